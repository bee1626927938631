use kvtier::settings::Encryption;

use super::{Configuration, ConfigurationError, Origin, Sources};

fn sources(environment: &[(&str, &str)], flags: &[(&'static str, &'static str, &str)]) -> Sources {
    Sources {
        file: None,
        environment: environment
            .iter()
            .map(|(name, value)| ((*name).into(), (*value).into()))
            .collect(),
        flags: flags
            .iter()
            .map(|(field, flag, text)| (*field, *flag, (*text).into()))
            .collect(),
        root: false,
    }
}

fn with_file(text: &str, mut sources: Sources) -> Result<Configuration, ConfigurationError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("kv-daemon.toml");
    std::fs::write(&path, text).unwrap();
    sources.file = Some(path);
    sources.load()
}

#[test]
fn flags_win_over_variables_and_these_over_the_file() {
    let file = "state_dir = \"/f\"\nhost_bytes = \"16MiB\"\nnvme_bytes = 67108864\nlease_ttl_ms = 5\n";
    let sources = sources(
        &[
            ("KVTIER_HOST_BYTES", "32MiB"),
            ("KVTIER_LEASE_TTL_MS", "7"),
            ("HOME", "/h"),
        ],
        &[("host_bytes", "--host-bytes", "64MiB")],
    );
    let configuration = with_file(file, sources).unwrap();
    assert_eq!(configuration.node.state_dir.to_str(), Some("/f"));
    assert_eq!(configuration.node.host_bytes, 64 << 20);
    assert_eq!(configuration.node.nvme_bytes, 64 << 20);
    assert_eq!(configuration.node.lease_ttl_ms, 7);
    assert_eq!(configuration.origins["host_bytes"], Origin::Flag("--host-bytes".into()));
    assert_eq!(
        configuration.origins["lease_ttl_ms"],
        Origin::Environment("KVTIER_LEASE_TTL_MS".into())
    );
}

#[test]
fn members_are_separated_by_commas_or_an_array() {
    let flags = [
        ("peers", "--peers", "a:1, b:2"),
        ("peer_listen", "--peer-listen", "127.0.0.1:1"),
        ("peer_secret_file", "--peer-secret-file", "/s"),
    ];
    let configuration = sources(&[("HOME", "/h"), ("KVTIER_PEERS", "[\"c:3\"]")], &flags)
        .load()
        .unwrap();
    assert_eq!(configuration.node.peers, ["a:1", "b:2"]);
    let file = "peers = [\"d:4\"]\npeer_listen = \"127.0.0.1:1\"\npeer_secret_file = \"/s\"\n";
    let configuration = with_file(file, sources(&[("HOME", "/h")], &[])).unwrap();
    assert_eq!(configuration.node.peers, ["d:4"]);
}

#[test]
fn an_error_names_the_field_the_value_the_place_and_the_remedy() {
    let bad_size = sources(&[("KVTIER_NVME_BYTES", "many"), ("HOME", "/h")], &[])
        .load()
        .unwrap_err();
    assert_eq!(bad_size.field, "nvme_bytes");
    let words = bad_size.to_string();
    assert!(
        words.contains("KVTIER_NVME_BYTES") && words.contains("\"many\"") && words.contains("64MiB"),
        "{words}"
    );

    let misspelt = with_file("host_byte = 1", sources(&[("HOME", "/h")], &[]))
        .unwrap_err()
        .to_string();
    assert!(
        misspelt.contains("did you mean host_bytes?") && misspelt.contains("kv-daemon.toml"),
        "{misspelt}"
    );

    let too_small = sources(&[("HOME", "/h")], &[("host_bytes", "--host-bytes", "1KiB")])
        .load()
        .unwrap_err();
    assert_eq!(too_small.field, "host_bytes");
    assert_eq!(too_small.origin, Origin::Flag("--host-bytes".into()));

    let wrong_word = sources(&[("HOME", "/h")], &[("clock", "--clock", "sundial")])
        .load()
        .unwrap_err()
        .to_string();
    assert!(
        wrong_word.contains("sundial") && wrong_word.contains("system"),
        "{wrong_word}"
    );

    let no_toml = with_file("host_bytes = ", sources(&[("HOME", "/h")], &[]))
        .unwrap_err()
        .to_string();
    assert!(no_toml.contains("no TOML"), "{no_toml}");
}

