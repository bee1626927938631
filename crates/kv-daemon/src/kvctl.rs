//! The operator's tool: what a daemon can be asked from a shell.
//!
//! Every command prints words for people, or with `--json` one JSON value. A miss ends with 1, a daemon that is not there
//! with 69, wrong bytes with 1; see [`crate::exit`].

mod administration;
mod audit;
mod bench;
mod commands;
mod explain;
mod hints;
mod http;
mod namespace;
mod peers;
mod purge;
mod receipt;
mod remote;
mod replay_gate;
mod simulate;
mod token;

use std::path::PathBuf;
use std::process::ExitCode as ProcessExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;
use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientError, ClientOptions};
use kvtier::{BlockHash, ErrorKind, Realization};
use kvtier_sim::workload::ChatWorkload;

use crate::arguments::usage;
use crate::configuration::{default_socket, environment};
use crate::exit::{ExitCode, Failure, report};
use crate::replay;

/// Asks a kv-daemon.
#[derive(Debug, Parser)]
#[command(name = "kvctl", version)]
struct Arguments {
    #[command(flatten)]
    connection: Connection,
    #[command(subcommand)]
    command: Command,
}

/// How the daemon is reached and how it answers.
#[derive(Clone, Debug, Args)]
pub(crate) struct Connection {
    /// The daemon's socket [default: kvtier.sock in the state directory of this user]
    #[arg(long, global = true, value_name = "PATH", env = "KVTIER_SOCKET")]
    socket: Option<String>,
    /// Print JSON
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// Namespace of the keys
    #[arg(long, global = true, value_name = "NAME", env = "KVTIER_NAMESPACE")]
    pub(crate) namespace: Option<String>,
    /// What the bytes are: blocks put under one text are found under the same text only
    #[arg(long, global = true, value_name = "TEXT", default_value = "kvctl")]
    pub(crate) realization: String,
    /// File whose first line is the token of a trust domain
    #[arg(long, global = true, value_name = "FILE", env = "KVTIER_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// How long one request may take, milliseconds
    #[arg(long, global = true, value_name = "MS", default_value_t = 30_000)]
    pub(crate) timeout_ms: u64,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What the daemon holds and does
    Status,
    /// The other nodes: rails, bandwidth, errors
    Peers,
    /// The remote tier: what was read and written there, and whether it is worth asking
    Remote,
    /// Store a file, or standard input, under a key
    Put {
        /// 32 hex digits, or any text (which is hashed)
        key: String,
        /// The file; - for standard input
        file: PathBuf,
        /// Tokens that the block stands for
        #[arg(long, default_value_t = 0)]
        tokens: u32,
        /// What it is part of, to be purged by `kvctl purge NS --label`
        #[arg(long)]
        label: Option<String>,
    },
    /// Read the block of a key; a miss ends with 1
    Get {
        /// 32 hex digits, or any text (which is hashed)
        key: String,
        /// Where to [default: standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        #[command(flatten)]
        hints: hints::HintOptions,
    },
    /// Say which keys are cached, and where; any miss ends with 1
    Exists {
        /// 32 hex digits each, or any text (which is hashed)
        #[arg(required = true)]
        keys: Vec<String>,
        /// Also what other nodes have and is not worth fetching
        #[arg(long)]
        raw: bool,
        /// The engine can compute the front while the rest is fetched: then those in front are left to it where that is faster
        #[arg(long, help_heading = "Hints")]
        can_split: bool,
        #[command(flatten)]
        hints: hints::HintOptions,
    },
    /// Say what would be decided about fetching a prompt's blocks from other nodes, term by term; decides nothing
    Explain(explain::ExplainOptions),
    /// Forget the blocks of keys; any miss ends with 1
    Delete {
        /// 32 hex digits each, or any text (which is hashed)
        #[arg(required = true)]
        keys: Vec<String>,
    },
    /// Make everything in a namespace unreadable, at once
    Invalidate {
        /// Name of the namespace in the caller's trust domain
        name: String,
    },
    /// Write every block to NVMe that is not there yet
    Flush,
    /// Purge a namespace, or a part of it: nothing older can be read, and with --mode physical it is destroyed
    Purge(purge::PurgeOptions),
    /// List purges, of one namespace with --namespace
    Purges(purge::PurgesOptions),
    /// Look at namespaces and set them
    Namespace {
        /// What to do
        #[command(subcommand)]
        what: namespace::NamespaceCommand,
    },
    /// Manage the tokens of the admin API
    Token {
        /// What to do
        #[command(subcommand)]
        what: token::TokenCommand,
    },
    /// Receipts of purges
    Receipt {
        /// What to do with them
        #[command(subcommand)]
        what: receipt::ReceiptCommand,
    },
    /// Check the admin API's audit log
    Audit {
        /// What to do
        #[command(subcommand)]
        what: audit::AuditCommand,
    },
    /// Send a trace with every byte checked
    Replay(replay::Options),
    /// Say what eviction policies would hit on a trace, without a daemon
    Simulate(simulate::SimulateOptions),
    /// Say whether a trace's traffic gains by the cache, without a daemon: 0 where it does, 1 where not, 75 where the trace does not say
    ReplayGate(replay_gate::ReplayGateOptions),
    /// Measure
    Bench {
        /// What to measure
        #[command(subcommand)]
        what: Bench,
    },
    /// Write a generated chat workload, in the schema that replay reads
    Workload {
        /// Where to [default: standard output]
        #[arg(short, long, value_name = "FILE")]
        output: Option<PathBuf>,
        /// Fixes the workload
        #[arg(long, default_value_t = 1)]
        seed: u64,
        /// Chats
        #[arg(long, default_value_t = ChatWorkload::default().sessions)]
        sessions: u32,
    },
    /// Print a completion script for a shell
    Completion {
        /// Which shell
        shell: Shell,
    },
    /// What a bench starts as the other end of its echoes.
    #[command(hide = true)]
    EchoServer {
        /// Path of the socket to listen on.
        listen_path: PathBuf,
    },
}

