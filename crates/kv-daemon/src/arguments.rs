//! The command line of `kv-daemon`.

use std::path::PathBuf;
use std::process::ExitCode as ProcessExitCode;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::configuration::Sources;
use crate::demo;
use crate::exit::{ExitCode, Failure, report};
use crate::{replay, rotation, serve};

/// Keeps KV-cache blocks in host memory and on NVMe, for engines that ask over a Unix socket.
#[derive(Debug, Parser)]
#[command(name = "kv-daemon", version, args_conflicts_with_subcommands = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    flags: Flags,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run until SIGTERM (what happens without a command, too).
    Serve(Flags),
    /// Print the effective settings and where each comes from.
    Settings {
        /// One JSON object.
        #[arg(long, conflicts_with = "toml")]
        json: bool,
        /// A settings file (the default).
        #[arg(long)]
        toml: bool,
        #[command(flatten)]
        flags: Flags,
    },
    /// Show it at work: a daemon of its own, a chat workload, a table. Under a minute; leaves nothing behind.
    Demo(demo::Options),
    /// Wrap the keys of a stopped daemon's namespaces by another master key, without touching data.
    RotateMasterKey(rotation::Options),
    /// Sign receipts by a new key; the old one says so in the chain. The daemon must be stopped
    RotateReceiptKey(rotation::ReceiptKeyOptions),
    /// Print a completion script for a shell.
    Completion {
        /// Which shell.
        shell: Shell,
    },
    /// What the demo starts as its client.
    #[command(hide = true)]
    DemoClient(replay::ClientArguments),
}

