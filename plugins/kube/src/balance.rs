//! What the status of a Service of type LoadBalancer is to say: which addresses ovl gives it. Pure: no clock, no I/O.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ovl_control::{Balanced, BalancedService};
use ovl_proto::resource::Name;

use crate::kind::Object;

/// What is to be done about the status of a Service.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Due {
    /// Write these addresses, if the object has still this version.
    Write(Addresses),
    /// Nothing can be written, for this reason.
    Refused(Name, &'static str),
}

/// The addresses that a Service is to have in its status.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Addresses {
    /// The Service.
    pub name: Name,
    /// The version of the object for which this was decided.
    pub version: u64,
    /// The addresses.
    pub addresses: Vec<IpAddr>,
}

/// Another program has written the status.
const FOREIGN: &str = "another program has written its status.loadBalancer, which therefore stays, and ovl's addresses are not \
                       in it: let one of the two serve the Service, by spec.loadBalancerClass";
/// The pool has no address.
const USED_UP: &str = "no address of ovl's load_balancer_pool is free: delete a Service of type LoadBalancer, or enlarge the pool \
                       on all hosts";

/// Decides about the statuses of Services.
pub(crate) fn due<'a>(
    services: impl Iterator<Item = &'a Object>,
    balanced: &Balanced,
) -> impl Iterator<Item = Due> {
    services.filter_map(|object| {
        let served = balanced.services.binary_search_by(|served| served.name.cmp(&object.name));
        judge(object, served.ok().and_then(|at| balanced.services.get(at)), balanced)
    })
}

/// Decides about the status of one Service. `None` if nothing is due.
///
/// The API server does not say who wrote a status. An address of ovl's pool was written by ovl, here or on the host that
/// mirrored before; all else was not, and stays.
fn judge(object: &Object, served: Option<&BalancedService>, balanced: &Balanced) -> Option<Due> {
    let Object { name, version, status, .. } = object;
    let is_own =
        |ip: &Option<IpAddr>| ip.is_some_and(|ip| balanced.pools.iter().any(|pool| pool.contains(&ip)));
    let addresses = match served {
        // What ovld said is of another state of the object: it says something else soon.
        Some(served) if served.version != *version => return None,
        Some(served) if status.balances => served.addresses.clone(),
        // It was a LoadBalancer. The API server empties its status, but not in all releases.
        _ if !status.balances && !status.ingress.is_empty() => Vec::new(),
        _ => return None,
    };
    let wanted: BTreeSet<Option<IpAddr>> = addresses.iter().copied().map(Some).collect();
    if wanted == status.ingress.iter().copied().collect() {
        return (served.is_some() && wanted.is_empty()).then(|| Due::Refused(name.clone(), USED_UP));
    }
    if !status.ingress.iter().all(is_own) {
        return served.is_some().then(|| Due::Refused(name.clone(), FOREIGN));
    }
    Some(Due::Write(Addresses { name: name.clone(), version: *version, addresses }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use serde_json::{Value, json};

    use super::*;
    use crate::status::Status;

    fn service(kind: &str, ingress: Value) -> Object {
        let value = json!({ "spec": { "type": kind }, "status": { "loadBalancer": { "ingress": ingress } } });
        Object {
            name: Name::new("shop", "web"),
            version: 7,
            uid: String::new(),
            manifest: None,
            status: Status::of(&value),
        }
    }

    fn balanced(addresses: &[&str]) -> Balanced {
        let served = BalancedService {
            name: Name::new("shop", "web"),
            version: 7,
            addresses: addresses.iter().map(|ip| ip.parse().unwrap()).collect(),
        };
        let pools = ["192.0.2.0/24", "2001:db8::/64"].map(|pool| pool.parse().unwrap()).to_vec();
        Balanced { pools, services: vec![served] }
    }

    fn one(object: &Object, balanced: &Balanced) -> Option<Due> {
        due(std::iter::once(object), balanced).next()
    }

    fn write(addresses: &[&str]) -> Option<Due> {
        let addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        Some(Due::Write(Addresses { name: Name::new("shop", "web"), version: 7, addresses }))
    }

    #[test]
    fn a_status_is_written_only_if_it_differs() {
        let wanted = balanced(&["192.0.2.7", "2001:db8::7"]);
        let balancer = |ingress| service("LoadBalancer", ingress);
        assert_eq!(one(&balancer(json!(null)), &wanted), write(&["192.0.2.7", "2001:db8::7"]));
        // An address of ovl's pool is an earlier one of ovl.
        assert_eq!(
            one(&balancer(json!([{ "ip": "192.0.2.8" }])), &wanted),
            write(&["192.0.2.7", "2001:db8::7"])
        );
        let same = json!([{ "ip": "2001:0db8::7", "ipMode": "VIP" }, { "ip": "192.0.2.7" }]);
        assert_eq!(one(&balancer(same), &wanted), None);
        // It is no LoadBalancer any more.
        let was = service("ClusterIP", json!([{ "ip": "192.0.2.7" }]));
        assert_eq!(one(&was, &wanted), write(&[]));
        assert_eq!(
            one(&service("ClusterIP", json!(null)), &Balanced { services: Vec::new(), ..wanted }),
            None
        );
    }

    #[test]
    fn what_another_program_wrote_stays() {
        let wanted = balanced(&["192.0.2.7"]);
        for theirs in [
            json!([{ "ip": "203.0.113.1" }]),
            json!([{ "hostname": "lb.example.com" }]),
            json!([{ "ip": "192.0.2.7", "ipMode": "Proxy" }]),
            json!([{ "ip": "192.0.2.7" }, { "ip": "203.0.113.1" }]),
        ] {
            let object = service("LoadBalancer", theirs.clone());
            assert_eq!(
                one(&object, &wanted),
                Some(Due::Refused(Name::new("shop", "web"), FOREIGN)),
                "{theirs}"
            );
            // Nothing is to be said if ovl does not serve it.
            assert_eq!(one(&object, &Balanced { services: Vec::new(), ..wanted.clone() }), None);
            assert_eq!(
                one(&service("ClusterIP", theirs), &Balanced { services: Vec::new(), ..wanted.clone() }),
                None
            );
        }
    }

    #[test]
    fn nothing_is_written_about_another_state_of_the_object() {
        let mut wanted = balanced(&["192.0.2.7"]);
        wanted.services[0].version = 6;
        assert_eq!(one(&service("LoadBalancer", json!(null)), &wanted), None);
    }

    #[test]
    fn a_pool_that_is_used_up_is_said() {
        let refused = Some(Due::Refused(Name::new("shop", "web"), USED_UP));
        assert_eq!(one(&service("LoadBalancer", json!(null)), &balanced(&[])), refused);
        assert_eq!(one(&service("LoadBalancer", json!([{ "ip": "192.0.2.7" }])), &balanced(&[])), write(&[]));
    }
}
