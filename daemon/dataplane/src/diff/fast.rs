//! The difference of what the programs of the fast path know.

use crate::fast::Fast;
use crate::op::{FastOp, Op};

/// Returns the operations that take something away, and those that add. What is taken away comes before everything
/// else: the fast path does not know less for long than the stack. What is added comes after everything that it leads to.
pub fn fast_changes(actual: &Fast, desired: &Fast, prune: bool) -> (Vec<Op>, Vec<Op>) {
    let (mut first, mut last) = (Vec::new(), Vec::new());
    let Some(host) = desired.host else {
        // Nothing that gossip has still to say loads them again.
        if actual.host.is_some() {
            first.push(FastOp::Unload);
        }
        return (first.into_iter().map(Op::Fast).collect(), Vec::new());
    };
    if actual.host != Some(host) {
        let op = FastOp::SetHost(host);
        if host.on || actual.host.is_none() { last.push(op) } else { first.push(op) }
    }
    let none = Fast::default();
    let held = if actual.host.is_some() { actual } else { &none };
    if prune {
        first.extend(
            held.pods.keys().filter(|at| !desired.pods.contains_key(at)).map(|at| FastOp::DeletePod(*at)),
        );
        first.extend(
            held.paths.keys().filter(|to| !desired.paths.contains_key(to)).map(|to| FastOp::DeletePath(*to)),
        );
        first.extend(held.hooks.difference(&desired.hooks).map(|device| FastOp::Detach(*device)));
    }
    for (at, pod) in desired.pods.iter().filter(|(at, pod)| held.pods.get(at) != Some(pod)) {
        let op = FastOp::SetPod(*at, *pod);
        if pod.fast || !held.pods.contains_key(at) { last.push(op) } else { first.push(op) }
    }
    let paths = desired.paths.iter().filter(|(to, path)| held.paths.get(to) != Some(path));
    last.extend(paths.map(|(to, path)| FastOp::SetPath(*to, *path)));
    last.extend(desired.hooks.difference(&held.hooks).map(|device| FastOp::Attach(*device)));
    (first.into_iter().map(Op::Fast).collect(), last.into_iter().map(Op::Fast).collect())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::IpAddr;

    use ovl_proto::id::{Mac, NetworkId};

    use super::*;
    use crate::device::Device;
    use crate::fast::{FastHost, FastPod};

    fn host(on: bool) -> FastHost {
        FastHost { on, underlay: Device::new("eth0").unwrap(), vtep: None, port: 4789 }
    }

    fn pod(fast: bool) -> FastPod {
        FastPod {
            device: Device::new("ove-aaaaaaaa").unwrap(),
            epoch: 1,
            network: NetworkId([1; 5]),
            mac: Mac([2; 6]),
            mtu: 1450,
            switched: false,
            fast,
            selected: false,
        }
    }

    fn text(ops: &[Op]) -> Vec<String> {
        ops.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn what_leaves_the_fast_path_comes_first() {
        let at: IpAddr = "10.1.0.2".parse().unwrap();
        let with = |on, fast| Fast {
            host: Some(host(on)),
            pods: BTreeMap::from([(at, pod(fast))]),
            ..Fast::default()
        };
        let (first, last) = fast_changes(&with(true, true), &with(true, false), true);
        assert_eq!((first.len(), last.len()), (1, 0));
        let (first, last) = fast_changes(&with(true, false), &with(true, true), true);
        assert_eq!((first.len(), last.len()), (0, 1));
        let (first, last) = fast_changes(&with(true, true), &with(false, true), true);
        assert_eq!((first.len(), last.len()), (1, 0), "{:?}", text(&first));
    }

    #[test]
    fn without_programs_there_is_nothing_to_compare() {
        let at: IpAddr = "fd01::2".parse().unwrap();
        let left = Fast { pods: BTreeMap::from([(at, pod(true))]), ..Fast::default() };
        let wanted = Fast { host: Some(host(true)), ..left.clone() };
        let (first, last) = fast_changes(&left, &wanted, true);
        assert!(first.is_empty());
        assert_eq!(last.len(), 2, "{:?}", text(&last));
        let (first, last) = fast_changes(&wanted, &Fast::default(), false);
        assert_eq!(text(&first), ["# fast path: unload the programs"]);
        assert!(last.is_empty());
    }
}
