//! The addresses of a LoadBalancer as the API server has them.

use std::net::IpAddr;

use serde_json::{Value, json};

/// What the API server has in the status of a Service.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Status {
    /// Whether its type is LoadBalancer.
    pub balances: bool,
    /// Its addresses. `None`: a name, or an address that hosts are not to translate.
    pub ingress: Vec<Option<IpAddr>>,
}

impl Status {
    /// Reads the status of a Service. That of any other object is empty.
    pub(crate) fn of(value: &Value) -> Self {
        let ingress = value.pointer("/status/loadBalancer/ingress").and_then(Value::as_array);
        Self {
            balances: value.pointer("/spec/type").is_some_and(|kind| kind == "LoadBalancer"),
            ingress: ingress.into_iter().flatten().map(address).collect(),
        }
    }

    /// Returns the status as it is handed on to ovld: the addresses that hosts are to translate. `None` if there is none.
    pub(crate) fn manifest(&self) -> Option<Value> {
        let all: Vec<Value> = self.ingress.iter().flatten().map(|ip| json!({ "ip": ip })).collect();
        (!all.is_empty()).then(|| json!({ "loadBalancer": { "ingress": all } }))
    }
}

/// Returns an address of a LoadBalancer at which hosts are to translate.
fn address(ingress: &Value) -> Option<IpAddr> {
    let is_translated = ingress.get("ipMode").is_none_or(|mode| mode == "VIP");
    ingress.get("ip")?.as_str()?.parse().ok().filter(|_| is_translated)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_that_hosts_translate_are_handed_on() {
        let status = |ingress: Value| {
            Status::of(&json!({ "status": { "loadBalancer": { "ingress": ingress } } })).manifest()
        };
        let mixed = json!([{ "hostname": "a" }, { "ip": "192.0.2.7", "ipMode": "VIP" }, { "ip": "192.0.2.8", "ipMode": "Proxy" }]);
        assert_eq!(status(mixed), Some(json!({ "loadBalancer": { "ingress": [{ "ip": "192.0.2.7" }] } })));
        assert_eq!(status(json!(null)), None);
    }
}
