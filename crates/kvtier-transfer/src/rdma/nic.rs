//! One NIC of this node: its device, port and address, the regions it can reach, and the thread that takes completions.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::VerbsSettings;
use super::gid::{self, Gid, Kind};
use super::iwarp::{self, Manager};
use super::verbs::{Completion, CompletionQueue, Destination, Device, DirectWay, Path, Port, QueuePair, Registered};
use super::wire::{End, Fabric, mtu_code};
use crate::gpu::DeviceRegion;
use crate::memory::MemoryRegion;
use crate::remote::{RemoteAccess, draw_u64};
use crate::transport::RegisterError;

const PORT: u8 = 1;
/// Room for completions of all queue pairs of a NIC that post.
const COMPLETIONS_MAX: u32 = 32_768;
/// Reads in flight on a queue pair that the devices of both ends must have room for.
const READS_MAX: u32 = 16;
/// How long the polling thread sleeps at most, which bounds how long its end takes.
const SLEEP: Duration = Duration::from_millis(100);

/// Whoever takes completions of a group of requests.
pub(super) trait Completed: Send + Sync {
    /// All completions of one poll that belong to it, in order.
    fn completed(&self, completions: &[Completion]);
}

pub(super) struct Nic {
    device: Arc<Device>,
    gid: Gid,
    completions: Arc<CompletionQueue>,
    /// On iWARP: who connects its queue pairs.
    manager: Option<Arc<Manager>>,
    /// Entries of the completion queue that queue pairs have a claim on.
    claimed: AtomicU32,
    takers: Mutex<HashMap<u32, Weak<dyn Completed>>>,
    closed: AtomicBool,
    spin: Duration,
    /// The NUMA node that it is attached to, where the system tells.
    numa_node: Option<u32>,
}

/// Who takes completions. Numbers are never used twice, so that a late completion of one that is gone is nobody's.
pub(super) fn draw_taker() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// 24 bits of chance for the first packet number of a queue pair.
pub(super) fn draw_psn() -> u32 {
    u32::try_from(draw_u64() >> 40).expect("24 bits")
}

impl Nic {
    pub(super) fn open(name: &str, settings: &VerbsSettings) -> Result<Arc<Nic>, String> {
        let device = Device::open(name)?;
        let port = device
            .port(PORT)
            .map_err(|error| format!("{name} port {PORT}: {error}"))?;
        if !port.is_active {
            return Err(format!(
                "{name} port {PORT} is not active: is its link up and has it an address?"
            ));
        }
        let gid = choose_gid(&device, &port, settings)?;
        let manager = match device.is_iwarp {
            true => Some(Manager::start(name, gid.address)?),
            false => None,
        };
        let depth = device.limits.completions.min(COMPLETIONS_MAX);
        let completions =
            CompletionQueue::new(&device, depth).map_err(|error| format!("{name}: completion queue: {error}"))?;
        let nic = Arc::new(Nic {
            device,
            gid,
            completions,
            manager,
            claimed: AtomicU32::new(0),
            takers: Mutex::default(),
            closed: AtomicBool::new(false),
            spin: settings.spin,
            numa_node: numa_node(name),
        });
        let weak = Arc::downgrade(&nic);
        let polling = std::thread::Builder::new()
            .name(format!("kvtier-{name}"))
            .spawn(move || poll_until_gone(&weak));
        polling.map_err(|error| format!("{name}: no thread: {error}"))?;
        Ok(nic)
    }

    pub(super) fn name(&self) -> &str {
        &self.device.name
    }

    /// Whether memory on `node` is as near to it as any; unknown places count as near.
    pub(super) fn is_near(&self, node: Option<u32>) -> bool {
        match (self.numa_node, node) {
            (Some(mine), Some(memory)) => mine == memory,
            _ => true,
        }
    }

    #[cfg(test)]
    pub(super) fn pages_on_demand(&self) -> bool {
        self.device.limits.on_demand
    }

    pub(super) fn check_active(&self) -> Result<(), String> {
        match self.device.port(PORT) {
            Ok(port) if port.is_active => Ok(()),
            Ok(_) => Err(format!("{}: the port is down", self.name())),
            Err(error) => Err(format!("{}: {error}", self.name())),
        }
    }