#[test]
fn a_device_and_discards_come_from_every_layer() {
    let defaults = sources(&[("HOME", "/h")], &[]).load().unwrap();
    assert_eq!(
        (defaults.node.nvme_device.as_ref(), defaults.node.nvme_discard),
        (None, false)
    );
    let layered = sources(
        &[("KVTIER_NVME_DISCARD", "true"), ("HOME", "/h")],
        &[("nvme_device", "--nvme-device", "/dev/flag")],
    );
    let layered = with_file("nvme_device = \"/dev/file\"\n", layered).unwrap();
    assert_eq!(layered.node.nvme_device.as_deref(), Some("/dev/flag".as_ref()));
    assert!(layered.node.nvme_discard);
    let again = with_file(&layered.to_toml(), sources(&[("HOME", "/h")], &[])).unwrap();
    assert_eq!(again.to_json(), layered.to_json());
}

#[test]
fn encryption_key_file_and_flush_interval_come_from_every_layer() {
    let defaults = sources(&[("HOME", "/h")], &[]).load().unwrap();
    assert_eq!(defaults.node.encryption, Encryption::Aes256Gcm);
    assert_eq!(defaults.node.master_key_file, None);
    assert_eq!(defaults.node.nvme_flush_interval_ms, 1000);
    let file = "encryption = \"none\"\nmaster_key_file = \"/f/key\"\nnvme_flush_interval_ms = 5\n";
    let layered = sources(
        &[("KVTIER_NVME_FLUSH_INTERVAL_MS", "250"), ("HOME", "/h")],
        &[("master_key_file", "--master-key-file", "/flag/key")],
    );
    let layered = with_file(file, layered).unwrap();
    assert_eq!(layered.node.encryption, Encryption::None);
    assert_eq!(layered.node.master_key_file.as_deref(), Some("/flag/key".as_ref()));
    assert_eq!(layered.node.nvme_flush_interval_ms, 250);
    let again = with_file(&layered.to_toml(), sources(&[("HOME", "/h")], &[])).unwrap();
    assert_eq!(again.to_json(), layered.to_json());
    let words = sources(&[("KVTIER_ENCRYPTION", "rot13"), ("HOME", "/h")], &[])
        .load()
        .unwrap_err()
        .to_string();
    assert!(
        words.contains("rot13") && words.contains("aes-256-gcm") && words.contains("none"),
        "{words}"
    );
}

#[test]
fn an_address_that_others_can_reach_is_refused() {
    for address in ["0.0.0.0:80", "[::]:80", "192.0.2.1:80"] {
        let words = sources(&[("HOME", "/h")], &[("http", "--http", address)])
            .load()
            .unwrap_err()
            .to_string();
        assert!(words.contains("loopback") && words.contains("TLS"), "{words}");
    }
    for address in ["127.0.0.1:0", "[::1]:80", "localhost:80"] {
        assert!(
            sources(&[("HOME", "/h")], &[("http", "--http", address)])
                .load()
                .unwrap()
                .http
                .is_some()
        );
    }
    assert!(
        sources(&[("HOME", "/h")], &[("http", "--http", "off")])
            .load()
            .unwrap()
            .http
            .is_none()
    );
}

