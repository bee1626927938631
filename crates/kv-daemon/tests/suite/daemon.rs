//! A daemon of its own for one test, and ways to ask it.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Resource, Rlimit, Signal, kill_process, prlimit};
use serde_json::Value;
use tempfile::TempDir;

/// How long anything may take that must happen at all.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// The path of one of this package's binaries: under test elsewhere when `KVTIER_BIN_DIR` says so.
pub(crate) fn binary(name: &str) -> PathBuf {
    match std::env::var_os("KVTIER_BIN_DIR") {
        Some(directory) => PathBuf::from(directory).join(name),
        None if name == "kvctl" => PathBuf::from(env!("CARGO_BIN_EXE_kvctl")),
        None => PathBuf::from(env!("CARGO_BIN_EXE_kv-daemon")),
    }
}

/// A command that no setting of the machine reaches.
pub(crate) fn command(name: &str) -> Command {
    let mut command = Command::new(binary(name));
    for (variable, _) in std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("KVTIER_")) {
        command.env_remove(variable);
    }
    command.env("KVTIER_CONFIG", "/dev/null").stdin(Stdio::null());
    command
}

/// A daemon that is told of a file that may not grow instead of being killed for it, as of a disk that is full.
pub(crate) fn told_of_full_disks() -> Command {
    let direct = command("kv-daemon");
    let mut program = Command::new("sh");
    for (variable, value) in direct.get_envs() {
        match value {
            Some(value) => program.env(variable, value),
            None => program.env_remove(variable),
        };
    }
    program
        .stdin(Stdio::null())
        .args(["-c", "trap '' XFSZ; exec \"$0\" \"$@\""])
        .arg(direct.get_program());
    program
}

/// A directory that others may pass, for sockets that others may use.
pub(crate) fn directory() -> TempDir {
    use std::os::unix::fs::PermissionsExt;
    let directory = tempfile::Builder::new()
        .prefix("kvd")
        .tempdir()
        .expect("a temporary directory");
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o711)).expect("its mode");
    directory
}

/// A running `kv-daemon serve`. Killed when dropped.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) directory: TempDir,
    log: Option<std::thread::JoinHandle<String>>,
}

impl Daemon {
    /// Starts one with these flags over small defaults, and waits until it is ready.
    pub(crate) fn start(flags: &[&str]) -> Daemon {
        Daemon::start_with(flags, "")
    }

    /// The same with a settings file.
    pub(crate) fn start_with(flags: &[&str], settings: &str) -> Daemon {
        Daemon::try_start(flags, settings).unwrap_or_else(|log| panic!("not ready: {log}"))
    }

    /// The same, or what it said before it ended.
    pub(crate) fn try_start(flags: &[&str], settings: &str) -> Result<Daemon, String> {
        Daemon::try_start_in(directory(), flags, settings).map_err(|(words, _)| words)
    }

    /// The same where another one was before.
    pub(crate) fn start_in(directory: TempDir, flags: &[&str]) -> Daemon {
        Daemon::try_start_in(directory, flags, "").unwrap_or_else(|(log, _)| panic!("not ready: {log}"))
    }

    /// The same with a settings file.
    pub(crate) fn start_in_with(directory: TempDir, flags: &[&str], settings: &str) -> Daemon {
        Daemon::try_start_in(directory, flags, settings).unwrap_or_else(|(log, _)| panic!("not ready: {log}"))
    }

    /// The same, or what it said before it ended, and the directory.
    pub(crate) fn try_start_in(
        directory: TempDir,
        flags: &[&str],
        settings: &str,
    ) -> Result<Daemon, (String, TempDir)> {
        Daemon::try_launch(command("kv-daemon"), directory, flags, settings)
    }

    /// The same by another way to run the program.
    pub(crate) fn try_launch(
        program: Command,
        directory: TempDir,
        flags: &[&str],
        settings: &str,
    ) -> Result<Daemon, (String, TempDir)> {
        Daemon::try_launch_on(program, directory, flags, settings, "127.0.0.1:0")
    }

