use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::time::{Duration, UNIX_EPOCH};

use super::*;

fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_900_000_000)
}

fn new(role: Role) -> NewToken {
    NewToken {
        role,
        namespaces: None,
        label: String::new(),
        expires_at: None,
    }
}

const ADMIN: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

#[test]
fn a_token_is_good_until_it_is_revoked_across_restarts_and_is_nowhere_on_the_disk() {
    let directory = tempfile::tempdir().unwrap();
    let register = TokenRegister::open(directory.path(), ADMIN).unwrap();
    let wanted = NewToken {
        namespaces: Some(vec!["red/a".into()]),
        label: "nightly".into(),
        ..new(Role::Purge)
    };
    let (status, secret) = register.create(wanted, now()).unwrap();
    assert_eq!(secret.len(), 68);
    let path = directory.path().join(TOKENS_FILE);
    assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(!text.contains(&secret[4..]) && !text.contains(ADMIN), "{text}");
    for register in [&register, &TokenRegister::open(directory.path(), ADMIN).unwrap()] {
        let caller = register.authenticate(&secret, now()).expect("a good token");
        assert_eq!((caller.token.as_str(), caller.role), (status.id.as_str(), Role::Purge));
        assert_eq!(caller.namespaces, Some(vec!["red/a".to_string()]));
        assert_eq!(register.authenticate(ADMIN, now()).unwrap().role, Role::Admin);
        for wrong in ["", &secret[..67], &secret.to_uppercase(), &text, &"a".repeat(1 << 20)] {
            assert_eq!(register.authenticate(wrong, now()), None);
        }
    }
    register.revoke(&status.id).unwrap();
    assert_eq!(register.authenticate(&secret, now()), None);
    assert!(!register.is_good(&status.id, now()));
    let again = TokenRegister::open(directory.path(), ADMIN).unwrap();
    assert_eq!(
        again.authenticate(&secret, now()),
        None,
        "a revoked token does not come back"
    );
    assert_eq!(register.revoke(&status.id), Err(TokenError::Unknown(status.id)));
    assert_eq!(register.revoke(FILE_TOKEN_ID), Err(TokenError::OfTheFile));
}

#[test]
fn a_token_expires_to_the_second() {
    let directory = tempfile::tempdir().unwrap();
    let register = TokenRegister::open(directory.path(), ADMIN).unwrap();
    let expires = now() + Duration::from_secs(10);
    let wanted = NewToken {
        expires_at: Some(rfc3339::format(expires)),
        ..new(Role::Read)
    };
    let (status, secret) = register.create(wanted, now()).unwrap();
    let before = expires - Duration::from_secs(1);
    assert!(register.authenticate(&secret, before).is_some() && register.is_good(&status.id, before));
    assert!(register.authenticate(&secret, expires).is_none() && !register.is_good(&status.id, expires));
    assert_eq!(register.list().len(), 2, "expired ones are listed");
}

#[test]
fn what_cannot_be_a_token_is_refused_and_nothing_is_kept() {
    let directory = tempfile::tempdir().unwrap();
    let register = TokenRegister::open(directory.path(), ADMIN).unwrap();
    let names = |names: &[&str]| NewToken {
        namespaces: Some(names.iter().map(ToString::to_string).collect()),
        ..new(Role::Read)
    };
    let expires = |text: &str| NewToken {
        expires_at: Some(text.into()),
        ..new(Role::Read)
    };
    let long = "a".repeat(257);
    for wrong in [
        names(&[]),
        names(&[""]),
        names(&["/a"]),
        names(&["a/"]),
        names(&[&long]),
        names(&["a"; 65]),
        expires("tomorrow"),
        expires("2001-01-01T00:00:00Z"),
        NewToken {
            label: long.clone(),
            ..new(Role::Read)
        },
    ] {
        assert!(
            matches!(register.create(wanted(&wrong), now()), Err(TokenError::Invalid(_))),
            "{wrong:?}"
        );
    }
    assert_eq!(register.list().len(), 1);
    assert!(!directory.path().join(TOKENS_FILE).exists());
}

fn wanted(new: &NewToken) -> NewToken {
    new.clone()
}

#[test]
fn a_register_that_cannot_be_written_keeps_nothing_and_forgets_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let register = TokenRegister::open(directory.path(), ADMIN).unwrap();
    let (status, secret) = register.create(new(Role::Read), now()).unwrap();
    let path = directory.path().join(TOKENS_FILE);
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir_all(path.join("in the way")).unwrap();
    assert!(matches!(
        register.create(new(Role::Read), now()),
        Err(TokenError::Unavailable(_))
    ));
    assert!(matches!(register.revoke(&status.id), Err(TokenError::Unavailable(_))));
    assert_eq!(register.list().len(), 2);
    assert!(register.authenticate(&secret, now()).is_some());
}

#[test]
fn a_register_that_others_can_read_or_that_makes_no_sense_lets_nobody_start() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join(TOKENS_FILE);
    for text in [
        "",
        "{}",
        r#"{"version": 2, "tokens": []}"#,
        r#"{"version": 1, "tokens": [{"id": "tok_1"}]}"#,
        r#"{"version": 1, "tokens": [], "more": 1}"#,
        r#"{"version": 1, "tokens": [{"id": "tok_1", "sha256": "00", "role": "read", "namespaces": null, "label": "", "created_at": "", "expires_at": null}]}"#,
    ] {
        std::fs::write(&path, text).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        let words = TokenRegister::open(directory.path(), ADMIN).unwrap_err();
        assert!(words.contains(TOKENS_FILE) && words.contains("put it right"), "{words}");
    }
    std::fs::write(&path, r#"{"version": 1, "tokens": []}"#).unwrap();
    TokenRegister::open(directory.path(), ADMIN).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(
        TokenRegister::open(directory.path(), ADMIN)
            .unwrap_err()
            .contains("chmod 0600")
    );
}
