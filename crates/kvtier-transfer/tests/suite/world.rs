//! Two hosts, made of network namespaces and virtual cables with Soft-RoCE on them: what a wire can do to a transport.
//!
//! Runs where [`WORLD`] is set, by the guest that `cargo xtask test rdma` boots: it needs root and a kernel with these
//! drivers, and changes the machine's network.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_transfer::rdma::{Verbs, VerbsSettings};
use kvtier_transfer::{Direction, Peer, RailReport, RemoteAccess, Transfer, Transport};

use crate::child::{Child, SEED, Start};
use crate::stand::{Kind, Memory, PATIENCE, pattern, piece};

const WORLD: &str = "KVTIER_VERBS_WORLD";
const MIB: usize = 1 << 20;

/// A namespace `far`, and cables to it: `near0`–`far0`, `near1`–`far1`, each a network and an RDMA device at both ends.
struct World {
    cables: usize,
}

fn run(line: &str) {
    let status = Command::new("/bin/sh").args(["-c", line]).status().expect("a shell");
    assert!(status.success(), "{line}: {status}");
}

impl World {
    fn make(cables: usize, far_mtu: u32) -> Option<World> {
        if std::env::var_os(WORLD).is_none() {
            println!("skipped: verbs world: two hosts on one machine: run `cargo xtask test rdma`");
            return None;
        }
        run("/bin/ip netns add far; /bin/ip -n far link set lo up");
        for at in 0..cables {
            run(&format!(
                "/bin/ip link add near{at} type veth peer name far{at} && /bin/ip link set far{at} netns far"
            ));
            run(&format!("/bin/ip addr add 10.9.{at}.1/24 dev near{at}"));
            run(&format!("/bin/ip -n far addr add 10.9.{at}.2/24 dev far{at}"));
            run(&format!(
                "/bin/ip link set near{at} mtu 4200 up; /bin/ip -n far link set far{at} mtu {far_mtu} up"
            ));
            run(&format!("/bin/rdma link add rxnear{at} type rxe netdev near{at}"));
            run(&format!(
                "/bin/ip netns exec far /bin/rdma link add rxfar{at} type rxe netdev far{at}"
            ));
        }
        for at in 0..cables {
            for device in [format!("rxnear{at}"), format!("rxfar{at}")] {
                wait_for_address(&device);
            }
        }
        Some(World { cables })
    }

    fn devices(&self, side: &str) -> Vec<String> {
        (0..self.cables).map(|at| format!("rx{side}{at}")).collect()
    }

    /// The far host serves memory; this one connects to it.
    fn connect(&self, bytes: usize) -> (Verbs, Child, Box<dyn Peer>) {
        let devices = self.devices("far").join(",");
        let child = Start {
            kind: Kind::Verbs,
            bytes,
            listen: "10.9.0.2:0",
            devices: &devices,
            namespace: "far",
        }
        .run();
        let verbs = Verbs::start(VerbsSettings {
            devices: self.devices("near"),
            ..VerbsSettings::default()
        });
        let verbs = verbs.expect("the devices are there");
        let peer = verbs.connect(&child.address, PATIENCE).expect("connected");
        (verbs, child, peer)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        for at in 0..self.cables {
            let line =
                format!("/bin/rdma link del rxnear{at}; /bin/rdma link del rxfar{at}; /bin/ip link del near{at}");
            let _ = Command::new("/bin/sh").args(["-c", &line]).status();
        }
        let _ = Command::new("/bin/ip").args(["netns", "del", "far"]).status();
    }
}

