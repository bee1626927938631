use std::time::Duration;

use kvtier_core::{BlockHash, CoreSettings, Eviction};

use crate::memory::PAGE_BYTES;
use crate::random::Random;
use crate::trace::block_hash;

/// How often each fault strikes, in thousandths of its occasions. Each seed switches off about half of them: a fault
/// alone finds what a storm of all of them hides.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Rates {
    pub(crate) lost: u64,
    pub(crate) late: u64,
    pub(crate) duplicate: u64,
    pub(crate) unknown: u64,
    pub(crate) io: u64,
    pub(crate) busy: u64,
    pub(crate) deadline: u64,
    pub(crate) full: u64,
    pub(crate) torn: u64,
    pub(crate) flip: u64,
    pub(crate) slow: u64,
    pub(crate) gone: u64,
    pub(crate) disconnected: u64,
    pub(crate) stalled: u64,
    pub(crate) lies: u64,
    pub(crate) crash: u64,
    /// A crash after which an older image is put back.
    pub(crate) restored: u64,
    pub(crate) drain: bool,
    /// Most lateness of the manager's timer, nanoseconds.
    pub(crate) timer_late_ns: u64,
}

/// A namespace of the world.
#[derive(Clone, Debug)]
pub(crate) struct Space {
    pub(crate) domain: u32,
    pub(crate) name: &'static str,
    pub(crate) quota_bytes: Option<u64>,
}

/// All that a seed decides before its world begins.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) settings: CoreSettings,
    pub(crate) spaces: Vec<Space>,
    pub(crate) realizations: u32,
    pub(crate) domains: u32,
    pub(crate) clients: u32,
    /// Length of each node's block.
    pub(crate) lengths: Vec<u32>,
    /// The prompt forest: a node's parent comes before it.
    pub(crate) parents: Vec<Option<u32>>,
    pub(crate) steps: u64,
    pub(crate) step_gap_ns: u64,
    pub(crate) device_ns: u64,
    /// How often the storage writes the index entries that it holds back.
    pub(crate) flush_interval_ns: u64,
    pub(crate) rates: Rates,
    /// Shares of what clients do, in thousandths of their steps; the rest are fetches.
    pub(crate) put_permille: u64,
    pub(crate) delete_permille: u64,
    /// How often the operator invalidates or flushes, in thousandths of all steps.
    pub(crate) operator_permille: u64,
    /// Most leases a client likes to hold.
    pub(crate) hold_max: usize,
    /// Puts may be under one of so many labels; 0: none is.
    pub(crate) labels: u8,
    /// Something outside the devices remembers acknowledged generations, so that older images may be put back.
    pub(crate) anchored: bool,
}

impl Plan {
    pub(crate) fn new(random: &mut Random) -> Plan {
        let sizes: Vec<u64> = (0..random.between(1, 3))
            .map(|_| random.pick(&[4096, 4096, 8192, 8192, 12_288, 16_384, 32_768, 65_536]))
            .collect();
        let nodes = random.between(8, 48) as usize;
        let lengths = (0..nodes).map(|_| length(random, &sizes)).collect();
        let parents = (0..nodes)
            .map(|node| (node > 0 && !random.chance(150)).then(|| parent(random, node)))
            .collect();
        let domains = random.between(1, 3) as u32;
        let mut settings = settings(random, &sizes);
        let quota = (settings.host_bytes / random.between(1, 4)).max(u64::from(settings.block_bytes_max));
        let mut spaces = Vec::new();
        for domain in 0..domains {
            for name in ["alpha", "beta"].iter().take(random.between(1, 2) as usize) {
                spaces.push(Space {
                    domain,
                    name,
                    quota_bytes: random.chance(250).then_some(quota),
                });
            }
        }
        if random.chance(150) {
            settings.namespace_quota_bytes = Some(quota);
        }
        let mut plan = Plan {
            spaces,
            realizations: random.between(1, 2) as u32,
            domains,
            clients: random.between(2, 6) as u32,
            lengths,
            parents,
            steps: random.between(150, 500),
            step_gap_ns: random.pick(&[20_000, 50_000, 100_000, 400_000]),
            device_ns: random.pick(&[10_000, 50_000, 100_000, 300_000]),
            flush_interval_ns: random.pick(&[100_000, 1_000_000, 20_000_000]),
            rates: rates(random),
            put_permille: random.between(250, 500),
            delete_permille: random.pick(&[0, 10, 30, 80]),
            operator_permille: random.pick(&[0, 10, 30, 60]),
            hold_max: random.between(1, 24) as usize,
            labels: 0,
            anchored: false,
            settings,
        };
        if random.chance(250) {
            plan.churn(random);
        }
        plan
    }

    /// The same for labels.
    pub(crate) fn label(&mut self, mut random: Random) {
        self.labels = random.pick(&[0, 2, 4]);
        if self.labels > 0 {
            self.settings.label_sets_per_namespace_max = random.pick(&[2, 6, 100]);
            self.operator_permille = self.operator_permille.max(random.pick(&[10, 60]));
        }
    }

    /// A seed's draws of its own, so that what they decide changes no other.
    pub(crate) fn anchor(&mut self, mut random: Random) {
        self.anchored = random.chance(400);
        if self.anchored {
            self.rates.restored = random.pick(&[200, 600]);
            self.rates.crash = self.rates.crash.max(random.pick(&[0, 4, 12]));
            self.operator_permille = self.operator_permille.max(random.pick(&[10, 60]));
        }
    }

    /// Which policy decides, from draws of its own too.
    pub(crate) fn eviction(&mut self, mut random: Random) {
        if random.chance(500) {
            self.settings.eviction = Eviction::Hazard;
            self.settings.ghosts_max = random.pick(&[0, 600, 100_000]);
        }
    }

