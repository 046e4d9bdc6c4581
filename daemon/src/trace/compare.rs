//! Holds the model of a packet's way against what was seen of the probe: the verdict, the reason and the advice.
//!
//! The module owns no state. Begin to read at [`compare`].

use std::net::IpAddr;

use ovl_control::{Trace, TraceHop, TraceSeen, TraceStage as Stage, TraceState, TraceVerdict};
use ovl_dataplane::passage::{FilterDrop, IcmpError, PacketKind, Passage, ProbeKind, Sighting};

use super::step::Step;

/// What is known at one end.
#[derive(Debug, Clone, Default)]
pub(crate) struct End {
    /// The host's name.
    pub host: String,
    /// Its steps.
    pub steps: Vec<Step>,
    /// What was seen. `None` if nothing was watched there.
    pub passage: Option<Passage>,
}

/// All that is known of a packet's way.
#[derive(Debug, Clone, Default)]
pub(crate) struct Known {
    /// The sender, for people.
    pub from: String,
    /// The destination, for people.
    pub to: String,
    /// The address to which the probe is sent.
    pub to_address: Option<IpAddr>,
    /// The end of the sender.
    pub source: End,
    /// The end of the destination. `None`: outside of the cluster, or the packet does not get there.
    pub destination: Option<End>,
    /// Whether the sender is a workload, and not a host.
    pub from_workload: bool,
    /// Whether the destination is a workload.
    pub to_workload: bool,
    /// Whether the destination of the probe is known to the model. If not, the model has nothing to say about it.
    pub is_outside: bool,
    /// The other ways that the packet may have gone: which of them end, and how many there are.
    pub others: Others,
    /// The address to which the probe is sent on, if that is another one than it is sent to.
    pub backend: Option<IpAddr>,
    /// Why the probe could not be sent.
    pub send_error: Option<String>,
    /// Whether a probe was to be sent.
    pub is_probed: bool,
    /// Why an answer may not come back, though the packet arrives.
    pub answer: Option<Step>,
    /// Which packets are lost on the way that are larger than the probe.
    pub limited: Option<String>,
    /// What could not be looked at.
    pub notes: Vec<String>,
}

/// The other backends of a Service.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Others {
    /// How many there are.
    pub all: usize,
    /// How many of them the packet does not reach.
    pub ending: usize,
}

/// Returns the whole trace of a probe.
pub(crate) fn compare(known: Known, kind: ProbeKind) -> Trace {
    let protocol = match kind {
        ProbeKind::Echo => "icmp".to_owned(),
        ProbeKind::Tcp(port) => format!("tcp/{port}"),
        ProbeKind::Udp(port) => format!("udp/{port}"),
    };
    let first_stop = known.steps().find(|(_, step)| step.state == TraceState::Stops);
    let model = model(&known, first_stop);
    let judged = known.is_probed.then(|| Judge { known: &known, kind }.judge());
    let arrived = match &judged {
        Some(judged) => judged.arrives.unwrap_or(model.arrives != Some(false)),
        None => model.arrives != Some(false),
    };
    let agree = match (&judged, model.arrives) {
        (Some(judged), Some(says)) => judged.arrives.is_none_or(|showed| showed == says),
        _ => true,
    };
    // A filter of another program is what the model does not know, so the probe says more.
    let cause = if known.is_probed { known.stop_not_passed() } else { first_stop.map(|(_, step)| step) };
    let (reason, advice) = match (arrived, &judged, cause) {
        (true, _, _) => (None, None),
        (false, Some(judged), Some(step)) if !judged.is_foreign => {
            (Some(step.detail.clone()), Some(step.advice.clone()))
        }
        (false, Some(judged), _) => (Some(judged.why.clone()), judged.advice.clone()),
        (false, None, Some(step)) => (Some(step.detail.clone()), Some(step.advice.clone())),
        (false, None, None) => (Some(model.why.clone()), None),
    };
    let hops = known.hops(kind);
    let mut notes = known.notes.clone();
    let passages = [Some(&known.source), known.destination.as_ref()].into_iter().flatten();
    for end in passages {
        let said = end.passage.iter().flat_map(|passage| &passage.notes);
        notes.extend(said.map(|note| format!("{}: {note}", end.host)));
    }
    Trace {
        from: known.from.clone(),
        to: known.to.clone(),
        protocol,
        arrived,
        reason,
        advice: advice.filter(|advice| !advice.is_empty()),
        // What keeps the packet itself from arriving comes first.
        limited: known.limited.clone().filter(|_| arrived),
        model,
        probe: judged.map(|judged| TraceVerdict { arrives: judged.arrives, why: judged.why }),
        agree,
        backend: known.backend,
        hops,
        notes,
    }
}

