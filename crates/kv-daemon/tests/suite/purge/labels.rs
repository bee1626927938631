//! Purges of what was put under a label.

use kvtier::Parent;
use kvtier::client::PutOutcome;

use super::scan::{Needles, Sightings};
use super::{
    Block, NVME, answer, await_completed, blocks, cached, flush, namespace, only_receipt, purge, put, put_under,
};
use crate::daemon::{Daemon, command};

const PUBLISHED: [PutOutcome; 3] = [PutOutcome::Published; 3];

/// A prompt that all share, two documents behind it, and an answer that extends the first one without a label.
fn populate(daemon: &Daemon) {
    let [prompt, first, second, reply] = ["prompt", "first", "second", "reply"].map(blocks);
    put(daemon, "mine", &prompt);
    let parent = Parent::Block(prompt[2].hash);
    assert_eq!(put_under(daemon, "mine", "doc-1", parent, &first), PUBLISHED);
    assert_eq!(put_under(daemon, "mine", "doc-2", parent, &second), PUBLISHED);
    let pairs: Vec<_> = reply.iter().map(|block| (block.hash, &block.bytes[..])).collect();
    let client = super::connect(daemon);
    let mine = client.namespace("mine", super::realization("a model")).unwrap();
    let parent = super::Lineage::Chain(Parent::Block(first[2].hash));
    assert_eq!(mine.put_from(parent, &pairs, 64).unwrap(), PUBLISHED);
    drop(mine);
    client.goodbye().unwrap();
    assert_eq!(put_under(daemon, "other", "doc-1", Parent::Root, &first), PUBLISHED);
    flush(daemon);
}

/// Whether the prompt, the documents and the answer are there, and the document of the other namespace.
fn found(daemon: &Daemon) -> [bool; 5] {
    let whole = |name: &str, label: &str| {
        let cached = cached(daemon, name, &blocks(label));
        assert!(cached.iter().all(|one| *one == cached[0]), "{name} {label}: {cached:?}");
        cached[0]
    };
    [
        whole("mine", "prompt"),
        whole("mine", "first"),
        whole("mine", "reply"),
        whole("mine", "second"),
        whole("other", "first"),
    ]
}

#[test]
fn what_was_put_under_a_label_goes_with_all_that_extends_it_and_stays_gone() {
    for mode in ["invalidate", "physical"] {
        let daemon = Daemon::start(&NVME);
        populate(&daemon);
        // Labels survive a restart with the blocks that carry them.
        let daemon = Daemon::start_in(daemon.kill(), &NVME);
        assert_eq!(found(&daemon), [true; 5]);
        let generation = namespace(&daemon, "mine")["generation"].clone();
        let job = answer(&daemon, &["purge", "mine", "--mode", mode, "--label", "doc-1"]);
        assert_ne!(job["state"], "requested", "{job}");
        // As soon as it is acknowledged.
        let daemon = Daemon::start_in(daemon.kill(), &NVME);
        let expected = [true, false, false, true, true];
        assert_eq!(found(&daemon), expected, "{mode}");
        let id = job["id"].as_str().unwrap();
        await_completed(&daemon, id);
        let receipt = only_receipt(&daemon, id);
        assert_eq!(receipt["scope"]["label"], "doc-1", "{receipt:#}");
        assert_eq!(receipt["guarantee"], "verified_namespace_invalidation", "{receipt:#}");
        let evidence = &receipt["processors"][0]["evidence"][0];
        assert_eq!(evidence["objects"], 6, "{receipt:#}");
        assert!(
            !evidence["action"].as_str().unwrap().contains("not known"),
            "{receipt:#}"
        );
        assert_eq!(namespace(&daemon, "mine")["generation"], generation);
        // The same label of a namespace that has no such block, and one that nobody ever used.
        for label in ["doc-1", "doc-3"] {
            let receipt = purge(&daemon, &["mine", "--label", label]);
            assert_eq!(receipt["processors"][0]["evidence"][0]["objects"], 0, "{receipt:#}");
        }
        let parent = Parent::Block(blocks("prompt")[2].hash);
        assert_eq!(put_under(&daemon, "mine", "doc-1", parent, &blocks("first")), PUBLISHED);
        assert_eq!(cached(&daemon, "mine", &blocks("first")), [true; 3]);
    }
}