#[derive(Clone, Debug, Subcommand)]
enum Bench {
    /// The client's data path beside memcpy and an echo; without --socket against a daemon of its own
    Client(BenchOptions),
    /// The NVMe tier beside a raw io_uring ring over the same files and memory
    Nvme(NvmeBenchOptions),
    /// Purges against fdatasync, and another tenant's gets while one destroys a full namespace
    Purge(PurgeBenchOptions),
    /// The transports between nodes beside the rawest way to move the same bytes
    Transfer(TransferBenchOptions),
    /// Copies to and from a GPU beside the barest ones; without one it exits 69
    Gpu(GpuBenchOptions),
}

#[derive(Clone, Debug, Args)]
struct GpuBenchOptions {
    /// Which device
    #[arg(long, value_name = "N", default_value_t = 0)]
    device: usize,
    /// A CUDA driver library instead of the system's libcuda.so.1
    #[arg(long, value_name = "FILE")]
    library: Option<PathBuf>,
    /// Short rounds and few: shows that everything runs; the figures mean little
    #[arg(long)]
    quick: bool,
    /// Rounds behind each median
    #[arg(long)]
    rounds: Option<u32>,
}

#[derive(Clone, Debug, Args)]
struct TransferBenchOptions {
    /// Transports: loopback, shm, tcp, verbs; nodes for gets of another node's blocks [default: all that this machine has]
    #[arg(long, value_name = "NAME", value_delimiter = ',')]
    transports: Vec<String>,
    /// Sizes of a piece, such as 1MiB [default: 16KiB,64KiB,1MiB,4MiB]
    #[arg(long, value_name = "SIZE", value_delimiter = ',', value_parser = crate::size::parse)]
    bytes: Vec<u64>,
    /// Short rounds and few: shows that everything runs; the figures mean little
    #[arg(long)]
    quick: bool,
    /// Rounds behind each median
    #[arg(long)]
    rounds: Option<u32>,
}

#[derive(Clone, Debug, Args)]
struct NvmeBenchOptions {
    /// Directory on the disk to measure; what is written there is removed at the end
    #[arg(long, value_name = "DIR")]
    dir: PathBuf,
    /// Cases: read, write, reopen [default: all]
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    cases: Vec<String>,
    /// Small and fast: shows that everything runs; the figures mean little
    #[arg(long)]
    quick: bool,
    /// Rounds behind each median
    #[arg(long)]
    rounds: Option<u32>,
    /// Bytes of records of each size, such as 1GiB; each side moves a quarter of them in a round
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    file_bytes: Option<u64>,
    /// Blocks of 4 KiB to find again after a restart
    #[arg(long)]
    reopen_blocks: Option<u64>,
}