fn model(known: &Known, first_stop: Option<(&str, &Step)>) -> TraceVerdict {
    let verdict = |arrives, why: String| TraceVerdict { arrives, why };
    if let Some((host, step)) = first_stop {
        return verdict(Some(false), format!("ends on {host}: {}", step.detail));
    }
    if known.is_outside {
        return verdict(None, "leaves the cluster".to_owned());
    }
    if known.destination.is_none() {
        return verdict(None, "what happens at the destination is not known".to_owned());
    }
    if let Some((host, step)) = known.steps().find(|(_, step)| step.state == TraceState::Unknown) {
        return verdict(None, format!("not known on {host}: {}", step.detail));
    }
    let Others { all, ending } = known.others;
    if ending > 0 && !known.is_probed {
        return verdict(None, format!("depends on the backend: {ending} of {all} are not reached"));
    }
    verdict(Some(true), "passes every hop".to_owned())
}

impl Known {
    /// The steps of both ends, each with its host.
    fn steps(&self) -> impl Iterator<Item = (&str, &Step)> {
        let ends = [Some(&self.source), self.destination.as_ref()].into_iter().flatten();
        let all = ends.flat_map(|end| end.steps.iter().map(move |step| (&*end.host, step)));
        all.chain(self.answer.iter().map(|step| (&*self.source.host, step)))
    }

    /// The first step that stops the packet by the model, and that the probe was not seen behind: a path that is found broken
    /// may have been repaired a moment ago.
    fn stop_not_passed(&self) -> Option<&Step> {
        let ends = [Some(&self.source), self.destination.as_ref()].into_iter().flatten();
        let steps = ends.flat_map(|end| {
            end.steps.iter().map(|step| {
                let spot = end.passage.as_ref().zip(step.spot.as_ref());
                (step, spot.is_some_and(|(passage, spot)| spot.first(passage).is_some()))
            })
        });
        let mut all: Vec<(&Step, bool)> = steps.collect();
        all.extend(self.answer.iter().map(|step| (step, false)));
        let last = all.iter().rposition(|(_, seen)| *seen).unwrap_or_default();
        let mut behind = all.into_iter().skip(last).map(|(step, _)| step);
        behind.find(|step| step.state == TraceState::Stops)
    }

    fn source_seen(&self) -> &[Sighting] {
        self.source.passage.as_ref().map_or(&[], |passage| &passage.sightings)
    }

    fn destination_seen(&self) -> &[Sighting] {
        let passage = self.destination.as_ref().and_then(|end| end.passage.as_ref());
        passage.map_or(&[], |passage| &passage.sightings)
    }

    /// Whether the probe was watched at its destination.
    fn is_watched_there(&self) -> bool {
        self.destination.as_ref().is_some_and(|end| end.passage.is_some())
    }

    fn hops(&self, kind: ProbeKind) -> Vec<TraceHop> {
        let ends = [Some(&self.source), self.destination.as_ref()].into_iter().flatten();
        let mut hops: Vec<TraceHop> = ends
            .flat_map(|end| {
                let began =
                    end.passage.as_ref().and_then(|passage| passage.sightings.first()).map(|seen| seen.at_us);
                end.steps.iter().map(move |step| TraceHop {
                    host: end.host.clone(),
                    stage: step.stage,
                    model: step.state,
                    probe: end.passage.as_ref().zip(step.spot.as_ref()).map(|(passage, spot)| {
                        let first = spot.first(passage);
                        let after_us = first.zip(began).map(|(at, began)| at.saturating_sub(began));
                        TraceSeen { seen: first.is_some(), after_us }
                    }),
                    detail: step.detail.clone(),
                    command: step.command.clone(),
                })
            })
            .collect();
        // Most programs do not answer a datagram that they do not understand.
        let is_answered = !matches!(kind, ProbeKind::Udp(_)) || self.answered().is_some();
        hops.extend(self.answer_hop().filter(|_| is_answered));
        hops
    }