    pub(super) fn register(
        &self,
        region: &Arc<MemoryRegion>,
        access: RemoteAccess,
    ) -> Result<Arc<Registered>, RegisterError> {
        let made = Registered::new(&self.device, region, access);
        made.map(Arc::new)
            .map_err(|error| self.cannot_register(region.bytes(), &error))
    }

    /// Memory of a GPU, `way`.
    pub(super) fn register_device(
        &self,
        region: &Arc<DeviceRegion>,
        way: DirectWay,
        access: RemoteAccess,
    ) -> Result<Arc<Registered>, RegisterError> {
        let made = Registered::of_device(&self.device, region, way, access);
        made.map(Arc::new)
            .map_err(|error| self.cannot_register(region.bytes(), &error))
    }

    fn cannot_register(&self, bytes: usize, error: &io::Error) -> RegisterError {
        RegisterError::Device {
            device: self.name().to_owned(),
            bytes,
            what: format!("{error}{}", registration_remedy(error)),
        }
    }

    /// A queue pair without a claim on completions: it must post nothing.
    pub(super) fn queue_pair(&self, depth: u32) -> io::Result<QueuePair> {
        QueuePair::new(&self.device, &self.completions, depth, 0, PORT)
    }

    /// A queue pair for so many messages to it, each of which is a completion.
    pub(super) fn receiving_pair(&self, receives: u32) -> io::Result<QueuePair> {
        QueuePair::new(&self.device, &self.completions, 1, receives, PORT)
    }

    /// A completion queue beside the one that the polling thread takes from.
    pub(super) fn completion_queue(&self, depth: u32) -> io::Result<Arc<CompletionQueue>> {
        CompletionQueue::new(&self.device, depth)
    }

    /// A queue pair that reports there.
    pub(super) fn queue_pair_on(&self, completions: &Arc<CompletionQueue>, depth: u32) -> io::Result<QueuePair> {
        QueuePair::new(&self.device, completions, depth, 0, PORT)
    }

    /// The right to `depth` completions, while the answer lives.
    pub(super) fn claim(self: &Arc<Self>, depth: u32) -> Option<Claim> {
        let depth = depth.min(self.device.limits.work_requests);
        let before = self.claimed.fetch_add(depth, Ordering::Relaxed);
        let claim = Claim {
            nic: Arc::clone(self),
            depth,
        };
        (before + depth <= self.completions.depth).then_some(claim)
    }

    /// Completions with this number in the upper half of their id go to `taker`.
    pub(super) fn deliver(&self, number: u32, taker: Weak<dyn Completed>) {
        self.takers.lock().insert(number, taker);
    }

    pub(super) fn undeliver(&self, number: u32) {
        self.takers.lock().remove(&number);
    }

    fn fabric(&self) -> Fabric {
        match self.gid.kind {
            Kind::InfiniBand => Fabric::InfiniBand,
            Kind::Iwarp => Fabric::Iwarp,
            Kind::RoceV1 | Kind::RoceV2 => Fabric::Roce,
        }
    }

    /// Whether completions come in the order of requests.
    pub(super) fn is_ordered(&self) -> bool {
        !self.device.is_iwarp
    }

    /// Requests in flight on a queue pair with room for `depth`. On iWARP each has a read in it, and more than may be under
    /// way would hold up the writes behind them.
    pub(super) fn lane_depth(&self, depth: u32) -> usize {
        if self.is_ordered() {
            depth as usize
        } else {
            depth.min(self.device.limits.reads_out.clamp(1, READS_MAX)) as usize
        }
    }

    /// This NIC as one end of a connection.
    pub(super) fn end(&self, number: u32, psn: u32) -> End {
        let port = self.device.port(PORT).ok();
        let limit = |number: u32| u8::try_from(number.clamp(1, READS_MAX)).expect("16 at most");
        End {
            destination: Destination {
                number,
                psn,
                gid: self.gid.address,
                lid: port.map_or(0, |port| port.lid),
            },
            fabric: self.fabric(),
            mtu: port.map_or(1, |port| port.mtu.clamp(1, 5)),
            reads_out: limit(self.device.limits.reads_out),
            reads_in: limit(self.device.limits.reads_in),
            token: 0,
        }
    }

