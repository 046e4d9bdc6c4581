//! Answers to health checks of Services (`healthCheckNodePort`).
//!
//! [`HealthAnswers`] owns what is answered at which port. How many backends a Service has here is decided by
//! [`ovl_subsystems::services::Announcements`]. Begin to read at [`HealthAnswers::update`].

use std::cell::RefCell;
use std::collections::BTreeMap;

use crate::ports::{Answer, Ports, listen_everywhere};

/// The answers of this host to health checks.
pub(crate) struct HealthAnswers {
    /// The thread that answers.
    thread: Ports,
    /// What is answered, by port.
    answered: RefCell<BTreeMap<u16, Answer>>,
}

impl HealthAnswers {
    /// Answers at no port yet.
    pub(crate) fn new(thread: Ports) -> Self {
        Self { thread, answered: RefCell::default() }
    }

    /// Answers at these ports from now on, and at no others. Returns a sentence for each port that another program has;
    /// it is tried again by the next call. `None` if nothing was to be done.
    pub(crate) fn update(&self, wanted: BTreeMap<u16, Answer>) -> Option<Vec<(String, String)>> {
        let mut before = self.answered.borrow_mut();
        if wanted == *before {
            return None;
        }
        let mut taken = Vec::new();
        let mut new = Vec::new();
        let mut answered = BTreeMap::new();
        for (port, answer) in wanted {
            if !before.contains_key(&port) {
                match listen_everywhere(port) {
                    Ok(listener) => new.push((port, listener)),
                    Err(why) => {
                        let sentence = format!(
                            "load balancers cannot ask this host about Service {}/{}: its healthCheckNodePort {port} {why}",
                            answer.namespace, answer.name
                        );
                        taken.push((port.to_string(), sentence));
                        continue;
                    }
                }
            }
            answered.insert(port, answer);
        }
        before.clone_from(&answered);
        self.thread.answer(answered, new);
        Some(taken)
    }
}