    /// The hop of the answer, at the sender.
    fn answer_hop(&self) -> Option<TraceHop> {
        let passage = self.source.passage.as_ref()?;
        let began = passage.sightings.first().map(|seen| seen.at_us);
        let answer = self.answered();
        let last = self.destination.as_ref().map_or(&self.source.host, |end| &end.host);
        let detail = match (answer.map(|seen| seen.kind), &self.answer) {
            (Some(PacketKind::Answer), _) => format!("answered by {last}"),
            (Some(PacketKind::Reset), _) => "refused: a TCP reset came back".to_owned(),
            (Some(PacketKind::Error(error)), _) => format!("an ICMP error came back: {}", name(error)),
            (Some(PacketKind::Probe) | None, Some(step)) => step.detail.clone(),
            (Some(PacketKind::Probe) | None, None) => "no answer came back".to_owned(),
        };
        let model = self.answer.as_ref().map_or(TraceState::Passes, |step| step.state);
        Some(TraceHop {
            host: self.source.host.clone(),
            stage: Stage::Answer,
            model,
            probe: Some(TraceSeen {
                seen: answer.is_some_and(|seen| seen.kind == PacketKind::Answer),
                after_us: answer
                    .map(|seen| seen.at_us)
                    .zip(began)
                    .map(|(at, began)| at.saturating_sub(began)),
            }),
            detail,
            command: self.to_address.map_or_else(String::new, |to| format!("ip route get {to}")),
        })
    }

    /// The first answer, reset or error that the sender received.
    fn answered(&self) -> Option<&Sighting> {
        self.source_seen().iter().find(|seen| {
            seen.kind != PacketKind::Probe && !seen.outgoing && seen.inside == self.from_workload
        })
    }
}

/// The verdict of the probe.
#[derive(Debug)]
struct Judged {
    arrives: Option<bool>,
    why: String,
    advice: Option<String>,
    /// Whether the model cannot know the cause.
    is_foreign: bool,
}

/// Judges what was seen.
struct Judge<'a> {
    known: &'a Known,
    kind: ProbeKind,
}