    /// Connects a queue pair to the end that answered.
    pub(super) fn connect(
        &self,
        pair: &QueuePair,
        psn: u32,
        peer: &End,
        settings: &VerbsSettings,
        patience: Duration,
    ) -> Result<(), String> {
        let path = self.path(peer, settings)?;
        let failed = |error: io::Error| format!("{}: {error}", self.name());
        match &self.manager {
            Some(manager) => manager.call(pair, &path, peer, patience).map_err(failed),
            None => pair.connect(&path, psn, &peer.destination).map_err(failed),
        }
    }

    /// Connects a queue pair to the end that asked, or lets that one call. This end, to tell.
    pub(super) fn accept(&self, pair: &Arc<QueuePair>, peer: &End, settings: &VerbsSettings) -> Result<End, String> {
        let path = self.path(peer, settings)?;
        if let Some(manager) = &self.manager {
            let mut end = self.end(u32::from(manager.port()), 0);
            end.token = manager.expect(pair, &path);
            return Ok(end);
        }
        let psn = draw_psn();
        let connected = pair.connect(&path, psn, &peer.destination);
        connected.map_err(|error| format!("{}: {error}", self.name()))?;
        Ok(self.end(pair.number(), psn))
    }

    /// How to reach `peer` from here: the smaller MTU of both, no more reads than the other end answers.
    pub(super) fn path(&self, peer: &End, settings: &VerbsSettings) -> Result<Path, String> {
        let mine = self.end(0, 0);
        if mine.fabric != peer.fabric {
            return Err(format!(
                "one end speaks {:?} and the other {:?}",
                mine.fabric, peer.fabric
            ));
        }
        let limit = mtu_code(settings.mtu_max).unwrap_or(5);
        Ok(Path {
            port: PORT,
            gid_index: self.gid.index,
            is_infiniband: mine.fabric == Fabric::InfiniBand,
            mtu: mine.mtu.min(peer.mtu).min(limit),
            reads_out: mine.reads_out.min(peer.reads_in),
            reads_in: mine.reads_in.min(peer.reads_out),
            timeout: settings.ack_timeout,
            retries: settings.retries,
            receiver_retries: 3,
        })
    }

    /// Takes every completion there is and hands each to its taker. Whether there was any.
    fn take_completions(&self, completions: &mut Vec<Completion>) -> io::Result<bool> {
        completions.clear();
        // All of a batch, though the first may be an error: what it flushed comes with it.
        while self.completions.poll(64, completions)? == 64 {}
        let mut rest = completions.as_slice();
        while let Some(first) = rest.first() {
            let number = taker_of(first.id);
            let count = rest
                .iter()
                .take_while(|completion| taker_of(completion.id) == number)
                .count();
            let taker = self.takers.lock().get(&number).cloned();
            // A completion of a queue pair that is gone says nothing any more.
            if let Some(taker) = taker.and_then(|taker| taker.upgrade()) {
                taker.completed(&rest[..count]);
            }
            rest = &rest[count..];
        }
        Ok(!completions.is_empty())
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Release);
    }
}

/// Upper half of a completion's id.
fn taker_of(id: u64) -> u32 {
    u32::try_from(id >> 32).expect("the upper half")
}

/// A right to completions.
pub(super) struct Claim {
    nic: Arc<Nic>,
    pub(super) depth: u32,
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.nic.claimed.fetch_sub(self.depth, Ordering::Relaxed);
    }
}

