use std::fs;
use std::path::Path;
use std::time::UNIX_EPOCH;

use super::super::evidence::{Evidence, Guarantee, Method, ProcessorReport, Standing};
use super::super::receipt::{MasterKeyNote, Raised, ReceiptScope};
use super::super::verify::verify;
use super::super::{PurgeMode, PurgeReach};
use super::*;
use crate::keys::crash_disk::{CrashDisk, Tear};

fn body(job: &str) -> ReceiptBody {
    ReceiptBody {
        purge: job.into(),
        request_id: format!("request {job}"),
        namespace: "uid-0/tenänt \"1\"\u{7}".into(),
        scope: ReceiptScope::All,
        reach: PurgeReach::Node,
        mode: PurgeMode::Physical,
        reason: "contract ended".into(),
        node: "00".repeat(16),
        generation: Some(Raised { from: 1, to: 2 }),
        requested_at: rfc3339(UNIX_EPOCH),
        acknowledged_at: rfc3339(UNIX_EPOCH),
        completed_at: rfc3339(UNIX_EPOCH),
        guarantee: Guarantee::VerifiedPhysicalPurge,
        processors: vec![ProcessorReport {
            processor: "kv-daemon".into(),
            kind: "byoc_runtime".into(),
            status: Standing::Confirmed,
            guarantee: Guarantee::VerifiedPhysicalPurge,
            reason: String::new(),
            evidence: vec![Evidence {
                tier: "nvme".into(),
                action: "records overwritten".into(),
                objects: 7,
                bytes: 1 << 40,
                method: Method::Overwritten,
                started_at: rfc3339(UNIX_EPOCH),
                completed_at: rfc3339(UNIX_EPOCH),
                residual_window_s: 0,
                verified: true,
            }],
        }],
        not_covered: vec!["copies that clients made".into()],
        master_key: MasterKeyNote {
            id: "ab".repeat(16),
            location: "state_directory".into(),
            note: String::new(),
        },
        rollback_protection: "none".into(),
        resumed: 0,
        supersedes: None,
    }
}

fn open(directory: &Path) -> (ReceiptLog, Vec<String>) {
    let mut notes = Vec::new();
    let log = ReceiptLog::open(directory, &mut notes).expect("the log opens");
    (log, notes)
}

fn refusal(directory: &Path) -> String {
    match ReceiptLog::open(directory, &mut Vec::new()) {
        Ok(_) => panic!("the log opens"),
        Err(error) => error.to_string(),
    }
}

/// As a file's lines, named by their numbers.
fn lines(text: &[u8]) -> Vec<(String, Vec<u8>)> {
    let lines = text.split(|&byte| byte == b'\n').filter(|line| !line.is_empty());
    lines
        .zip(1..)
        .map(|(line, number)| (format!("file:{number}"), line.to_vec()))
        .collect()
}

fn chain_of(directory: &Path) -> Vec<u8> {
    fs::read(directory.join(CHAIN_FILE)).expect("the chain")
}

#[test]
fn a_job_has_one_receipt_whoever_asks_how_often_and_after_a_restart() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, notes) = open(directory.path());
    assert_eq!(notes.len(), 1, "a key was made");
    let first = log.issue(&body("prg_1")).expect("issued");
    let second = log.issue(&body("prg_2")).expect("issued");
    assert_ne!(first.id, second.id);
    assert_eq!(log.issue(&body("prg_1")).expect("issued"), first);
    let keys = log.keys();
    drop(log);
    let (log, notes) = open(directory.path());
    assert!(notes.is_empty(), "{notes:?}");
    assert_eq!(log.of_job("prg_2").expect("read"), Some(second));
    assert_eq!(log.of_job("prg_3").expect("read"), None);
    assert_eq!(log.issue(&body("prg_1")).expect("issued"), first);
    assert_eq!(log.keys(), keys);
    let report = verify(&lines(&chain_of(directory.path())), &keys);
    assert!(report.verified && report.unchecked.is_empty(), "{report:?}");
    assert_eq!(report.lines.len(), 2);
}