impl Judge<'_> {
    fn judge(&self) -> Judged {
        let no = |why: String, advice: &str| Judged {
            arrives: Some(false),
            why,
            advice: Some(advice.to_owned()),
            is_foreign: false,
        };
        let known = self.known;
        if let Some(error) = &known.send_error {
            return no(
                format!("the probe was not sent: {error}"),
                "look at the interface, the routes and the packet filter in the namespace: ovlctl exec NAME -- ip route",
            );
        }
        match known.answered().map(|seen| (seen.kind, seen.source)) {
            Some((PacketKind::Answer, _)) => {
                let after = known.answered().zip(known.source_seen().first());
                let after = after.map_or(0, |(answer, first)| answer.at_us.saturating_sub(first.at_us));
                return Judged {
                    arrives: Some(true),
                    why: format!("answered after {}.{:03} ms", after / 1000, after % 1000),
                    advice: None,
                    is_foreign: false,
                };
            }
            Some((PacketKind::Reset, from)) => return self.refused("a TCP reset", from),
            Some((PacketKind::Error(error), from)) => return self.error(error, from),
            Some((PacketKind::Probe, _)) | None => {}
        }
        let received = known
            .destination_seen()
            .iter()
            .any(|seen| seen.kind == PacketKind::Probe && !seen.outgoing && seen.inside == known.to_workload);
        // A Service may have sent one probe to a backend where it was dropped, and the next one to this workload.
        let is_elsewhere = received && known.to_workload && known.others.all > 1;
        if let Some(judged) = self.dropped(false).filter(|_| !is_elsewhere) {
            return judged;
        }
        match self.kind {
            // Most programs do not answer a datagram that they do not understand.
            ProbeKind::Udp(_) if received => {
                let why = "received, and not refused".to_owned();
                Judged { arrives: Some(true), why, advice: None, is_foreign: false }
            }
            ProbeKind::Udp(_) if !known.is_watched_there() && self.left() => {
                let why = match known.is_outside {
                    true => "sent to the underlay; a datagram need not be answered",
                    false => {
                        "sent to the underlay; the host of the destination does not say whether it arrived"
                    }
                };
                Judged { arrives: None, why: why.to_owned(), advice: None, is_foreign: false }
            }
            ProbeKind::Udp(_) | ProbeKind::Echo | ProbeKind::Tcp(_) if received => self.unanswered(),
            ProbeKind::Udp(_) | ProbeKind::Echo | ProbeKind::Tcp(_) => self.lost(),
        }
    }

    /// Whether the probe left the host of its sender.
    fn left(&self) -> bool {
        let leaves = |step: &&Step| step.stage == Stage::Leaves;
        let spots = self.known.source.steps.iter().filter(leaves).filter_map(|step| step.spot.as_ref());
        let passage = self.known.source.passage.as_ref();
        spots.into_iter().any(|spot| passage.is_some_and(|passage| spot.first(passage).is_some()))
    }

    /// A packet filter rejected the packet, or nothing listens.
    fn refused(&self, how: &str, from: IpAddr) -> Judged {
        // A rule that rejects sends the same as a host on which nothing listens.
        if let Some(judged) = self.dropped(false) {
            return judged;
        }
        let known = self.known;
        let by_workload = known
            .destination_seen()
            .iter()
            .any(|seen| seen.inside == known.to_workload && seen.outgoing && seen.kind != PacketKind::Probe);
        let (why, advice) = match by_workload {
            true => (
                format!("{how} came from {from}: no program listens at the port"),
                "start the program, or let it listen at this address and port",
            ),
            false if known.is_outside => (
                format!(
                    "{how} came from {from}: no program listens at the port, or a packet filter there refuses it"
                ),
                "look at that machine, which is outside of the cluster",
            ),
            false => (
                format!(
                    "{how} came back, and not from the destination: a packet filter or a Service refuses it"
                ),
                "look for a rule that rejects: nft list ruleset, iptables-save",
            ),
        };
        Judged { arrives: Some(false), why, advice: Some(advice.to_owned()), is_foreign: !by_workload }
    }

    fn error(&self, error: IcmpError, from: IpAddr) -> Judged {
        if let Some(judged) = self.dropped(false) {
            return judged;
        }
        let advice = match error {
            IcmpError::PortUnreachable => return self.refused("an ICMP error (port unreachable)", from),
            IcmpError::Prohibited => "look for a rule that rejects: nft list ruleset, iptables-save",
            IcmpError::TooBig(_) => "give the network a smaller MTU: ovlctl network update NAME --mtu BYTES",
            IcmpError::Expired => "there is a routing loop: ip route get ADDRESS on each host",
            IcmpError::Unreachable => "look at the routes and the neighbours: ip route get ADDRESS, ip neigh",
        };
        Judged {
            arrives: Some(false),
            why: format!("{from} answered with an ICMP error: {}", name(error)),
            advice: Some(advice.to_owned()),
            is_foreign: false,
        }
    }

    /// Whether a dropped packet is an answer, which may be in VXLAN from the host of the destination.
    fn is_answer(&self, drop: &FilterDrop) -> bool {
        let known = self.known;
        let has = |answer: bool| {
            known.source_seen().iter().chain(known.destination_seen()).any(|seen| {
                (seen.kind == PacketKind::Probe) != answer
                    && seen.outer.is_some()
                    && seen.outer.map(|(from, _)| from) == drop.source
            })
        };
        drop.is_answer || (has(true) && !has(false))
    }

    /// A rule of a packet filter dropped the probe or, with `answers`, its answer.
    fn dropped(&self, answers: bool) -> Option<Judged> {
        let known = self.known;
        let ends = [Some(&known.source), known.destination.as_ref()].into_iter().flatten();
        let mut all: Vec<(&str, &FilterDrop)> = ends
            .flat_map(|end| end.passage.iter().map(move |passage| (end, passage)))
            .flat_map(|(end, passage)| passage.drops.iter().map(move |drop| (&*end.host, drop)))
            .filter(|(_, drop)| self.is_answer(drop) == answers)
            .collect();
        // Another program's rule is what the operator does not expect.
        all.sort_by_key(|(_, drop)| drop.table.starts_with("ovl"));
        let (host, drop) = all.first()?;
        let FilterDrop { family, table, chain, .. } = drop;
        let what = if answers { "its answer is" } else { "it is" };
        let by = drop.by();
        let is_foreign = !table.starts_with("ovl");
        let advice = match is_foreign {
            true => format!(
                "change that rule on {host}, or accept the packet before it: nft -a list chain {family} {table} {chain}"
            ),
            false => format!(
                "it is a table of ovl: `nft list table {family} {table}` on {host}, and `ovlctl status`"
            ),
        };
        Some(Judged {
            arrives: Some(false),
            why: format!("{what} dropped on {host} by {by}"),
            advice: Some(advice),
            is_foreign,
        })
    }

    /// The destination received the probe and nothing came back.
    fn unanswered(&self) -> Judged {
        let known = self.known;
        if let Some(judged) = self.dropped(true) {
            return judged;
        }
        let is_answer = |seen: &&Sighting| seen.kind == PacketKind::Answer;
        let host = known.destination.as_ref().map_or("", |end| &*end.host);
        let last = known.source_seen().iter().rfind(is_answer).map(|seen| (&*known.source.host, seen));
        let last = last.or_else(|| known.destination_seen().iter().rfind(is_answer).map(|seen| (host, seen)));
        let (why, advice) = match last {
            None => (
                format!("it reached the destination on {host}, which did not answer"),
                "look at a packet filter in the namespace, and at the program",
            ),
            Some((on, seen)) => (
                format!("it was answered, and the answer was last seen on {on} at {}", seen.device),
                "the answer takes another way: look at the routes of the destination's host, and at rp_filter",
            ),
        };
        let why = format!("{why}{}", self.reasons());
        Judged { arrives: Some(false), why, advice: Some(advice.to_owned()), is_foreign: false }
    }

    /// The probe did not reach its destination, and no rule is known that dropped it.
    fn lost(&self) -> Judged {
        let known = self.known;
        let ends = [Some(&known.source), known.destination.as_ref()].into_iter().flatten();
        let mut last: Option<(&str, &Step)> = None;
        let mut next: Option<(&str, &Step)> = None;
        for end in ends {
            let Some(passage) = &end.passage else { continue };
            for step in &end.steps {
                let Some(spot) = &step.spot else { continue };
                match spot.first(passage) {
                    Some(_) => (last, next) = (Some((&*end.host, step)), None),
                    None => next = next.or(Some((&*end.host, step))),
                }
            }
        }
        let at = last.map_or_else(String::new, |(host, step)| {
            format!("last seen on {host} ({}), ", stage(step.stage))
        });
        let (why, advice) = match next.map(|(host, step)| (host, step.stage)) {
            Some((host, Stage::Sender)) => (
                format!("it did not leave the namespace on {host}"),
                "look at the interface and the routes in it: ovlctl exec NAME -- ip route".to_owned(),
            ),
            Some((host, Stage::Enters)) => (
                format!(
                    "it did not reach {host}: the underlay, a cloud's firewall or a filter before nftables drops it"
                ),
                "open the UDP ports of VXLAN (4789) and of the tunnel (51940) between the hosts".to_owned(),
            ),
            Some((host, stage_of)) => (
                format!("it was not seen on {host} ({})", stage(stage_of)),
                format!(
                    "look at what is between the two on {host}: tc filter show, ip -s link, iptables-save"
                ),
            ),
            None if known.is_outside => (
                "it left the host, and nothing came back".to_owned(),
                "look at the network outside of the cluster, and whether it has a route back".to_owned(),
            ),
            None => (
                "nothing came back".to_owned(),
                "look at `ovlctl peers` and `ovlctl status` on the other host".to_owned(),
            ),
        };
        let why = format!("{at}{why}{}", self.reasons());
        Judged { arrives: Some(false), why, advice: Some(advice), is_foreign: false }
    }

    /// Why the kernels of both hosts dropped the probe or an answer.
    fn reasons(&self) -> String {
        let known = self.known;
        let ends = [Some(&known.source), known.destination.as_ref()].into_iter().flatten();
        let said = ends.flat_map(|end| {
            let reasons = end.passage.iter().flat_map(|passage| &passage.reasons);
            reasons.map(move |reason| format!("; the kernel of {} dropped {reason}", end.host))
        });
        said.collect()
    }
}