    /// Whether there is a tier in device memory, from draws of its own too.
    pub(crate) fn hbm(&mut self, mut random: Random) {
        if random.chance(400) {
            let settings = &mut self.settings;
            settings.hbm_segment_bytes = random.pick(&[8 << 10, 16 << 10, 64 << 10]);
            settings.hbm_bytes = settings.hbm_segment_bytes * random.between(1, 6);
            settings.hbm_promotions_in_flight_max = random.pick(&[1, 4, 32]);
        }
    }

    /// Much is put into little NVMe, so that segments are emptied, copied and closed all the time, and crashes come often.
    fn churn(&mut self, random: &mut Random) {
        let settings = &mut self.settings;
        settings.nvme_bytes = settings.nvme_segment_bytes * random.between(4, 7);
        settings.nvme_live_permille = 1000;
        settings.host_clean_low_permille = 250;
        settings.host_clean_high_permille = 500;
        settings.blocks_max = 100_000;
        self.steps = random.between(300, 900);
        self.put_permille = random.between(400, 700);
        self.operator_permille = random.pick(&[30, 100]);
        self.hold_max = 4;
        self.rates.crash = random.pick(&[0, 4, 12]);
    }

    pub(crate) fn hash(node: u32) -> BlockHash {
        block_hash(u64::from(node))
    }

    /// The prompt that ends at `node`, its root first.
    pub(crate) fn prompt(&self, node: u32) -> Vec<u32> {
        let mut prompt = vec![node];
        while let Some(parent) = self.parents[prompt[prompt.len() - 1] as usize] {
            prompt.push(parent);
        }
        prompt.reverse();
        prompt
    }
}

fn length(random: &mut Random, sizes: &[u64]) -> u32 {
    let size = random.pick(sizes);
    // Most blocks fill their slots; some leave a little free, as odd layouts do.
    let short = if random.chance(250) {
        random.below(PAGE_BYTES)
    } else {
        0
    };
    (size - short) as u32
}

/// Mostly the node before, so that prompts are chains with branches and not bushes.
fn parent(random: &mut Random, node: usize) -> u32 {
    if random.chance(650) {
        node as u32 - 1
    } else {
        random.index(node) as u32
    }
}

fn settings(random: &mut Random, sizes: &[u64]) -> CoreSettings {
    let largest = sizes.iter().copied().max().unwrap_or(PAGE_BYTES);
    let host_segment_bytes = largest.max(random.pick(&[16 << 10, 32 << 10, 64 << 10]));
    let host_bytes = host_segment_bytes * random.between(3, 8) + random.pick(&[0, 0, 8192]);
    let nvme_segment_header_bytes = random.pick(&[4096, 8192]);
    let nvme_segment_bytes = nvme_segment_header_bytes + largest * random.between(2, 6) + PAGE_BYTES;
    let nvme_bytes = if random.chance(120) {
        0
    } else {
        nvme_segment_bytes * random.between(4, 12)
    };
    let milliseconds =
        |random: &mut Random, low: u64, high: u64| Duration::from_micros(random.between(low * 1000, high * 1000));
    let low = random.pick(&[0, 100, 250]);
    CoreSettings {
        host_bytes,
        host_segment_bytes,
        nvme_bytes,
        nvme_segment_bytes,
        nvme_segment_header_bytes,
        nvme_record_index_bytes: 64,
        block_bytes_max: largest as u32,
        namespace_quota_bytes: None,
        host_clean_low_permille: low,
        host_clean_high_permille: low + random.pick(&[0, 100, 300]),
        host_clean_slots_min: low / 25,
        nvme_live_permille: random.pick(&[500, 700, 940]),
        lease_ttl: milliseconds(random, 2, 20),
        reservation_ttl: milliseconds(random, 2, 20),
        operation_deadline: milliseconds(random, 3, 12),
        tier_retry_backoff: milliseconds(random, 1, 3),
        clients_max: 24,
        namespaces_max: 12,
        realizations_max: 4,
        blocks_max: random.pick(&[20, 64, 100_000]),
        leases_per_client_max: random.pick(&[6, 24, 200]),
        reserved_bytes_per_client_max: (host_bytes / random.between(1, 6)).max(largest),
        quarantine_bytes_per_client_max: host_bytes / random.between(1, 6),
        waiting_max: random.pick(&[2, 5, 50]),
        waiting_per_client_max: random.pick(&[1, 2, 8]),
        demotions_in_flight_max: random.pick(&[1, 3, 16]),
        promotions_in_flight_max: random.pick(&[1, 3, 16]),
        // Of what was drawn already, so that older seeds stay the worlds that they were.
        prefetch_blocks: (host_bytes >> 12) as usize % 3 * 4,
        batch_keys_max: 64,
        ..CoreSettings::default()
    }
}

fn rates(random: &mut Random) -> Rates {
    let mut rate = |often: &[u64]| if random.chance(500) { random.pick(often) } else { 0 };
    Rates {
        lost: rate(&[5, 20]),
        late: rate(&[5, 20]),
        duplicate: rate(&[10, 100]),
        unknown: rate(&[10, 50]),
        io: rate(&[10, 50, 300]),
        busy: rate(&[20, 200]),
        deadline: rate(&[10, 50]),
        full: rate(&[20, 200]),
        torn: rate(&[10, 50]),
        flip: rate(&[10, 50]),
        slow: rate(&[20, 100]),
        gone: rate(&[3, 15]),
        disconnected: rate(&[3, 15]),
        stalled: rate(&[5, 20]),
        lies: rate(&[20, 60]),
        crash: rate(&[2, 8]),
        restored: 0,
        drain: rate(&[1]) == 1,
        timer_late_ns: rate(&[10_000, 1_000_000, 60_000_000]),
    }
}