#[test]
fn any_changed_byte_of_any_receipt_is_found() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    log.issue(&body("prg_1")).expect("issued");
    let text = chain_of(directory.path());
    let text = &text[..text.len() - 1];
    assert!(verify(&[("file:1".into(), text.to_vec())], &log.keys()).verified);
    for position in 0..text.len() {
        for bit in [0x01, 0x10, 0x20] {
            let mut altered = text.to_vec();
            altered[position] ^= bit;
            let report = verify(&[("file:1".into(), altered)], &log.keys());
            assert!(!report.verified, "byte {position} ^ {bit:#x}");
        }
    }
    let mut longer = text.to_vec();
    longer.insert(1, b' ');
    assert!(
        !verify(&[("file:1".into(), longer)], &log.keys()).verified,
        "white space too"
    );
}

#[test]
fn a_missing_link_a_fork_a_changed_order_and_a_foreign_key_are_found() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    for job in ["prg_1", "prg_2", "prg_3", "prg_4"] {
        log.issue(&body(job)).expect("issued");
    }
    let all = lines(&chain_of(directory.path()));
    let keys = log.keys();
    let words = |lines: &[(String, Vec<u8>)]| {
        let report = verify(lines, &keys);
        assert!(!report.verified, "{report:?}");
        report.chain_problems.join("; ")
    };
    let hole = [all[0].clone(), all[1].clone(), all[3].clone()];
    assert_eq!(words(&hole), "missing: numbers 3 to 3");
    let swapped = [all[1].clone(), all[0].clone()];
    assert!(words(&swapped).contains("reordered"));
    let tail = verify(&all[2..], &keys);
    assert!(tail.verified && tail.unchecked.len() == 1, "{tail:?}");
    let apart = [
        ("b:1".to_string(), all[1].1.clone()),
        ("a:1".to_string(), all[0].1.clone()),
    ];
    assert!(verify(&apart, &keys).verified, "files come in any order");

    let elsewhere = tempfile::tempdir().expect("a directory");
    let (other, _) = open(elsewhere.path());
    let report = verify(&all, &other.keys());
    assert!(!report.verified);
    assert!(
        report.lines[0]
            .problem
            .as_deref()
            .is_some_and(|problem| problem.contains("not among the keys"))
    );
    // The same key, a copy of the directory, another history.
    for file in [KEY_FILE, PUBLIC_FILE] {
        fs::copy(directory.path().join(file), elsewhere.path().join(file)).expect("copied");
    }
    fs::write(elsewhere.path().join(CHAIN_FILE), [&all[0].1[..], b"\n"].concat()).expect("written");
    let (forked, _) = open(elsewhere.path());
    forked.issue(&body("prg_9")).expect("issued");
    let both = [
        all.clone(),
        vec![("other:1".into(), lines(&chain_of(elsewhere.path()))[1].1.clone())],
    ]
    .concat();
    assert!(words(&both).contains("forked"));
    assert!(!verify(&[], &keys).verified, "nothing is no proof");
}

#[test]
fn a_rotation_that_the_old_key_signed_brings_the_new_one() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    let first_keys = log.keys();
    log.issue(&body("prg_1")).expect("issued");
    log.rotate(UNIX_EPOCH).expect("rotated");
    log.issue(&body("prg_2")).expect("issued");
    assert_eq!(log.keys().keys.len(), 2);
    drop(log);
    let (log, _) = open(directory.path());
    log.issue(&body("prg_3")).expect("issued");
    let all = lines(&chain_of(directory.path()));
    assert_eq!(all.len(), 4);
    assert!(
        verify(&all, &first_keys).verified,
        "who trusts the first key trusts the second"
    );
    let without = [all[0].clone(), all[2].clone()];
    assert!(!verify(&without, &first_keys).verified, "not without the rotation");
    assert!(verify(&all[2..3], &log.keys()).verified);
}

