use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;

fn entry(path: &str) -> Entry {
    Entry {
        token: Some("tok_1".into()),
        role: Some("admin"),
        method: "GET".into(),
        path: path.into(),
        status: Some(200),
        ..Entry::default()
    }
}

fn open(directory: &Path) -> (AuditLog, Vec<String>) {
    AuditLog::open(directory, 1 << 20).unwrap()
}

fn text(directory: &Path) -> String {
    fs::read_to_string(directory.join(AUDIT_FILE)).unwrap()
}

fn chain_of(text: &str) -> Result<Chain, Box<chain::Break>> {
    chain::read(text.as_bytes()).unwrap()
}

fn three_lines(directory: &Path) -> String {
    let (log, warnings) = open(directory);
    assert!(warnings.is_empty(), "{warnings:?}");
    for path in ["/a", "/b", "/c"] {
        log.append(&entry(path), true).unwrap();
    }
    text(directory)
}

#[test]
fn lines_follow_each_other_across_restarts_and_are_private() {
    let directory = tempfile::tempdir().unwrap();
    three_lines(directory.path());
    let (log, warnings) = open(directory.path());
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(log.append(&entry("/d"), false).unwrap(), 4);
    let chain = chain_of(&text(directory.path())).unwrap();
    assert_eq!((chain.lines, chain.torn_bytes), (4, 0));
    assert_eq!(chain.first, Some((1, NOTHING.to_string())));
    let metadata = fs::metadata(directory.path().join(AUDIT_FILE)).unwrap();
    assert_eq!(metadata.mode() & 0o777, 0o600);
}

#[test]
fn any_altered_byte_is_found() {
    let directory = tempfile::tempdir().unwrap();
    let whole = three_lines(directory.path());
    for place in 0..whole.len() {
        for flip in [1, 0x20] {
            let mut bytes = whole.clone().into_bytes();
            bytes[place] ^= flip;
            let found = chain::read(&bytes[..]).unwrap();
            // The last newline is the one byte that a cut write explains as well.
            let last = place == whole.len() - 1;
            assert!(
                found.as_ref().map_or(true, |chain| last && chain.lines == 2),
                "byte {place}: {found:?}"
            );
        }
    }
}

#[test]
fn removed_moved_and_doubled_lines_are_found() {
    let directory = tempfile::tempdir().unwrap();
    let whole = three_lines(directory.path());
    let lines: Vec<&str> = whole.lines().collect();
    for (order, line) in [
        (vec![0, 2], 2),
        (vec![1, 0, 2], 2),
        (vec![0, 1, 1, 2], 3),
        (vec![0, 2, 1], 2),
    ] {
        let text: String = order.iter().map(|index| format!("{}\n", lines[*index])).collect();
        assert_eq!(chain_of(&text).unwrap_err().line, line, "{order:?}");
    }
    for nonsense in ["\n", "{}\n", "null\n", ",\"sha256\":\"\"}\n", "\u{0}\n"] {
        assert!(chain_of(&format!("{whole}{nonsense}")).is_err(), "{nonsense:?}");
    }
    assert!(chain_of(&format!("{whole}{}\n", "x".repeat(1 << 20))).is_err());
    assert!(
        chain_of(&format!("{whole}{}", "x".repeat(1 << 20))).is_err(),
        "endless lines end the reading"
    );
}

#[test]
fn a_broken_log_is_set_aside_with_a_loud_warning_and_the_new_chain_says_so() {
    let directory = tempfile::tempdir().unwrap();
    let whole = three_lines(directory.path());
    let path = directory.path().join(AUDIT_FILE);
    fs::write(&path, whole.replace("\"/b\"", "\"/x\"")).unwrap();
    let (log, warnings) = open(directory.path());
    assert!(
        warnings[0].contains("AUDIT LOG") && warnings[0].contains("line 2"),
        "{warnings:?}"
    );
    assert_eq!(
        log.append(&entry("/d"), false).unwrap(),
        3,
        "after the last good line and the note"
    );
    let text = text(directory.path());
    let chain = chain_of(&text).unwrap();
    assert_eq!((chain.lines, chain.notes.len()), (2, 1));
    assert!(
        chain.notes[0].contains("altered") && chain.notes[0].contains("audit-broken-"),
        "{chain:?}"
    );
    let aside = fs::read_dir(directory.path())
        .unwrap()
        .find_map(|item| {
            item.unwrap()
                .file_name()
                .into_string()
                .ok()
                .filter(|name| name.contains("broken"))
        })
        .unwrap();
    assert!(
        fs::read_to_string(directory.path().join(&aside))
            .unwrap()
            .contains("\"/x\""),
        "kept as it was found"
    );
    drop(log);
    assert_eq!(open(directory.path()).1, Vec::<String>::new(), "once");
}

