//! Two nodes, and a client of one that gets blocks of the other: question, lease, read, check, seal and answer. Beside it a
//! raw socket that moves the same bytes and does none of that.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientError, ClientOptions, FetchScope, Lineage, PutOutcome};
use kvtier::node::Node;
use kvtier::settings::{DomainSettings, PeerTransport, Settings};
use kvtier::{BlockHash, Parent, Realization};
use kvtier_transfer::memory::{MemoryRegion, MemorySlice, PageRequest};

use super::{Row, Turn, median, percentile};
use crate::baseline::{RawSockets, process_cpu_time};
use crate::{BenchError, load, pattern};

const NAMESPACE: &str = "peers";
/// Host memory of each node, and what both measure with.
const HOST_BYTES: u64 = 512 << 20;
/// Bytes that one round moves.
const ROUND_BYTES: usize = 96 << 20;
const BATCH: usize = 16;
const CONNECTIONS: usize = 2;
const PATIENCE: Duration = Duration::from_secs(60);

fn refused(what: &'static str) -> impl FnOnce(String) -> BenchError {
    move |message| BenchError::Client { what, message }
}

fn failed(what: &'static str) -> impl FnOnce(ClientError) -> BenchError {
    move |error| BenchError::Client {
        what,
        message: error.to_string(),
    }
}

struct Pair {
    // Clients before their nodes.
    holder: Namespace,
    reader: Namespace,
    _clients: [Client; 2],
    _nodes: [Node; 2],
    _directory: tempfile::TempDir,
}