#[test]
fn the_key_of_a_stopped_node_is_rotated_and_a_running_ones_is_not() {
    let state = tempfile::tempdir().expect("a directory");
    assert!(matches!(
        rotate_signing_key(state.path(), UNIX_EPOCH),
        Err(KeyError::NothingToRotate { .. })
    ));
    let running = crate::keys::StateFiles::open(state.path(), None).expect("a register");
    assert!(matches!(
        rotate_signing_key(state.path(), UNIX_EPOCH),
        Err(KeyError::InUse { .. })
    ));
    drop(running);
    let (old, new) = rotate_signing_key(state.path(), UNIX_EPOCH).expect("rotated");
    let (log, _) = open(&state.path().join("receipts"));
    let kids: Vec<String> = log.keys().keys.into_iter().map(|key| key.kid).collect();
    assert_eq!(kids, [old, new]);
}

#[test]
fn a_rotation_that_was_cut_short_is_finished_or_forgotten() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    log.issue(&body("prg_1")).expect("issued");
    drop(log);
    // Before the chain had it: the key that waits signed nothing.
    SigningKey::make(&directory.path().join(NEXT_KEY_FILE)).expect("made");
    let (log, _) = open(directory.path());
    assert!(!directory.path().join(NEXT_KEY_FILE).exists());
    let old = fs::read(directory.path().join(KEY_FILE)).expect("the key");
    log.rotate(UNIX_EPOCH).expect("rotated");
    drop(log);
    // After: as if neither the wipe nor the rename had come about.
    let new = fs::read(directory.path().join(KEY_FILE)).expect("the key");
    disk::write_whole(&directory.path().join(NEXT_KEY_FILE), &new).expect("written");
    fs::write(directory.path().join(KEY_FILE), &old).expect("written");
    let (log, _) = open(directory.path());
    assert_eq!(fs::read(directory.path().join(KEY_FILE)).expect("the key"), new);
    log.issue(&body("prg_2")).expect("issued");
    assert!(verify(&lines(&chain_of(directory.path())), &log.keys()).verified);
    // The same, and the node went on: the new key is the only one that may sign.
    drop(log);
    disk::write_whole(&directory.path().join(NEXT_KEY_FILE), &new).expect("written");
    fs::write(directory.path().join(KEY_FILE), &old).expect("written");
    let (log, _) = open(directory.path());
    assert_eq!(fs::read(directory.path().join(KEY_FILE)).expect("the key"), new);
    log.issue(&body("prg_3")).expect("issued");
    assert!(verify(&lines(&chain_of(directory.path())), &log.keys()).verified);
}

#[test]
fn what_a_failed_write_left_never_stands_behind_a_later_receipt() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    log.issue(&body("prg_1")).expect("issued");
    let whole = chain_of(directory.path());
    // A longer line whose sync failed: it is in the file, and was given to nobody.
    let left = format!("{}\n{}", "x".repeat(9000), "y".repeat(50));
    fs::write(
        directory.path().join(CHAIN_FILE),
        [&whole[..], left.as_bytes()].concat(),
    )
    .expect("written");
    log.issue(&body("prg_2")).expect("issued");
    drop(log);
    let (log, notes) = open(directory.path());
    assert_eq!(notes, [] as [String; 0]);
    assert!(log.of_job("prg_2").expect("read").is_some());
}

#[test]
fn numbers_that_readers_confuse_are_text_in_a_receipt() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    let mut large = body("prg_1");
    let last_exact = (1 << 53) - 1;
    large.generation = Some(Raised {
        from: last_exact,
        to: u64::MAX,
    });
    let line = log.issue(&large).expect("issued");
    let words = r#""generation":{"from":9007199254740991,"to":"18446744073709551615"}"#;
    assert!(line.text.contains(words), "{}", line.text);
    drop(log);
    let (log, _) = open(directory.path());
    assert_eq!(log.of_job("prg_1").expect("read"), Some(line));
}