    /// The same with the admin server elsewhere.
    pub(crate) fn try_launch_on(
        mut program: Command,
        directory: TempDir,
        flags: &[&str],
        settings: &str,
        http: &str,
    ) -> Result<Daemon, (String, TempDir)> {
        let file = directory.path().join("kv-daemon.toml");
        std::fs::write(&file, settings).expect("a settings file");
        let mut child = program
            .arg("serve")
            .arg("--config")
            .arg(&file)
            .arg("--state-dir")
            .arg(directory.path().join("state"))
            .arg("--socket")
            .arg(directory.path().join("s"))
            .args(flags)
            .env("KVTIER_HTTP", http)
            .env("KVTIER_HOST_BYTES", "16MiB")
            .env("KVTIER_LOCK_MEMORY", "false")
            .env("KVTIER_LOG_LEVEL", "debug")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("kv-daemon starts");
        let mut errors = child.stderr.take().expect("a pipe");
        let log = std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            text
        });
        let mut line = String::new();
        let mut output = BufReader::new(child.stdout.take().expect("a pipe"));
        output.read_line(&mut line).expect("a line");
        let mut daemon = Daemon {
            child,
            directory,
            log: Some(log),
        };
        if !line.contains("ready") {
            let status = wait(&mut daemon.child);
            let (log, directory) = daemon.into_remains();
            return Err((format!("{status}: {log}"), directory));
        }
        Ok(daemon)
    }

    pub(crate) fn socket(&self) -> PathBuf {
        self.directory.path().join("s")
    }

    pub(crate) fn state(&self) -> PathBuf {
        self.directory.path().join("state")
    }

    /// `kvctl` against this daemon.
    pub(crate) fn kvctl(&self) -> Command {
        let mut kvctl = command("kvctl");
        kvctl.arg("--socket").arg(self.socket());
        kvctl
    }

    /// Runs `kvctl --json` with these arguments; the answer must be success and JSON.
    pub(crate) fn ask(&self, arguments: &[&str]) -> Value {
        let output = self.kvctl().arg("--json").args(arguments).output().expect("kvctl runs");
        assert!(output.status.success(), "kvctl {arguments:?}: {}", words(&output));
        serde_json::from_slice(&output.stdout)
            .unwrap_or_else(|error| panic!("kvctl {arguments:?}: {error}: {}", words(&output)))
    }

    /// The admin server's address.
    pub(crate) fn http_address(&self) -> String {
        let text = std::fs::read_to_string(self.state().join("http.addr")).expect("http.addr");
        text.trim().to_string()
    }

    pub(crate) fn token(&self) -> String {
        std::fs::read_to_string(self.state().join("admin.token"))
            .expect("admin.token")
            .trim()
            .to_string()
    }

    /// One HTTP request with the token.
    pub(crate) fn http(&self, method: &str, path: &str) -> (u16, String) {
        let token = format!("Bearer {}", self.token());
        self.http_with(method, path, &[("Authorization", &token)])
    }

    /// One HTTP request: status code, and headers and body as they came.
    pub(crate) fn http_with(&self, method: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
        let address = self.http_address();
        let mut stream = TcpStream::connect(&address).expect("the admin server listens");
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        let mut request = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n");
        if !headers.iter().any(|(name, _)| *name == "Host") {
            request.push_str(&format!("Host: {address}\r\n"));
        }
        for (name, value) in headers {
            request.push_str(&format!("{name}: {value}\r\n"));
        }
        request.push_str("\r\n");
        stream.write_all(request.as_bytes()).expect("a request is taken");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("an answer");
        let code = answer.split(' ').nth(1).and_then(|code| code.parse().ok());
        (code.unwrap_or_else(|| panic!("no HTTP: {answer}")), answer)
    }

    /// `/v1/status`.
    pub(crate) fn status(&self) -> Value {
        let (code, answer) = self.http("GET", "/v1/status");
        assert_eq!(code, 200, "{answer}");
        let body = answer.split_once("\r\n\r\n").expect("a body").1;
        serde_json::from_str(body).expect("JSON")
    }

    /// A counter of the status.
    pub(crate) fn count(&self, name: &str) -> u64 {
        let status = self.status();
        status[name].as_u64().unwrap_or_else(|| panic!("{name} in {status}"))
    }

    /// Waits until nothing is held or under way any more.
    pub(crate) fn settle(&self) -> Value {
        const MUST_BE_ZERO: [&str; 6] = [
            "leases",
            "reservations",
            "quarantined_slots",
            "quarantined_bytes",
            "operations_in_flight",
            "waiting",
        ];
        let begun = Instant::now();
        loop {
            let status = self.status();
            let left: Vec<&str> = MUST_BE_ZERO
                .into_iter()
                .filter(|name| status[*name].as_u64() != Some(0))
                .collect();
            if left.is_empty() {
                return status;
            }
            assert!(begun.elapsed() < PATIENCE, "{left:?} are not zero: {status:#}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        signal_process(&self.child, signal);
    }

    /// No file of a daemon that was [`told_of_full_disks`] grows beyond so many bytes, or all may again.
    pub(crate) fn limit_files(&self, bytes: Option<u64>) {
        let process = Pid::from_raw(i32::try_from(self.child.id()).expect("an id"));
        let limit = Rlimit {
            current: bytes,
            maximum: None,
        };
        prlimit(process, Resource::Fsize, limit).expect("a limit");
    }

    /// SIGTERM, then its exit status and its log.
    pub(crate) fn stop(mut self) -> (ExitStatus, String) {
        self.signal(Signal::TERM);
        let status = wait(&mut self.child);
        (status, self.into_log())
    }

    /// SIGKILL; its directory stays.
    pub(crate) fn kill(mut self) -> TempDir {
        self.signal(Signal::KILL);
        wait(&mut self.child);
        self.into_remains().1
    }

    /// The directory of one that ended by itself.
    pub(crate) fn ended(mut self) -> TempDir {
        wait(&mut self.child);
        self.into_remains().1
    }

    /// SIGTERM; its directory stays.
    pub(crate) fn stop_and_keep(mut self) -> TempDir {
        self.signal(Signal::TERM);
        let status = wait(&mut self.child);
        let (log, directory) = self.into_remains();
        assert!(status.success(), "{status}: {log}");
        directory
    }

    /// SIGTERM; how it ended, what it said, and its directory, which stays.
    pub(crate) fn stop_with_log(mut self) -> (ExitStatus, String, TempDir) {
        self.signal(Signal::TERM);
        let status = wait(&mut self.child);
        let (log, directory) = self.into_remains();
        (status, log, directory)
    }

    /// What an ended daemon said.
    fn into_log(self) -> String {
        self.into_remains().0
    }

    /// What an ended daemon said, and its directory.
    pub(crate) fn into_remains(mut self) -> (String, TempDir) {
        let log = self.log.take().and_then(|log| log.join().ok()).unwrap_or_default();
        let directory = std::mem::replace(&mut self.directory, directory());
        (log, directory)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn signal_process(child: &Child, signal: Signal) {
    let process = Pid::from_raw(i32::try_from(child.id()).expect("a process id")).expect("a process id");
    kill_process(process, signal).expect("the process is there");
}

/// Waits for a child that must end.
pub(crate) fn wait(child: &mut Child) -> ExitStatus {
    let begun = Instant::now();
    loop {
        if let Some(status) = child.try_wait().expect("a child") {
            return status;
        }
        assert!(begun.elapsed() < PATIENCE, "the process does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What a process said, for a message.
pub(crate) fn words(output: &Output) -> String {
    let out = String::from_utf8_lossy(&output.stdout);
    let err = String::from_utf8_lossy(&output.stderr);
    format!("{}\nstdout: {out}\nstderr: {err}", output.status)
}

/// A generated trace of a chat workload, small.
pub(crate) fn chat_trace(directory: &Path, seed: u64, sessions: u32) -> PathBuf {
    use kvtier_sim::{trace::write_trace, workload::ChatWorkload};
    let workload = ChatWorkload {
        seed,
        sessions,
        ..ChatWorkload::default()
    };
    let path = directory.join(format!("chat-{seed}-{sessions}.jsonl"));
    let mut file = std::fs::File::create(&path).expect("a trace file");
    write_trace(&workload.generate(), &mut file).expect("a trace");
    path
}
