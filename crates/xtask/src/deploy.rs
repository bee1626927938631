//! `cargo xtask test deploy`: what ships for Kubernetes and Docker is valid, and the daemon runs as it says.
//!
//! Manifests are checked against the schemas of Kubernetes. Then the daemon is started as a node would start it: with the
//! manifest's command, arguments, environment and user, its volumes, a read-only root and the seccomp profile, in namespaces
//! of its own; the manifest's probes are run beside it. Only the sizes of the tiers are smaller.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getuid, kill_process};
use serde_json::Value;

use crate::built::Built;
use crate::outcome::{Failure, Tally};
use crate::process;
use crate::seccomp::Profile;
use crate::workspace::Workspace;

/// The schemas come with it.
const VALIDATOR: &str = "kubernetes-validate==1.37.0";
/// The oldest Kubernetes whose schema the manifests must meet.
const KUBERNETES: &str = "1.30";
const LIMIT: Duration = Duration::from_secs(10 * 60);
const READY_LIMIT: Duration = Duration::from_secs(60);
const MANIFESTS: [&str; 2] = ["daemonset.yaml", "daemonset-threads.yaml"];

/// Runs every check; a machine that lacks namespaces or root skips the running part.
pub(crate) fn run(workspace: &Workspace) -> Result<Tally, Failure> {
    let docker = workspace.root.join("docker");
    let python = environment()?;
    let profile = Profile::read(&docker.join("seccomp/kvtier.json"))?;
    let mut report = Tally::default();
    let mut failures = Vec::new();
    let mut check = |name: String, outcome: Result<(), Failure>| match outcome {
        Ok(()) => {
            println!("ok      {name}");
            report.passed += 1;
        }
        Err(failure) => {
            println!("FAILED  {name}: {}", failure.message);
            report.failed += 1;
            failures.push(name);
        }
    };
    check(
        "the seccomp profile allows io_uring and no namespaces".into(),
        allows_io_uring(&profile),
    );
    check("compose.yaml".into(), compose(&python, &docker.join("compose.yaml")));
    check("Dockerfile".into(), dockerfile(&docker.join("Dockerfile")));
    let mut pods = Vec::new();
    for name in MANIFESTS {
        let path = docker.join("kubernetes").join(name);
        check(
            format!("{name} meets the schema of Kubernetes {KUBERNETES}"),
            validate(&python, &path),
        );
        check(
            format!("{name} with an unknown field does not"),
            refuses_unknown_field(&python, &path),
        );
        match documents(&python, &path).and_then(|documents| Pod::of(&documents)) {
            Ok(pod) => pods.push((name, pod)),
            Err(failure) => check(format!("{name} describes the daemon"), Err(failure)),
        }
    }
    let skip = cannot_contain();
    if skip.is_none() {
        let built = Built::daemon(workspace)?.directory()?;
        for (name, pod) in &pods {
            check(
                format!("{name}: the daemon runs as described"),
                runs(&built, pod, &profile),
            );
        }
        if let Some((_, pod)) = pods.first() {
            let name = "with a call removed from the profile the daemon does not run".to_owned();
            let outcome = match runs(&built, pod, &profile.without("io_uring_")) {
                Err(failure) if failure.message.contains("io_uring cannot be used") => Ok(()),
                Err(failure) => Err(failure),
                Ok(()) => Err(Failure::new("it ran all the same")),
            };
            check(name, outcome);
            let mut wrong = pod.clone();
            wrong.probes = vec![vec!["/usr/local/bin/kvctl".into(), "state".into()]];
            let outcome = match runs(&built, &wrong, &profile) {
                Err(failure) if failure.message.contains("unrecognized subcommand") => Ok(()),
                Err(failure) => Err(failure),
                Ok(()) => Err(Failure::new("it passed all the same")),
            };
            check("a wrong probe does not pass".into(), outcome);
        }
    }
    if let Some(reason) = &skip {
        println!("skipped: deploy: the daemon as the manifests describe it: {reason}");
        report.skipped += 1;
    }
    println!("deploy: the image itself is not built here (no registry): docker build -f docker/Dockerfile .");
    println!("{report}");
    if report.failed > 0 {
        return Err(Failure::new(format!("deploy: {report}: {}", failures.join("; "))));
    }
    if report.skipped > 0 {
        println!("ran {}, skipped {}", report.passed, report.skipped);
        return Err(Failure::skipped("a suite named on the command line skipped a part"));
    }
    Ok(report)
}

