//! Nodes in network namespaces of their own, on one bridge.

use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};

use super::{Plan, await_connected};
use crate::daemon::{self, Daemon, binary, command};

/// Namespaces, each with an end of a cable whose other end is on a bridge in a namespace of its own. Removed when dropped.
pub(crate) struct Network {
    name: String,
    members: usize,
    has_nics: bool,
}

static NEXT: AtomicU32 = AtomicU32::new(0);

impl Network {
    /// `None`, said in words, where this machine does not let us.
    pub(crate) fn new(members: usize) -> Option<Network> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Network {
            name: format!("kvt{}x{number}", std::process::id()),
            members,
            has_nics: false,
        };
        match network.build() {
            Ok(()) => Some(network),
            Err(why) => {
                eprintln!("skipped: network namespaces: {why}");
                None
            }
        }
    }

    /// Two hosts with a Soft-RoCE device each, joined by one cable.
    pub(crate) fn with_nics() -> Option<Network> {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let network = Network {
            name: format!("kvn{number}"),
            members: 2,
            has_nics: true,
        };
        match network.build_pair() {
            Ok(()) => Some(network),
            Err(why) => {
                eprintln!("skipped: network namespaces with RDMA: {why}");
                None
            }
        }
    }

    fn build_pair(&self) -> Result<(), String> {
        let spaces = [self.space(Some(0)), self.space(Some(1))];
        for space in &spaces {
            ip(&["netns", "add", space])?;
            ip(&["-n", space, "link", "set", "lo", "up"])?;
        }
        ip(&[
            "-n", &spaces[0], "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", &spaces[1],
        ])?;
        for (member, space) in spaces.iter().enumerate() {
            ip(&[
                "-n",
                space,
                "addr",
                "add",
                &format!("10.77.0.{}/24", member + 1),
                "dev",
                "eth0",
            ])?;
            ip(&["-n", space, "link", "set", "eth0", "up"])?;
            let device = self.nic(member);
            ip(&[
                "netns", "exec", space, "rdma", "link", "add", &device, "type", "rxe", "netdev", "eth0",
            ])?;
        }
        Ok(())
    }

    fn nic(&self, member: usize) -> String {
        format!("rxe{}m{member}", self.name)
    }

    fn build(&self) -> Result<(), String> {
        let hub = self.space(None);
        ip(&["netns", "add", &hub])?;
        ip(&["-n", &hub, "link", "add", "hub", "type", "bridge"])?;
        ip(&["-n", &hub, "link", "set", "hub", "up"])?;
        for member in 0..self.members {
            let (space, port) = (self.space(Some(member)), format!("port{member}"));
            ip(&["netns", "add", &space])?;
            ip(&["-n", &space, "link", "set", "lo", "up"])?;
            ip(&[
                "-n", &hub, "link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &space,
            ])?;
            ip(&["-n", &hub, "link", "set", &port, "master", "hub", "up"])?;
            ip(&[
                "-n",
                &space,
                "addr",
                "add",
                &format!("10.77.0.{}/24", member + 1),
                "dev",
                "eth0",
            ])?;
            ip(&["-n", &space, "link", "set", "eth0", "up"])?;
        }
        Ok(())
    }

    fn space(&self, member: Option<usize>) -> String {
        match member {
            Some(member) => format!("{}-{member}", self.name),
            None => format!("{}-hub", self.name),
        }
    }

    pub(crate) fn plan(&self) -> Plan {
        Plan::of(
            (1..=self.members)
                .map(|member| format!("10.77.0.{member}:7411"))
                .collect(),
        )
    }

    pub(crate) fn start(&self, plan: &Plan, member: usize) -> Daemon {
        self.start_with(plan, member, "")
    }

    /// The same with settings beside those that all members have.
    pub(crate) fn start_with(&self, plan: &Plan, member: usize, more: &str) -> Daemon {
        let mut program = Command::new("ip");
        program
            .args(["netns", "exec", &self.space(Some(member))])
            .arg(binary("kv-daemon"))
            .env("KVTIER_CONFIG", "/dev/null");
        let flags = plan.flags_of(member);
        let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
        let mut settings = format!("{more}{}", Plan::settings());
        if self.has_nics {
            // Each host sees the other's device, too.
            settings = format!("peer_devices = [{:?}]\n{settings}", self.nic(member));
        }
        Daemon::try_launch(program, daemon::directory(), &flags, &settings)
            .unwrap_or_else(|(log, _)| panic!("not ready: {log}"))
    }

    pub(crate) fn start_all(&self, plan: &Plan) -> Vec<Daemon> {
        let daemons: Vec<Daemon> = (0..self.members).map(|member| self.start(plan, member)).collect();
        for daemon in &daemons {
            await_connected(daemon, self.members - 1);
        }
        daemons
    }

    /// Lets so much out of a member's end of the cable from now on. False, said in words, where this machine cannot.
    pub(crate) fn slow(&self, member: usize, bits_per_s: u64) -> bool {
        let space = self.space(Some(member));
        let rate = format!("{bits_per_s}bit");
        let shaper = ["burst", "16kb", "latency", "4s"];
        let output = Command::new("tc")
            .args([
                "-n", &space, "qdisc", "replace", "dev", "eth0", "root", "tbf", "rate", &rate,
            ])
            .args(shaper)
            .output();
        match output {
            Ok(output) if output.status.success() => true,
            other => {
                eprintln!("skipped: a slow link: {other:?}");
                false
            }
        }
    }

    /// Pulls a member's cable.
    pub(crate) fn cut(&self, member: usize) {
        self.set(member, "down");
    }

    pub(crate) fn join(&self, member: usize) {
        self.set(member, "up");
    }

    fn set(&self, member: usize, state: &str) {
        let (space, port) = if self.has_nics {
            (self.space(Some(member)), "eth0".to_owned())
        } else {
            (self.space(None), format!("port{member}"))
        };
        let done = ip(&["-n", &space, "link", "set", &port, state]);
        done.unwrap_or_else(|why| panic!("{why}"));
    }

    fn kvctl(&self, member: usize) -> Command {
        let plain = command("kvctl");
        let mut kvctl = Command::new("ip");
        kvctl
            .args(["netns", "exec", &self.space(Some(member))])
            .arg(plain.get_program())
            .env("KVTIER_CONFIG", "/dev/null");
        kvctl
    }

    pub(crate) fn purge(&self, member: usize, daemon: &Daemon, arguments: &[&str]) -> Output {
        self.kvctl(member)
            .args(["--json", "purge", "team/default", "--state-dir"])
            .arg(daemon.state())
            .args(arguments)
            .output()
            .expect("kvctl runs")
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for member in 0..self.members {
            if self.has_nics {
                let _ = Command::new("rdma").args(["link", "del", &self.nic(member)]).status();
            }
        }
        for member in (0..self.members).map(Some).chain([None]) {
            let _ = ip(&["netns", "delete", &self.space(member)]);
        }
    }
}

fn ip(arguments: &[&str]) -> Result<(), String> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .map_err(|error| format!("ip: {error}"))?;
    if output.status.success() {
        return Ok(());
    }
    let words = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    Err(format!("ip {}: {words}", arguments.join(" ")))
}
