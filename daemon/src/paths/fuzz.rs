//! Runs arbitrary bytes through the probes of paths, for the fuzzer in `tests/fuzz` and for a property test: frames as they
//! are, and a host that is sent authentic frames with any content, by peers that come, go and start again.

use std::collections::BTreeMap;
use std::time::Duration;

use ovl_mesh::keys::{ClusterKey, Keyring};
use ovl_proto::id::{Mac, NodeId};

use super::frame::{Arrived, Frame, Report, Size, Verdict};
use super::{Candidate, Carrier, Paths};

const ME: NodeId = NodeId([0; 10]);
/// The run of this host.
const RUN: u64 = 7;
/// The number of peers.
const PEERS: u8 = 40;

/// Reads a frame, and takes the bytes as events of a host that watches paths.
pub(crate) fn run(bytes: &[u8]) {
    let key = ClusterKey::new([5; 32]);
    let ring = Keyring::new(ClusterKey::new([5; 32]), Vec::new());
    let _refused = Frame::decode(bytes, ME, &ring);
    let mut input = Input(bytes);
    let mut both = [Carrier::Vxlan, Carrier::Direct].map(|carrier| Paths::new(ME, carrier));
    let (mut now, mut candidates) = (Duration::ZERO, BTreeMap::new());
    while let Some(event) = input.byte() {
        match event % 4 {
            0 => {
                let peer = peer(input.small());
                let (run, mtu) = (input.small().into(), u16::from(input.small()) * 16);
                let candidate = Candidate { run, mtu, tries_offload: run % 2 == 0 };
                if candidates.remove(&peer).is_none() {
                    candidates.insert(peer, candidate);
                }
                both.iter_mut().for_each(|paths| paths.follow(candidates.clone(), now));
            }
            1 => {
                now += Duration::from_millis(u64::from(input.small()) * 20);
                let silent = input.small();
                let due = both.each_mut().map(|paths| paths.tick(now, RUN, |host| host != peer(silent)));
                let [vxlan, direct] = due;
                assert!(
                    direct.limits.is_empty()
                        && direct.probes.iter().all(|(frame, _)| frame.size == Size::Direct),
                    "a large probe on a direct route"
                );
                for (frame, mtu) in vxlan.probes.into_iter().chain(direct.probes) {
                    assert!(
                        frame.from == ME && candidates.contains_key(&frame.to),
                        "a probe for a host that is no candidate"
                    );
                    assert_read_back(&frame, mtu, &key, &ring);
                }
                for (host, limit) in vxlan.limits {
                    assert!(candidates.get(&host).is_some_and(|found| limit < found.mtu), "no limit");
                }
            }
            _ => {
                let frame = input.frame();
                assert_read_back(&frame, u16::from(event) * 8, &key, &ring);
                both.iter_mut().for_each(|paths| paths.take(&frame, RUN, now));
            }
        }
        for (host, _) in both.iter().flat_map(|paths| paths.all(now)) {
            assert!(candidates.contains_key(&host), "the path to a host that is gone");
        }
    }
}

fn assert_read_back(frame: &Frame, mtu: u16, key: &ClusterKey, ring: &Keyring) {
    let bytes = frame.encode([Mac([2; 6]), Mac([6; 6])], key, mtu);
    let cut = |report: Report| Report {
        held: Duration::from_micros(u32::try_from(report.held.as_micros()).unwrap_or(u32::MAX).into()),
        ..report
    };
    let sent = Frame { small: cut(frame.small), large: cut(frame.large), ..*frame };
    assert_eq!(Frame::decode(&bytes, frame.to, ring), Ok(sent));
}

fn peer(number: u8) -> NodeId {
    NodeId([1 + number % PEERS; 10])
}

/// The rest of the bytes. What is missing is 0.
struct Input<'a>(&'a [u8]);

impl Input<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (first, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(*first)
    }

    fn small(&mut self) -> u8 {
        self.byte().unwrap_or_default()
    }

    /// Returns a small number, or one close to the greatest.
    fn number(&mut self) -> u64 {
        let byte = self.small();
        if byte < 200 { byte.into() } else { u64::MAX - u64::from(u8::MAX - byte) }
    }

    fn report(&mut self) -> Report {
        let verdict = match self.small() % 4 {
            0 => Verdict::Unknown,
            1 => Verdict::Works,
            2 => Verdict::Doubtful,
            _ => Verdict::Broken,
        };
        let held = Duration::from_millis(self.number() & 0xffff_ffff);
        Report { verdict, number: self.number(), held, lost: self.small(), of: self.small() }
    }

    fn frame(&mut self) -> Frame {
        let from = peer(self.small());
        let size = match self.small() % 6 {
            0 => Size::Small,
            1 => Size::Large,
            2 => Size::Trial,
            3 => Size::Direct,
            4 => Size::Partial,
            _ => Size::Complete,
        };
        let [run, number, heard_run, heard_trial] = std::array::from_fn(|_| self.number());
        Frame {
            from,
            to: ME,
            size,
            run,
            number,
            heard_run,
            heard_trial,
            small: self.report(),
            large: self.report(),
            arrived: Arrived { partial: self.small().into(), complete: self.small().into() },
        }
    }
}