/// Python with the validator, made once and kept.
fn environment() -> Result<PathBuf, Failure> {
    let cache = match std::env::var_os("KVTIER_CACHE") {
        Some(cache) => PathBuf::from(cache),
        None => {
            let home = std::env::var_os("HOME").ok_or_else(|| Failure::new("set HOME or KVTIER_CACHE"))?;
            Path::new(&home).join(".cache/kvtier")
        }
    };
    let place = cache.join(format!("deploy-{}", VALIDATOR.replace("==", "-")));
    let python = place.join("bin/python");
    if python.exists() {
        return Ok(python);
    }
    fs::create_dir_all(&cache)?;
    let fresh = cache.join(format!("deploy-new-{}", std::process::id()));
    println!("making {}", place.display());
    let mut venv = Command::new("python3");
    venv.args(["-m", "venv"]).arg(&fresh);
    process::succeed(&mut venv, "python3 -m venv", LIMIT)?;
    let mut pip = Command::new(fresh.join("bin/python"));
    pip.args([
        "-m",
        "pip",
        "install",
        "--quiet",
        "--disable-pip-version-check",
        VALIDATOR,
    ]);
    process::succeed(&mut pip, "pip install", LIMIT)?;
    // Programs in it name their place: it is used through `python -m`.
    match fs::rename(&fresh, &place) {
        Err(_) if python.exists() => fs::remove_dir_all(&fresh)?,
        renamed => renamed?,
    }
    Ok(python)
}

/// The documents of a YAML file.
fn documents(python: &Path, path: &Path) -> Result<Vec<Value>, Failure> {
    let script = "import json, sys, yaml; print(json.dumps([d for d in yaml.safe_load_all(open(sys.argv[1])) if d]))";
    let mut command = Command::new(python);
    command.args(["-c", script]).arg(path);
    serde_json::from_str(&output(&mut command)?).map_err(|error| Failure::new(format!("{}: {error}", path.display())))
}

fn output(command: &mut Command) -> Result<String, Failure> {
    let (mut printed, mut errors) = (String::new(), String::new());
    let status = process::stream(command, "a program", LIMIT, |stream, line| {
        let kept = match stream {
            process::Stream::Output => &mut printed,
            process::Stream::Error => &mut errors,
        };
        kept.push_str(line);
        kept.push('\n');
    })?;
    if status.success() {
        Ok(printed)
    } else {
        Err(Failure::new(format!("{status}: {printed}{errors}")))
    }
}

fn validate(python: &Path, manifest: &Path) -> Result<(), Failure> {
    let script = "import sys; from kubernetes_validate.__main__ import main; sys.exit(main())";
    let mut command = Command::new(python);
    command.args(["-c", script, "--strict", "-k", KUBERNETES]).arg(manifest);
    output(&mut command).map(drop)
}

/// The check itself must be able to fail.
fn refuses_unknown_field(python: &Path, manifest: &Path) -> Result<(), Failure> {
    let text = fs::read_to_string(manifest)?;
    let spoiled = text.replacen("terminationGracePeriodSeconds", "terminationGraciousSeconds", 1);
    if spoiled == text {
        return Err(Failure::new("there is no field to spoil"));
    }
    let file = tempfile::Builder::new().suffix(".yaml").tempfile()?;
    fs::write(file.path(), spoiled)?;
    match validate(python, file.path()) {
        Err(failure) if failure.message.contains("terminationGraciousSeconds") => Ok(()),
        Err(failure) => Err(failure),
        Ok(()) => Err(Failure::new("it was accepted")),
    }
}

fn allows_io_uring(profile: &Profile) -> Result<(), Failure> {
    let needed = [
        "io_uring_setup",
        "io_uring_enter",
        "io_uring_register",
        "memfd_create",
        "pidfd_open",
    ];
    for call in needed {
        if !profile.allows(call) {
            return Err(Failure::new(format!("{call} is not allowed")));
        }
    }
    // What the usual profile keeps from making namespaces, ours keeps too.
    for call in ["clone", "clone3", "unshare", "setns", "mount", "ptrace", "bpf"] {
        if profile.allows(call) {
            return Err(Failure::new(format!("{call} is allowed whatever its arguments")));
        }
    }
    Ok(())
}