#[derive(Clone, Debug, Args)]
struct PurgeBenchOptions {
    /// Directory on the disk to measure; what is written there is removed at the end
    #[arg(long, value_name = "DIR", default_value = ".")]
    dir: PathBuf,
    /// Sizes, blocks of 4 KiB [default: 10000,1000000]
    #[arg(long, value_name = "N", value_delimiter = ',')]
    blocks: Vec<u64>,
    /// Small and fast: shows that everything runs; the figures mean little
    #[arg(long)]
    quick: bool,
    /// Physical purges of each size
    #[arg(long)]
    rounds: Option<u32>,
    /// Acknowledgements of each size
    #[arg(long)]
    acknowledgements: Option<u32>,
}

#[derive(Clone, Debug, Args)]
struct BenchOptions {
    /// Cases: get_into, put_from, get_in_place, lookup [default: all]
    #[arg(long, value_name = "CASE", value_delimiter = ',')]
    cases: Vec<String>,
    /// Small and fast: shows that everything runs; the figures mean little
    #[arg(long)]
    quick: bool,
    /// Rounds behind each median
    #[arg(long)]
    rounds: Option<u32>,
    /// Bytes to cycle through, such as 1GiB
    #[arg(long, value_name = "SIZE", value_parser = crate::size::parse)]
    working_set_bytes: Option<u64>,
    /// Blocks resident for lookups
    #[arg(long)]
    lookup_blocks: Option<u64>,
}

/// The whole of `kvctl`.
#[must_use]
pub fn main() -> ProcessExitCode {
    match Arguments::try_parse() {
        Ok(arguments) => report("kvctl", run(arguments)),
        Err(error) => usage(&error),
    }
}

fn run(arguments: Arguments) -> Result<(), Failure> {
    let connection = arguments.connection;
    match arguments.command {
        Command::Status => commands::status(&connection),
        Command::Peers => peers::peers(&connection),
        Command::Remote => remote::remote(&connection),
        Command::Put {
            key,
            file,
            tokens,
            label,
        } => commands::put(&connection, &key, &file, tokens, label.as_deref()),
        Command::Get { key, output, hints } => commands::get(&connection, &key, output.as_deref(), (&hints).into()),
        Command::Exists {
            keys,
            raw,
            can_split,
            hints,
        } => {
            let hints = kvtier::Hints {
                can_split,
                ..(&hints).into()
            };
            commands::exists(&connection, &keys, raw, hints)
        }
        Command::Explain(options) => explain::explain(&connection, &options),
        Command::Delete { keys } => commands::delete(&connection, &keys),
        Command::Invalidate { name } => commands::invalidate(&connection, &name),
        Command::Flush => commands::flush(&connection),
        Command::Purge(options) => purge::purge(&connection, &options),
        Command::Purges(options) => purge::purges(&connection, &options),
        Command::Namespace { what } => namespace::run(&connection, &what),
        Command::Token { what } => token::run(&connection, &what),
        Command::Audit { what } => audit::run(&connection, &what),
        Command::Receipt { what } => receipt::run(&connection, &what),
        Command::Replay(options) => replay::run_command(&connection, &options),
        Command::Simulate(options) => simulate::run(&connection, &options),
        Command::ReplayGate(options) => replay_gate::run(&connection, &options),
        Command::Bench {
            what: Bench::Client(options),
        } => bench::client(&connection, options),
        Command::Bench {
            what: Bench::Nvme(options),
        } => bench::nvme(&connection, options),
        Command::Bench {
            what: Bench::Purge(options),
        } => bench::purge(&connection, options),
        Command::Bench {
            what: Bench::Transfer(options),
        } => bench::transfer(&connection, options),
        Command::Bench {
            what: Bench::Gpu(options),
        } => bench::gpu(&connection, options),
        Command::Workload { output, seed, sessions } => {
            let workload = ChatWorkload {
                seed,
                sessions,
                ..ChatWorkload::default()
            };
            commands::workload(&connection, &workload, output.as_deref())
        }
        Command::Completion { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "kvctl", &mut script);
            crate::output::print(&String::from_utf8_lossy(&script))
        }
        Command::EchoServer { listen_path } => bench::echo_server(&listen_path),
    }
}

