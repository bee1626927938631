//! A real S3 server on loopback: Ceph's object gateway over one monitor and one device in memory, from Debian's packages, unpacked in the cache.

use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::outcome::Failure;
use crate::process;
use crate::verbs_world::{is_program, packages::Packages};

/// For each step of its start.
const LIMIT: Duration = Duration::from_secs(120);
/// Bytes of its device, in memory.
const DEVICE_BYTES: u64 = 2 << 30;
/// Programs, and what they are linked with that a system without Ceph lacks; alternatives in the order of their preference. Those that a release
/// does not have it may not need: what is missing in the end is named.
const PACKAGES: [&[&str]; 40] = [
    &["radosgw"],
    &["ceph-mon"],
    &["ceph-osd"],
    &["ceph-common"],
    &["ceph-base"],
    &["librados2"],
    &["libradosstriper1"],
    &["librgw2"],
    &["librbd1"],
    &["libcephfs2"],
    &["libfmt9", "libfmt10"],
    &["libboost-thread1.74.0", "libboost-thread1.83.0"],
    &["libboost-context1.74.0", "libboost-context1.83.0"],
    &["libboost-iostreams1.74.0", "libboost-iostreams1.83.0"],
    &["libboost-program-options1.74.0", "libboost-program-options1.83.0"],
    &["libboost-filesystem1.74.0", "libboost-filesystem1.83.0"],
    &["libboost-date-time1.74.0", "libboost-date-time1.83.0"],
    &["libibverbs1"],
    &["librdmacm1", "librdmacm1t64"],
    &["libnl-3-200"],
    &["libnl-route-3-200"],
    &["libtcmalloc-minimal4", "libtcmalloc-minimal4t64"],
    &["libgoogle-perftools4", "libgoogle-perftools4t64"],
    &["liblua5.3-0"],
    &["liboath0", "liboath0t64"],
    &["librabbitmq4"],
    &["libsnappy1v5"],
    &["libleveldb1d"],
    &["liburcu8", "liburcu8t64"],
    &["librdkafka1"],
    &["liblttng-ust1", "liblttng-ust1t64"],
    &["libaio1", "libaio1t64"],
    &["libfuse2", "libfuse2t64"],
    &["libpmem1"],
    &["libndctl6"],
    &["libdaxctl1"],
    &["libicu72", "libicu74", "libicu76"],
    &["libcurl3-gnutls", "libcurl3t64-gnutls"],
    &["libexpat1"],
    &["libldap-2.5-0", "libldap2"],
];
const PROGRAMS: [&str; 6] = [
    "ceph-authtool",
    "monmaptool",
    "osdmaptool",
    "ceph-mon",
    "ceph-osd",
    "radosgw",
];

/// The programs, where they were unpacked.
struct Unpacked {
    root: PathBuf,
    libraries: PathBuf,
}

/// A server with one user and no bucket. It ends when this is dropped, and all that it keeps with it.
pub(crate) struct Radosgw {
    running: Vec<Child>,
    directory: PathBuf,
    pub(crate) endpoint: String,
    /// The keys of its user, as other tools of S3 keep them.
    pub(crate) credentials: PathBuf,
}

