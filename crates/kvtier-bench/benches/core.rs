//! The tier manager alone, with a million blocks: what a decision costs without sockets and bytes.

use std::hint::black_box;
use std::time::Duration;

use criterion::{Criterion, Throughput};
use kvtier_core::{
    Action, Answer, BlockHash, ClientId, Completion, CoreSettings, Event, Eviction, FetchScope, Fetched, Generation,
    Hints, NamespaceId, Parent, Realization, RealizationId, Request, Reserved, SealItem, SealRequest, Sealed,
    TierManager, Time, TrustDomain,
};

const CLIENT: ClientId = ClientId(1);
const BATCH: u64 = 4096;
const BLOCK_BYTES: u32 = 4096;

struct World {
    manager: TierManager,
    namespace: NamespaceId,
    realization: RealizationId,
    generation: Generation,
    now: u64,
    sealed: u64,
}

fn hash(index: u64) -> BlockHash {
    let mixed = |number: u64| {
        let state = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let state = (state ^ (state >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        state ^ (state >> 31)
    };
    let number = index.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    BlockHash((u128::from(mixed(number)) << 64 | u128::from(mixed(!number))).to_le_bytes())
}

fn hashes(first: u64, count: u64) -> Vec<BlockHash> {
    (first..first + count).map(hash).collect()
}

fn request(hashes: &[BlockHash], namespace: NamespaceId, realization: RealizationId) -> Request<'_> {
    Request {
        client: CLIENT,
        namespace,
        realization,
        hashes,
        hints: Hints::default(),
        deadline: Time(u64::MAX),
    }
}

impl World {
    fn with_blocks(blocks: u64, eviction: Eviction) -> World {
        let settings = CoreSettings {
            host_bytes: blocks * u64::from(BLOCK_BYTES) + (256 << 20),
            host_segment_bytes: 64 << 20,
            reserved_bytes_per_client_max: 1 << 30,
            eviction,
            ..CoreSettings::default()
        };
        let settings = settings.check().expect("sizes that fit");
        let policy = settings.policy();
        let mut manager = TierManager::new(settings, policy);
        let (namespace, generation) = manager
            .open_namespace(TrustDomain(0), "bench")
            .expect("room for a namespace");
        let realization = manager
            .open_realization(Realization::default())
            .expect("room for a realization");
        manager
            .connect(CLIENT, TrustDomain(0), Time(0))
            .expect("room for a client");
        let mut world = World {
            manager,
            namespace,
            realization,
            generation,
            now: 0,
            sealed: 0,
        };
        while world.sealed < blocks {
            world.put(BATCH);
        }
        world
    }

    /// A tenth of a second: so that each call is a use of its own to a policy that learns from uses.
    fn tick(&mut self) -> Time {
        self.now += 100_000_000;
        Time(self.now)
    }

    /// Answers every action as a host tier would; nothing else is asked without an NVMe tier.
    fn settle(&mut self) {
        while let Some(action) = self.manager.poll_action() {
            match action {
                Action::OpenSegment { operation, .. } | Action::CloseSegment { operation, .. } => {
                    let now = Time(self.now);
                    self.manager.handle_event(
                        Event {
                            operation,
                            outcome: Ok(Completion::Done),
                        },
                        now,
                    );
                }
                _ => {}
            }
        }
    }

    /// Reserves and seals the next blocks.
    fn put(&mut self, count: u64) {
        let hashes = hashes(self.sealed, count);
        let now = self.tick();
        let lengths = vec![BLOCK_BYTES; hashes.len()];
        let mut reserved = Vec::new();
        while reserved.len() < hashes.len() {
            let rest = &hashes[reserved.len()..];
            let answer = self
                .manager
                .reserve(
                    &request(rest, self.namespace, self.realization),
                    &lengths[reserved.len()..],
                    now,
                )
                .expect("a valid call");
            match answer {
                Answer::Ready(results) => reserved.extend(results),
                Answer::Pending(waited_for) => {
                    while let Some(action) = self.manager.poll_action() {
                        match action {
                            Action::OpenSegment { operation, .. } | Action::CloseSegment { operation, .. } => {
                                self.manager.handle_event(
                                    Event {
                                        operation,
                                        outcome: Ok(Completion::Done),
                                    },
                                    now,
                                );
                            }
                            Action::ReserveDone { operation, results, .. } if operation == waited_for => {
                                reserved.extend(results)
                            }
                            _ => {}
                        }
                    }
                }
            }
        }
        let mut parent = if self.sealed.is_multiple_of(BATCH) {
            Parent::Root
        } else {
            Parent::Block(hash(self.sealed - 1))
        };
        let items: Vec<SealItem> = reserved
            .iter()
            .zip(&hashes)
            .map(|(reserved, &hash)| {
                let Reserved::Granted { reservation, .. } = *reserved else {
                    panic!("{reserved:?} for a fresh block")
                };
                let item = SealItem {
                    reservation,
                    hash,
                    parent,
                    length: BLOCK_BYTES,
                    tokens: 16,
                };
                parent = Parent::Block(hash);
                item
            })
            .collect();
        let sealed = self
            .manager
            .seal(
                &SealRequest {
                    client: CLIENT,
                    namespace: self.namespace,
                    realization: self.realization,
                    generation: self.generation,
                    label: None,
                    items: &items,
                },
                now,
            )
            .expect("a valid call");
        assert!(sealed.iter().all(|sealed| *sealed == Sealed::Published));
        self.sealed += count;
        self.settle();
    }

    fn lookup(&mut self, hashes: &[BlockHash]) -> usize {
        let now = self.tick();
        let found = self
            .manager
            .lookup(&request(hashes, self.namespace, self.realization), now)
            .expect("a valid call");
        found.iter().flatten().count()
    }

    fn fetch_and_release(&mut self, hashes: &[BlockHash]) {
        let now = self.tick();
        let answer = self
            .manager
            .fetch(
                &request(hashes, self.namespace, self.realization),
                FetchScope::Prefix,
                now,
            )
            .expect("a valid call");
        let Answer::Ready(fetched) = answer else {
            panic!("host blocks are there at once")
        };
        let leases: Vec<_> = fetched
            .iter()
            .map(|fetched| match fetched {
                Fetched::Leased { lease, .. } => *lease,
                other => panic!("{other:?} for a resident block"),
            })
            .collect();
        assert_eq!(self.manager.release(CLIENT, &leases, now), 0);
        self.settle();
    }
}

fn decisions(criterion: &mut Criterion, eviction: Eviction) {
    let blocks = 1 << 20;
    let mut world = World::with_blocks(blocks, eviction);
    println!(
        "index, {eviction:?}: {:.1} bytes a block",
        world.manager.statistics().index_bytes as f64 / blocks as f64
    );
    let mut group = criterion.benchmark_group(format!("among a million blocks, {eviction:?}"));
    let mut draw = 0u64;
    let mut anywhere = move |count: u64| {
        draw = draw
            .wrapping_mul(0x5851_f42d_4c95_7f2d)
            .wrapping_add(0x1405_7b7e_f767_814f);
        hashes((draw >> 20) % (blocks / count) * count, count)
    };
    for keys in [1u64, 16, 256] {
        group.throughput(Throughput::Elements(keys));
        group.bench_function(format!("lookup of {keys}"), |bencher| {
            bencher.iter_batched(
                || anywhere(keys),
                |hashes| black_box(world.lookup(&hashes)),
                criterion::BatchSize::SmallInput,
            );
        });
        group.bench_function(format!("fetch and release of {keys}"), |bencher| {
            bencher.iter_batched(
                || anywhere(keys),
                |hashes| world.fetch_and_release(&hashes),
                criterion::BatchSize::SmallInput,
            );
        });
    }
    // Past the spare room each put makes the manager forget the oldest blocks.
    for keys in [1u64, 16] {
        group.throughput(Throughput::Elements(keys));
        group.bench_function(format!("reserve and seal of {keys}"), |bencher| {
            bencher.iter(|| world.put(keys))
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default()
        .configure_from_args()
        .warm_up_time(Duration::from_millis(500))
        .measurement_time(Duration::from_secs(2));
    for eviction in [Eviction::Lru, Eviction::Hazard] {
        decisions(&mut criterion, eviction);
    }
    criterion.final_summary();
}