/// Spins while there is work, sleeps on the completion channel otherwise, ends with the NIC.
fn poll_until_gone(nic: &Weak<Nic>) {
    let mut completions = Vec::with_capacity(64);
    let mut last = Instant::now();
    loop {
        let Some(nic) = nic.upgrade() else { return };
        match nic.take_completions(&mut completions) {
            Ok(true) => last = Instant::now(),
            Ok(false) if last.elapsed() < nic.spin => std::thread::yield_now(),
            Ok(false) => {
                // Armed before the last look, so that nothing arrives unseen in between.
                let slept = nic
                    .completions
                    .arm()
                    .and_then(|()| match nic.take_completions(&mut completions)? {
                        true => Ok(()),
                        false => nic.completions.sleep(SLEEP),
                    });
                if slept.is_err() {
                    std::thread::sleep(SLEEP);
                }
                last = Instant::now();
            }
            // The device is gone: its requests end by their deadlines.
            Err(_) => std::thread::sleep(SLEEP),
        }
    }
}

fn numa_node(name: &str) -> Option<u32> {
    let text = std::fs::read_to_string(format!("/sys/class/infiniband/{name}/device/numa_node")).ok()?;
    // -1 where the firmware does not say.
    text.trim().parse().ok()
}

fn choose_gid(device: &Device, port: &Port, settings: &VerbsSettings) -> Result<Gid, String> {
    let name = &device.name;
    let count = u8::try_from(port.gid_count.min(255)).expect("at most 255");
    if device.is_iwarp {
        return iwarp::choose(name, device.gid(PORT, 0).ok(), settings);
    }
    let wanted = |index: &u8| settings.gid_index.is_none_or(|only| only == *index);
    let table: Vec<Gid> = (0..count)
        .filter(wanted)
        .filter_map(|index| {
            let address = device.gid(PORT, index).ok().filter(|address| *address != [0; 16])?;
            let path = format!("/sys/class/infiniband/{name}/ports/{PORT}/gid_attrs/types/{index}");
            let kind = match std::fs::read_to_string(path) {
                _ if port.is_infiniband => Kind::InfiniBand,
                Ok(kind) if kind.trim() == "RoCE v2" => Kind::RoceV2,
                _ => Kind::RoceV1,
            };
            Some(Gid { index, address, kind })
        })
        .collect();
    gid::choose(&table, settings.network.as_ref()).ok_or_else(|| match settings.gid_index {
        Some(index) => format!("{name} has no address at index {index}"),
        None => format!("{name} has no address: give its network interface one"),
    })
}

fn registration_remedy(error: &io::Error) -> &'static str {
    match error.raw_os_error() {
        Some(libc::ENOMEM) => {
            " (locked memory: raise RLIMIT_MEMLOCK, in systemd LimitMEMLOCK=infinity, in a container --ulimit memlock=-1; or the device's table of pages (MTT) is full: use huge pages or fewer regions)"
        }
        Some(libc::EFAULT) => " (bad address: the mapping does not allow what was asked for)",
        Some(libc::EOPNOTSUPP) => " (the device cannot register this kind of memory)",
        _ => "",
    }
}

/// Regions of this node that its NICs know, by the region.
#[derive(Default)]
pub(super) struct LocalRegions(Mutex<HashMap<usize, LocalRegion>>);

/// A region with each NIC, and whether that one is near it.
#[derive(Clone)]
pub(super) struct LocalRegion {
    pub(super) with: Arc<[Arc<Registered>]>,
    pub(super) near: Arc<[bool]>,
}

impl LocalRegions {
    /// `registered` is in the order of `nics`; the region lies near this NUMA node.
    pub(super) fn insert(&self, region: usize, node: Option<u32>, nics: &[Arc<Nic>], registered: &[Arc<Registered>]) {
        let local = LocalRegion {
            with: registered.into(),
            near: nics.iter().map(|nic| nic.is_near(node)).collect(),
        };
        self.0.lock().insert(region, local);
    }

    /// Unless the region was registered once more since.
    pub(super) fn remove(&self, region: usize, registered: &[Arc<Registered>]) {
        let mut regions = self.0.lock();
        let is_same = |known: &LocalRegion| match (known.with.first(), registered.first()) {
            (Some(known), Some(this)) => Arc::ptr_eq(known, this),
            _ => false,
        };
        if regions.get(&region).is_some_and(is_same) {
            regions.remove(&region);
        }
    }

    pub(super) fn get(&self, region: usize) -> Option<LocalRegion> {
        self.0.lock().get(&region).cloned()
    }
}