impl Connection {
    /// The socket that was named, if one was.
    fn named_socket(&self) -> Option<PathBuf> {
        self.socket.as_ref().map(PathBuf::from)
    }

    fn token(&self) -> Result<Option<String>, Failure> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let text = std::fs::read_to_string(path)
            .map_err(|error| Failure::new(ExitCode::NoInput, format!("token file {}: {error}", path.display())))?;
        match text.lines().next().map(str::trim).filter(|token| !token.is_empty()) {
            Some(token) => Ok(Some(token.to_string())),
            None => Err(Failure::new(
                ExitCode::DataFormat,
                format!("token file {}: its first line is empty", path.display()),
            )),
        }
    }

    /// The client's options: socket, token and patience.
    pub(crate) fn options(&self) -> Result<ClientOptions, Failure> {
        let root = rustix::process::geteuid().is_root();
        let socket = self
            .named_socket()
            .or_else(|| default_socket(&environment(), root))
            .ok_or_else(|| {
                Failure::new(
                    ExitCode::Usage,
                    "no socket: neither HOME nor KVTIER_SOCKET is set: name one with --socket",
                )
            })?;
        let mut options = ClientOptions::new(socket).with_timeout(Duration::from_millis(self.timeout_ms.max(1)));
        if let Some(token) = self.token()? {
            options = options.with_token(token);
        }
        Ok(options)
    }

    /// Connects.
    pub(crate) fn connect(&self) -> Result<Client, Failure> {
        Client::connect(self.options()?).map_err(failure)
    }

    /// Connects to the namespace that was named, or to this one.
    pub(crate) fn open(&self, default_namespace: &str) -> Result<Namespace, Failure> {
        let name = self.namespace.as_deref().unwrap_or(default_namespace);
        self.connect()?.namespace(name, self.form()).map_err(failure)
    }

    /// What the bytes are.
    pub(crate) fn form(&self) -> Realization {
        Realization::digest(&[("form", &self.realization)])
    }
}

/// A client's error as the end of the process.
pub(crate) fn failure(error: ClientError) -> Failure {
    let code = match error.kind {
        ErrorKind::Invalid => ExitCode::DataFormat,
        ErrorKind::Busy | ErrorKind::Stale => ExitCode::TryAgain,
        ErrorKind::Unavailable | ErrorKind::Closed => ExitCode::Unavailable,
        ErrorKind::Denied => ExitCode::Denied,
        ErrorKind::Corrupt | ErrorKind::Internal => ExitCode::Internal,
    };
    let remedy = match code {
        ExitCode::Unavailable => {
            "\n  start one with `kv-daemon serve`, or name its socket with --socket or KVTIER_SOCKET"
        }
        ExitCode::Denied => "\n  name your trust domain's token with --token-file, or ask the daemon's administrator",
        _ => "",
    };
    Failure::new(code, format!("{}{remedy}", error.message))
}

/// The block hash that a key on the command line names: 32 hex digits as they are, any other text hashed.
pub(crate) fn block_hash(key: &str) -> BlockHash {
    let mut bytes = [0; 16];
    let digits = key.as_bytes();
    if digits.len() == 32 && digits.iter().all(u8::is_ascii_hexdigit) {
        let nibble = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
                .unwrap_or(0)
        };
        for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
            *byte = nibble(pair[0]) << 4 | nibble(pair[1]);
        }
    } else {
        let hash = blake3::derive_key("kvtier kvctl key v1", digits);
        bytes.copy_from_slice(&hash[..16]);
    }
    BlockHash(bytes)
}

/// The 32 hex digits of a block hash.
pub(crate) fn hex(hash: BlockHash) -> String {
    hash.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::{Arguments, block_hash, hex};
    use clap::CommandFactory;

    #[test]
    fn a_key_is_its_hex_digits_or_the_hash_of_its_text() {
        let digits = "00112233445566778899aabbccddeeFF";
        assert_eq!(hex(block_hash(digits)), digits.to_ascii_lowercase());
        assert_ne!(block_hash("a"), block_hash("b"));
        assert_eq!(block_hash("any text"), block_hash("any text"));
    }

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