#[test]
fn beyond_loopback_the_admin_server_needs_both_files_of_tls() {
    let of = |settings: &str| with_file(settings, sources(&[("HOME", "/h")], &[]));
    let both = "http_tls_certificate_file = \"/c\"\nhttp_tls_key_file = \"/k\"\n";
    let open = of(&format!("{both}http = \"0.0.0.0:9640\"\n")).unwrap();
    assert_eq!(open.http, Some("0.0.0.0:9640".parse().unwrap()));
    let again = with_file(&open.to_toml(), sources(&[("HOME", "/h")], &[])).unwrap();
    assert_eq!(again.to_json(), open.to_json());
    for (settings, field) in [
        ("http_tls_certificate_file = \"/c\"", "http_tls_key_file"),
        ("http_tls_key_file = \"/k\"", "http_tls_certificate_file"),
        ("http_tls_client_ca_file = \"/a\"", "http_tls_certificate_file"),
    ] {
        let error = of(settings).unwrap_err();
        assert_eq!(error.field, field, "{error}");
    }
    let words = of("http = \"0.0.0.0:9640\"").unwrap_err().to_string();
    assert!(
        words.contains("http_tls_certificate_file") && words.contains("forward the port"),
        "{words}"
    );
}

#[test]
fn bounds_of_the_admin_server_are_checked() {
    for wrong in [
        "http_requests_per_second_max = 0",
        "http_requests_burst_max = 0",
        "http_failed_authentications_per_second_max = 0",
        "http_event_subscribers_max = 0",
        "http_event_subscribers_max = 32",
        "audit_file_bytes_max = \"1KiB\"",
    ] {
        let error = with_file(wrong, sources(&[("HOME", "/h")], &[])).unwrap_err();
        assert!(wrong.starts_with(&error.field), "{error}");
    }
}

#[test]
fn a_socket_mode_is_read_as_octal() {
    let mode = |text| sources(&[("HOME", "/h")], &[("socket_mode", "--socket-mode", text)]).load();
    assert_eq!(mode("0666").unwrap().node.socket_mode, 0o666);
    assert_eq!(mode("0o660").unwrap().node.socket_mode, 0o660);
    assert!(mode("888").is_err());
    let from_file = with_file("socket_mode = 0o666", sources(&[("HOME", "/h")], &[])).unwrap();
    assert_eq!(from_file.node.socket_mode, 0o666);
    assert!(
        with_file("socket_mode = 666", sources(&[("HOME", "/h")], &[])).is_err(),
        "decimal 666 is not meant"
    );
}

#[test]
fn a_variable_of_somebody_else_is_a_warning() {
    let configuration = sources(&[("KVTIER_PORT", "tcp://10.0.0.1:80"), ("HOME", "/h")], &[])
        .load()
        .unwrap();
    assert_eq!(configuration.warnings.len(), 1, "{:?}", configuration.warnings);
}

#[test]
fn effective_settings_read_back_to_themselves() {
    let flags = [
        ("socket_mode", "--socket-mode", "0660"),
        ("numa_node", "--numa-node", "0"),
        ("nvme_bytes", "--nvme-bytes", "1.5GiB"),
        ("lock_memory", "--lock-memory", "false"),
    ];
    let mut once = sources(&[("HOME", "/h")], &flags);
    once.environment
        .insert("KVTIER_DOMAINS".into(), r#"[{"name": "a", "uids": [7]}]"#.into());
    let first = once.load().unwrap();
    let second = with_file(&first.to_toml(), sources(&[("HOME", "/h")], &[])).unwrap();
    assert_eq!(first.to_json(), second.to_json());
    assert_eq!(second.node.domains[0].uids, [7]);
}

#[test]
fn the_state_directory_follows_the_user() {
    let state_dir = |environment: &[(&str, &str)], root| {
        let sources = Sources {
            root,
            ..sources(environment, &[])
        };
        sources
            .load()
            .map(|configuration| configuration.node.state_dir.to_str().unwrap().to_string())
    };
    assert_eq!(state_dir(&[("HOME", "/h")], false).unwrap(), "/h/.local/state/kvtier");
    assert_eq!(
        state_dir(&[("HOME", "/h"), ("XDG_STATE_HOME", "/x")], false).unwrap(),
        "/x/kvtier"
    );
    assert_eq!(state_dir(&[("HOME", "/h")], true).unwrap(), "/var/lib/kvtier");
    assert_eq!(state_dir(&[("KVTIER_STATE_DIR", "/s")], true).unwrap(), "/s");
    assert!(state_dir(&[], false).is_err());
}