/// Settings that have a flag. All of them can also be set in the file and as `KVTIER_NAME` in the environment.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Flags {
    /// Settings file [default: /etc/kvtier/kv-daemon.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where segment files, keys, lock, admin token and socket live
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// Unix socket for clients [default: kvtier.sock in the state directory]
    #[arg(long, value_name = "PATH")]
    socket: Option<String>,
    /// Permission bits of the socket, octal [default: 0600]
    #[arg(long, value_name = "MODE")]
    socket_mode: Option<String>,
    /// Admin HTTP address; beyond loopback it needs TLS; port 0 takes a free one; off for none [default: 127.0.0.1:9640]
    #[arg(long, value_name = "ADDRESS")]
    http: Option<String>,
    /// Host memory for blocks, such as 64MiB or 1.5GiB [default: 1GiB]
    #[arg(long, value_name = "SIZE")]
    host_bytes: Option<String>,
    /// Memory of a GPU for copies of blocks that are used again; 0 for none [default: 0]
    #[arg(long, value_name = "SIZE")]
    hbm_bytes: Option<String>,
    /// Number of that GPU, as CUDA counts them [default: 0]
    #[arg(long, value_name = "NUMBER")]
    hbm_device: Option<String>,
    /// NVMe space for blocks; 0 for none [default: 0]
    #[arg(long, value_name = "SIZE")]
    nvme_bytes: Option<String>,
    /// One block device or file for the NVMe tier [default: segment files in the state directory]
    #[arg(long, value_name = "PATH")]
    nvme_device: Option<String>,
    /// Give the room of emptied segments on the device back to it [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    nvme_discard: Option<String>,
    /// How NVMe is reached: auto, io-uring or threads [default: auto]
    #[arg(long, value_name = "ENGINE")]
    nvme_engine: Option<String>,
    /// Which blocks go when room is needed: lru or hazard [default: lru]
    #[arg(long, value_name = "POLICY")]
    eviction_policy: Option<String>,
    /// Record requests in this file, as a trace for kvctl simulate and replay-gate: times, lengths, keyed hashes, no contents
    #[arg(long, value_name = "FILE")]
    record_trace: Option<String>,
    /// How payloads on NVMe are protected: aes-256-gcm or none [default: aes-256-gcm]
    #[arg(long, value_name = "CIPHER")]
    encryption: Option<String>,
    /// File of the master key, 64 hex digits, mode 0600 [default: master.key in the state directory, made at first start]
    #[arg(long, value_name = "FILE")]
    master_key_file: Option<String>,
    /// File outside the state directory that remembers generations, so that an older copy of that is not served
    #[arg(long, value_name = "FILE")]
    anchor: Option<String>,
    /// How long a physical purge waits for clients to give back memory, milliseconds [default: 5000]
    #[arg(long, value_name = "MS")]
    purge_lease_grace_ms: Option<String>,
    /// How long a purge waits for caches to confirm, milliseconds [default: 2000]
    #[arg(long, value_name = "MS")]
    purge_confirm_wait_ms: Option<String>,
    /// How long demoted blocks may wait before they survive a power cut, milliseconds [default: 1000]
    #[arg(long, value_name = "MS")]
    nvme_flush_interval_ms: Option<String>,
    /// Where peers reach this node; it needs --peer-secret-file [default: no peers]
    #[arg(long, value_name = "ADDRESS")]
    peer_listen: Option<String>,
    /// This node as the others' list names it [default: --peer-listen]
    #[arg(long, value_name = "HOST:PORT")]
    peer_address: Option<String>,
    /// Members of the cluster, separated by commas
    #[arg(long, value_name = "HOST:PORT,...")]
    peers: Option<String>,
    /// A name whose addresses are members too, such as a headless service's
    #[arg(long, value_name = "NAME:PORT")]
    peers_dns: Option<String>,
    /// A Redis server where members find each other
    #[arg(long, value_name = "redis://HOST:PORT")]
    peers_redis: Option<String>,
    /// A Redis server that keeps sealed blocks of the named trust domains: redis://[USER@]HOST:PORT[/DB]
    #[arg(long, value_name = "URL")]
    remote_redis: Option<String>,
    /// A bucket that keeps sealed blocks of the named trust domains: s3://BUCKET[/PREFIX]; it needs --remote-s3-credentials-file
    #[arg(long, value_name = "URL")]
    remote_s3: Option<String>,
    /// Where the bucket's server is [default: Amazon's, of the region]
    #[arg(long, value_name = "URL")]
    remote_s3_endpoint: Option<String>,
    /// The region that requests to the bucket are signed for [default: us-east-1]
    #[arg(long, value_name = "NAME")]
    remote_s3_region: Option<String>,
    /// The file with the keys to the bucket, as `aws configure` writes it
    #[arg(long, value_name = "FILE")]
    remote_s3_credentials_file: Option<String>,
    /// A file whose content all members know and nobody else
    #[arg(long, value_name = "FILE")]
    peer_secret_file: Option<String>,
    /// PEM of this node's certificate: members talk within TLS; it needs --peer-tls-key-file and --peer-tls-ca-file
    #[arg(long, value_name = "FILE")]
    peer_tls_certificate_file: Option<String>,
    /// PEM of its key
    #[arg(long, value_name = "FILE")]
    peer_tls_key_file: Option<String>,
    /// PEM of the authorities that sign every member's certificate
    #[arg(long, value_name = "FILE")]
    peer_tls_ca_file: Option<String>,
    /// A name that every member's certificate has [default: each is for the IP address that is called]
    #[arg(long, value_name = "NAME")]
    peer_tls_name: Option<String>,
    /// How blocks are read from peers: auto, tcp or verbs [default: auto]
    #[arg(long, value_name = "TRANSPORT")]
    peer_transport: Option<String>,
    /// Serve only while a majority of the members renews this one's lease [default: false]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    cluster_fence: Option<String>,
    /// Huge pages for host memory: auto, never or require [default: auto]
    #[arg(long, value_name = "WHEN")]
    huge_pages: Option<String>,
    /// NUMA node to place host memory on
    #[arg(long, value_name = "NODE")]
    numa_node: Option<String>,
    /// Lock host memory when the limit allows [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_missing_value = "true")]
    lock_memory: Option<String>,
    /// How long a lease promises, milliseconds [default: 30000]
    #[arg(long, value_name = "MS")]
    lease_ttl_ms: Option<String>,
    /// How long an unsealed reservation lives, milliseconds [default: 30000]
    #[arg(long, value_name = "MS")]
    reservation_ttl_ms: Option<String>,
    /// Byte quota of each namespace [default: none]
    #[arg(long, value_name = "SIZE")]
    namespace_quota_bytes: Option<String>,
    /// Which clock drives eviction: system, or client to replay traces at their own pace (a test mode) [default: system]
    #[arg(long, value_name = "CLOCK")]
    clock: Option<String>,
    /// How long a stop may take, milliseconds [default: 30000]
    #[arg(long, value_name = "MS")]
    drain_timeout_ms: Option<String>,
    /// How log lines look: text or json [default: text]
    #[arg(long, value_name = "FORMAT")]
    log_format: Option<String>,
    /// Which log lines are written: a level or directives [default: info]
    #[arg(long, value_name = "LEVEL")]
    log_level: Option<String>,
    /// End when the process that started this one ends.
    #[arg(long, hide = true)]
    exit_with_parent: bool,
}

