//! Admission: the policy says which blocks are worth writing to NVMe when their host slots are needed.

use crate::world::{KIB, SECOND, World, hash, hashes, settings};
use kvtier_core::{
    BlockId, EvictionPolicy, LeafFirstLru, ListId, Parent, Plane, Sealed, Tier, TierManager, Time, Verdict,
};
use std::collections::BTreeSet;

/// Leaf-first LRU that has no use for blocks seen once.
#[derive(Default)]
struct SeenTwice {
    order: LeafFirstLru,
    used_again: BTreeSet<BlockId>,
}

impl EvictionPolicy for SeenTwice {
    fn insert(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time) {
        self.order.insert(list, block, beside, now);
    }

    fn insert_oldest(&mut self, list: ListId, block: BlockId) {
        self.order.insert_oldest(list, block);
    }

    fn touch(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time) {
        self.used_again.insert(block);
        self.order.touch(list, block, beside, now);
    }

    fn is_recent(&self, block: BlockId, now: Time) -> bool {
        self.order.is_recent(block, now)
    }

    fn remove(&mut self, list: ListId, block: BlockId) {
        if list.plane == Plane::Host {
            self.used_again.remove(&block);
        }
        self.order.remove(list, block);
    }

    fn shelve(&mut self, list: ListId, block: BlockId) {
        self.order.shelve(list, block);
    }

    fn unpark(&mut self, list: ListId, block: BlockId) {
        self.order.unpark(list, block);
    }

    fn victim(&mut self, list: ListId, parked: bool, judge: &mut dyn FnMut(BlockId) -> Verdict) -> Option<BlockId> {
        self.order.victim(list, parked, judge)
    }

    fn age(&self, list: ListId, now: Time) -> Option<u32> {
        self.order.age(list, now)
    }

    fn admit(&mut self, block: BlockId, tier: Tier) -> bool {
        assert_eq!(tier, Tier::Nvme);
        self.used_again.contains(&block)
    }

    fn keep(&mut self, list: ListId, block: BlockId, again: bool) -> bool {
        self.order.keep(list, block, again)
    }

    fn contains(&self, list: ListId, block: BlockId) -> bool {
        self.order.contains(list, block)
    }

    fn length(&self, list: ListId) -> usize {
        self.order.length(list)
    }

    fn memory_bytes(&self) -> u64 {
        self.order.memory_bytes()
    }

    fn check_invariants(&self) {
        self.order.check_invariants();
    }
}

fn world() -> World {
    let settings = settings(256 << 10, 4 << 20).check().unwrap();
    World::with(TierManager::new(settings, Box::new(SeenTwice::default())))
}

#[test]
fn a_block_seen_once_is_forgotten_and_one_used_again_is_written() {
    let mut world = world();
    for number in 0..8 {
        world.put(&hashes([number]), 8 * KIB);
    }
    world.pass(SECOND);
    world.fetch(&hashes([3]));
    for number in 100..132 {
        world.put(&hashes([number]), 8 * KIB);
        world.pass(SECOND);
    }
    assert_eq!(world.present(0..8), [3]);
    let statistics = world.core.statistics();
    assert_eq!(statistics.demotions, 1);
    assert!(statistics.admissions_refused >= 7);
    world.core.check_invariants();
}

#[test]
fn a_block_with_cached_children_is_written_whatever_admission_says() {
    let mut world = world();
    world.put(&hashes([0]), 8 * KIB);
    world.put_after(Parent::Block(hash(0)), &hashes([1]), 8 * KIB);
    world.pass(SECOND);
    world.fetch(&hashes([0, 1]));
    for number in 100..132 {
        world.put(&hashes([number]), 8 * KIB);
        world.pass(SECOND);
    }
    assert_eq!(world.present(0..2), [0, 1]);
}

#[test]
fn a_flush_writes_whatever_admission_says() {
    let mut world = world();
    world.put(&hashes(0..8), 8 * KIB);
    let flush = world.flush();
    assert_eq!(world.flushed[&flush], (8, 0));
    assert_eq!(world.core.statistics().admissions_refused, 0);
}

#[test]
fn where_segments_are_emptied_for_others_admission_counts_too() {
    let mut world = world();
    world.put(&hashes(0..32), 8 * KIB);
    world.pass(SECOND);
    assert_eq!(world.put(&hashes(100..104), 12 * KIB), [Sealed::Published; 4]);
    let statistics = world.core.statistics();
    assert_eq!(
        statistics.demotions + statistics.admissions_refused,
        statistics.evictions_host
    );
    assert!(statistics.admissions_refused > 0);
    world.core.check_invariants();
}