#[test]
fn a_block_that_two_documents_share_goes_with_either_also_after_a_restart() {
    let daemon = Daemon::start(&NVME);
    let shared = blocks("shared");
    assert_eq!(put_under(&daemon, "mine", "a", Parent::Root, &shared), PUBLISHED);
    flush(&daemon);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    assert_eq!(put_under(&daemon, "mine", "b", Parent::Root, &shared), PUBLISHED);
    for label in ["a", "b"] {
        let outcomes = put_under(&daemon, "mine", label, Parent::Root, &shared);
        assert_eq!(outcomes, [PutOutcome::Present; 3], "{label}");
    }
    flush(&daemon);
    let daemon = Daemon::start_in(daemon.kill(), &NVME);
    let receipt = purge(&daemon, &["mine", "--label", "b"]);
    assert_eq!(receipt["processors"][0]["evidence"][0]["objects"], 3, "{receipt:#}");
    assert_eq!(cached(&daemon, "mine", &shared), [false; 3]);
    // A third label is more than is kept: from then on it goes with every one, and the receipt says so.
    for label in ["a", "b", "c"] {
        assert_eq!(put_under(&daemon, "mine", label, Parent::Root, &shared), PUBLISHED);
    }
    assert!(daemon.count("blocks_of_any_label") >= 3);
    let receipt = purge(&daemon, &["mine", "--label", "another"]);
    let action = receipt["processors"][0]["evidence"][0]["action"].as_str().unwrap();
    assert!(action.contains("of 3 it is not known"), "{receipt:#}");
    assert_eq!(cached(&daemon, "mine", &shared), [false; 3]);
}

#[test]
fn nothing_of_labelled_blocks_nor_their_labels_is_found_on_disk() {
    let daemon = Daemon::start(&[&NVME[..], &["--encryption", "none"]].concat());
    populate(&daemon);
    let gone = [blocks("first"), blocks("reply")].concat();
    let mut needles = Needles::default();
    for Block { hash, bytes } in &gone[1..3] {
        needles.of_block(&super::hex(&hash.0), bytes);
    }
    assert_ne!(needles.in_files(&daemon.state()), Sightings::new());
    // What a record was put under lies in its sealed name.
    let label = kvtier::Label::of("doc-1").0.to_le_bytes();
    let mut files = 0;
    for directory in [daemon.state(), daemon.state().join("nvme")] {
        let Ok(entries) = std::fs::read_dir(directory) else {
            continue;
        };
        for path in entries.map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
            let bytes = std::fs::read(&path).unwrap();
            assert!(
                !bytes.windows(label.len()).any(|window| window == label),
                "{}",
                path.display()
            );
            files += 1;
        }
    }
    assert!(files >= 5, "the register, the journal, segments: {files}");
    // The other namespace keeps its own copy of the document.
    purge(&daemon, &["other", "--mode", "physical"]);
    let receipt = purge(&daemon, &["mine", "--mode", "physical", "--label", "doc-1"]);
    assert_eq!(needles.in_files(&daemon.state()), Sightings::new(), "{receipt:#}");
    assert_eq!(needles.in_memory_of(daemon.child.id()), Sightings::new(), "{receipt:#}");
    assert_eq!(found(&daemon), [true, false, false, true, false]);
}

#[test]
fn kvctl_puts_under_a_label() {
    let daemon = Daemon::start(&NVME);
    let file = daemon.directory.path().join("block");
    std::fs::write(&file, b"bytes").unwrap();
    let output = command("kvctl")
        .env("KVTIER_SOCKET", daemon.socket())
        .args(["put", "some key", "--label", "doc-9"])
        .arg(&file)
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", crate::daemon::words(&output));
    let receipt = purge(&daemon, &["default", "--label", "doc-9"]);
    assert_eq!(receipt["processors"][0]["evidence"][0]["objects"], 1, "{receipt:#}");
}