impl Flags {
    fn sources(self) -> Sources {
        let mut sources = Sources::of_this_process();
        sources.file = self.config;
        let given = [
            ("state_dir", "--state-dir", self.state_dir),
            ("socket", "--socket", self.socket),
            ("socket_mode", "--socket-mode", self.socket_mode),
            ("http", "--http", self.http),
            ("host_bytes", "--host-bytes", self.host_bytes),
            ("hbm_bytes", "--hbm-bytes", self.hbm_bytes),
            ("hbm_device", "--hbm-device", self.hbm_device),
            ("nvme_bytes", "--nvme-bytes", self.nvme_bytes),
            ("nvme_device", "--nvme-device", self.nvme_device),
            ("nvme_discard", "--nvme-discard", self.nvme_discard),
            ("nvme_engine", "--nvme-engine", self.nvme_engine),
            ("eviction_policy", "--eviction-policy", self.eviction_policy),
            ("record_trace", "--record-trace", self.record_trace),
            ("encryption", "--encryption", self.encryption),
            ("master_key_file", "--master-key-file", self.master_key_file),
            ("anchor_file", "--anchor", self.anchor),
            ("peer_listen", "--peer-listen", self.peer_listen),
            ("peer_address", "--peer-address", self.peer_address),
            ("peers", "--peers", self.peers),
            ("peers_dns", "--peers-dns", self.peers_dns),
            ("peers_redis", "--peers-redis", self.peers_redis),
            ("remote_redis", "--remote-redis", self.remote_redis),
            ("remote_s3", "--remote-s3", self.remote_s3),
            ("remote_s3_endpoint", "--remote-s3-endpoint", self.remote_s3_endpoint),
            ("remote_s3_region", "--remote-s3-region", self.remote_s3_region),
            (
                "remote_s3_credentials_file",
                "--remote-s3-credentials-file",
                self.remote_s3_credentials_file,
            ),
            ("peer_secret_file", "--peer-secret-file", self.peer_secret_file),
            (
                "peer_tls_certificate_file",
                "--peer-tls-certificate-file",
                self.peer_tls_certificate_file,
            ),
            ("peer_tls_key_file", "--peer-tls-key-file", self.peer_tls_key_file),
            ("peer_tls_ca_file", "--peer-tls-ca-file", self.peer_tls_ca_file),
            ("peer_tls_name", "--peer-tls-name", self.peer_tls_name),
            ("peer_transport", "--peer-transport", self.peer_transport),
            ("cluster_fence", "--cluster-fence", self.cluster_fence),
            (
                "purge_lease_grace_ms",
                "--purge-lease-grace-ms",
                self.purge_lease_grace_ms,
            ),
            (
                "purge_confirm_wait_ms",
                "--purge-confirm-wait-ms",
                self.purge_confirm_wait_ms,
            ),
            (
                "nvme_flush_interval_ms",
                "--nvme-flush-interval-ms",
                self.nvme_flush_interval_ms,
            ),
            ("huge_pages", "--huge-pages", self.huge_pages),
            ("numa_node", "--numa-node", self.numa_node),
            ("lock_memory", "--lock-memory", self.lock_memory),
            ("lease_ttl_ms", "--lease-ttl-ms", self.lease_ttl_ms),
            ("reservation_ttl_ms", "--reservation-ttl-ms", self.reservation_ttl_ms),
            (
                "namespace_quota_bytes",
                "--namespace-quota-bytes",
                self.namespace_quota_bytes,
            ),
            ("clock", "--clock", self.clock),
            ("drain_timeout_ms", "--drain-timeout-ms", self.drain_timeout_ms),
            ("log_format", "--log-format", self.log_format),
            ("log_level", "--log-level", self.log_level),
        ];
        sources.flags = given
            .into_iter()
            .filter_map(|(field, flag, text)| Some((field, flag, text?)))
            .collect();
        sources
    }
}

/// The whole of `kv-daemon`.
#[must_use]
pub fn main() -> ProcessExitCode {
    match Arguments::try_parse() {
        Ok(arguments) => report("kv-daemon", run(arguments)),
        Err(error) => usage(&error),
    }
}

/// Prints what clap has to say: help and version are successes, the rest is a wrong command line.
pub(crate) fn usage(error: &clap::Error) -> ProcessExitCode {
    // A closed pipe is the reader's choice, not a failure of ours.
    let _ = error.print();
    ProcessExitCode::from(if error.use_stderr() { ExitCode::Usage as u8 } else { 0 })
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    match arguments.command.unwrap_or(Command::Serve(arguments.flags)) {
        Command::Serve(flags) => {
            if flags.exit_with_parent {
                end_with_parent();
            }
            serve::run(flags.sources().load()?)
        }
        Command::Settings { json, toml: _, flags } => {
            let configuration = flags.sources().load()?;
            for warning in &configuration.warnings {
                eprintln!("kv-daemon: warning: {warning}");
            }
            let text = if json {
                format!("{:#}\n", configuration.to_json())
            } else {
                configuration.to_toml()
            };
            crate::output::print(&text)
        }
        Command::Demo(options) => demo::run(&options),
        Command::RotateMasterKey(options) => rotation::run(options),
        Command::RotateReceiptKey(options) => rotation::rotate_receipt_key(options),
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "kv-daemon", &mut script);
            crate::output::print(&String::from_utf8_lossy(&script))
        }
        Command::DemoClient(arguments) => {
            end_with_parent();
            arguments.run()
        }
    }
}

/// Asks the kernel to end this process with its parent, so that a killed demo leaves nothing behind.
fn end_with_parent() {
    // Only a very old kernel refuses; then the parent's own clean-up is what there is.
    let _ = rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM));
}
