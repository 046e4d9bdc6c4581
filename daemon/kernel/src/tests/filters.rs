//! The base nftables table.

use std::time::Instant;

use ovl_cluster::addresses as ipam;
use ovl_dataplane::op::{NftOp, Op};
use ovl_proto::clock::Stamp;
use ovl_proto::object::{Backend, Driver, Mode, Network};
use ovl_proto::wire::fields::Unknown;
use ovl_subsystems::networks::filter;

use super::lab::{Lab, NETWORK, in_namespace, net, run, underlay};
use crate::KernelEvent;

fn text() -> String {
    let network = Network {
        id: NETWORK,
        name: "blue".to_owned(),
        created: Stamp::default(),
        driver: Driver::Overlay,
        mode: Mode::L2,
        vni: 4097,
        subnets: vec![ipam::new_subnet(net("10.1.0.0/16")).expect("subnet")],
        mtu: None,
        encrypted: false,
        auto_encrypt: false,
        internal: false,
        backend: Backend::Vxlan,
        names: true,
        on_demand: false,
        external_names: false,
        unknown: Unknown::default(),
    };
    filter::render(&[&network], &underlay(&["192.0.2.2", "192.0.2.3", "2001:db8::1"], true), None, true, &[])
}

async fn write(lab: &Lab, text: &str) {
    lab.kernel.apply(vec![Op::Nft(NftOp::SetBase(text.to_owned()))]).await.remove(0).result.expect("written");
}

#[test]
fn base_table_is_written_recognised_and_removed() {
    in_namespace(async || {
        let mut lab = Lab::start();
        assert_eq!(lab.dump().await.filter, None);
        let start = Instant::now();
        write(&lab, &text()).await;
        println!("written in {:?}", start.elapsed());
        assert_eq!(lab.dump().await.filter, Some(text()));
        let start = Instant::now();
        lab.dump().await;
        println!("a dump: {:?}", start.elapsed());
        assert_eq!(lab.events().await, [], "ovld made this change");
        let other = text().replace("192.0.2.3", "192.0.2.4");
        write(&lab, &other).await;
        assert_eq!(lab.dump().await.filter, Some(other));
        lab.kernel.remove_filter().await.expect("removed");
        assert_eq!(lab.dump().await.filter, None);
        lab.kernel.remove_filter().await.expect("an absent object is no error");
        assert_eq!(lab.events().await, []);
    });
}

#[test]
fn members_that_sent_packets_are_no_change_of_the_base_table() {
    in_namespace(async || {
        let mut lab = Lab::start();
        write(&lab, &text()).await;
        // As a packet does, but with a notification, so that the next dump lists the table.
        run("nft add element inet ovl paths4 { 1 . 192.0.2.2 }");
        assert_eq!(lab.events().await, [KernelEvent::FilterChanged]);
        assert_eq!(lab.dump().await.filter, Some(text()));
        run("nft add element inet ovl vteps4 { 192.0.2.9 }");
        assert_eq!(lab.events().await, [KernelEvent::FilterChanged]);
        assert_ne!(lab.dump().await.filter, Some(text()));
    });
}

#[test]
fn changes_of_the_base_table_by_others_are_noticed() {
    in_namespace(async || {
        let mut lab = Lab::start();
        write(&lab, &text()).await;
        for line in [
            "nft flush ruleset",
            "nft delete table inet ovl",
            "nft delete element inet ovl vteps4 { 192.0.2.3 }",
            "nft add element inet ovl vteps4 { 192.0.2.9 }",
            "nft flush chain inet ovl output",
            "nft insert rule inet ovl prerouting accept",
        ] {
            run(line);
            assert_eq!(lab.events().await, [KernelEvent::FilterChanged], "{line}");
            assert_ne!(lab.dump().await.filter, Some(text()), "{line}");
            write(&lab, &text()).await;
            assert_eq!(lab.dump().await.filter, Some(text()), "{line}");
            assert_eq!(lab.events().await, [], "{line}");
        }
        run("nft add table inet other && nft add chain inet other c && nft delete table inet other");
        run("nft add table ip ovl");
        assert_eq!(lab.events().await, [], "other tables are not ours");
    });
}

#[test]
fn base_table_of_an_earlier_process_is_unknown() {
    in_namespace(async || {
        write(&Lab::start(), &text()).await;
        let lab = Lab::start();
        assert_eq!(lab.dump().await.filter.as_deref(), Some("unknown"));
        write(&lab, &text()).await;
        assert_eq!(lab.dump().await.filter, Some(text()));
    });
}

#[test]
fn error_of_nft_is_reported() {
    in_namespace(async || {
        let lab = Lab::start();
        write(&lab, &text()).await;
        let outcome = lab
            .kernel
            .apply(vec![Op::Nft(NftOp::SetBase("table inet ovl { nonsense }".to_owned()))])
            .await
            .remove(0);
        let error = outcome.result.unwrap_err().to_string();
        assert!(error.starts_with("nft rejected the ruleset: ") && error.contains("nonsense"), "{error}");
    });
}
