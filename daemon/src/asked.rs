//! Questions that other hosts were asked, and that wait for their answers.

use std::collections::HashMap;

use ovl_proto::id::NodeId;
use tokio::sync::oneshot;

/// Questions of one kind, each with the host that was asked.
#[derive(Debug)]
pub(crate) struct Asked<T> {
    last: u64,
    waiting: HashMap<u64, (NodeId, oneshot::Sender<T>)>,
}

impl<T> Asked<T> {
    /// Without questions. Their numbers begin after `last`, which is random: an answer to an earlier run of this daemon is
    /// then taken for none of this one.
    pub(crate) fn new(last: u64) -> Self {
        Self { last, waiting: HashMap::new() }
    }

    /// Notes a question, and returns its number and where its answer arrives. The wait ends when [`Self::give_up`] is called.
    pub(crate) fn ask(&mut self, host: NodeId) -> (u64, oneshot::Receiver<T>) {
        let (tell, answer) = oneshot::channel();
        self.last = self.last.wrapping_add(1);
        self.waiting.insert(self.last, (host, tell));
        (self.last, answer)
    }

    /// Whether this host was asked, and its answer is waited for.
    pub(crate) fn waits_for(&self, id: u64, host: NodeId) -> bool {
        self.waiting.get(&id).is_some_and(|(asked, _)| *asked == host)
    }

    /// Takes an answer. That of a host that was not asked is passed over.
    pub(crate) fn answer(&mut self, id: u64, from: NodeId, answer: T) {
        if self.waits_for(id, from)
            && let Some((_, tell)) = self.waiting.remove(&id)
        {
            // The requester may have given up.
            tell.send(answer).ok();
        }
    }

    /// Forgets a question, answered or not.
    pub(crate) fn give_up(&mut self, id: u64) {
        self.waiting.remove(&id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOST: NodeId = NodeId([1; 10]);
    const OTHER: NodeId = NodeId([2; 10]);

    #[test]
    fn only_the_host_that_was_asked_answers_and_only_once() {
        let mut asked = Asked::new(u64::MAX);
        let (first, mut to_first) = asked.ask(HOST);
        let (second, mut to_second) = asked.ask(HOST);
        assert_ne!(first, second);
        asked.answer(first, OTHER, "of another");
        assert!(asked.waits_for(first, HOST) && !asked.waits_for(first, OTHER));
        asked.answer(first, HOST, "its own");
        asked.answer(first, HOST, "again");
        assert_eq!(to_first.try_recv(), Ok("its own"));
        asked.give_up(second);
        assert_eq!(to_second.try_recv(), Err(oneshot::error::TryRecvError::Closed));
    }
}
