use super::*;

pub(crate) use super::sample_record as record_of;

#[test]
fn identity_is_created_once_and_kept() {
    let dir = std::env::temp_dir().join(format!("ovl-identity-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("node.key");
    let id = Identity::load_or_create(&path).unwrap().id();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    assert_eq!(Identity::load_or_create(&path).unwrap().id(), id);

    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(Identity::load_or_create(&path).unwrap_err().to_string().contains("chmod 600"));
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();

    let good = fs::read(&path).unwrap();
    let mut damaged = good.clone();
    *damaged.last_mut().unwrap() ^= 1;
    for bad in [&b""[..], &good[..good.len() - 1], b"garbage", &damaged, &[0; 5000]] {
        fs::write(&path, bad).unwrap();
        assert!(Identity::load_or_create(&path).is_err());
        assert_eq!(fs::read(&path).unwrap(), bad, "a bad file is never replaced");
    }
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn signature_is_valid_for_one_purpose() {
    let identity = Identity::ephemeral();
    let signature = identity.sign(Domain::Table, b"body");
    assert!(verify(identity.public_key(), Domain::Table, b"body", &signature));
    assert!(!verify(identity.public_key(), Domain::Object, b"body", &signature));
    assert!(!verify(identity.public_key(), Domain::Table, b"bodY", &signature));
    assert!(!verify(Identity::ephemeral().public_key(), Domain::Table, b"body", &signature));
    assert_eq!(node_id(identity.public_key()), identity.id());
}

#[test]
fn invalid_records_are_rejected() {
    let identity = Identity::ephemeral();
    let good = record_of(&identity);
    assert_eq!(open_record(&identity.sign_record(&good).unwrap()).unwrap(), good);

    let mut tampered = identity.sign_record(&good).unwrap();
    *tampered.body.last_mut().unwrap() ^= 1;
    assert!(matches!(open_record(&tampered), Err(RecordError::Signature(_))));
    let stolen = NodeRecord { id: Identity::ephemeral().id(), ..good.clone() };
    assert!(matches!(open_record(&identity.sign_record(&stolen).unwrap()), Err(RecordError::Id(_))));
    let garbage = SignedRecord { body: vec![1, 2, 3], signature: Signature([0; 64]) };
    assert!(matches!(open_record(&garbage), Err(RecordError::Wire(_))));

    for bad in [
        NodeRecord { name: String::new(), ..good.clone() },
        NodeRecord { name: "a b".to_owned(), ..good.clone() },
        NodeRecord { name: "n".repeat(64), ..good.clone() },
        NodeRecord { zone: "a b".to_owned(), ..good.clone() },
        NodeRecord { zone: "z".repeat(64), ..good.clone() },
        NodeRecord { vtep: "0.0.0.0".parse().unwrap(), ..good.clone() },
        NodeRecord { vtep: "ff02::1".parse().unwrap(), ..good.clone() },
        NodeRecord { address: "127.0.0.1:0".parse().unwrap(), ..good.clone() },
        NodeRecord { link_mtu: 10, ..good.clone() },
        NodeRecord { further: vec![good.address], ..good.clone() },
        NodeRecord { further: vec![([192, 0, 2, 9], 0).into()], ..good.clone() },
        NodeRecord { further: vec![([0, 0, 0, 0], 7940).into()], ..good.clone() },
        NodeRecord { further: (1..6).map(|port| ([192, 0, 2, 9], port).into()).collect(), ..good.clone() },
        NodeRecord { version: "\u{1b}[31m".to_owned(), ..good.clone() },
    ] {
        assert!(matches!(open_record(&identity.sign_record(&bad).unwrap()), Err(RecordError::Field(..))));
    }
}

#[test]
fn tunnel_key_is_created_once_stored_as_wg_prints_it_and_never_shown() {
    let dir = std::env::temp_dir().join(format!("ovl-tunnel-key-{}", std::process::id()));
    fs::create_dir_all(&dir).unwrap();
    let path = dir.join("tunnel.key");
    let made = TunnelSecret::load_or_create(&path).unwrap();
    let text = fs::read_to_string(&path).unwrap();
    assert_eq!(text.trim_end().len(), 44);
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(TunnelSecret::load_or_create(&path).unwrap().public(), made.public());
    assert!(!format!("{made:?}").contains(text.trim_end()));
    for bad in ["", "short", &text[1..]] {
        fs::write(&path, bad).unwrap();
        let error = format!("{:#}", TunnelSecret::load_or_create(&path).unwrap_err());
        assert!(error.contains("tunnel.key") && !error.contains(text.trim_end()), "{error}");
    }
    fs::write(&path, &text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(TunnelSecret::load_or_create(&path).unwrap_err().to_string().contains("chmod 600"));
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn record_with_an_unreachable_tunnel_is_rejected() {
    let identity = Identity::ephemeral();
    let with = |key, port| {
        let end =
            ovl_proto::record::Tunnel { key: TunnelKey(key), port, epoch: 0, rotating: false, kernel: false };
        let record = NodeRecord { tunnel: Some(end), ..record_of(&identity) };
        open_record(&identity.sign_record(&record).unwrap()).is_ok()
    };
    assert!(with([1; 32], 51940));
    assert!(!with([1; 32], 0));
    assert!(!with([0; 32], 51940));
}
