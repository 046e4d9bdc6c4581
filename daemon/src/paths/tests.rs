//! Two hosts in a simulated network that loses, delays and damages probes.

use super::*;

/// The interval of the simulation.
const STEP: Duration = Duration::from_millis(50);
/// The delay of a probe.
const DELAY: Duration = Duration::from_millis(50);

const CANDIDATE: Candidate = Candidate { run: 7, mtu: 1450, tries_offload: true };

fn id(n: u8) -> NodeId {
    NodeId([n; 10])
}

/// The first probe of a host.
fn probe(from: NodeId, to: NodeId) -> Frame {
    Frame {
        from,
        to,
        size: Size::Small,
        run: 1,
        number: 1,
        heard_run: 0,
        heard_trial: 0,
        small: Report::default(),
        large: Report::default(),
        arrived: Arrived::default(),
    }
}

/// Two hosts, 1 and 2, and the probes between them.
struct World {
    now: Duration,
    hosts: [Paths; 2],
    flying: Vec<(Duration, Frame)>,
    sent: usize,
    vouched: bool,
    /// The limits that the hosts found.
    limits: Vec<(NodeId, u16)>,
}

impl World {
    fn new() -> Self {
        Self::with(Carrier::Vxlan)
    }

    fn with(carrier: Carrier) -> Self {
        let mut hosts = [Paths::new(id(1), carrier), Paths::new(id(2), carrier)];
        hosts[0].follow([(id(2), CANDIDATE)].into(), Duration::ZERO);
        hosts[1].follow([(id(1), CANDIDATE)].into(), Duration::ZERO);
        Self { now: Duration::ZERO, hosts, flying: Vec::new(), sent: 0, vouched: true, limits: Vec::new() }
    }

    /// Lets time pass. `passes` says whether a probe arrives.
    fn run(&mut self, time: Duration, mut passes: impl FnMut(&Frame) -> bool) {
        self.run_with(time, |frame, _| passes(frame));
    }

    /// As [`Self::run`], with the length of each probe.
    fn run_with(&mut self, time: Duration, mut passes: impl FnMut(&Frame, u16) -> bool) {
        let end = self.now + time;
        while self.now < end {
            self.now += STEP;
            let now = self.now;
            let arrived: Vec<Frame> =
                self.flying.extract_if(.., |(at, _)| *at <= now).map(|(_, frame)| frame).collect();
            for frame in arrived {
                self.hosts[usize::from(frame.to.0[0]) - 1].take(&frame, 7, self.now);
            }
            if !self.now.as_millis().is_multiple_of(TICK.as_millis()) {
                continue;
            }
            for host in &mut self.hosts {
                let due = host.tick(self.now, 7, |_| self.vouched);
                self.limits.extend(due.limits);
                for (frame, mtu) in due.probes {
                    self.sent += 1;
                    if passes(&frame, mtu) {
                        self.flying.push((self.now + DELAY, frame));
                    }
                }
            }
        }
    }

    fn state(&self, host: u8) -> PathState {
        self.hosts[usize::from(host) - 1].state(id(3 - host), self.now).unwrap()
    }

    /// The judgements of host 1 and 2: what it receives, and what the other one receives.
    fn verdicts(&self, size: Size) -> [Verdict; 4] {
        let of = |direction: Direction| match size {
            Size::Large | Size::Trial => direction.large,
            _ => direction.small,
        };
        let (one, two) = (self.state(1), self.state(2));
        [one.received, one.sent, two.received, two.sent].map(of)
    }
}

const SECOND: Duration = Duration::from_secs(1);

#[test]
fn healthy_path_works_both_ways_with_few_probes_and_a_round_trip() {
    let mut world = World::new();
    world.run(SECOND * 60, |_| true);
    for size in [Size::Small, Size::Large] {
        assert_eq!(world.verdicts(size), [Verdict::Works; 4]);
    }
    assert_eq!(world.state(1).received.loss_percent, Some(0));
    assert_eq!(world.state(1).sent.loss_percent, Some(0));
    let trip = world.state(2).round_trip.unwrap();
    assert!(trip >= DELAY * 2 && trip <= DELAY * 4, "{trip:?}");
    // One small probe a second, one large one in five, and one of the offload in fifteen, of two hosts.
    assert!(world.sent <= (60 * 12 / 10 + 4) * 2, "{}", world.sent);
}

