//! Names with two meanings: an endpoint is called `web.blue`, and an endpoint of the network `blue` is called `web`.
//!
//! The module owns no state. Begin to read at [`ambiguous`].

use std::collections::BTreeMap;

use ovl_cluster::view::{Placed, View};
use ovl_proto::id::NetworkId;
use ovl_proto::table::canonical_name;

use super::zone;

/// The limit of names that are returned.
const MOST: usize = 16;

/// An endpoint, as users know it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bearer {
    /// The name of the endpoint.
    pub endpoint: String,
    /// The name of its network.
    pub network: String,
    /// The name of its host.
    pub host: String,
}

/// The two meanings of a name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ambiguous {
    /// The endpoint that is called so, in one word.
    pub called: Bearer,
    /// The endpoint that is called so on the network that the name ends with. Endpoints on both networks get its
    /// addresses.
    pub qualified: Bearer,
}

/// Returns the names with two meanings of which one is an endpoint of this host, at most 16.
pub fn ambiguous(view: &View) -> BTreeMap<String, Ambiguous> {
    let labels: Vec<(NetworkId, String)> =
        view.networks.iter().map(|(id, state)| (*id, canonical_name(&state.network.name))).collect();
    let mut found = BTreeMap::new();
    let mut note = |name: &str, called: &Placed<'_>, qualified: &Placed<'_>| {
        let (Some(of_called), Some(of_qualified)) = (bearer(view, called), bearer(view, qualified)) else {
            return;
        };
        // An alias of the same endpoint has the same addresses.
        if called.endpoint.addresses != qualified.endpoint.addresses && found.len() < MOST {
            found.insert(name.to_owned(), Ambiguous { called: of_called, qualified: of_qualified });
        }
    };
    let own = view
        .own()
        .into_iter()
        .flat_map(|node| node.table.endpoints().map(move |endpoint| Placed { node, endpoint }));
    for own in own.filter(|own| view.is_counted(own)) {
        for name in own.endpoint.canonical_names() {
            for (label_at, _) in name.match_indices('.') {
                let (short, label) = name.split_at(label_at);
                let named = labels.iter().filter(|(_, other)| label.strip_prefix('.') == Some(other));
                for (network, _) in named {
                    if let Some(other) = zone::called(view, *network, short).next() {
                        note(&name, &own, &other);
                    }
                }
            }
            let label = labels.iter().find(|(network, _)| *network == own.endpoint.network);
            let Some((_, label)) = label else { continue };
            let full = format!("{name}.{label}");
            let mut others = view.all_called(&full).filter(|other| view.is_counted(other));
            if let Some(other) = others.next() {
                note(&full, &other, &own);
            }
        }
    }
    found
}

fn bearer(view: &View, Placed { node, endpoint }: &Placed<'_>) -> Option<Bearer> {
    let network = &view.networks.get(&endpoint.network)?.network;
    let (endpoint, host) = (endpoint.name.clone(), node.record.name.clone());
    Some(Bearer { endpoint, network: network.name.clone(), host })
}