impl Pair {
    fn start() -> Result<Pair, BenchError> {
        let directory = tempfile::tempdir().map_err(BenchError::system("a directory".to_owned()))?;
        let port = || -> Result<String, BenchError> {
            let listener = TcpListener::bind("127.0.0.1:0").map_err(BenchError::system("a port".to_owned()))?;
            let address = listener.local_addr().map_err(BenchError::system("a port".to_owned()))?;
            Ok(address.to_string())
        };
        let secret = directory.path().join("secret");
        std::fs::write(&secret, "what both nodes of a bench know")
            .map_err(BenchError::system("a secret".to_owned()))?;
        let addresses = [port()?, port()?];
        let start = |member: usize| -> Result<Node, BenchError> {
            let state_dir = directory.path().join(member.to_string());
            let settings = Settings {
                socket: state_dir.join("s"),
                state_dir,
                host_bytes: HOST_BYTES,
                reserved_bytes_per_client_max: HOST_BYTES,
                lock_memory: false,
                domains: vec![DomainSettings {
                    name: "bench".into(),
                    uids: vec![rustix::process::geteuid().as_raw()],
                    ..DomainSettings::default()
                }],
                peer_listen: addresses[member].parse().ok(),
                peers: addresses.to_vec(),
                peer_secret_file: Some(secret.clone()),
                peer_transport: PeerTransport::Tcp,
                peer_connections: u32::try_from(CONNECTIONS).unwrap_or(1),
                ..Settings::default()
            };
            let settings = settings
                .check()
                .map_err(|error| refused("settings")(error.to_string()))?;
            Node::start(settings, Box::new(|_| {})).map_err(|error| refused("start of a node")(error.to_string()))
        };
        let nodes = [start(0)?, start(1)?];
        let connect = |node: &Node| {
            Client::connect(ClientOptions::new(node.socket()).with_timeout(PATIENCE)).map_err(failed("connection"))
        };
        let clients = [connect(&nodes[0])?, connect(&nodes[1])?];
        let open = |client: &Client| {
            client
                .namespace(NAMESPACE, Realization::digest(&[]))
                .map_err(failed("namespace"))
        };
        let begun = Instant::now();
        while !nodes.iter().all(is_connected) {
            if begun.elapsed() > PATIENCE {
                return Err(refused("peers")("they do not reach each other".into()));
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        Ok(Pair {
            holder: open(&clients[0])?,
            reader: open(&clients[1])?,
            _clients: clients,
            _nodes: nodes,
            _directory: directory,
        })
    }

    /// Puts blocks at the one node; their hashes.
    fn put(&self, stream: u64, count: usize, bytes: usize) -> Result<Vec<BlockHash>, BenchError> {
        let hashes: Vec<BlockHash> = (0..count as u64).map(|index| pattern::hash(stream, index)).collect();
        let mut block = vec![0; bytes];
        for (index, hash) in (0..).zip(&hashes) {
            pattern::write(index, &mut block);
            let put = self
                .holder
                .put_from(Lineage::Chain(Parent::Unknown), &[(*hash, &block[..])], 16)
                .map_err(failed("put"))?;
            if put != [PutOutcome::Published] {
                return Err(refused("put")(format!("{put:?}")));
            }
        }
        Ok(hashes)
    }

    /// Gets them at the other; the bytes are compared where that is asked for.
    fn get(&self, hashes: &[BlockHash], first: u64, compare: bool) -> Result<(), BenchError> {
        let found = self.reader.get(hashes, FetchScope::Each).map_err(failed("get"))?;
        for (index, handle) in (first..).zip(found) {
            let handle = handle.ok_or_else(|| refused("get")("a miss".into()))?;
            if compare {
                let mut bytes = vec![0; handle.len()];
                handle.copy_to(&mut bytes).map_err(failed("get"))?;
                if !pattern::matches(index, &bytes) {
                    return Err(BenchError::WrongBytes {
                        case: "peer_get",
                        block: index,
                    });
                }
            }
        }
        Ok(())
    }

    fn forget(&self, hashes: &[BlockHash]) -> Result<(), BenchError> {
        for some in hashes.chunks(256) {
            self.holder.delete(some).map_err(failed("delete"))?;
            self.reader.delete(some).map_err(failed("delete"))?;
        }
        Ok(())
    }
}

fn is_connected(node: &Node) -> bool {
    let cluster = node.status().cluster.unwrap_or_default();
    cluster.peers.iter().any(|peer| peer.state == "connected")
}

/// Gets of a peer's blocks, `sizes` bytes each, for so many rounds.
pub(super) fn run(
    sizes: &[usize],
    rounds: u32,
    quick: bool,
    say: &mut dyn FnMut(&str),
) -> Result<Vec<Row>, BenchError> {
    let pair = Pair::start()?;
    let region = |label: &str| -> Result<MemorySlice, BenchError> {
        let (region, _) = MemoryRegion::create(label, ROUND_BYTES, PageRequest::Small)
            .map_err(|error| refused("memory")(error.to_string()))?;
        region.zero();
        region
            .slice(0, ROUND_BYTES)
            .map_err(|error| refused("memory")(error.to_string()))
    };
    let (source, target) = (region("bench-source")?, region("bench-target")?);
    let mut raw = RawSockets::start(CONNECTIONS, &source).map_err(BenchError::system("raw sockets".to_owned()))?;
    let mut rows = Vec::new();
    for &bytes in sizes {
        let row = measure(&pair, &mut raw, &target, bytes, rounds, quick)?;
        say(&format!(
            "peer_get, {bytes} bytes, batch {BATCH}: {:.2} GB/s, {:.2} of {:.2}",
            row.gbps, row.ratio_to_raw, row.raw_gbps
        ));
        rows.push(row);
    }
    Ok(rows)
}

fn measure(
    pair: &Pair,
    raw: &mut RawSockets,
    target: &MemorySlice,
    bytes: usize,
    rounds: u32,
    quick: bool,
) -> Result<Row, BenchError> {
    let load = load();
    let moved = if quick { ROUND_BYTES / 8 } else { ROUND_BYTES };
    let count = (moved / bytes).clamp(BATCH, 2048) / BATCH * BATCH;
    let (mut times, mut raw_times) = (Vec::new(), Vec::new());
    let (mut turns, mut raw_turns) = (Vec::new(), Vec::new());
    for round in 0..=u64::from(rounds) {
        let hashes = pair.put(round << 32 | bytes as u64, count, bytes)?;
        // The first round warms up, and its bytes are compared.
        let is_first = round == 0;
        let turn = timed(
            count * bytes,
            &mut times,
            hashes.chunks(BATCH).zip((0u64..).step_by(BATCH)),
            |(some, first)| pair.get(some, first, is_first),
        )?;
        pair.forget(&hashes)?;
        let wanted: Vec<(u64, MemorySlice)> = (0..count)
            .map(|at| {
                let offset = at * bytes % (ROUND_BYTES - bytes + 1);
                let slice = target.subslice(offset, bytes);
                slice.map(|slice| (offset as u64, slice))
            })
            .collect::<Result<_, _>>()
            .map_err(|error| refused("memory")(error.to_string()))?;
        let raw_turn = timed(count * bytes, &mut raw_times, wanted.chunks(BATCH), |some| {
            raw.fetch(some).map_err(BenchError::system("raw socket".to_owned()))
        })?;
        if is_first {
            times.clear();
            raw_times.clear();
        } else {
            turns.push(turn);
            raw_turns.push(raw_turn);
        }
    }
    let of = |turns: &[Turn], figure: fn(&Turn) -> f64| median(turns.iter().map(figure).collect());
    let ratios = turns.iter().zip(&raw_turns).map(|(ours, raw)| ours.gbps / raw.gbps);
    Ok(Row {
        case: "peer_get",
        transport: "tcp",
        bytes: bytes as u64,
        batch: BATCH as u64,
        connections: CONNECTIONS as u64,
        gbps: of(&turns, |turn| turn.gbps),
        raw_gbps: of(&raw_turns, |turn| turn.gbps),
        ratio_to_raw: median(ratios.collect()),
        p50_us: percentile(&mut times, 0.5),
        raw_p50_us: percentile(&mut raw_times, 0.5),
        p99_us: percentile(&mut times, 0.99),
        cpu_s_per_gb: of(&turns, |turn| turn.cpu_s_per_gb),
        raw_cpu_s_per_gb: of(&raw_turns, |turn| turn.cpu_s_per_gb),
        rounds,
        load,
    })
}

fn timed<T>(
    bytes: usize,
    times: &mut Vec<f64>,
    work: impl Iterator<Item = T>,
    mut once: impl FnMut(T) -> Result<(), BenchError>,
) -> Result<Turn, BenchError> {
    let cpu = || process_cpu_time(std::process::id()).unwrap_or_default();
    let (begun, cpu_before) = (Instant::now(), cpu());
    for part in work {
        let before = Instant::now();
        once(part)?;
        times.push(before.elapsed().as_secs_f64() * 1e6);
    }
    let gigabytes = bytes as f64 / 1e9;
    Ok(Turn {
        gbps: gigabytes / begun.elapsed().as_secs_f64(),
        cpu_s_per_gb: (cpu().saturating_sub(cpu_before)).as_secs_f64() / gigabytes,
    })
}