impl Drop for Radosgw {
    fn drop(&mut self) {
        self.running.iter_mut().rev().for_each(process::kill_tree);
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

impl Radosgw {
    /// Starts one; what it needs is kept in `cache`.
    pub(crate) fn start(cache: &Path) -> Result<Radosgw, Failure> {
        let unpacked = Unpacked::have(&cache.join("radosgw"))?;
        // Those of runs that were killed.
        for entry in std::fs::read_dir(cache.join("radosgw"))?.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            let process = name
                .strip_prefix("run-")
                .filter(|id| !Path::new("/proc").join(id).exists());
            if process.is_some() {
                std::fs::remove_dir_all(entry.path())?;
            }
        }
        let directory = cache.join(format!("radosgw/run-{}", std::process::id()));
        for part in ["mon", "osd", "rgw", "run"] {
            std::fs::create_dir_all(directory.join(part))?;
        }
        let ports = free_ports::<3>()?;
        let mut server = Radosgw {
            running: Vec::new(),
            endpoint: format!("http://127.0.0.1:{}", ports[2]),
            credentials: directory.join("credentials"),
            directory,
        };
        server.begin(&unpacked, ports)?;
        Ok(server)
    }

    fn begin(&mut self, unpacked: &Unpacked, [mon, mon_old, gateway]: [u16; 3]) -> Result<(), Failure> {
        let at = |name: &str| self.directory.join(name).display().to_string();
        let (settings, keyring, monmap, osdmap) = (at("ceph.conf"), at("keyring"), at("monmap"), at("osdmap"));
        let cluster = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
            .trim()
            .to_owned();
        let addresses = format!("[v2:127.0.0.1:{mon},v1:127.0.0.1:{mon_old}]");
        std::fs::write(
            &settings,
            configuration(&self.directory, unpacked, &cluster, &addresses, gateway),
        )?;
        let run = |program: &str, arguments: &[&str]| {
            process::succeed_quietly(unpacked.command(program).args(arguments), program, LIMIT)
        };
        run(
            "ceph-authtool",
            &[
                "--create-keyring",
                &keyring,
                "-n",
                "mon.",
                "--gen-key",
                "--cap",
                "mon",
                "allow *",
            ],
        )?;
        for (name, monitor) in [
            ("client.admin", "allow *"),
            ("osd.0", "allow profile osd"),
            ("client.rgw", "allow rwx"),
        ] {
            run(
                "ceph-authtool",
                &[
                    &keyring,
                    "-n",
                    name,
                    "--gen-key",
                    "--cap",
                    "mon",
                    monitor,
                    "--cap",
                    "osd",
                    "allow *",
                ],
            )?;
        }
        run(
            "monmaptool",
            &[
                "--create",
                "--fsid",
                &cluster,
                "--addv",
                "a",
                &addresses,
                "--enable-all-features",
                &monmap,
            ],
        )?;
        // A map that has the one device from the beginning: nobody has to be asked for a number.
        run(
            "osdmaptool",
            &["-c", &settings, "--createsimple", "1", &osdmap, "--with-default-pool"],
        )?;
        run(
            "ceph-mon",
            &[
                "-i",
                "a",
                "-c",
                &settings,
                "--mkfs",
                "--monmap",
                &monmap,
                "--osdmap",
                &osdmap,
                "--keyring",
                &keyring,
            ],
        )?;
        self.spawn(unpacked, "ceph-mon", &["-i", "a", "-c", &settings, "-f"])?;
        let device = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
            .trim()
            .to_owned();
        run(
            "ceph-osd",
            &["-i", "0", "-c", &settings, "--mkfs", "--osd-uuid", &device],
        )?;
        self.spawn(unpacked, "ceph-osd", &["-i", "0", "-c", &settings, "-f"])?;
        self.spawn(unpacked, "radosgw", &["-n", "client.rgw", "-c", &settings, "-f"])?;
        self.await_answer(gateway)?;
        // Random, so that no other server on this machine knows them.
        let (key, secret) = (uuid()?, uuid()?);
        run(
            "radosgw-admin",
            &[
                "-c",
                &settings,
                "user",
                "create",
                "--uid=kvtier",
                "--display-name=kvtier",
                &format!("--access-key={key}"),
                &format!("--secret-key={secret}"),
            ],
        )?;
        let keys = format!("[default]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n");
        std::fs::write(&self.credentials, keys)?;
        Ok(())
    }

    fn spawn(&mut self, unpacked: &Unpacked, program: &str, arguments: &[&str]) -> Result<(), Failure> {
        let log = std::fs::File::create(self.directory.join(format!("{program}.out")))?;
        let mut command = unpacked.server(program);
        command
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        self.running.push(command.spawn()?);
        Ok(())
    }

    fn await_answer(&mut self, gateway: u16) -> Result<(), Failure> {
        let begun = Instant::now();
        let address = SocketAddr::from(([127, 0, 0, 1], gateway));
        while TcpStream::connect_timeout(&address, Duration::from_secs(1)).is_err() {
            let ended = self
                .running
                .iter_mut()
                .any(|child| !matches!(child.try_wait(), Ok(None)));
            if ended || begun.elapsed() > LIMIT {
                let mut said = String::new();
                for program in ["ceph-mon", "ceph-osd", "radosgw"] {
                    let log = std::fs::read_to_string(self.directory.join(format!("{program}.out")));
                    said.push_str(&log.unwrap_or_default());
                }
                return Err(Failure::new(format!("{said}the S3 server does not start")));
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }
}

impl Unpacked {
    fn have(directory: &Path) -> Result<Unpacked, Failure> {
        let root = directory.join("root");
        let unpacked = Unpacked {
            libraries: root.join(format!("usr/lib/{}-linux-gnu", std::env::consts::ARCH)),
            root,
        };
        if unpacked.missing().is_ok() {
            return Ok(unpacked);
        }
        let packages = Packages::of_this_machine(directory)?;
        for names in PACKAGES {
            match packages.unpack(names, &unpacked.root) {
                Err(failure) if failure.code != crate::outcome::SKIPPED => return Err(failure),
                _ => {}
            }
        }
        match unpacked.missing() {
            Ok(()) => Ok(unpacked),
            Err(what) => Err(Failure::skipped(format!(
                "the S3 server of Debian's packages does not run here: {what}"
            ))),
        }
    }

    /// What its programs lack.
    fn missing(&self) -> Result<(), String> {
        for program in PROGRAMS {
            let path = self.root.join("usr/bin").join(program);
            if !path.exists() {
                return Err(format!("there is no {program}"));
            }
            let output = self.with_libraries(Command::new("ldd").arg(&path)).output();
            let output = output.map_err(|error| format!("ldd: {error}"))?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            if let Some(line) = said.lines().find(|line| line.contains("not found")) {
                return Err(format!("{program} lacks {}", line.trim()));
            }
        }
        Ok(())
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(self.root.join("usr/bin").join(program));
        self.with_libraries(&mut command);
        command
    }

    /// One that runs on: it ends with this process, however that ends.
    fn server(&self, program: &str) -> Command {
        let path = self.root.join("usr/bin").join(program);
        if !is_program("setpriv") {
            return self.command(program);
        }
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(path);
        self.with_libraries(&mut command);
        command
    }

    fn with_libraries<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        let old = self.root.join(format!("lib/{}-linux-gnu", std::env::consts::ARCH));
        let paths = [self.libraries.clone(), self.libraries.join("ceph"), old];
        let joined = std::env::join_paths(paths).unwrap_or_default();
        command
            .env("LD_LIBRARY_PATH", joined)
            .env_remove("CEPH_CONF")
            .env_remove("CEPH_ARGS")
    }
}

fn configuration(directory: &Path, unpacked: &Unpacked, cluster: &str, addresses: &str, gateway: u16) -> String {
    let (directory, libraries) = (directory.display(), unpacked.libraries.display());
    format!(
        "[global]
fsid = {cluster}
mon host = {addresses}
public addr = 127.0.0.1
cluster addr = 127.0.0.1
auth cluster required = cephx
auth service required = cephx
auth client required = cephx
keyring = {directory}/keyring
run dir = {directory}/run
admin socket =
pid file =
log file = {directory}/$name.log
mon cluster log file = {directory}/cluster.log
mon data = {directory}/mon
osd data = {directory}/osd
rgw data = {directory}/rgw
osd class dir = {libraries}/rados-classes
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class load list = *
osd class default list = *
osd objectstore = memstore
memstore device bytes = {DEVICE_BYTES}
osd pool default size = 1
osd pool default min size = 1
osd pool default pg num = 4
osd pool default pgp num = 4
osd crush chooseleaf type = 0
mon allow pool size one = true

[client.rgw]
rgw frontends = beast endpoint=127.0.0.1:{gateway}
rgw enable usage log = false
rgw enable ops log = false
rgw enable gc threads = false
rgw enable lc threads = false
"
    )
}

fn uuid() -> Result<String, Failure> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/uuid")?
        .trim()
        .replace('-', ""))
}

/// All at once, so that they differ.
fn free_ports<const N: usize>() -> Result<[u16; N], Failure> {
    let mut held = Vec::new();
    let mut ports = [0; N];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        held.push(listener);
    }
    Ok(ports)
}
