//! Tests of `ovlctl network`.

use ovl_control::GroupInfo;

use super::*;

fn blue() -> NetworkInfo {
    NetworkInfo {
        name: "blue".into(),
        id: "04gc3g8k".parse().unwrap(),
        driver: Driver::Overlay,
        mode: Mode::L2,
        vni: 4097,
        subnets: vec!["10.1.0.0/16".parse().unwrap()],
        gateways: vec!["10.1.0.1".parse().unwrap()],
        mtu: 1450,
        encrypted: false,
        encrypt: Encrypt::No,
        sealed_to: Vec::new(),
        internal: false,
        backend: None,
        removing: false,
        endpoints: 5,
        nodes: vec!["host1".into(), "host2".into()],
        bridge: Some("ovb-04gc3g8k".into()),
        dns: true,
        external_names: true,
        groups: Vec::new(),
        all_groups: Vec::new(),
    }
}

#[test]
fn network_is_rendered_as_one_row() {
    assert_eq!(
        rows(&[blue()]),
        "\
NAME  DRIVER   MODE  VNI   SUBNETS      MTU   ENDPOINTS  NODES
blue  overlay  l2    4097  10.1.0.0/16  1450  5          2
"
    );
}

#[test]
fn options_are_shown_if_a_network_has_any() {
    let mut red = blue();
    red.name = "red".into();
    red.subnets.push("fd00:1::/64".parse().unwrap());
    (red.encrypted, red.encrypt, red.internal, red.removing) = (true, Encrypt::Yes, true, true);
    assert_eq!(
        rows(&[blue(), red]),
        "\
NAME  DRIVER   MODE  VNI   SUBNETS                  MTU   ENDPOINTS  NODES  OPTIONS
blue  overlay  l2    4097  10.1.0.0/16              1450  5          2      -
red   overlay  l2    4097  10.1.0.0/16,fd00:1::/64  1450  5          2      encrypted,internal,external-names,removing
"
    );
}

#[test]
fn inspect_shows_all_fields() {
    assert_eq!(
        inspect(&blue()),
        "\
Name            blue
Id              04gc3g8k
Driver          overlay
Mode            l2
Backend         -
VNI             4097
Subnets         10.1.0.0/16
Gateways        10.1.0.1
MTU             1450
Encrypted       no
Internal        no
Removing        no
Endpoints       5
Nodes           host1,host2
Bridge          ovb-04gc3g8k
DNS             yes
External names  yes
"
    );
}

#[test]
fn inspect_shows_groups_that_were_joined() {
    let mut joined = blue();
    let group = |group: &str, nodes: &[&str]| GroupInfo {
        group: group.parse().unwrap(),
        nodes: nodes.iter().map(|node| (*node).to_owned()).collect(),
    };
    joined.groups = vec![group("239.1.2.3", &["host1", "host2"]), group("ff15::7", &["host2"])];
    joined.all_groups = vec!["host3".into()];
    let text = inspect(&joined);
    let (_, end) = text.split_once("External names  yes\n").unwrap();
    assert_eq!(
        end,
        "\
All groups      host3

GROUP      NODES
239.1.2.3  host1,host2
ff15::7    host2
"
    );
}

fn create(line: &str) -> Result<NetworkCreate> {
    use clap::{Args as _, FromArgMatches};

    let command = CreateArgs::augment_args(clap::Command::new("create"));
    let matches = command.try_get_matches_from(line.split_whitespace()).unwrap();
    CreateArgs::from_arg_matches(&matches).unwrap().request()
}

#[test]
fn absent_options_are_left_to_ovld() {
    let expected = NetworkCreate {
        name: "blue".into(),
        driver: Driver::Overlay,
        mode: Mode::L2,
        subnets: Vec::new(),
        vni: None,
        encrypted: false,
        auto_encrypt: false,
        internal: false,
        mtu: None,
        backend: None,
        block_lengths: Vec::new(),
        dns: false,
        external_names: false,
    };
    assert_eq!(create("create blue"), Ok(expected));
}

#[test]
fn request_contains_all_options() {
    let line = "create blue --driver overlay --mode l3 --block 24 --block 72 --backend auto --subnet 10.1.0.0/16 --subnet fd00::/64 --vni 16777215 \
                --encrypted --internal --external-names --mtu 1400";
    let expected = NetworkCreate {
        name: "blue".into(),
        driver: Driver::Overlay,
        mode: Mode::L3,
        subnets: vec!["10.1.0.0/16".parse().unwrap(), "fd00::/64".parse().unwrap()],
        vni: Some(16_777_215),
        encrypted: true,
        auto_encrypt: false,
        internal: true,
        mtu: Some(1400),
        backend: Some(Backend::Auto),
        block_lengths: vec![24, 72],
        dns: false,
        external_names: true,
    };
    assert_eq!(create(line), Ok(expected));
}

#[test]
fn encryption_is_asked_for_in_two_ways() {
    let asked =
        |more: &str| create(&format!("create blue {more}")).map(|made| (made.encrypted, made.auto_encrypt));
    assert_eq!(asked("--encrypt yes"), Ok((true, false)));
    assert_eq!(asked("--encrypted"), Ok((true, false)));
    assert_eq!(asked("--encrypt auto"), Ok((false, true)));
    assert_eq!(asked("--encrypt no"), Ok((false, false)));
}

#[test]
fn invalid_subnet_is_a_usage_error() {
    for text in ["10.1.0.0", "10.1.0.0/33", "blue", "10.1.0.0/16,10.2.0.0/16"] {
        let result = create(&format!("create blue --subnet {text}"));
        assert!(matches!(result, Err(Error::Usage(message)) if message.starts_with('\'')), "{text}");
    }
}