fn compose(python: &Path, path: &Path) -> Result<(), Failure> {
    let documents = documents(python, path)?;
    let service = &documents.first().ok_or_else(|| Failure::new("it is empty"))?["services"]["kv-daemon"];
    let options = service["security_opt"].as_array().cloned().unwrap_or_default();
    let named = options
        .iter()
        .filter_map(Value::as_str)
        .find_map(|option| option.strip_prefix("seccomp:"));
    let exists = named.is_some_and(|named| path.with_file_name("").join(named).is_file());
    let rules = [
        (service["read_only"] == true, "the root is to be read-only"),
        (service["user"] == "10001:10001", "the user is to be 10001"),
        (service["cap_drop"][0] == "ALL", "capabilities are to be dropped"),
        (exists, "the seccomp profile is to exist"),
    ];
    unmet(&rules)
}

fn dockerfile(path: &Path) -> Result<(), Failure> {
    let text = fs::read_to_string(path)?;
    let has = |line: &str| text.lines().any(|other| other.starts_with(line));
    unmet(&[
        (has("USER 10001:10001"), "the user is to be 10001"),
        (has("HEALTHCHECK"), "a health check is missing"),
        (
            text.matches("FROM ").count() == 2,
            "it is to have a stage that builds and one that ships",
        ),
        (
            text.contains("release/kv-daemon") && text.contains("release/kvctl"),
            "both programs are to ship",
        ),
    ])
}

fn unmet(rules: &[(bool, &str)]) -> Result<(), Failure> {
    let unmet: Vec<&str> = rules.iter().filter(|(met, _)| !met).map(|(_, words)| *words).collect();
    if unmet.is_empty() {
        Ok(())
    } else {
        Err(Failure::new(unmet.join("; ")))
    }
}

/// What a manifest says about the daemon's container.
#[derive(Clone, Debug, Default)]
struct Pod {
    command: Vec<String>,
    environment: Vec<(String, String)>,
    user: u32,
    group: u32,
    /// `Localhost`: our profile. Else the runtime's own, which is taken to be ours without io_uring.
    is_localhost: bool,
    mounts: Vec<String>,
    probes: Vec<Vec<String>>,
    grace: Duration,
}

impl Pod {
    fn of(documents: &[Value]) -> Result<Pod, Failure> {
        let find = |kind: &str| documents.iter().find(|document| document["kind"] == kind);
        let set = find("DaemonSet").ok_or_else(|| Failure::new("no DaemonSet"))?;
        let spec = &set["spec"]["template"]["spec"];
        let container = &spec["containers"][0];
        let texts = |value: &Value| -> Vec<String> {
            let list = value.as_array().map_or(&[][..], Vec::as_slice);
            list.iter().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let mut environment = Vec::new();
        for source in container["envFrom"].as_array().map_or(&[][..], Vec::as_slice) {
            let name = &source["configMapRef"]["name"];
            let map = documents
                .iter()
                .find(|document| document["kind"] == "ConfigMap" && document["metadata"]["name"] == *name);
            let data = map.and_then(|map| map["data"].as_object());
            let data = data.ok_or_else(|| Failure::new(format!("no ConfigMap {name}")))?;
            environment.extend(
                data.iter()
                    .map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())),
            );
        }
        for variable in container["env"].as_array().map_or(&[][..], Vec::as_slice) {
            let text = |field: &str| variable[field].as_str().unwrap_or_default().to_owned();
            environment.push((text("name"), text("value")));
        }
        let number = |value: &Value| value.as_u64().and_then(|number| u32::try_from(number).ok());
        let context = &spec["securityContext"];
        let own = &container["securityContext"];
        unmet(&[
            (context["runAsNonRoot"] == true, "it is not to run as root"),
            (own["readOnlyRootFilesystem"] == true, "the root is to be read-only"),
            (
                own["allowPrivilegeEscalation"] == false,
                "no privileges are to be gained",
            ),
            (
                own["capabilities"]["drop"][0] == "ALL",
                "capabilities are to be dropped",
            ),
            (
                !container["resources"]["limits"]["memory"].is_null(),
                "memory is to be limited",
            ),
        ])?;
        let mut command = texts(&container["command"]);
        command.extend(texts(&container["args"]));
        let probes = ["startupProbe", "readinessProbe", "livenessProbe"];
        let probes: Vec<Vec<String>> = probes
            .iter()
            .map(|probe| texts(&container[*probe]["exec"]["command"]))
            .collect();
        let mounts = container["volumeMounts"].as_array().map_or(&[][..], Vec::as_slice);
        let pod = Pod {
            command,
            environment,
            user: number(&context["runAsUser"]).unwrap_or(0),
            group: number(&context["runAsGroup"]).unwrap_or(0),
            is_localhost: context["seccompProfile"]["type"] == "Localhost",
            mounts: mounts
                .iter()
                .filter_map(|mount| mount["mountPath"].as_str())
                .map(str::to_owned)
                .collect(),
            probes,
            grace: Duration::from_secs(spec["terminationGracePeriodSeconds"].as_u64().unwrap_or(30)),
        };
        unmet(&[
            (pod.user != 0 && pod.group != 0, "user and group are to be given"),
            (
                pod.probes.iter().all(|probe| !probe.is_empty()),
                "startup, readiness and liveness are to be probed",
            ),
            (pod.mounts.len() == 2, "socket and NVMe are to be mounted"),
        ])?;
        Ok(pod)
    }
}

