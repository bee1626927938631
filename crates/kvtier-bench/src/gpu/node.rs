//! Blocks between arrays on the device and a node: the calls of a client, beside the bare copies of the same bytes.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, DeviceArray, DeviceArrays, Namespace};
use kvtier::client::{ClientError, ClientOptions, FetchScope, GetOutcome, PutOutcome};
use kvtier::node::Node;
use kvtier::settings::Settings;
use kvtier::{Parent, Realization, Tier};
use kvtier_transfer::gpu::{Copy, DeviceRegion, Gpu, Place, RawCopies, Stream};
use kvtier_transfer::memory::MemoryRegion;

use super::{Options, failed};
use crate::{BenchError, pattern};

/// Bytes of all blocks of one call.
const CALL_BYTES: usize = 32 << 20;
/// How long a block may take to come to the device.
const PATIENCE: Duration = Duration::from_secs(60);

/// What is measured: a call, and where it finds or leaves the blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Call {
    Put,
    Get,
    GetHbm,
}

impl Call {
    pub(super) const ALL: [(&'static str, Call); 3] =
        [("put", Call::Put), ("get", Call::Get), ("get_hbm", Call::GetHbm)];
}

/// A node, and an engine's arrays: half of the memory to put from, half to get into.
pub(super) struct Stand {
    _node: Node,
    _client: Client,
    namespace: Namespace,
    arrays: DeviceArrays,
    gpu: Arc<Gpu>,
    memory: Arc<DeviceRegion>,
    stream: Stream,
    bare: RawCopies,
    _directory: tempfile::TempDir,
    /// Keys so far.
    keys: u64,
}

impl Stand {
    pub(super) fn start(options: &Options, gpu: &Arc<Gpu>) -> Result<Stand, BenchError> {
        let directory = tempfile::tempdir().map_err(failed)?;
        let settings = Settings {
            state_dir: directory.path().to_owned(),
            socket: directory.path().join("kvtier.sock"),
            host_bytes: 16 * CALL_BYTES as u64,
            hbm_bytes: 2 * CALL_BYTES as u64,
            hbm_device: u32::try_from(options.device).unwrap_or(0),
            hbm_library: options.library.clone(),
            lock_memory: false,
            ..Settings::default()
        };
        let node = Node::start(settings.check().map_err(failed)?, Box::new(|_| {})).map_err(failed)?;
        let client = Client::connect(ClientOptions::new(node.socket())).map_err(of_client)?;
        let namespace = client.namespace("bench", Realization::default()).map_err(of_client)?;
        Ok(Stand {
            _node: node,
            _client: client,
            namespace,
            arrays: DeviceArrays::new(gpu).map_err(of_client)?,
            memory: gpu.allocate(2 * CALL_BYTES).map_err(failed)?,
            stream: gpu.stream().map_err(failed)?,
            bare: RawCopies::new(gpu, CALL_BYTES).map_err(failed)?,
            gpu: Arc::clone(gpu),
            _directory: directory,
            keys: 0,
        })
    }

    /// New keys, and the arrays of one half.
    fn blocks(&self, first: u64, bytes: usize, into: bool) -> Result<Vec<DeviceArray>, BenchError> {
        let base = if into { CALL_BYTES } else { 0 };
        let array = |at: usize| {
            let slice = self.memory.slice(base + at * bytes, bytes).map_err(failed)?;
            Ok((pattern::hash(1, first + at as u64), slice))
        };
        (0..CALL_BYTES / bytes).map(array).collect()
    }

    /// Puts under new keys. The first of them.
    fn put(&mut self, bytes: usize) -> Result<u64, BenchError> {
        let first = self.keys;
        self.keys += (CALL_BYTES / bytes) as u64;
        let blocks = self.blocks(first, bytes, false)?;
        let saving = self.arrays.begin_put(&self.namespace, Parent::Root, &blocks, 16, &[]);
        let outcomes = saving.and_then(|saving| saving.finish()).map_err(of_client)?;
        if outcomes.iter().all(|outcome| *outcome == PutOutcome::Published) {
            return Ok(first);
        }
        Err(failed(format!("of a put came {outcomes:?}")))
    }

    /// Gets all blocks from `first` on. Where they were.
    fn get(&self, first: u64, bytes: usize) -> Result<Vec<Tier>, BenchError> {
        let blocks = self.blocks(first, bytes, true)?;
        let loading = self.arrays.begin_get(&self.namespace, &blocks, FetchScope::Prefix, &[]);
        let outcomes = loading.and_then(|loading| loading.finish()).map_err(of_client)?;
        let tier = |outcome: &GetOutcome| match outcome {
            GetOutcome::Hit { tier, .. } => Ok(*tier),
            other => Err(failed(format!("of a get came {other:?}"))),
        };
        outcomes.iter().map(tier).collect()
    }

    /// Puts blocks and gets them until all lie on the device.
    fn warm(&mut self, bytes: usize) -> Result<u64, BenchError> {
        let first = self.put(bytes)?;
        let begun = Instant::now();
        while self.get(first, bytes)?.iter().any(|tier| *tier != Tier::Hbm) {
            if begun.elapsed() > PATIENCE {
                return Err(failed("the blocks do not come to the device"));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(first)
    }

    /// GB/s of a call, and of the bare way, repeated for `turn` each.
    pub(super) fn measure(
        &mut self,
        call: Call,
        bytes: usize,
        turn: Duration,
        rounds: u32,
    ) -> Result<Vec<(f64, f64)>, BenchError> {
        self.check(bytes)?;
        let warm = match call {
            Call::GetHbm => self.warm(bytes)?,
            Call::Put | Call::Get => 0,
        };
        let mut turns = Vec::new();
        for _ in 0..rounds {
            let (mut spent, mut count) = (Duration::ZERO, 0u32);
            while spent < turn {
                let first = if call == Call::Get { self.put(bytes)? } else { warm };
                let begun = Instant::now();
                match call {
                    Call::Put => drop(self.put(bytes)?),
                    Call::Get | Call::GetHbm => drop(self.get(first, bytes)?),
                }
                spent += begun.elapsed();
                count += 1;
            }
            let ours = gigabytes(count) / spent.as_secs_f64();
            let (begun, mut count) = (Instant::now(), 0u32);
            while begun.elapsed() < turn {
                match call {
                    Call::Put => self.bare.run(false, bytes).map_err(failed)?,
                    Call::Get => self.bare.run(true, bytes).map_err(failed)?,
                    Call::GetHbm => self.copy_within(bytes)?,
                }
                count += 1;
            }
            turns.push((ours, gigabytes(count) / begun.elapsed().as_secs_f64()));
        }
        Ok(turns)
    }

    /// From one half to the other, on the device.
    fn copy_within(&self, bytes: usize) -> Result<(), BenchError> {
        let (from, into) = (self.blocks(0, bytes, false)?, self.blocks(0, bytes, true)?);
        let copies = from.into_iter().zip(into).map(|((_, source), (_, target))| Copy {
            source: Place::Device(source),
            target: Place::Device(target),
        });
        let transfer = self.stream.submit(copies.collect()).map_err(failed)?;
        transfer.wait().map_err(failed)
    }

    /// Once there and back, and once from the device, with the bytes compared.
    fn check(&mut self, bytes: usize) -> Result<(), BenchError> {
        let region = MemoryRegion::anonymous(bytes.next_multiple_of(4096)).map_err(failed)?;
        let host = region.slice(0, bytes).map_err(failed)?;
        let mut block = vec![0; bytes];
        let move_one = |place: &DeviceArray, up: bool| {
            let (there, here) = (Place::Device(place.1.clone()), Place::Host(host.clone()));
            let (source, target) = if up { (here, there) } else { (there, here) };
            let transfer = self.stream.submit(vec![Copy { source, target }]).map_err(failed)?;
            transfer.wait().map_err(failed)
        };
        for (index, array) in (0..).zip(self.blocks(0, bytes, false)?) {
            pattern::write(index, &mut block);
            host.copy_from_slice(&block).map_err(failed)?;
            move_one(&array, true)?;
        }
        let into = self.blocks(0, bytes, true)?;
        let zero = |stream: &Stream| {
            let half = self.memory.slice(CALL_BYTES, CALL_BYTES).map_err(failed)?;
            stream.zero(&half).map_err(failed)?.wait().map_err(failed)
        };
        zero(&self.stream)?;
        let compare = |case: &'static str| {
            for (index, array) in (0..).zip(&into) {
                move_one(array, false)?;
                if !pattern::matches(index, &host.to_vec()) {
                    return Err(BenchError::WrongBytes { case, block: index });
                }
            }
            Ok(())
        };
        let first = self.keys;
        self.keys += into.len() as u64;
        let put = self.blocks(first, bytes, false)?;
        let saving = self.arrays.begin_put(&self.namespace, Parent::Root, &put, 16, &[]);
        saving.and_then(|saving| saving.finish()).map_err(of_client)?;
        self.get(first, bytes)?;
        compare("get")?;
        let begun = Instant::now();
        loop {
            zero(&self.stream)?;
            let tiers = self.get(first, bytes)?;
            if tiers.iter().all(|tier| *tier == Tier::Hbm) {
                return compare("get_hbm");
            }
            if begun.elapsed() > PATIENCE {
                let name = self.gpu.name();
                return Err(failed(format!("the blocks do not come to {name}")));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

fn gigabytes(calls: u32) -> f64 {
    #[expect(clippy::cast_precision_loss, reason = "a rate")]
    let gigabytes = CALL_BYTES as f64 / 1e9;
    gigabytes * f64::from(calls)
}

fn of_client(error: ClientError) -> BenchError {
    failed(error)
}
