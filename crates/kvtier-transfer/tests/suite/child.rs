//! The other end of a test in a process of its own: an owner of memory that can be killed, stopped and started again.

use std::io::{BufRead, BufReader, Write};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use kvtier_transfer::{PeerAddress, RemoteAccess, RemoteRegion};

use crate::stand::{Kind, Memory, Site, Wishes, site};

const WHAT: &str = "KVTIER_SUITE_CHILD";
/// What the child's memory is filled with.
pub(crate) const SEED: u64 = 99;

pub(crate) struct Child {
    process: std::process::Child,
    pub(crate) address: PeerAddress,
    pub(crate) region: Arc<RemoteRegion>,
}

/// How to start one.
pub(crate) struct Start<'a> {
    pub(crate) kind: Kind,
    pub(crate) bytes: usize,
    pub(crate) listen: &'a str,
    /// RDMA devices, by comma; empty for all.
    pub(crate) devices: &'a str,
    /// Network namespace; empty for ours.
    pub(crate) namespace: &'a str,
}

impl Start<'_> {
    pub(crate) fn here(kind: Kind, bytes: usize) -> Start<'static> {
        Start {
            kind,
            bytes,
            listen: "127.0.0.1:0",
            devices: "",
            namespace: "",
        }
    }

    pub(crate) fn run(&self) -> Child {
        let program = std::env::current_exe().expect("our own file");
        let mut command = if self.namespace.is_empty() {
            Command::new(program)
        } else {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", self.namespace]).arg(program);
            command
        };
        let what = format!("{:?};{};{};{}", self.kind, self.bytes, self.listen, self.devices);
        command.args(["--exact", "child_process", "--nocapture", "--test-threads=1"]);
        command.env(WHAT, what).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().expect("started");
        let lines = BufReader::new(process.stdout.take().expect("piped")).lines();
        let mut words = lines
            .map_while(Result::ok)
            .find_map(|line| line.split_once("child: ").map(|(_, rest)| rest.to_owned()))
            .expect("the child says where it is")
            .split(' ')
            .map(str::to_owned)
            .collect::<Vec<String>>()
            .into_iter();
        let address = words.next().expect("an address");
        let address = match self.kind {
            Kind::Shm => PeerAddress::Shm(address.into()),
            Kind::Tcp => PeerAddress::Tcp(address.parse().expect("an address")),
            Kind::Verbs | Kind::Iwarp => PeerAddress::Verbs(address.parse().expect("an address")),
            Kind::Loopback | Kind::Tls => unreachable!("one process"),
        };
        let region = from_hex(&words.next().expect("a region"));
        Child {
            process,
            address,
            region: Arc::new(RemoteRegion::decode(&region).expect("a region")),
        }
    }
}

impl Child {
    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.process);
        rustix::process::kill_process(pid, signal).expect("signalled");
    }

    /// Returns once none of its threads runs any more.
    pub(crate) fn stop(&self) {
        self.signal(rustix::process::Signal::STOP);
        let tasks = format!("/proc/{}/task", self.process.id());
        let is_stopped = |task: std::io::Result<std::fs::DirEntry>| {
            let stat = task.and_then(|task| std::fs::read_to_string(task.path().join("stat")));
            stat.map_or(true, |stat| {
                stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" T"))
            })
        };
        while !std::fs::read_dir(&tasks).expect("it lives").all(is_stopped) {
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(crate) fn go_on(&self) {
        self.signal(rustix::process::Signal::CONT);
    }

    /// With -9, and waited for.
    pub(crate) fn kill(&mut self) {
        self.process.kill().expect("killed");
        self.process.wait().expect("waited for");
    }

    pub(crate) fn port(&self) -> u16 {
        match &self.address {
            PeerAddress::Tcp(address) | PeerAddress::Verbs(address) => address.port(),
            other => unreachable!("{other:?} has no port"),
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        // It may have been killed already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Serves one region until it is killed or its input ends.
pub(crate) fn main() {
    let Ok(what) = std::env::var(WHAT) else { return };
    let parts: Vec<&str> = what.split(';').collect();
    let kind = match parts[0] {
        "Shm" => Kind::Shm,
        "Tcp" => Kind::Tcp,
        "Verbs" => Kind::Verbs,
        "Iwarp" => Kind::Iwarp,
        other => unreachable!("{other}"),
    };
    let devices = parts[3].split(',').filter(|name| !name.is_empty()).map(str::to_owned);
    let wishes = Wishes {
        listen: Some(parts[2].parse().expect("an address")),
        devices: devices.collect(),
        ..Wishes::default()
    };
    // A port that a killed process held is free again at once, but for a moment of the system's.
    let owner: Site = (0..50)
        .find_map(|_| {
            let made = std::panic::catch_unwind(|| site(kind, &wishes)).ok().flatten();
            if made.is_none() {
                std::thread::sleep(Duration::from_millis(100));
            }
            made
        })
        .expect("it starts");
    let bytes = parts[1].parse().expect("a number");
    let memory = Memory::new(bytes).fill(SEED).register(&owner, RemoteAccess::ReadWrite);
    let address = match owner.transport.address() {
        PeerAddress::Shm(path) => path.display().to_string(),
        PeerAddress::Tcp(address) | PeerAddress::Verbs(address) => address.to_string(),
        PeerAddress::Loopback(_) => unreachable!("one process"),
    };
    println!("\nchild: {address} {}", to_hex(&memory.remote().encode()));
    std::io::stdout().flush().expect("somebody reads");
    // Ends with whoever started us.
    let _ = std::io::stdin().lock().lines().count();
    std::process::exit(0);
}

fn to_hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn from_hex(text: &str) -> Vec<u8> {
    let digits = text.trim();
    (0..digits.len() / 2)
        .map(|at| u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("hex"))
        .collect()
}