/// Why this machine cannot do as a node does, if it cannot.
fn cannot_contain() -> Option<String> {
    if !getuid().is_root() {
        return Some("only root can mount and change users: run it as root".into());
    }
    let mut probe = Command::new("unshare");
    probe.args([
        "--mount", "--pid", "--net", "--fork", "mount", "-t", "tmpfs", "none", "/mnt",
    ]);
    match probe.stdout(Stdio::null()).stderr(Stdio::null()).status() {
        Ok(status) if status.success() => None,
        Ok(_) => Some("namespaces or mounts are denied here".into()),
        Err(error) => Some(format!("unshare (util-linux): {error}")),
    }
}

/// A root directory of its own: the libraries of this machine, read-only, and the two programs.
const ROOM: &str = r#"
set -eu
root=$1 stage=$2 user=$3
shift 3
mount --make-rprivate /
mount -t tmpfs -o mode=755 none "$root"
for directory in lib lib64 usr/lib usr/lib64; do
    [ -d "/$directory" ] || continue
    if [ -L "/$directory" ]; then ln -s "$(readlink "/$directory")" "$root/$directory"; continue; fi
    mkdir -p "$root/$directory"
    mount --rbind "/$directory" "$root/$directory"
done
mkdir -p "$root/proc" "$root/dev" "$root/usr/local/bin" "$root/tmp" "$root/profile"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
cp "$stage"/programs/* "$root/usr/local/bin/"
cp "$stage/profile.json" "$root/profile/"
while [ "$1" != -- ]; do
    mkdir -p "$root$1"
    mount --bind "$stage/volumes/$(echo "$1" | tr / _)" "$root$1"
    shift
done
shift
mount -o remount,ro "$root"
exec chroot --userspec="$user" "$root" /usr/local/bin/xtask confine --profile /profile/profile.json -- "$@"
"#;

/// Starts the daemon as the pod says and runs its probes.
fn runs(built: &Path, pod: &Pod, profile: &Profile) -> Result<(), Failure> {
    let stage = tempfile::Builder::new().prefix("kvd-").tempdir()?;
    let root = stage.path().join("root");
    let programs = stage.path().join("programs");
    for directory in [&root, &programs] {
        fs::create_dir(directory)?;
    }
    fs::set_permissions(stage.path(), fs::Permissions::from_mode(0o755))?;
    for name in ["kv-daemon", "kvctl"] {
        fs::copy(built.join(name), programs.join(name))?;
    }
    fs::copy("/proc/self/exe", programs.join("xtask"))?;
    let profile = if pod.is_localhost {
        profile.clone()
    } else {
        profile.without("io_uring_")
    };
    fs::write(stage.path().join("profile.json"), profile.to_json())?;
    for mount in &pod.mounts {
        let volume = volume(stage.path(), mount);
        fs::create_dir_all(&volume)?;
        chown(&volume, Some(pod.user), Some(pod.group))?;
        fs::set_permissions(&volume, fs::Permissions::from_mode(0o750))?;
    }
    let log = stage.path().join("log");
    let mut command = Command::new("unshare");
    command.args([
        "--mount",
        "--pid",
        "--net",
        "--fork",
        "--kill-child",
        "sh",
        "-c",
        ROOM,
        "room",
    ]);
    command
        .arg(&root)
        .arg(stage.path())
        .arg(format!("{}:{}", pod.user, pod.group));
    command.args(&pod.mounts).arg("--").args(&pod.command);
    command
        .env_clear()
        .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
    command.envs(pod.environment.iter().map(|(name, value)| (name, value)));
    // A node's sizes are not a test's.
    command
        .env("KVTIER_HOST_BYTES", "64MiB")
        .env("KVTIER_NVME_BYTES", "256MiB");
    let child = command
        .stdin(Stdio::null())
        .stdout(fs::File::create(&log)?)
        .stderr(fs::OpenOptions::new().append(true).create(true).open(&log)?)
        .spawn()?;
    let mut contained = Contained {
        child,
        pod,
        stage: stage.path().to_owned(),
    };
    contained.examine().map_err(|failure| {
        let said = fs::read_to_string(&log).unwrap_or_default();
        let tail: Vec<&str> = said.lines().rev().take(8).collect();
        Failure::new(format!(
            "{}\n{}",
            failure.message,
            tail.into_iter().rev().collect::<Vec<_>>().join("\n")
        ))
    })
}

/// What a mount is bound to.
fn volume(stage: &Path, mount: &str) -> PathBuf {
    stage.join("volumes").join(mount.replace('/', "_"))
}

/// A daemon in namespaces of its own.
struct Contained<'a> {
    child: Child,
    pod: &'a Pod,
    stage: PathBuf,
}

impl Contained<'_> {
    fn examine(&mut self) -> Result<(), Failure> {
        let begun = Instant::now();
        for probe in &self.pod.probes {
            loop {
                match self.inside(probe) {
                    Ok(_) => break,
                    Err(failure) if begun.elapsed() > READY_LIMIT => return Err(failure),
                    Err(_) => {}
                }
                if let Some(status) = self.child.try_wait()? {
                    return Err(Failure::new(format!("the daemon ended: {status}")));
                }
                // A probe that cannot succeed is found out by its words, not by the time.
                if let Err(failure) = self.inside(probe)
                    && failure.message.contains("unrecognized subcommand")
                {
                    return Err(failure);
                }
                std::thread::sleep(Duration::from_millis(200));
            }
        }
        let kvctl = |arguments: &[&str]| {
            let command = std::iter::once("/usr/local/bin/kvctl").chain(arguments.iter().copied());
            self.inside(&command.map(str::to_owned).collect::<Vec<_>>())
        };
        let status: Value = serde_json::from_str(&kvctl(&["status", "--json"])?)
            .map_err(|error| Failure::new(format!("the status is no JSON: {error}")))?;
        let wanted = if self.pod.is_localhost { "io_uring" } else { "threads" };
        if status["nvme_engine"] != wanted {
            return Err(Failure::new(format!(
                "NVMe is reached by {}, not {wanted}",
                status["nvme_engine"]
            )));
        }
        let socket = volume(&self.stage, "/run/kvtier");
        let block: Vec<u8> = (0..1u32 << 18)
            .flat_map(|word| word.wrapping_mul(0x9E37_79B9).to_le_bytes())
            .collect();
        fs::write(socket.join("block"), &block)?;
        kvctl(&["put", "deploy", "/run/kvtier/block", "--json"])?;
        kvctl(&["flush", "--json"])?;
        kvctl(&["get", "deploy", "--output", "/run/kvtier/back", "--json"])?;
        if fs::read(socket.join("back"))? != block {
            return Err(Failure::new("what was put came back as something else"));
        }
        match kvctl(&["get", "deploy", "--output", "/usr/local/bin/new"]) {
            Err(failure) if failure.message.contains("Read-only file system") => {}
            other => return Err(Failure::new(format!("the root takes writes: {other:?}"))),
        }
        self.terminate()
    }

    /// The daemon's process, as this namespace sees it.
    fn process(&self) -> Option<u32> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.child.id())).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Runs a command where the daemon runs and as its user.
    fn inside(&self, command: &[String]) -> Result<String, Failure> {
        let process = self
            .process()
            .ok_or_else(|| Failure::new("the daemon is not there yet"))?;
        let mut nsenter = Command::new("nsenter");
        nsenter.args(["--target", &process.to_string(), "--mount", "--pid", "--root", "--wd=/"]);
        nsenter.args([
            "--setgid",
            &self.pod.group.to_string(),
            "--setuid",
            &self.pod.user.to_string(),
            "--",
        ]);
        // As a node does: under the container's profile, and with nothing but its environment.
        nsenter.args([
            "/usr/local/bin/xtask",
            "confine",
            "--profile",
            "/profile/profile.json",
            "--",
        ]);
        nsenter
            .args(command)
            .env_clear()
            .env("PATH", "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin");
        nsenter.envs(self.pod.environment.iter().map(|(name, value)| (name, value)));
        output(&mut nsenter)
    }

    /// As a node ends it.
    fn terminate(&mut self) -> Result<(), Failure> {
        let process = self
            .process()
            .and_then(|process| i32::try_from(process).ok())
            .and_then(Pid::from_raw);
        let process = process.ok_or_else(|| Failure::new("the daemon is gone"))?;
        kill_process(process, Signal::TERM).map_err(|error| Failure::new(error.to_string()))?;
        let begun = Instant::now();
        while begun.elapsed() < self.pod.grace {
            match self.child.try_wait()? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(Failure::new(format!("SIGTERM ended it with {status}"))),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
        Err(Failure::new(format!(
            "it still runs {} s after SIGTERM",
            self.pod.grace.as_secs()
        )))
    }
}

impl Drop for Contained<'_> {
    fn drop(&mut self) {
        process::kill_tree(&mut self.child);
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn manifest() -> Value {
        let probe = json!({"exec": {"command": ["/usr/local/bin/kvctl", "status"]}});
        json!({"kind": "DaemonSet", "spec": {"template": {"spec": {
            "terminationGracePeriodSeconds": 40,
            "securityContext": {"runAsNonRoot": true, "runAsUser": 5, "runAsGroup": 6, "seccompProfile": {"type": "Localhost"}},
            "containers": [{
                "command": ["/kv-daemon"], "args": ["serve"],
                "env": [{"name": "A", "value": "b"}], "envFrom": [{"configMapRef": {"name": "sizes"}}],
                "startupProbe": probe, "readinessProbe": probe, "livenessProbe": probe,
                "resources": {"limits": {"memory": "1Gi"}},
                "securityContext": {"readOnlyRootFilesystem": true, "allowPrivilegeEscalation": false, "capabilities": {"drop": ["ALL"]}},
                "volumeMounts": [{"mountPath": "/a"}, {"mountPath": "/b"}],
            }],
        }}}})
    }

    fn pod(manifest: Value) -> Result<Pod, Failure> {
        let sizes = json!({"kind": "ConfigMap", "metadata": {"name": "sizes"}, "data": {"C": "d"}});
        Pod::of(&[sizes, manifest])
    }

    #[test]
    fn a_pod_is_read_with_all_that_its_process_sees() {
        let pod = pod(manifest()).expect("complete");
        assert_eq!(pod.command, ["/kv-daemon", "serve"]);
        assert_eq!(pod.environment, [("C".into(), "d".into()), ("A".into(), "b".into())]);
        assert_eq!(
            (pod.user, pod.group, pod.is_localhost, pod.probes.len()),
            (5, 6, true, 3)
        );
    }

    #[test]
    fn whatever_a_pod_lacks_is_named() {
        let container = "/spec/template/spec/containers/0";
        for (place, words) in [
            (
                format!("{container}/securityContext/readOnlyRootFilesystem"),
                "read-only",
            ),
            (format!("{container}/livenessProbe"), "probed"),
            (format!("{container}/resources"), "limited"),
            (format!("{container}/volumeMounts"), "mounted"),
            ("/spec/template/spec/securityContext/runAsNonRoot".into(), "root"),
            ("/spec/template/spec/securityContext/runAsUser".into(), "user"),
        ] {
            let mut manifest = manifest();
            *manifest.pointer_mut(&place).expect("a field") = Value::Null;
            let failure = pod(manifest).expect_err(&place);
            assert!(failure.message.contains(words), "{place}: {}", failure.message);
        }
    }
}