#[test]
fn an_unfinished_line_is_cut_off_and_the_chain_goes_on() {
    let directory = tempfile::tempdir().unwrap();
    let whole = three_lines(directory.path());
    let path = directory.path().join(AUDIT_FILE);
    for cut in 1..40 {
        fs::write(&path, &whole[..whole.len() - cut]).unwrap();
        let (log, warnings) = open(directory.path());
        assert!(warnings[0].contains("unfinished line"), "{warnings:?}");
        log.append(&entry("/d"), true).unwrap();
        let chain = chain_of(&text(directory.path())).unwrap();
        assert_eq!((chain.lines, chain.torn_bytes, chain.notes.len()), (4, 0, 1));
    }
}

#[test]
fn a_full_file_is_kept_and_the_chain_goes_on_in_the_next_across_restarts() {
    let directory = tempfile::tempdir().unwrap();
    let mut expected = 0;
    for _ in 0..3 {
        let (log, warnings) = AuditLog::open(directory.path(), 1000).unwrap();
        assert!(warnings.is_empty(), "{warnings:?}");
        for _ in 0..7 {
            expected += 1;
            assert_eq!(log.append(&entry("/a"), false).unwrap(), expected);
        }
    }
    let mut names: Vec<PathBuf> = fs::read_dir(directory.path())
        .unwrap()
        .map(|item| item.unwrap().path())
        .collect();
    names.sort();
    assert!(names.len() > 4, "{names:?}");
    let mut all = String::new();
    for name in &names {
        assert_eq!(fs::metadata(name).unwrap().mode() & 0o777, 0o600);
        all.push_str(&fs::read_to_string(name).unwrap());
    }
    assert_eq!(chain_of(&all).unwrap().lines, expected, "one chain through all files");
    // A crash between the two steps of a rotation leaves no current file.
    fs::rename(
        directory.path().join(AUDIT_FILE),
        directory.path().join(format!("audit-{:020}.jsonl", expected)),
    )
    .unwrap();
    let (log, warnings) = AuditLog::open(directory.path(), 1000).unwrap();
    assert!(warnings.is_empty(), "{warnings:?}");
    assert_eq!(log.append(&entry("/a"), false).unwrap(), expected + 1);
}

#[test]
fn a_current_file_that_does_not_follow_the_kept_one_is_a_break() {
    let directory = tempfile::tempdir().unwrap();
    let (log, _) = AuditLog::open(directory.path(), 500).unwrap();
    for _ in 0..6 {
        log.append(&entry("/a"), false).unwrap();
    }
    drop(log);
    let mut kept: Vec<PathBuf> = fs::read_dir(directory.path())
        .unwrap()
        .map(|item| item.unwrap().path())
        .collect();
    kept.sort();
    let newest = kept
        .iter()
        .rfind(|path| path.file_name().unwrap() != AUDIT_FILE)
        .unwrap();
    fs::remove_file(newest).unwrap();
    let (_, warnings) = open(directory.path());
    assert!(warnings[0].contains("does not follow"), "{warnings:?}");
    assert_eq!(open(directory.path()).1, Vec::<String>::new(), "once");
}

#[test]
fn what_comes_from_outside_is_cut_to_size() {
    let directory = tempfile::tempdir().unwrap();
    let (log, _) = open(directory.path());
    let long = "\u{1}ü".repeat(100_000);
    let hostile = Entry {
        method: long.clone(),
        path: long.clone(),
        namespace: Some(long.clone()),
        request_id: Some(long),
        ..Entry::default()
    };
    log.append(&hostile, false).unwrap();
    log.append(&entry("/a\n{\"sequence\":9}"), false).unwrap();
    let text = text(directory.path());
    assert_eq!(chain_of(&text).unwrap().lines, 2);
    assert!(text.lines().next().unwrap().len() < chain::LINE_BYTES_MAX as usize);
}

#[test]
fn a_log_that_others_can_read_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    three_lines(directory.path());
    let path = directory.path().join(AUDIT_FILE);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    assert!(
        AuditLog::open(directory.path(), 1 << 20)
            .unwrap_err()
            .to_string()
            .contains("chmod 0600")
    );
}
