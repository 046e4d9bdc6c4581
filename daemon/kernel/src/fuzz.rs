//! Runs arbitrary bytes through what parses answers and notifications of the kernel, for the fuzzer in `tests/fuzz` and
//! for a property test.

use std::collections::HashMap;

use ovl_dataplane::device::Device;

use super::attribute::{HEADER, messages};
use super::dump::DeviceNames;
use super::known::KernelModel;
use super::{conntrack, fact, flows, link, nftables, sources, timed, wireguard};

/// Reads the bytes as messages, and as the payload of a message of each kind.
pub fn netlink(bytes: &[u8]) {
    let mut model = KernelModel::default();
    let devices: HashMap<u32, Device> = (0..)
        .zip(["ovb-aaaaaaaa", "ove-aaaaaaaa", "ovx-aaaaaaaa"])
        .filter_map(|(index, name)| Some((index, Device::new(name)?)))
        .collect();
    let names = DeviceNames { all: devices.clone(), ours: devices.clone(), ..DeviceNames::default() };
    model.load(Default::default(), names, Default::default());
    for message in messages(bytes) {
        model.note(&message);
    }
    let _ = model.changes();

    let (kind, payload) = bytes.split_first().map_or((0, bytes), |(kind, rest)| (*kind, rest));
    let mut framed = Vec::with_capacity(HEADER + payload.len());
    framed.extend_from_slice(&((HEADER + payload.len()) as u32).to_ne_bytes());
    framed.extend_from_slice(&u16::from(kind).to_ne_bytes());
    framed.resize(HEADER, 0);
    framed.extend_from_slice(payload);
    for message in messages(&framed) {
        assert_eq!(message.payload, payload);
        model.note(&message);
        let _ = super::socket::refusal(&message);
    }
    let _ = model.changes();
    if let Some(view) = link::LinkView::parse(payload) {
        let _ = (view.ours(), view.model(&devices), view.is_doomed());
    }
    let _ = fact::route(payload, &devices);
    nftables::fuzz(payload);
    timed::fuzz(payload);
    wireguard::fuzz(payload);
    conntrack::fuzz(payload);
    flows::fuzz(payload);
    sources::fuzz(payload);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            super::netlink(&bytes);
        }
    }

    #[test]
    fn corpus_passes() {
        ovl_corpus::replay("netlink", super::netlink);
    }
}
