//! A lock for each container, so that its calls run one at a time, in the order of their arrival. A `DEL` that
//! arrives during an `ADD` waits, and then deletes what the `ADD` created.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::{Mutex, OwnedMutexGuard};

/// Containers with a call in flight.
#[derive(Debug, Default)]
pub(in crate::node) struct Containers(RefCell<BTreeMap<String, Arc<Mutex<()>>>>);

/// The lock of a container, held until this is dropped.
#[derive(Debug)]
pub(in crate::node) struct Alone<'a> {
    all: &'a Containers,
    container: String,
    /// `None` only during `drop`.
    guard: Option<OwnedMutexGuard<()>>,
}

impl Containers {
    /// Locks a container. Returns once all earlier calls for it have ended.
    pub(in crate::node) async fn alone(&self, container: &str) -> Alone<'_> {
        let mutex = Arc::clone(self.0.borrow_mut().entry(container.to_owned()).or_default());
        let guard = Some(mutex.lock_owned().await);
        Alone { all: self, container: container.to_owned(), guard }
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        drop(self.guard.take());
        let mut all = self.all.0.borrow_mut();
        // Waiting calls have a reference too.
        if all.get(&self.container).is_some_and(|mutex| Arc::strong_count(mutex) == 1) {
            all.remove(&self.container);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use tokio::task::{LocalSet, spawn_local, yield_now};

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn calls_for_one_container_come_one_after_the_other_and_leave_nothing() {
        LocalSet::new()
            .run_until(async {
                let containers = Rc::new(Containers::default());
                let told = Rc::new(RefCell::new(Vec::new()));
                let tasks: Vec<_> = [("a", 1), ("a", 2), ("b", 3), ("a", 4)]
                    .into_iter()
                    .map(|(container, number)| {
                        let (containers, told) = (Rc::clone(&containers), Rc::clone(&told));
                        spawn_local(async move {
                            let _alone = containers.alone(container).await;
                            told.borrow_mut().push((container, number, "begins"));
                            yield_now().await;
                            told.borrow_mut().push((container, number, "ends"));
                        })
                    })
                    .collect();
                for task in tasks {
                    task.await.unwrap();
                }
                let of_a: Vec<_> = told
                    .borrow()
                    .iter()
                    .filter(|(container, ..)| *container == "a")
                    .map(|(_, n, what)| (*n, *what))
                    .collect();
                let expected = [1, 2, 4].into_iter().flat_map(|n| [(n, "begins"), (n, "ends")]);
                assert_eq!(of_a, expected.collect::<Vec<_>>());
                // The call for the other container did not wait.
                assert_eq!(told.borrow().get(1), Some(&("b", 3, "begins")));
                assert!(containers.0.borrow().is_empty());
            })
            .await;
    }
}