#[test]
fn both_hosts_name_the_broken_direction_within_four_seconds_and_its_end() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    world.run(SECOND * 4, |frame| frame.from != id(1));
    let [received, sent, there, back] = world.verdicts(Size::Small);
    assert_eq!([received, sent], [Verdict::Works, Verdict::Broken]);
    // Nothing from host 1 arrives, also not what it says of host 2's probes.
    assert_eq!((there, back == Verdict::Broken), (Verdict::Broken, false));
    assert_eq!(world.state(1).sent.loss_percent, Some(100));
    world.run(SECOND * 3, |_| true);
    assert_eq!(world.verdicts(Size::Small), [Verdict::Works; 4]);
}

#[test]
fn direct_route_that_is_broken_is_named_within_five_seconds_and_has_no_large_probes() {
    let mut world = World::with(Carrier::Direct);
    world.run(SECOND * 60, |frame| {
        assert_eq!(frame.size, Size::Direct);
        true
    });
    assert_eq!(world.verdicts(Size::Direct), [Verdict::Works; 4]);
    assert_eq!(world.verdicts(Size::Large), [Verdict::Unknown; 4]);
    assert!(world.sent <= 62, "{}", world.sent);
    world.run(SECOND * 9 / 2, |frame| frame.from != id(1));
    let ends = DirectEnds {
        name: "h2",
        network: "pods",
        subnet: "10.61.0.0/16".parse().unwrap(),
        here: [192, 0, 2, 1].into(),
        there: [192, 0, 2, 2].into(),
    };
    let mutual = |host| PathState { is_mutual: true, ..world.state(host) };
    let sentence = ends.broken(&mutual(1)).unwrap();
    assert!(sentence.contains("from this host arrives at host h2, as it says"), "{sentence}");
    assert!(sentence.contains("in 10.61.0.0/16 from 192.0.2.1 to 192.0.2.2 ("), "{sentence}");
    let sentence = ends.broken(&mutual(2)).unwrap();
    assert!(sentence.contains("from host h2 arrives at this host"), "{sentence}");
    world.run(SECOND * 60, |_| true);
    assert_eq!(ends.broken(&world.state(1)), None);
    // What is sent on one path says nothing of another one.
    let mut other = World::new();
    other.run(SECOND * 5, |frame| frame.from != id(1));
    let frame = Frame { size: Size::Direct, ..probe(id(1), id(2)) };
    other.hosts[1].take(&frame, 7, other.now);
    assert_eq!(other.hosts[1].paths[&id(1)].small.arrivals.number, 0);
}

#[test]
fn offload_that_damages_checksums_is_found_by_the_host_that_sends() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    assert_eq!([1, 2].map(|host| world.state(host).offload), [Offload::Works; 2]);
    world.run(SECOND * 25, |frame| frame.from != id(1) || frame.size != Size::Partial);
    assert_eq!([1, 2].map(|host| world.state(host).offload), [Offload::Damages, Offload::Works]);
    assert_eq!(world.verdicts(Size::Small), [Verdict::Works; 4]);
    assert!(unfinished("h2").contains("host h2"));
    // A path that carries nothing says nothing of an offload.
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    world.run(SECOND * 60, |frame| frame.from != id(1));
    assert_eq!([1, 2].map(|host| world.state(host).offload), [Offload::Works; 2]);
}

#[test]
fn both_directions_are_found_at_once() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    world.run(SECOND * 4, |_| false);
    assert_eq!([world.state(1).received.small, world.state(2).received.small], [Verdict::Broken; 2]);
    world.run(SECOND * 60, |_| false);
    assert_eq!(world.state(1).sent.small, Verdict::Unknown);
}

#[test]
fn path_that_loses_a_third_is_never_broken() {
    let (mut world, mut random) = (World::new(), 1u32);
    let mut worst = Some(0);
    for _ in 0..600 {
        world.run(SECOND, |_| {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (random >> 16) % 3 != 0
        });
        let [one, two] = [world.state(1), world.state(2)];
        for direction in [one.received, one.sent, two.received, two.sent] {
            assert_ne!(direction.small, Verdict::Broken, "{:?}", world.now);
        }
        worst = worst.max(one.received.loss_percent);
    }
    assert!(worst > Some(20), "{worst:?}");
}