#[test]
fn receipts_of_two_nodes_are_two_chains_and_gaps_between_files_are_links_not_checked() {
    let mut keys = KeySet::default();
    let mut given = Vec::new();
    let directories = [tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two")];
    for (node, directory) in ["11", "22"].iter().zip(&directories) {
        let (log, _) = open(directory.path());
        for job in ["prg_1", "prg_2", "prg_3"] {
            let mut body = body(job);
            body.node = node.repeat(16);
            log.issue(&body).expect("issued");
            if job == "prg_2" {
                log.rotate(UNIX_EPOCH).expect("rotated");
            }
        }
        keys.keys.extend(log.keys().keys);
        for (number, (_, line)) in lines(&chain_of(directory.path())).into_iter().enumerate() {
            given.push((format!("{node}-{number}:1"), line));
        }
    }
    let report = verify(&given, &keys);
    assert!(report.verified && report.unchecked.is_empty(), "{report:?}");
    // The third entry of the first node, the rotation, is not given, nor the first of the second.
    given.remove(4);
    given.remove(2);
    let report = verify(&given, &keys);
    assert!(report.verified, "{report:?}");
    assert_eq!(report.unchecked.len(), 2, "{report:?}");
}

#[test]
fn a_key_signs_nothing_after_its_rotation_and_nothing_before_it() {
    let [directory, thief] = [tempfile::tempdir().expect("one"), tempfile::tempdir().expect("two")];
    let (log, _) = open(directory.path());
    log.issue(&body("prg_1")).expect("issued");
    // A copy of the directory, key and all, from before the rotation.
    for file in [KEY_FILE, PUBLIC_FILE, CHAIN_FILE] {
        fs::copy(directory.path().join(file), thief.path().join(file)).expect("copied");
    }
    log.rotate(UNIX_EPOCH).expect("rotated");
    let honest = lines(&chain_of(directory.path()));
    assert!(verify(&honest, &log.keys()).verified);
    let (stolen, _) = open(thief.path());
    for job in ["prg_2", "prg_3", "prg_4"] {
        stolen.issue(&body(job)).expect("issued");
    }
    let forged = lines(&chain_of(thief.path()));
    let words = |given: &[(String, Vec<u8>)]| {
        let report = verify(given, &log.keys());
        assert!(!report.verified, "{report:?}");
        report.chain_problems.join("; ")
    };
    // Where the rotation is known, a later number under the old key is nobody's.
    let given = [honest.clone(), vec![("forged:1".into(), forged[3].1.clone())]].concat();
    assert!(words(&given).contains("was replaced at number 2"), "{}", words(&given));
    // The next key, before the rotation that brought it into use.
    for file in [KEY_FILE, PUBLIC_FILE] {
        fs::copy(directory.path().join(file), thief.path().join(file)).expect("copied");
    }
    fs::write(thief.path().join(CHAIN_FILE), b"").expect("emptied");
    drop(stolen);
    let (early, _) = open(thief.path());
    early.issue(&body("prg_9")).expect("issued");
    let early = ("early:1".to_string(), lines(&chain_of(thief.path()))[0].1.clone());
    let given = [honest[1].clone(), early];
    assert!(words(&given).contains("only at number 2"), "{}", words(&given));
}

#[test]
fn a_signed_receipt_that_claims_more_than_it_shows_does_not_verify() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    let mut weak = body("prg_1");
    weak.processors[0].guarantee = Guarantee::VerifiedNamespaceInvalidation;
    let mut silent = body("prg_2");
    silent.processors[0].status = Standing::Unconfirmed;
    let mut nobody = body("prg_3");
    nobody.processors.clear();
    for body in [&weak, &silent, &nobody, &body("prg_4")] {
        log.issue(body).expect("issued");
    }
    let report = verify(&lines(&chain_of(directory.path())), &log.keys());
    let problems: Vec<_> = report
        .lines
        .iter()
        .map(|line| line.problem.as_deref().unwrap_or(""))
        .collect();
    assert!(problems[0].contains("weakest"), "{problems:?}");
    assert!(problems[1].contains("did not confirm"), "{problems:?}");
    assert!(problems[2].contains("weakest"), "{problems:?}");
    assert_eq!((problems[3], report.verified), ("", false));
}

