use super::*;

/// A simulated path with a clock.
struct Path {
    carries: u16,
    refused_above: u16,
    loss: f64,
    random: u64,
    now: Instant,
    sent: usize,
}

impl Path {
    fn new(carries: u16) -> Self {
        Self { carries, refused_above: u16::MAX, loss: 0.0, random: 42, now: Instant::now(), sent: 0 }
    }

    fn lucky(&mut self) -> bool {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        // The probe and its acknowledgement.
        let back = (1.0 - self.loss) * (1.0 - self.loss);
        ((self.random % 100_000) as f64) < back * 100_000.0
    }

    /// Runs the search for a time. Returns the values that it had meanwhile.
    fn run(&mut self, machine: &mut PathMtu, time: Duration) -> Vec<u16> {
        let end = self.now + time;
        let mut values: Vec<u16> = machine.current().into_iter().collect();
        let answered = (1.0 - self.loss) * (1.0 - self.loss);
        while self.now < end {
            for probe in machine.poll(self.now, Duration::from_millis(1), answered, true) {
                self.sent += 1;
                if probe.size > self.refused_above {
                    machine.too_big(probe.size);
                } else if probe.size <= self.carries && self.lucky() {
                    machine.acked(probe, self.now);
                }
            }
            if machine.current().is_some() && machine.current() != values.last().copied() {
                values.extend(machine.current());
            }
            self.now += Duration::from_millis(20);
        }
        values
    }
}

const SECONDS: fn(u64) -> Duration = Duration::from_secs;

#[test]
fn path_as_wide_as_its_links_needs_one_probe() {
    let mut path = Path::new(9000);
    let mut machine = PathMtu::new(9000, path.now);
    path.run(&mut machine, Duration::from_millis(50));
    assert_eq!((machine.current(), path.sent), (Some(9000), 2));
    assert!(!machine.is_searching());
}

#[test]
fn narrow_paths_are_found_in_time() {
    for (limit, carries, least) in [
        (9000, 1500, 1500),
        (1500, 1450, 1450),
        (1500, 1280, 1280),
        (1500, 1499, 1492),
        (9000, 4321, 4313),
        (65_535, 9000, 9000),
        (65_535, 30_000, 29_992),
        (1280, 1280, 1280),
        (1000, 1000, 1000),
    ] {
        let mut path = Path::new(carries);
        let mut machine = PathMtu::new(limit, path.now);
        path.run(&mut machine, Duration::from_millis(2500));
        let found = machine.current().unwrap();
        assert!((least..=carries).contains(&found), "{limit} {carries}: {found}");
        assert!(!machine.is_searching(), "{limit} {carries}");
    }
}

#[test]
fn first_value_is_available_before_the_exact_one() {
    let mut path = Path::new(1500);
    let mut machine = PathMtu::new(9000, path.now);
    path.run(&mut machine, Duration::from_millis(800));
    assert_eq!(machine.current(), Some(1500));
}

#[test]
fn changes_of_the_path_are_noticed() {
    let mut path = Path::new(1500);
    let mut machine = PathMtu::new(1500, path.now);
    path.run(&mut machine, SECONDS(5));
    path.carries = 1400;
    let values = path.run(&mut machine, SECONDS(12));
    assert_eq!(values, [1500, 1400]);
    path.carries = 1500;
    path.run(&mut machine, SECONDS(60));
    assert_eq!(machine.current(), Some(1500));
}

#[test]
fn change_of_the_link_mtu_applies_at_once() {
    let mut path = Path::new(9000);
    let mut machine = PathMtu::new(1500, path.now);
    path.run(&mut machine, SECONDS(1));
    machine.set_limit(9000, path.now);
    path.run(&mut machine, SECONDS(1));
    assert_eq!(machine.current(), Some(9000));
    machine.set_limit(1400, path.now);
    assert_eq!(machine.current(), Some(1400));
}

#[test]
fn size_refused_by_the_kernel_is_given_up_at_once() {
    let mut path = Path::new(1500);
    path.refused_above = 1500;
    let mut machine = PathMtu::new(9000, path.now);
    path.run(&mut machine, Duration::from_millis(200));
    assert_eq!(machine.current(), Some(1500));
}

#[test]
fn loss_does_not_reduce_the_path_mtu() {
    for seed in 1..40 {
        let mut path = Path::new(1500);
        path.random = seed * 7919;
        path.loss = 0.3;
        let mut machine = PathMtu::new(1500, path.now);
        let values = path.run(&mut machine, SECONDS(300));
        assert_eq!(values, [1500], "seed {seed}");
    }
}

#[test]
fn value_is_exact_despite_loss() {
    for seed in 1..20 {
        let mut path = Path::new(1450);
        path.random = seed * 104_729;
        path.loss = 0.3;
        let mut machine = PathMtu::new(1500, path.now);
        path.run(&mut machine, SECONDS(20));
        assert_eq!(machine.current(), Some(1450), "seed {seed}");
    }
}

#[test]
fn dead_path_keeps_the_value() {
    let mut path = Path::new(1500);
    let mut machine = PathMtu::new(1500, path.now);
    path.run(&mut machine, SECONDS(1));
    path.loss = 1.0;
    assert_eq!(path.run(&mut machine, SECONDS(600)), [1500]);
}

#[test]
fn idle_search_sends_few_probes() {
    let mut path = Path::new(1500);
    let mut machine = PathMtu::new(1500, path.now);
    path.run(&mut machine, SECONDS(600));
    assert!(path.sent <= 130, "{}", path.sent);
}
