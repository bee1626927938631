//! A peer that is dead, slow or lies costs a miss.

use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::{Plan, await_connected, bytes_of, get, put, sum_of_peers, until};
use crate::daemon::Daemon;

#[test]
fn a_peer_that_is_killed_is_a_miss_and_is_reached_again_when_it_is_back() {
    let plan = Plan::on_loopback(2);
    let mut nodes = plan.start_all();
    put(&nodes[0], "before");
    assert_eq!(get(&nodes[1], "before").as_deref(), Some("remote"));
    put(&nodes[0], "lost");
    let directory = nodes.remove(0).kill();
    let begun = Instant::now();
    assert_eq!(get(&nodes[0], "lost"), None);
    assert!(begun.elapsed() < Duration::from_secs(10));
    let back = plan.start_in(0, directory);
    await_connected(&nodes[0], 1);
    put(&back, "after");
    until("its blocks are read again", || get(&nodes[0], "after").is_some());
}

#[test]
fn a_peer_that_stops_costs_its_time_and_then_nothing() {
    let plan = Plan::on_loopback(2);
    let nodes = plan.start_all();
    put(&nodes[0], "stuck");
    nodes[0].signal(Signal::STOP);
    for _ in 0..6 {
        assert_eq!(get(&nodes[1], "stuck"), None);
    }
    assert!(sum_of_peers(&nodes[1], "late") >= 3);
    nodes[0].signal(Signal::CONT);
    until("it is asked again", || get(&nodes[1], "stuck").is_some());
}

#[test]
fn bytes_unlike_their_checksum_are_a_miss_and_counted() {
    let plan = Plan::on_loopback(3);
    let nodes = plan.start_all();
    put(&nodes[0], "altered");
    // The checksum is taken when it is first lent.
    assert_eq!(get(&nodes[1], "altered").as_deref(), Some("remote"));
    // The others must not have it: only its first holder is asked.
    assert!(
        nodes[1]
            .kvctl()
            .args(["delete", "altered"])
            .status()
            .expect("runs")
            .success()
    );
    assert!(
        alter(&nodes[0], &bytes_of("altered")) > 0,
        "the block is somewhere in its memory"
    );
    assert_eq!(get(&nodes[2], "altered"), None);
    assert_eq!(sum_of_peers(&nodes[2], "corrupt"), 1);
    assert_eq!(sum_of_peers(&nodes[2], "blocks"), 0);
}

/// Flips a byte in the middle of each place in the daemon's shared memory where these bytes lie.
fn alter(daemon: &Daemon, bytes: &[u8]) -> usize {
    let pid = daemon.child.id();
    let memory = OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{pid}/mem"))
        .expect("our own child's memory");
    let mut altered = 0;
    for line in std::fs::read_to_string(format!("/proc/{pid}/maps"))
        .expect("its maps")
        .lines()
    {
        if !line.contains("memfd:") {
            continue;
        }
        let (from, to) = line
            .split_once(' ')
            .expect("a range")
            .0
            .split_once('-')
            .expect("a range");
        let from = u64::from_str_radix(from, 16).expect("an address");
        let to = u64::from_str_radix(to, 16).expect("an address");
        let mut content = vec![0; usize::try_from(to - from).expect("a mapping")];
        if memory.read_exact_at(&mut content, from).is_err() {
            continue;
        }
        for at in (0..content.len().saturating_sub(bytes.len())).step_by(4096) {
            if content[at..].starts_with(bytes) {
                let middle = at + bytes.len() / 2;
                memory
                    .write_all_at(&[!content[middle]], from + middle as u64)
                    .expect("written");
                altered += 1;
            }
        }
    }
    altered
}

#[test]
fn a_clients_deletion_here_does_not_reach_peers() {
    let plan = Plan::on_loopback(2);
    let nodes = plan.start_all();
    put(&nodes[0], "kept");
    assert_eq!(get(&nodes[1], "kept").as_deref(), Some("remote"));
    assert!(
        nodes[1]
            .kvctl()
            .args(["delete", "kept"])
            .status()
            .expect("runs")
            .success()
    );
    assert_eq!(get(&nodes[0], "kept").as_deref(), Some("host"));
}

#[test]
fn more_than_fits_in_the_time_comes_in_part_and_holds_nothing_up() {
    let plan = Plan::on_loopback(2).with(&["--host-bytes", "64MiB"]);
    let flags = |member| plan.flags_of(member);
    let start = |member, settings: &str| {
        let flags: Vec<String> = flags(member);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        Daemon::start_with(&flags, settings)
    };
    let holder = start(0, &Plan::settings());
    // A millisecond, in which next to nothing can be read.
    let hasty = start(1, &format!("peer_fetch_timeout_ms = 1\n{}", Plan::settings()));
    await_connected(&hasty, 1);
    for key in 0..20 {
        put(&holder, &format!("key {key}"));
    }
    // Each is a miss or right, and the peer is not blamed for the haste.
    let found = (0..20)
        .filter(|key| get(&hasty, &format!("key {key}")).is_some())
        .count();
    eprintln!("{found} of 20 came within a millisecond each");
    holder.settle();
    hasty.settle();
}
