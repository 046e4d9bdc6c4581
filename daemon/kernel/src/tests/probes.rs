//! ICMP echo probes.

use std::time::{Duration, Instant};

use super::lab::{Container, in_namespace, ip, run};
use crate::Prober;

#[test]
fn probe_succeeds_only_if_a_host_has_the_address() {
    in_namespace(async || {
        let container = Container::new();
        run(&format!("ip link set up1 netns {}", container.path().split('/').nth(2).expect("pid")));
        container.run(
            "ip addr add 192.0.2.2/24 dev up1; ip addr add 2001:db8:ffff::2/64 dev up1 nodad; ip link set up1 up",
        );
        let prober = Prober::new().expect("socket");
        let time = Duration::from_millis(500);
        let start = Instant::now();
        assert!(prober.probe(ip("192.0.2.2"), time).await);
        println!("an answer in {:?}", start.elapsed());
        let all = ["192.0.2.2", "2001:db8:ffff::2", "192.0.2.2", "192.0.2.1", "2001:db8:ffff::1"];
        let tasks: Vec<_> = all
            .into_iter()
            .map(|address| {
                let prober = prober.clone();
                tokio::spawn(async move { prober.probe(ip(address), time).await })
            })
            .collect();
        for (task, address) in tasks.into_iter().zip(all) {
            assert!(task.await.expect("task"), "{address}");
        }
        let silent = ["192.0.2.9", "2001:db8:ffff::9", "203.0.113.1", "2001:db8:eeee::1"];
        for address in silent {
            let start = Instant::now();
            assert!(!prober.probe(ip(address), time).await, "{address}");
            assert!(start.elapsed() < time * 2);
        }
    });
}