#[test]
fn a_torn_line_is_put_aside_and_an_altered_one_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let (log, _) = open(directory.path());
    log.issue(&body("prg_1")).expect("issued");
    let whole = chain_of(directory.path());
    log.issue(&body("prg_2")).expect("issued");
    let keys = log.keys();
    drop(log);
    let both = chain_of(directory.path());
    for cut in [whole.len() + 1, both.len() - 1] {
        fs::write(directory.path().join(CHAIN_FILE), &both[..cut]).expect("written");
        let (log, notes) = open(directory.path());
        assert!(notes.iter().any(|note| note.contains("cut short")), "{notes:?}");
        assert_eq!(chain_of(directory.path()), whole);
        assert_eq!(log.of_job("prg_2").expect("read"), None);
        drop(log);
        let aside = fs::read(directory.path().join(format!("torn-at-{}", whole.len()))).expect("kept");
        assert_eq!(aside, both[whole.len()..cut]);
    }
    let mut altered = both.clone();
    altered[whole.len() / 2] ^= 1;
    fs::write(directory.path().join(CHAIN_FILE), &altered).expect("written");
    assert!(
        refusal(directory.path()).contains("altered"),
        "{}",
        refusal(directory.path())
    );
    fs::write(directory.path().join(CHAIN_FILE), &both[whole.len()..]).expect("written");
    assert!(refusal(directory.path()).contains("does not follow"));
    fs::write(directory.path().join(CHAIN_FILE), &both).expect("written");
    fs::remove_file(directory.path().join(KEY_FILE)).expect("removed");
    assert!(
        refusal(directory.path()).contains("signing.key"),
        "no other key takes over in silence"
    );
    assert!(verify(&lines(&both), &keys).verified);
}

/// The jobs of a script, and which of their receipts were given out, on a disk that stops after so many operations.
fn issued(disk: &CrashDisk, directory: &Path, stop_after: Option<usize>) -> Vec<(String, SignedLine)> {
    let log = ReceiptLog::load(Box::new(disk.clone()), directory, &mut Vec::new()).expect("the log opens");
    disk.stop_after(stop_after);
    let jobs = ["prg_1", "prg_2", "prg_3"].into_iter();
    let outcomes = jobs.map(|job| log.issue(&body(job)).map(|line| (job.to_owned(), line)));
    let given = outcomes.map_while(Result::ok).collect();
    disk.stop_after(None);
    given
}

/// Whoever opens what a crash left finds what was given out, and can go on.
fn check_image(image: Vec<u8>, directory: &Path, given: &[(String, SignedLine)], what: &str) {
    let disk = CrashDisk::of(image);
    let log = ReceiptLog::load(Box::new(disk.clone()), directory, &mut Vec::new())
        .unwrap_or_else(|error| panic!("{what}: {error}"));
    for (job, line) in given {
        assert_eq!(log.of_job(job).expect("read").as_ref(), Some(line), "{what}: {job}");
    }
    for job in ["prg_1", "prg_2", "prg_3", "prg_4"] {
        let line = log.issue(&body(job)).expect("issued");
        assert_eq!(log.of_job(job).expect("read"), Some(line), "{what}: {job}");
    }
    let report = verify(&lines(&disk.image()), &log.keys());
    assert!(report.verified && report.unchecked.is_empty(), "{what}: {report:?}");
    assert_eq!(report.lines.len(), 4, "{what}: one for each job");
}

