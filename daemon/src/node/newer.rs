//! Takes what later releases wrote and this one does not understand: `crate::newer` keeps it.

use ovl_proto::id::NodeId;
use ovl_proto::record::{NodeRecord, RecordHead, SignedRecord, WireVersions};

use super::Node;
use super::state::State;
use crate::newer::UnreadRecord;
use crate::problems::Code;

impl Node {
    /// Stores the record of a host that this release does not understand.
    pub(super) fn take_unread_record(&self, head: RecordHead, signed: SignedRecord, why: String) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let known = state.view.nodes.get(&head.id).map(|node| node.record.order());
        if head.id == state.view.me || known >= Some((head.generation, head.revision)) {
            return;
        }
        note_versions(state, head.id, &head.name, (&head.version, head.wire));
        let since_ms = state.wall_ms();
        if state.newer.take_record(UnreadRecord { head, signed, why, since_ms }) {
            state.save.want();
            self.saver.notify_one();
            note_newer(state);
        }
    }

    /// Counts a message that this release does not understand.
    pub(super) fn ignore_message(&self, from: NodeId, what: String) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        if !state.view.nodes.contains_key(&from) {
            return;
        }
        let new = state.newer.take_message(from, what);
        tracing::debug!(%from, count = state.newer.ignored(from), "ignored a message of a later release");
        if new {
            note_newer(state);
        }
    }
}

/// Notes a record that is understood: what was said of an earlier one is over. `old` is the one before it.
pub(super) fn note_record(state: &mut State, record: &NodeRecord, old: Option<&NodeRecord>) {
    note_versions(state, record.id, &record.name, (&record.version, record.wire));
    let upgraded = old.is_none_or(|old| old.version != record.version || old.generation != record.generation);
    state.newer.forget(record.id, upgraded);
    note_newer(state);
}

/// Forgets a host.
pub(super) fn drop_host(state: &mut State, host: NodeId) {
    state.newer.forget(host, true);
    state.problems.set(Code::WireVersion, host.to_string(), None);
    note_newer(state);
}

/// Reports everything that is not understood.
pub(super) fn note_newer(state: &mut State) {
    let sentences = state.newer.sentences(&state.view, &state.objects);
    state.problems.replace(Code::NotUnderstood, sentences);
}

/// Reports a host with which this one has no wire version in common.
fn note_versions(state: &mut State, host: NodeId, name: &str, (release, wire): (&str, WireVersions)) {
    let own = WireVersions::own();
    let sentence = (!own.overlap(wire)).then(|| {
        let older = if wire.newest < own.oldest { name } else { "this host" };
        format!(
            "host {name} runs ovld {release}, which speaks wire version {wire}, and this host speaks {own}: they cannot \
             understand each other. Upgrade ovld on {older}"
        )
    });
    state.problems.set(Code::WireVersion, host.to_string(), sentence);
}
