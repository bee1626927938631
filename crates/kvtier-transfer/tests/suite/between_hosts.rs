//! TCP over a route that leaves the node: a peer in another network namespace, at the other end of a virtual cable.

use std::process::Command;

use kvtier_transfer::{Direction, RemoteAccess};

use crate::child::{Child, SEED, Start};
use crate::stand::{Kind, Memory, PATIENCE, POISON, Wishes, pattern, piece, site};

const MIB: usize = 1 << 20;

/// A namespace with a cable to it; gone with the value.
struct Cable {
    name: String,
}

fn ip(line: &str) -> bool {
    let output = Command::new("ip").args(line.split(' ')).output();
    output.is_ok_and(|output| output.status.success())
}

impl Cable {
    /// None, with the reason printed, where this process may not make one.
    fn make(network: u8) -> Option<Cable> {
        let name = format!("kvt{}n{network}", std::process::id() % 100_000);
        if !ip(&format!("netns add {name}")) {
            println!("skipped: tcp between hosts: making a network namespace needs root and iproute2");
            return None;
        }
        let cable = Cable { name: name.clone() };
        let made = ip(&format!("link add {name}a type veth peer name {name}b netns {name}"))
            && ip(&format!("addr add 10.213.{network}.1/24 dev {name}a"))
            && ip(&format!("-n {name} addr add 10.213.{network}.2/24 dev {name}b"))
            && ip(&format!("link set {name}a up"))
            && ip(&format!("-n {name} link set {name}b up"));
        if !made {
            println!("skipped: tcp between hosts: no virtual cable can be made here");
            return None;
        }
        Some(cable)
    }

    fn child(&self, network: u8, bytes: usize) -> Child {
        Start {
            kind: Kind::Tcp,
            bytes,
            listen: &format!("10.213.{network}.2:0"),
            devices: "",
            namespace: &self.name,
        }
        .run()
    }
}

impl Drop for Cable {
    fn drop(&mut self) {
        ip(&format!("link del {}a", self.name));
        ip(&format!("netns del {}", self.name));
    }
}

#[test]
fn bytes_cross_a_wire_without_a_copy_into_the_kernel() {
    let Some(cable) = Cable::make(1) else { return };
    let child = cable.child(1, 16 * MIB);
    let caller = site(Kind::Tcp, &Wishes::default()).expect("a port");
    let peer = caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let local = Memory::new(16 * MIB).register(&caller, RemoteAccess::Read);
    for _ in 0..8 {
        local.all().copy_from_slice(&vec![POISON; 16 * MIB]).expect("equal");
        let read = piece(&local, 0, &child.region, 0, 16 * MIB, Direction::Read);
        assert_eq!(peer.submit(vec![read], PATIENCE).expect("taken").wait(), Ok(()));
        assert!(local.bytes(0, 16 * MIB) == pattern(SEED, 0, 16 * MIB));
    }
}

#[test]
fn a_wire_that_is_cut_costs_at_most_the_deadline_and_is_used_again() {
    let Some(cable) = Cable::make(2) else { return };
    let child = cable.child(2, 4 * MIB);
    let caller = site(Kind::Tcp, &Wishes::default()).expect("a port");
    let peer = caller.transport.connect(&child.address, PATIENCE).expect("connected");
    let local = Memory::new(4 * MIB).register(&caller, RemoteAccess::Read);
    let run = |milliseconds| {
        let read = piece(&local, 0, &child.region, 0, 4 * MIB, Direction::Read);
        let deadline = std::time::Duration::from_millis(milliseconds);
        peer.submit(vec![read], deadline)
            .is_ok_and(|transfer| transfer.wait().is_ok())
    };
    assert!(run(10_000));
    assert!(ip(&format!("link set {}a down", cable.name)));
    let begun = std::time::Instant::now();
    assert!(!run(300), "read over a wire that is cut");
    assert!(
        begun.elapsed() < std::time::Duration::from_secs(3),
        "{:?}",
        begun.elapsed()
    );
    assert!(ip(&format!("link set {}a up", cable.name)));
    let until = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !run(2000) {
        assert!(std::time::Instant::now() < until, "it does not come back");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    assert!(local.bytes(0, 4 * MIB) == pattern(SEED, 0, 4 * MIB));
}
