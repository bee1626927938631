//! Memory: what a block costs beyond its bytes.

use crate::world::{ME, World, hash, hashes};
use kvtier_core::{CoreSettings, Parent, SealItem};

/// Puts `count` blocks of 4 KiB in chains of 64 without remembering their bytes.
fn put_chains(world: &mut World, count: u64) {
    for chain in 0..count / 64 {
        let keys = hashes(chain * 64..chain * 64 + 64);
        let reserved = world.reserve_as(ME, &keys, 4096);
        let mut parent = Parent::Root;
        let items: Vec<SealItem> = crate::world::granted(&reserved)
            .into_iter()
            .zip(&keys)
            .map(|((reservation, _), &hash)| {
                let item = SealItem {
                    reservation,
                    hash,
                    parent,
                    length: 4096,
                    tokens: 16,
                };
                parent = Parent::Block(hash);
                item
            })
            .collect();
        assert_eq!(items.len(), 64);
        world.seal(&items);
    }
}

#[test]
fn a_block_costs_at_most_128_bytes_with_parents_policy_and_slots() {
    const COUNT: u64 = 1 << 20;
    let settings = CoreSettings {
        host_bytes: 8 << 30,
        host_segment_bytes: 64 << 20,
        ..CoreSettings::default()
    };
    let mut world = World::new(settings);
    put_chains(&mut world, COUNT);
    let statistics = world.core.statistics();
    assert_eq!(statistics.host_blocks, COUNT);
    assert!(
        statistics.index_bytes <= 128 * COUNT,
        "{} bytes a block",
        statistics.index_bytes / COUNT
    );
    assert!(world.lookup(&[hash(COUNT - 1)])[0].is_some());
}