#[test]
fn silence_of_a_host_that_nobody_vouches_for_means_nothing() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    world.vouched = false;
    world.run(SECOND * 30, |_| false);
    assert_eq!(world.state(1).received.small, Verdict::Works);
    world.vouched = true;
    world.run(SECOND * 4, |_| false);
    assert_eq!(world.state(1).received.small, Verdict::Broken);
}

#[test]
fn host_that_did_not_run_itself_blames_nobody() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    // What arrived meanwhile is read after the next judgement.
    world.now += SECOND * 30;
    for host in &mut world.hosts {
        host.tick(world.now, 7, |_| true);
    }
    assert_ne!(world.state(1).received.small, Verdict::Broken);
    world.run(SECOND * 4, |_| true);
    assert_eq!(world.verdicts(Size::Small), [Verdict::Works; 4]);
}

#[test]
fn path_for_small_packets_alone_is_found_in_its_direction() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    world.run(SECOND * 12, |frame| frame.from != id(1) || frame.size == Size::Small);
    assert_eq!(world.verdicts(Size::Small), [Verdict::Works; 4]);
    assert_eq!(
        world.verdicts(Size::Large),
        [Verdict::Works, Verdict::Broken, Verdict::Broken, Verdict::Works]
    );
    world.run(SECOND * 12, |_| true);
    assert_eq!(world.verdicts(Size::Large), [Verdict::Works; 4]);
}

#[test]
fn restarted_host_is_heard_again_and_replayed_probes_are_ignored() {
    let mut world = World::new();
    let mut recorded = None;
    world.run(SECOND * 20, |frame| {
        if frame.from == id(1) && frame.size == Size::Small {
            recorded = Some(*frame);
        }
        true
    });
    let recorded = recorded.unwrap();
    world.run(SECOND * 4, |frame| frame.from != id(1));
    world.hosts[1].take(&recorded, 7, world.now);
    world.hosts[1].take(&recorded, 7, world.now);
    world.run(SECOND, |frame| frame.from != id(1));
    assert_eq!(world.state(2).received.small, Verdict::Broken);
    // A new run counts from 1 again.
    let (small, large) = (Report::default(), Report::default());
    for number in 1..=2 {
        let frame = Frame { run: 8, number, small, large, ..recorded };
        world.hosts[1].take(&frame, 7, world.now);
    }
    world.run(TICK, |frame| frame.from != id(1));
    assert_eq!(world.state(2).received.small, Verdict::Works);
    world.hosts[1].take(&Frame { number: 1_000, ..recorded }, 7, world.now);
    assert_eq!(world.hosts[1].paths[&id(1)].small.arrivals.number, 2, "an earlier run");
}

#[test]
fn hosts_that_ask_are_answered_up_to_a_limit() {
    let many = |n: u16| {
        let [a, b] = n.to_be_bytes();
        NodeId([a, b, 0, 0, 0, 0, 0, 0, 0, 0])
    };
    let mut paths = Paths::new(many(0), Carrier::Vxlan);
    let candidates = || (1..1000).map(|n| (many(n), CANDIDATE)).collect();
    paths.follow(candidates(), Duration::ZERO);
    let watched = paths.paths.len();
    for n in 1..2000 {
        paths.take(&probe(many(n), many(0)), 7, SECOND);
    }
    assert_eq!(paths.paths.len(), watched + MAX_ASKED);
    assert!(paths.state(many(1500), SECOND).is_none(), "not a host of the cluster");
    paths.follow(candidates(), SECOND * 12);
    assert!(paths.paths.len() <= watched + 8, "those that ask no more are forgotten");
}

#[test]
fn longest_packets_that_pass_are_found_by_the_host_that_sends_them() {
    let mut world = World::new();
    world.run(SECOND * 20, |_| true);
    world.run_with(SECOND * 50, |frame, mtu| frame.from != id(1) || mtu <= 1300);
    let [(to, limit)] = world.limits[..] else { panic!("{:?}", world.limits) };
    assert_eq!(to, id(2));
    assert!((1292..=1300).contains(&limit), "{limit}");
    // The other direction is not searched, and trials change no judgement.
    assert_eq!(
        world.verdicts(Size::Large),
        [Verdict::Works, Verdict::Broken, Verdict::Broken, Verdict::Works]
    );
}