#[test]
fn a_receipt_that_was_given_out_survives_a_crash_at_any_write_or_sync() {
    let directory = tempfile::tempdir().expect("a directory");
    let disk = CrashDisk::default();
    assert_eq!(issued(&disk, directory.path(), None).len(), 3);
    let operations = disk.operations();
    assert!(operations >= 12, "two writes and two syncs for each");
    for stop_after in 0..operations {
        let disk = CrashDisk::default();
        let given = issued(&disk, directory.path(), Some(stop_after));
        assert!(given.len() < 3);
        let what = |tear: Tear| format!("stopped after {stop_after}, {tear:?}");
        for tear in [
            Tear::Nothing,
            Tear::Everything,
            Tear::First(1),
            Tear::First(700),
            Tear::Last(1),
            Tear::Last(700),
        ] {
            check_image(disk.killed(tear), directory.path(), &given, &what(tear));
            check_image(disk.unpowered(|| tear), directory.path(), &given, &what(tear));
        }
        // Each of the writes that no sync covered may be there without the others.
        for choice in 0..1_u32 << disk.undecided() {
            let mut choices = choice;
            let image = disk.unpowered(|| {
                let tear = if choices & 1 == 1 {
                    Tear::Everything
                } else {
                    Tear::Nothing
                };
                choices >>= 1;
                tear
            });
            check_image(
                image,
                directory.path(),
                &given,
                &format!("stopped after {stop_after}, {choice:b}"),
            );
        }
    }
}

#[test]
fn a_receipt_that_could_not_be_written_is_issued_when_it_is_asked_for_again() {
    let directory = tempfile::tempdir().expect("a directory");
    let operations = {
        let disk = CrashDisk::default();
        issued(&disk, directory.path(), None);
        disk.operations()
    };
    for stop_after in 0..operations {
        let disk = CrashDisk::default();
        let log = ReceiptLog::load(Box::new(disk.clone()), directory.path(), &mut Vec::new()).expect("opens");
        disk.stop_after(Some(stop_after));
        let mut refused = 0;
        for job in ["prg_1", "prg_2", "prg_3"] {
            // A disk that is full, and not any more.
            if log.issue(&body(job)).is_err() {
                refused += 1;
                assert_eq!(log.of_job(job).expect("read"), None, "it was given to nobody");
                disk.stop_after(None);
                log.issue(&body(job)).expect("issued");
            }
        }
        assert_eq!(refused, 1);
        let report = verify(&lines(&disk.image()), &log.keys());
        assert!(report.verified && report.lines.len() == 3, "{stop_after}: {report:?}");
    }
}

#[test]
fn a_later_receipt_supersedes_the_first_and_both_stay_in_the_chain() {
    let directory = tempfile::tempdir().unwrap();
    let log = ReceiptLog::open(directory.path(), &mut Vec::new()).unwrap();
    let first = log.issue(&body("prg_1")).unwrap();
    assert_eq!(log.issue(&body("prg_1")).unwrap().id, first.id, "issued once");
    let mut second = ReceiptBody::of_line(&first.text).unwrap();
    assert_eq!(second, body("prg_1"), "what was said is read back without its place");
    second.supersedes = Some(first.id.clone());
    let second = log.reissue(&second).unwrap();
    assert_ne!(second.id, first.id);
    drop(log);
    let log = ReceiptLog::open(directory.path(), &mut Vec::new()).unwrap();
    assert_eq!(
        log.of_job("prg_1").unwrap().unwrap().id,
        second.id,
        "the latest counts after a restart too"
    );
    let lines = vec![
        ("first".to_owned(), first.text.into_bytes()),
        ("second".to_owned(), second.text.into_bytes()),
    ];
    let report = verify(&lines, &log.keys());
    assert!(report.verified, "{report:?}");
}