fn name(error: IcmpError) -> String {
    match error {
        IcmpError::PortUnreachable => "port unreachable".to_owned(),
        IcmpError::Prohibited => "prohibited by a packet filter".to_owned(),
        IcmpError::TooBig(0) => "packet too big".to_owned(),
        IcmpError::TooBig(mtu) => format!("packet too big for an MTU of {mtu}"),
        IcmpError::Expired => "time to live exceeded".to_owned(),
        IcmpError::Unreachable => "unreachable".to_owned(),
    }
}

/// The name of a stage in a sentence.
fn stage(stage: Stage) -> &'static str {
    match stage {
        Stage::Sender => "interface of the sender",
        Stage::Name => "name",
        Stage::SourceCheck => "host's side of the veth pair",
        Stage::Service => "Service",
        Stage::EgressPolicy => "egress policy",
        Stage::Isolation => "isolation of networks",
        Stage::Route => "route",
        Stage::Neighbour => "neighbour",
        Stage::Fdb => "VXLAN device",
        Stage::Leaves => "device of the underlay",
        Stage::Host => "host",
        Stage::Enters => "device of the underlay",
        Stage::Decapsulated => "VXLAN device",
        Stage::PublishedPort => "published port",
        Stage::IngressPolicy => "ingress policy",
        Stage::Delivery => "host's side of the veth pair",
        Stage::Destination => "destination",
        Stage::Answer => "answer",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::step::Spot;

    fn seen(at_us: u64, inside: bool, device: &str, outgoing: bool, kind: PacketKind) -> Sighting {
        let (source, destination) = ([10, 1, 0, 1].into(), [10, 1, 0, 9].into());
        Sighting {
            at_us,
            inside,
            device: device.to_owned(),
            outgoing,
            source,
            destination,
            kind,
            outer: None,
        }
    }

    /// Two hosts, of which both saw the probe at all hops, and the answer came back.
    fn known() -> Known {
        let probe = PacketKind::Probe;
        let end = |host: &str, steps: Vec<Step>, sightings: Vec<Sighting>| End {
            host: host.to_owned(),
            steps,
            passage: Some(Passage { sightings, ..Passage::default() }),
        };
        let source = vec![
            Step::passes(Stage::Sender, "eth0", "ip").at(Spot::Inside(true)),
            Step::passes(Stage::Leaves, "underlay", "ip")
                .at(Spot::Underlay { outgoing: true, in_vxlan: false }),
        ];
        let destination = vec![
            Step::passes(Stage::Enters, "underlay", "ip")
                .at(Spot::Underlay { outgoing: false, in_vxlan: false }),
            Step::passes(Stage::Destination, "eth0", "ip").at(Spot::Inside(false)),
        ];
        Known {
            source: end(
                "h1",
                source,
                vec![
                    seen(5, true, "eth0", true, probe),
                    seen(9, false, "u0", true, probe),
                    seen(80, true, "eth0", false, PacketKind::Answer),
                ],
            ),
            destination: Some(end(
                "h2",
                destination,
                vec![seen(7, false, "u0", false, probe), seen(8, true, "eth0", false, probe)],
            )),
            from_workload: true,
            to_workload: true,
            is_probed: true,
            ..Known::default()
        }
    }

    fn drop_by(table: &str, rule: Option<&str>) -> FilterDrop {
        FilterDrop {
            at_us: 9,
            family: "inet".to_owned(),
            table: table.to_owned(),
            chain: "c".to_owned(),
            rule: rule.map(str::to_owned),
            source: None,
            is_answer: false,
        }
    }

    fn unanswered(mut known: Known) -> Known {
        if let Some(passage) = &mut known.source.passage {
            passage.sightings.retain(|seen| seen.kind == PacketKind::Probe);
        }
        known
    }

    #[test]
    fn answered_probe_arrived() {
        let trace = compare(known(), ProbeKind::Echo);
        assert!(trace.arrived && trace.agree && trace.reason.is_none());
        assert_eq!(trace.model.arrives, Some(true));
        assert_eq!(trace.probe.unwrap().why, "answered after 0.075 ms");
        let after: Vec<Option<u64>> = trace.hops.iter().map(|hop| hop.probe.unwrap().after_us).collect();
        assert_eq!(after, [Some(0), Some(4), Some(0), Some(1), Some(75)]);
    }

    #[test]
    fn lost_probe_was_last_seen_somewhere() {
        let mut lost = unanswered(known());
        if let Some(end) = &mut lost.destination {
            end.passage = Some(Passage::default());
        }
        let trace = compare(lost, ProbeKind::Tcp(80));
        assert!(!trace.arrived && !trace.agree);
        assert!(
            trace
                .reason
                .unwrap()
                .starts_with("last seen on h1 (device of the underlay), it did not reach h2")
        );
    }

    #[test]
    fn what_the_probe_has_passed_is_not_the_cause() {
        let mut lost = unanswered(known());
        lost.source.steps.push(Step::stops(
            Stage::Host,
            "path probes are lost",
            "ovlctl peers",
            "open a port",
        ));
        let mut seen_elsewhere = lost.clone();
        let end = lost.destination.as_mut().unwrap();
        end.passage.as_mut().unwrap().sightings.retain(|seen| !seen.inside);
        end.steps.push(Step::stops(Stage::Destination, "eth0 is down", "ip", "set it up"));
        assert_eq!(compare(lost, ProbeKind::Echo).reason.as_deref(), Some("eth0 is down"));
        seen_elsewhere.destination.as_mut().unwrap().passage = Some(Passage::default());
        let reason = compare(seen_elsewhere, ProbeKind::Echo).reason;
        assert_eq!(reason.as_deref(), Some("path probes are lost"));
    }

    #[test]
    fn rule_of_another_program_comes_before_what_the_model_says() {
        for (table, expected) in
            [("foreign", "the rule `x drop` of chain inet foreign c"), ("ovl-policy", "refused")]
        {
            let mut dropped = unanswered(known());
            if let Some(end) = &mut dropped.destination {
                end.steps.push(Step::stops(Stage::IngressPolicy, "refused by a policy", "nft", "allow it"));
                let passage = end.passage.as_mut().unwrap();
                passage.drops.push(drop_by(table, Some("x drop")));
            }
            let trace = compare(dropped, ProbeKind::Echo);
            assert!(trace.reason.as_ref().unwrap().contains(expected), "{trace:?}");
            assert!(trace.agree && trace.model.arrives == Some(false));
        }
    }

    #[test]
    fn datagram_counts_as_arrived_when_it_is_received_and_not_refused() {
        let trace = compare(unanswered(known()), ProbeKind::Udp(53));
        assert!(trace.arrived && trace.agree);
        let mut refused = unanswered(known());
        let error = PacketKind::Error(IcmpError::PortUnreachable);
        refused.source.passage.as_mut().unwrap().sightings.push(seen(90, true, "eth0", false, error));
        assert!(!compare(refused, ProbeKind::Udp(53)).arrived);
        assert!(!compare(unanswered(known()), ProbeKind::Echo).arrived);
    }

    #[test]
    fn datagram_to_a_host_that_does_not_watch_may_have_arrived() {
        let mut unwatched = unanswered(known());
        unwatched.destination.as_mut().unwrap().passage = None;
        let trace = compare(unwatched.clone(), ProbeKind::Udp(53));
        assert!(trace.arrived && trace.agree && trace.probe.unwrap().arrives.is_none());
        unwatched.source.passage.as_mut().unwrap().sightings.retain(|seen| seen.inside);
        assert!(!compare(unwatched, ProbeKind::Udp(53)).arrived);
    }

    #[test]
    fn datagram_that_another_backend_received_arrived() {
        let mut dropped = unanswered(known());
        let end = dropped.destination.as_mut().unwrap();
        end.passage.as_mut().unwrap().drops.push(drop_by("ovl-policy", Some("drop")));
        assert!(!compare(dropped.clone(), ProbeKind::Udp(53)).arrived);
        dropped.others = Others { all: 2, ending: 1 };
        let trace = compare(dropped, ProbeKind::Udp(53));
        assert!(trace.arrived && trace.agree, "{trace:?}");
    }

    #[test]
    fn path_that_loses_large_packets_is_named_of_a_packet_that_arrives() {
        let limited = Some("large packets are lost".to_owned());
        let trace = compare(Known { limited: limited.clone(), ..known() }, ProbeKind::Echo);
        assert!(trace.arrived && trace.limited == limited);
        let trace = compare(Known { limited, ..unanswered(known()) }, ProbeKind::Echo);
        assert!(!trace.arrived && trace.limited.is_none());
    }

    #[test]
    fn model_alone_leaves_open_what_it_cannot_know() {
        let mut model = known();
        model.is_probed = false;
        model.others = Others { all: 3, ending: 1 };
        let trace = compare(model.clone(), ProbeKind::Tcp(80));
        assert!(trace.arrived && trace.probe.is_none() && trace.model.arrives.is_none());
        model.others = Others::default();
        assert_eq!(compare(model, ProbeKind::Tcp(80)).model.arrives, Some(true));
    }
}
