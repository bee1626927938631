use super::*;

fn settings() -> Settings {
    Settings {
        state_dir: PathBuf::from("/tmp/kvtier-settings-test"),
        ..Settings::default()
    }
}

#[test]
fn the_defaults_pass_once_a_state_directory_is_named() {
    let checked = settings().check().expect("defaults");
    assert_eq!(checked.socket, PathBuf::from("/tmp/kvtier-settings-test/kvtier.sock"));
    assert_eq!(checked.core().host_bytes, GIB);
}

#[test]
fn a_refused_field_is_named_with_its_value_and_a_remedy() {
    let cases: Vec<(&str, Settings)> = vec![
        (
            "state_dir",
            Settings {
                state_dir: PathBuf::new(),
                ..settings()
            },
        ),
        (
            "socket",
            Settings {
                socket: PathBuf::from("/".to_string() + &"x".repeat(120)),
                ..settings()
            },
        ),
        (
            "socket_mode",
            Settings {
                socket_mode: 0o066,
                ..settings()
            },
        ),
        (
            "host_bytes",
            Settings {
                host_bytes: 4096,
                ..settings()
            },
        ),
        (
            "host_segment_bytes",
            Settings {
                host_segment_bytes: 5000,
                ..settings()
            },
        ),
        (
            "nvme_device",
            Settings {
                nvme_device: Some(std::path::PathBuf::new()),
                ..settings()
            },
        ),
        (
            "nvme_discard",
            Settings {
                nvme_discard: true,
                ..settings()
            },
        ),
        (
            "nvme_flush_interval_ms",
            Settings {
                nvme_flush_interval_ms: 0,
                ..settings()
            },
        ),
        (
            "nvme_flush_interval_ms",
            Settings {
                nvme_flush_interval_ms: 3_600_001,
                ..settings()
            },
        ),
        (
            "master_key_file",
            Settings {
                master_key_file: Some(PathBuf::new()),
                ..settings()
            },
        ),
        (
            "block_bytes_max",
            Settings {
                block_bytes_max: 100,
                ..settings()
            },
        ),
        (
            "nvme_bytes",
            Settings {
                nvme_bytes: MIB,
                ..settings()
            },
        ),
        (
            "nvme_segment_bytes",
            Settings {
                nvme_bytes: GIB,
                nvme_segment_bytes: 4097,
                ..settings()
            },
        ),
        (
            "lease_ttl_ms",
            Settings {
                lease_ttl_ms: 0,
                ..settings()
            },
        ),
        (
            "clients_max",
            Settings {
                clients_max: 0,
                ..settings()
            },
        ),
        (
            "nvme_queue_depth",
            Settings {
                nvme_queue_depth: 4096,
                ..settings()
            },
        ),
    ];
    for (field, refused) in cases {
        let error = refused.check().expect_err(field);
        assert_eq!(error.field, field);
        assert!(!error.remedy.is_empty() && !error.value.is_empty(), "{error}");
    }
}

#[test]
fn domains_that_nobody_can_join_or_that_overlap_are_refused() {
    let domain = |name: &str, uids: &[u32]| DomainSettings {
        name: name.to_string(),
        uids: uids.to_vec(),
        ..DomainSettings::default()
    };
    for domains in [
        vec![domain("a", &[])],
        vec![domain("a/b", &[1])],
        vec![domain("uid-7", &[1])],
        vec![domain("a", &[1]), domain("a", &[2])],
        vec![domain("a", &[1]), domain("b", &[1])],
    ] {
        let error = Settings { domains, ..settings() }.check().expect_err("refused");
        assert_eq!(error.field, "domains");
    }
    assert!(
        Settings {
            domains: vec![domain("a", &[1]), domain("b", &[2])],
            ..settings()
        }
        .check()
        .is_ok()
    );
}
