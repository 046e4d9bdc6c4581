//! Questions to all members, such as for a diagnosis, and this host's answers to those of others.

use std::collections::HashMap;
use std::rc::Rc;
use std::time::Duration;

use ovl_control::PeerState;
use ovl_proto::id::NodeId;
use ovl_proto::sync::Message;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;

use super::Node;
use crate::asked::Asked;

/// The most requests of other hosts that wait for one answer.
const MOST_ASKING: usize = 64;
/// The largest answer of another host that is accepted, in bytes.
const MOST_BYTES: usize = 1 << 20;

/// Something that hosts ask of one another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Topic {
    /// A diagnosis.
    Diagnosis,
    /// A report.
    Report,
    /// Who talks to whom.
    Flows,
}

impl Topic {
    fn reply(self, id: u64, text: String) -> Message {
        match self {
            Self::Diagnosis => Message::DoctorReply { id, diagnosis: text },
            Self::Report => Message::ReportReply { id, report: text },
            Self::Flows => Message::FlowsReply { id, flows: text },
        }
    }

    fn request(self, id: u64) -> Message {
        match self {
            Self::Diagnosis => Message::DoctorRequest { id },
            Self::Report => Message::ReportRequest { id },
            Self::Flows => Message::FlowsRequest { id },
        }
    }
}

/// Questions that are waited for.
#[derive(Debug)]
pub(crate) struct Questions {
    /// Those to other hosts.
    asked: Asked<String>,
    /// Hosts that wait for an answer of this one, with the numbers of their requests.
    asking: HashMap<Topic, Vec<(NodeId, u64)>>,
}

impl Questions {
    /// None yet. For `last` see [`Asked::new`].
    pub(crate) fn new(last: u64) -> Self {
        Self { asked: Asked::new(last), asking: HashMap::new() }
    }
}

impl Node {
    /// Returns the members but this host, without those that have left.
    pub(super) fn askable_members(&self) -> Vec<NodeId> {
        let state = self.state.borrow();
        let has_left =
            |id: &NodeId| state.view.nodes.get(id).is_some_and(|node| node.state == PeerState::Left);
        state.other_members().filter(|member| !has_left(member)).collect()
    }

    /// Asks all members but this host: [`Self::ask`].
    pub(super) async fn ask_members<T: DeserializeOwned>(
        &self,
        topic: Topic,
        within: Duration,
    ) -> (Vec<(String, T)>, Vec<String>) {
        self.ask(self.askable_members(), topic, within).await
    }

    /// Asks hosts. Returns the answers by name, which is that in the record of who gave it, and the names of those that gave
    /// none. Those that are down do not answer.
    pub(super) async fn ask<T: DeserializeOwned>(
        &self,
        hosts: Vec<NodeId>,
        topic: Topic,
        within: Duration,
    ) -> (Vec<(String, T)>, Vec<String>) {
        let mut waiting = Vec::new();
        let mut ids = Vec::new();
        {
            let mut state = self.state.borrow_mut();
            for member in hosts {
                let (id, answer) = state.questions.asked.ask(member);
                if self.links().send(member, &topic.request(id)) {
                    ids.push(id);
                } else {
                    // An answer that cannot come ends the wait at once.
                    state.questions.asked.give_up(id);
                }
                waiting.push((state.view.name_of(member), answer));
            }
        }
        let end = Instant::now() + within;
        let (mut answers, mut unanswered) = (Vec::new(), Vec::new());
        for (name, answer) in waiting {
            let answer = tokio::time::timeout_at(end, answer).await;
            match answer.ok().and_then(Result::ok).map(|answer| serde_json::from_str(&answer)) {
                Some(Ok(answer)) => answers.push((name, answer)),
                Some(Err(error)) => {
                    tracing::warn!(host = name, %error, ?topic, "cannot read the answer of another host");
                    unanswered.push(name);
                }
                None => unanswered.push(name),
            }
        }
        let mut state = self.state.borrow_mut();
        ids.iter().for_each(|id| state.questions.asked.give_up(*id));
        answers.sort_by(|(a, _), (b, _)| a.cmp(b));
        (answers, unanswered)
    }

    /// Takes an answer from the host that was asked.
    pub(super) fn take_answer(&self, from: NodeId, id: u64, answer: String) {
        if answer.len() <= MOST_BYTES {
            self.state.borrow_mut().questions.asked.answer(id, from, answer);
        }
    }

    /// Answers another host. One answer on a topic at a time is made, and goes to all that ask meanwhile.
    pub(super) fn answer_member<T: Serialize>(
        self: &Rc<Self>,
        (to, id): (NodeId, u64),
        topic: Topic,
        answer: impl AsyncFnOnce(Rc<Self>) -> T + 'static,
    ) {
        let is_first = {
            let mut state = self.state.borrow_mut();
            let waiting = state.questions.asking.entry(topic).or_default();
            if waiting.len() < MOST_ASKING {
                waiting.push((to, id));
            }
            waiting.len() == 1
        };
        if !is_first {
            return;
        }
        let node = Rc::clone(self);
        tokio::task::spawn_local(async move {
            let answer = serde_json::to_string(&answer(Rc::clone(&node)).await);
            let waiting = node.state.borrow_mut().questions.asking.remove(&topic).unwrap_or_default();
            match answer {
                Ok(answer) => {
                    for (to, id) in waiting {
                        node.links().send(to, &topic.reply(id, answer.clone()));
                    }
                }
                Err(error) => tracing::error!(%error, ?topic, "cannot encode an answer to another host"),
            }
        });
    }
}