fn wait_for_address(device: &str) {
    let until = Instant::now() + Duration::from_secs(10);
    let path = format!("/sys/class/infiniband/{device}/ports/1/gids/1");
    while !std::fs::read_to_string(&path).is_ok_and(|gid| gid.contains("ffff:")) {
        assert!(Instant::now() < until, "{device} gets no address");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Local memory that the near host's NICs know.
fn local(verbs: &Verbs, bytes: usize) -> Memory {
    let mut memory = Memory::new(bytes);
    let registered = verbs.register(&memory.region, None, RemoteAccess::Read);
    memory.registration = Some(registered.expect("registered"));
    memory
}

struct Reader {
    local: Memory,
    child: Child,
    peer: Box<dyn Peer>,
    _verbs: Verbs,
}

impl Reader {
    fn new(world: &World, bytes: usize) -> Reader {
        let (verbs, child, peer) = world.connect(bytes);
        Reader {
            local: local(&verbs, bytes),
            child,
            peer,
            _verbs: verbs,
        }
    }

    /// Reads everything and checks it. False for a failure; a success with wrong bytes is one of the test.
    fn read(&self, deadline: Duration) -> bool {
        let bytes = self.local.region.bytes();
        let _ = self.local.all().copy_from_slice(&vec![0xdb; bytes]);
        let read = piece(&self.local, 0, &self.child.region, 0, bytes, Direction::Read);
        let outcome = self.peer.submit(vec![read], deadline).map(Transfer::wait);
        let is_done = matches!(outcome, Ok(Ok(())));
        if is_done {
            assert!(
                self.local.bytes(0, bytes) == pattern(SEED, 0, bytes),
                "done with wrong bytes"
            );
        } else {
            println!("not done: {outcome:?}");
        }
        is_done
    }

    fn until_read(&self, patience: Duration) {
        let until = Instant::now() + patience;
        while !self.read(Duration::from_secs(2)) {
            assert!(Instant::now() < until, "it does not come back: {:?}", self.peer.rails());
        }
    }

    fn rail(&self, at: usize) -> RailReport {
        let name = format!("rxnear{at} ");
        let rails = self.peer.rails();
        let mut of_nic = rails.iter().filter(|rail| rail.name.starts_with(&name));
        of_nic
            .next()
            .cloned()
            .unwrap_or_else(|| panic!("no rail of {name}: {rails:?}"))
    }
}

#[test]
fn bytes_cross_from_host_to_host() {
    let Some(world) = World::make(1, 4200) else { return };
    let reader = Reader::new(&world, 8 * MIB);
    for _ in 0..3 {
        assert!(reader.read(PATIENCE));
    }
}

#[test]
fn hosts_with_different_mtus_agree_on_the_smaller_one() {
    let Some(world) = World::make(1, 1500) else { return };
    run("/bin/ip link set near0 mtu 4200");
    let reader = Reader::new(&world, 4 * MIB);
    assert!(reader.read(PATIENCE));
    assert_eq!(reader.rail(0).errors, 0);
}

#[test]
fn lost_packets_cost_time_and_no_bytes() {
    let Some(world) = World::make(1, 4200) else { return };
    let reader = Reader::new(&world, 4 * MIB);
    run("/bin/tc qdisc add dev near0 root netem loss 1%");
    run("/bin/ip netns exec far /bin/tc qdisc add dev far0 root netem loss 1%");
    let done = (0..8).filter(|_| reader.read(Duration::from_secs(20))).count();
    assert_eq!(done, 8, "{:?}", reader.peer.rails());
    let retries = "/sys/class/infiniband/rxnear0/ports/1/hw_counters";
    let lost: u64 = [
        "completer_retry_err",
        "rcvd_seq_err",
        "rcvd_rnr_err",
        "retry_rnr_exceeded_err",
        "out_of_seq_request",
    ]
    .iter()
    .filter_map(|name| {
        std::fs::read_to_string(format!("{retries}/{name}"))
            .ok()?
            .trim()
            .parse::<u64>()
            .ok()
    })
    .sum();
    println!("the device counts {lost} retries");
}

#[test]
fn a_link_that_went_down_is_used_again_when_it_is_up() {
    let Some(world) = World::make(1, 4200) else { return };
    let reader = Reader::new(&world, 2 * MIB);
    assert!(reader.read(PATIENCE));
    for _ in 0..2 {
        run("/bin/ip link set near0 down");
        let begun = Instant::now();
        assert!(!reader.read(Duration::from_secs(1)), "read over a link that is down");
        assert!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
        run("/bin/ip link set near0 up");
        reader.until_read(Duration::from_secs(20));
    }
    assert!(reader.rail(0).reconnects > 0);
}

#[test]
fn one_of_two_rails_goes_down_while_the_other_carries_on_and_comes_back() {
    let Some(world) = World::make(2, 4200) else { return };
    let reader = Reader::new(&world, 4 * MIB);
    assert!(reader.read(PATIENCE));
    let both = (reader.rail(0).bytes, reader.rail(1).bytes);
    assert!(both.0 > 0 && both.1 > 0, "{both:?}: both carry");
    run("/bin/ip link set near1 down");
    for round in 0..6 {
        assert!(
            reader.read(Duration::from_secs(10)),
            "round {round}: {:?}",
            reader.peer.rails()
        );
    }
    let alone = (reader.rail(0).bytes, reader.rail(1).bytes);
    assert!(
        alone.0 > both.0 + 10 * MIB as u64,
        "the other carries on: {alone:?} after {both:?}"
    );
    assert!(!reader.rail(1).usable, "{:?}", reader.rail(1));
    run("/bin/ip link set near1 up");
    let until = Instant::now() + Duration::from_secs(40);
    while reader.rail(1).bytes < alone.1 + 4 * MIB as u64 {
        assert!(reader.read(Duration::from_secs(10)), "{:?}", reader.peer.rails());
        assert!(
            Instant::now() < until,
            "it is not used again: {:?}",
            reader.peer.rails()
        );
    }
}

#[test]
fn a_peer_host_that_vanishes_costs_at_most_the_deadline() {
    let Some(world) = World::make(1, 4200) else { return };
    let reader = Reader::new(&world, 2 * MIB);
    assert!(reader.read(PATIENCE));
    // Packets go out and nothing comes back: no refusal, no reset.
    run("/bin/ip netns exec far /bin/tc qdisc add dev far0 root netem loss 100%");
    for _ in 0..2 {
        let begun = Instant::now();
        assert!(!reader.read(Duration::from_millis(500)));
        assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    }
    run("/bin/ip netns exec far /bin/tc qdisc del dev far0 root");
    reader.until_read(Duration::from_secs(30));
    let _ = Arc::clone(&reader.child.region);
}
