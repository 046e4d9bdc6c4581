//! The clocks of this host and of the members: what they allow, and the problems that they are. [`crate::clocks`] decides.

use ovl_control::PeerState;
use ovl_proto::clock::{MAX_AHEAD_MS, Stamp, timestamp};
use ovl_proto::id::NodeId;

use super::state::State;
use super::{Failed, Node};
use crate::clocks::{Clocks, RefusedObject, Skew, in_words};
use crate::objects::WantedObject;
use crate::problems::Code;

impl Node {
    /// Returns the clocks of this host and of the live members. A host that is not a member knows no members yet, and listens
    /// to all live hosts.
    pub(super) fn clocks(&self, state: &State) -> Clocks {
        let told = self.gossip().clocks();
        let member = state.is_member();
        let others = told.into_iter().filter(|(id, _)| {
            let alive = state.view.nodes.get(id).is_some_and(|node| node.state == PeerState::Alive);
            alive && *id != state.view.me && (!member || state.view.alloc.members.contains(id))
        });
        Clocks::new(state.wall_ms(), others)
    }

    /// Checks that others accept what this host writes now.
    ///
    /// # Errors
    ///
    /// The clock of this host is so far ahead that most of the other hosts would refuse it.
    pub(super) fn check_clock(&self) -> Result<(), Failed> {
        let state = self.state.borrow();
        self.check_refusing(&state, &self.clocks(&state))
    }

    /// As [`Self::check_clock`], by these clocks.
    pub(super) fn check_refusing(&self, state: &State, clocks: &Clocks) -> Result<(), Failed> {
        let Some(refusing) = clocks.refusing() else { return Ok(()) };
        let by = in_words(refusing.by_ms);
        let hosts = state.names_of(&refusing.hosts);
        let which = if refusing.decided {
            "Set the clock of this host right (timedatectl, NTP)"
        } else {
            "Set the clock right (timedatectl, NTP) on the host where it is wrong"
        };
        Err(Failed::unavailable(format!(
            "nothing was changed: the clock of this host is {by} ahead of that of {hosts}, where a change with such a time \
             is refused. {which}, and try again"
        )))
    }

    /// Returns the stamp of the creation of an object.
    pub(super) fn stamp_creation(&self, state: &mut State) -> Stamp {
        let (clocks, me) = (self.clocks(state), state.view.me);
        state.objects.stamp(&clocks, None, me)
    }

    /// Notes that a peer refuses objects of this host, which cannot be stamped again because it is not known whose clock
    /// is right.
    pub(super) fn note_future(&self, state: &mut State, clocks: &Clocks, wanted: &[WantedObject]) {
        if clocks.is_agreed() {
            return;
        }
        let Some(refusing) = clocks.refusing() else { return };
        let limit = clocks.now().saturating_sub(refusing.by_ms).saturating_add(MAX_AHEAD_MS);
        let refused = state.objects.refused_by(wanted, Some(limit), usize::MAX);
        if let Some((key, _)) = refused.first() {
            let what = match refused.len() {
                1 => key.to_string(),
                count => format!("{key} and {} more", count.saturating_sub(1)),
            };
            let refused = RefusedObject { what, by_ms: refusing.by_ms, at: state.now() };
            state.refused_objects.note(state.view.me, refused);
        }
    }

    /// Raises and clears the problems of clocks.
    pub(super) fn judge_clocks(&self) {
        let mut guard = self.state.borrow_mut();
        let state = &mut *guard;
        let clocks = self.clocks(state);
        state.problems.set(Code::OwnClock, "", own_sentence(state, &clocks));
        let wrong: Vec<(String, String)> = clocks
            .wrong_hosts()
            .into_iter()
            .map(|(node, skew)| {
                let name = state.view.name_of(node);
                let sentence = peer_sentence(&name, skew, clocks.is_agreed());
                (name, sentence)
            })
            .collect();
        state.problems.replace(Code::PeerClock, wrong);
        let (now, ours, me) = (state.now(), state.objects.digest(), state.view.me);
        let peers = &state.peers;
        let in_step = |id: &NodeId| peers.get(*id).is_some_and(|peer| peer.hints().objects == ours);
        let view = &state.view;
        let refused = state.refused_objects.current(now, in_step).map(|(from, refused)| {
            let RefusedObject { what, by_ms, .. } = refused;
            let by = in_words(*by_ms);
            if from == me {
                let sentence = format!(
                    "other hosts refuse {what}, stamped {by} in the future by their clocks. Set the clock right on the \
                     host where it is wrong; this host then stamps it again"
                );
                return (String::new(), sentence);
            }
            let name = view.name_of(from);
            let sentence = format!(
                "{what} of {name} is refused and unknown here: it is stamped {by} in the future. Set the clock right on the \
                 host where it is wrong; {name} then stamps it again"
            );
            (name, sentence)
        });
        let refused: Vec<(String, String)> = refused.collect();
        state.problems.replace(Code::FutureStamp, refused);
    }
}

/// Keeps the times for which hosts have been silent when the wall clock was set: a host that is down for a minute is not
/// forgotten because the clock went on by a year.
pub(super) fn note_step(state: &mut State) {
    let (wall_ms, now) = (state.wall_ms(), state.now());
    let Some(expected) = state.wall.step(wall_ms, now) else { return };
    tracing::warn!(from = timestamp(expected), to = timestamp(wall_ms), "the clock of this host was set");
    state.peers.shift(expected, wall_ms);
}

fn own_sentence(state: &State, clocks: &Clocks) -> Option<String> {
    if !clocks.is_set() {
        return Some(format!(
            "the clock of this host was never set: it says {}. Set it (timedatectl, NTP)",
            timestamp(state.wall_ms() / 86_400_000 * 86_400_000)
        ));
    }
    let Skew { by_ms, ahead } = clocks.own_skew()?;
    let hosts = state.names_of(&clocks.agreeing());
    let effect =
        if ahead { ". Networks and Kubernetes objects cannot be changed here until it is right" } else { "" };
    Some(format!(
        "the clock of this host is {} {} that of {hosts}. Set it right (timedatectl, NTP){effect}",
        in_words(by_ms),
        if ahead { "ahead of" } else { "behind" }
    ))
}

fn peer_sentence(name: &str, Skew { by_ms, ahead }: Skew, agreed: bool) -> String {
    let side = if ahead { "ahead of" } else { "behind" };
    let by = in_words(by_ms);
    if agreed {
        let effect = if ahead {
            ". Its networks and Kubernetes objects cannot be changed there until it is right"
        } else {
            ""
        };
        format!(
            "the clock of {name} is {by} {side} that of most hosts. Set it right there (timedatectl, NTP){effect}"
        )
    } else {
        format!(
            "the clock of {name} is {by} {side} that of this host, and no majority says which is right. Set it right on the \
             host where it is wrong (timedatectl, NTP). Until then, what is changed on the host that is ahead is refused"
        )
    }
}
