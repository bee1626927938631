use proptest::prelude::*;

use super::*;
use crate::{NamespaceId, Plane};

const LIST: ListId = ListId {
    plane: Plane::Host,
    index: 1,
};
const SECOND_NS: u64 = 1_000_000_000;

/// A cache of blocks that a number names, driven as the manager drives a policy.
struct World {
    policy: ReuseHazard,
    parents: Vec<Option<u32>>,
    children: Vec<u32>,
    cached: Vec<bool>,
}

impl World {
    fn new(blocks: usize, ghosts_max: usize) -> World {
        World {
            policy: ReuseHazard::new(ghosts_max),
            parents: vec![None; blocks],
            children: vec![0; blocks],
            cached: vec![false; blocks],
        }
    }

    fn usage(&self, block: u32, tokens: u16) -> Use {
        Use {
            parent: self.parents[block as usize].map(BlockId),
            tokens,
            bytes: 0,
            namespace: NamespaceId(0),
            fingerprint: u64::from(block).wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
        }
    }

    /// A prompt of these blocks, in prefix order; the last one has so many tokens, the others 512.
    fn prompt(&mut self, blocks: &[u32], last_tokens: u16, seconds: u64) {
        let now = Time(seconds * SECOND_NS);
        let mut parent = None;
        for (index, &block) in blocks.iter().enumerate() {
            let tokens = if index + 1 == blocks.len() { last_tokens } else { 512 };
            let beside = parent.map(BlockId);
            if self.cached[block as usize] {
                self.policy.used(BlockId(block), self.usage(block, tokens), now);
                self.policy.touch(LIST, BlockId(block), beside, now);
            } else {
                self.parents[block as usize] = parent;
                if let Some(parent) = parent {
                    self.children[parent as usize] += 1;
                }
                self.cached[block as usize] = true;
                self.policy.appeared(BlockId(block), self.usage(block, tokens), now);
                self.policy.insert(LIST, BlockId(block), beside, now);
            }
            parent = Some(block);
        }
    }

    /// Stores one more block behind one that is cached, without using that.
    fn go_on(&mut self, parent: u32, block: u32, seconds: u64) {
        let now = Time(seconds * SECOND_NS);
        self.parents[block as usize] = Some(parent);
        self.children[parent as usize] += 1;
        self.cached[block as usize] = true;
        self.policy.appeared(BlockId(block), self.usage(block, 512), now);
        self.policy.insert(LIST, BlockId(block), Some(BlockId(parent)), now);
    }

    fn evict(&mut self) -> Option<u32> {
        let children = &self.children;
        let victim = self.policy.victim(LIST, false, &mut |block| {
            if children[block.0 as usize] > 0 {
                Verdict::Park
            } else {
                Verdict::Take
            }
        })?;
        self.policy.remove(LIST, victim);
        self.policy.forgotten(victim, self.usage(victim.0, 0).fingerprint);
        self.cached[victim.0 as usize] = false;
        if let Some(parent) = self.parents[victim.0 as usize] {
            self.children[parent as usize] -= 1;
            if self.children[parent as usize] == 0 {
                self.policy.unpark(LIST, BlockId(parent));
            }
        }
        Some(victim.0)
    }
}

#[test]
fn a_prefix_goes_from_its_end() {
    let mut world = World::new(100, 1024);
    world.prompt(&(0..50).collect::<Vec<_>>(), 512, 1);
    let order: Vec<u32> = std::iter::from_fn(|| world.evict()).collect();
    assert_eq!(order, (0..50).rev().collect::<Vec<_>>());
    world.policy.check_invariants();
}

#[test]
fn knowing_nothing_it_keeps_what_was_used_last() {
    let mut world = World::new(100, 1024);
    for chain in 0..4 {
        world.prompt(
            &(chain * 10..chain * 10 + 5).collect::<Vec<_>>(),
            512,
            u64::from(chain) * 100,
        );
    }
    world.prompt(&[0, 1, 2, 3, 4], 512, 1_000);
    let order: Vec<u32> = std::iter::from_fn(|| world.evict()).map(|block| block / 10).collect();
    assert_eq!(order[..15], [1, 1, 1, 1, 1, 2, 2, 2, 2, 2, 3, 3, 3, 3, 3]);
}

#[test]
fn the_unfinished_last_block_of_a_prompt_goes_before_older_ones() {
    let mut world = World::new(100, 1024);
    world.prompt(&[0, 1, 2], 512, 1);
    world.prompt(&[10, 11, 12], 100, 30);
    assert_eq!(world.evict(), Some(12));
    assert_eq!(world.evict(), Some(2));
}

#[test]
fn it_learns_that_long_pauses_end_and_short_ones_do_not() {
    // Conversations of the first kind begin with little and return after a minute; of the second kind, never.
    let mut world = World::new(200_000, 1 << 16);
    let mut next = 0;
    let mut chain = |blocks: u32| {
        next += blocks;
        (next - blocks..next).collect::<Vec<u32>>()
    };
    let mut second = Vec::new();
    for round in 0..400_u64 {
        let returning = chain(2);
        world.prompt(&returning, 512, round * 40);
        second.push(returning);
        world.prompt(&chain(30), 512, round * 40 + 1);
        if round >= 2 {
            world.prompt(&second[round as usize - 2].clone(), 512, round * 40 + 2);
        }
        while world.policy.cached > 400 {
            world.evict();
        }
    }
    world.policy.check_invariants();
    let now = 400 * 40;
    let (short, long) = (chain(2), chain(30));
    world.prompt(&short, 512, now);
    world.prompt(&long, 512, now + 1);
    let short_share = world.policy.return_share(BlockId(short[1]), Duration::from_secs(600));
    let long_share = world.policy.return_share(BlockId(long[29]), Duration::from_secs(600));
    assert!(short_share.expect("known") > 0.6, "{short_share:?}");
    assert!(long_share.expect("known") < 0.3, "{long_share:?}");
    assert!(!world.policy.is_overruled());
    let evicted: Vec<u32> = (0..30).filter_map(|_| world.evict()).collect();
    assert!(!evicted.contains(&short[1]), "{evicted:?}");
}

#[test]
fn it_learns_that_who_got_a_short_answer_comes_back_late_and_others_do_not() {
    let mut world = World::new(200_000, 1 << 16);
    let prompt = |round: u64, kind: u32| {
        let first = (round as u32 * 2 + kind) * 4;
        (first..first + 4).collect::<Vec<u32>>()
    };
    let advise = |world: &mut World, blocks: &[u32], tokens: u32, seconds: u64| {
        let blocks: Vec<BlockId> = blocks.iter().copied().map(BlockId).collect();
        world
            .policy
            .advise(&blocks, Advice::Answered(tokens), Time(seconds * SECOND_NS));
    };
    for round in 0..300_u64 {
        for (kind, tokens) in [(0, 3), (1, 600)] {
            world.prompt(&prompt(round, kind), 512, round * 40 + u64::from(kind));
            advise(
                &mut world,
                &prompt(round, kind),
                tokens,
                round * 40 + u64::from(kind) + 2,
            );
        }
        if let Some(earlier) = round.checked_sub(25) {
            world.prompt(&prompt(earlier, 0), 512, round * 40 + 10);
        }
        while world.policy.cached > 260 {
            world.evict();
        }
    }
    world.policy.check_invariants();
    let now = 300 * 40;
    let (short, long, unknown) = (prompt(301, 0), prompt(301, 1), prompt(302, 0));
    for blocks in [&short, &long, &unknown] {
        world.prompt(blocks, 512, now);
    }
    advise(&mut world, &short, 3, now + 2);
    advise(&mut world, &long, 600, now + 2);
    let mut share = |blocks: &[u32]| {
        let share = world
            .policy
            .return_share(BlockId(blocks[3]), Duration::from_secs(2_000));
        share.expect("known")
    };
    let (short, long, unknown) = (share(&short), share(&long), share(&unknown));
    assert!(short > 0.4 && long < 0.1, "{short} {long}");
    assert!(long < unknown && unknown < short, "{long} {unknown} {short}");
}

#[test]
fn what_is_worth_less_than_three_quarters_of_nvme_is_not_written_there() {
    let nvme = ListId {
        plane: Plane::Nvme,
        index: 0,
    };
    let mut world = World::new(100_000, 1 << 16);
    // Who asks comes back after half a minute, or not at all.
    for round in 0..400_u32 {
        let (back, not) = (round * 8, round * 8 + 4);
        world.prompt(&[back, back + 1], 512, u64::from(round) * 100);
        world.prompt(&[not, not + 1], 512, u64::from(round) * 100 + 1);
        world.prompt(&[back, back + 1, back + 2], 512, u64::from(round) * 100 + 30);
    }
    let at = 40_000;
    world.prompt(&[90_000, 90_001], 512, at - 4_000);
    world.prompt(&[90_004, 90_005], 512, at);
    let now = Time(at * SECOND_NS);
    assert!(
        world.policy.admit(BlockId(90_001), Tier::Nvme),
        "nothing was reclaimed yet"
    );
    for young in 0..20 {
        let first = 90_100 + young * 4;
        world.prompt(&[first, first + 1], 512, at);
        world.policy.insert(nvme, BlockId(first), None, now);
    }
    let _ = world.policy.keep(nvme, BlockId(90_100), false);
    assert!(
        world.policy.admit(BlockId(90_005), Tier::Nvme),
        "as good as what is there"
    );
    assert!(!world.policy.admit(BlockId(90_001), Tier::Nvme));
    assert!(world.policy.admit(BlockId(90_001), Tier::Host), "of NVMe alone");
    // What is promised to come does not make the rest worth less.
    let promised: Vec<BlockId> = (0..10).map(|young| BlockId(90_100 + young * 4)).collect();
    for block in promised {
        let until = Time((at + 600) * SECOND_NS);
        world.policy.advise(&[block], Advice::PinnedUntil(until), now);
    }
    assert!(world.policy.admit(BlockId(90_005), Tier::Nvme));
    // Among what is worth as little it is as good as any.
    let old = ListId { index: 1, ..nvme };
    world.policy.insert(old, BlockId(90_000), None, now);
    let _ = world.policy.keep(old, BlockId(90_000), false);
    assert!(world.policy.admit(BlockId(90_001), Tier::Nvme));
}

#[test]
fn an_answer_says_something_of_its_own_prompt_only() {
    let mut world = World::new(100, 1024);
    let answer = |world: &World, block: u32| world.policy.visits.at(world.policy.block(block).visit).answer;
    let advise = |world: &mut World, blocks: &[u32], seconds: u64| {
        let blocks: Vec<BlockId> = blocks.iter().copied().map(BlockId).collect();
        world
            .policy
            .advise(&blocks, Advice::Answered(40), Time(seconds * SECOND_NS));
        world.policy.check_invariants();
    };
    // The last block is not full, and a visit of its own.
    world.prompt(&[0, 1, 2], 70, 1);
    advise(&mut world, &[0, 1, 2], 2);
    assert_eq!([0, 1, 2].map(|block| answer(&world, block)), [2, 2, 0]);
    // The next turn is not answered yet, and the answer before is not its.
    world.prompt(&[0, 1, 3, 4], 512, 60);
    assert_eq!(answer(&world, 4), 0);
    advise(&mut world, &[0, 1], 61);
    assert_eq!(answer(&world, 1), 0, "another prompt went on from there");
    advise(&mut world, &[0, 1, 3, 4], 62);
    assert_eq!(answer(&world, 4), 2);
    // What was put of an answer is named with the prompt, however long that took.
    world.prompt(&[20, 21], 512, 70);
    world.prompt(&[20, 21, 22], 512, 75);
    advise(&mut world, &[20, 21], 76);
    assert_eq!(answer(&world, 21), 0, "it may be another's that went on");
    advise(&mut world, &[20, 21, 22], 77);
    assert_eq!([20, 21, 22].map(|block| answer(&world, block)), [2, 2, 2]);
    world.prompt(&[30, 31], 512, 80);
    for (number, at) in [(32, 120), (33, 160)] {
        world.go_on(number - 1, number, at);
    }
    advise(&mut world, &[30, 31, 32, 33], 162);
    assert_eq!([30, 31, 32, 33].map(|block| answer(&world, block)), [2, 2, 2, 2]);
    let visits = [31, 32, 33].map(|block| world.policy.block(block).visit);
    assert!(visits[0] != visits[1] && visits[1] != visits[2]);
    // The front of one that another went on from is not its.
    world.prompt(&[40, 41], 512, 170);
    world.prompt(&[40, 42], 512, 180);
    advise(&mut world, &[40, 41], 181);
    assert_eq!([40, 41, 42].map(|block| answer(&world, block)), [0, 2, 0]);
    // Of a prompt that many share, one that is gone, and none, there is nothing to say.
    advise(&mut world, &[], 63);
    advise(&mut world, &[77], 63);
    for branch in 10..16 {
        world.prompt(&[9, branch], 512, 100 + u64::from(branch));
    }
    world.prompt(&[9], 512, 200);
    advise(&mut world, &[9], 201);
    assert_eq!(answer(&world, 9), 0);
}

#[test]
fn an_evicted_block_that_comes_back_is_known_again() {
    let mut world = World::new(100, 1024);
    world.prompt(&[0, 1, 2], 512, 0);
    while world.evict().is_some() {}
    world.prompt(&[0, 1, 2], 512, 60);
    let visit = world.policy.block(2).visit;
    let entry = world.policy.visits.at(visit).clone();
    assert_eq!((entry.turn, entry.fresh_tokens, entry.tokens), (1, 0, 1536));
    assert!((57_000..58_000).contains(&entry.pause), "{}", entry.pause);
    let mut forgetful = World::new(100, 0);
    forgetful.prompt(&[0, 1, 2], 512, 0);
    while forgetful.evict().is_some() {}
    forgetful.prompt(&[0, 1, 2], 512, 60);
    assert_eq!(forgetful.policy.visits.at(forgetful.policy.block(2).visit).turn, 0);
}

#[test]
fn what_many_conversations_share_is_none_of_them() {
    let mut world = World::new(1_000, 1024);
    for chat in 0..10 {
        world.prompt(&[0, 1, 10 + chat * 2, 11 + chat * 2], 512, u64::from(chat) * 10);
    }
    let class = |world: &World, block: u32| world.policy.visits.at(world.policy.block(block).visit).class;
    assert!(class(&world, 1).is_shared());
    assert!(class(&world, 29).is_conversation());
    // A new conversation behind the shared prefix is at its first turn.
    world.prompt(&[0, 1, 100], 512, 200);
    assert_eq!(world.policy.visits.at(world.policy.block(100).visit).turn, 0);
    world.prompt(&[0, 1, 100, 101], 512, 260);
    assert_eq!(world.policy.visits.at(world.policy.block(101).visit).turn, 1);
}

#[test]
fn a_put_that_follows_its_read_is_the_same_visit() {
    let mut world = World::new(100, 1024);
    world.prompt(&[0, 1, 2], 512, 0);
    world.prompt(&[0, 1, 2], 512, 100);
    // Computing the rest took five seconds.
    world.policy.appeared(
        BlockId(3),
        Use {
            parent: Some(BlockId(2)),
            tokens: 512,
            bytes: 0,
            namespace: NamespaceId(0),
            fingerprint: 99,
        },
        Time(105 * SECOND_NS),
    );
    assert_eq!(world.policy.block(3).visit, world.policy.block(2).visit);
    assert!(world.policy.is_recent(BlockId(2), Time(105 * SECOND_NS)));
    assert!(!world.policy.is_recent(BlockId(2), Time(200 * SECOND_NS)));
}

#[test]
fn a_closed_session_goes_first_and_a_pinned_one_last_until_its_deadline() {
    let mut world = World::new(100, 1024);
    for chain in 0..3 {
        world.prompt(&[chain * 10, chain * 10 + 1], 512, u64::from(chain));
    }
    let now = Time(3 * SECOND_NS);
    world.policy.advise(&[BlockId(20), BlockId(21)], Advice::Closed, now);
    world.policy.advise(
        &[BlockId(0), BlockId(1)],
        Advice::PinnedUntil(Time(60 * SECOND_NS)),
        now,
    );
    assert_eq!(world.evict(), Some(21));
    assert_eq!(world.evict(), Some(20));
    assert_eq!(world.evict(), Some(11));
    assert_eq!(world.evict(), Some(10));
    world.prompt(&[30, 31], 512, 61);
    // The pin is over, and what it held is the oldest.
    assert_eq!(world.evict(), Some(1));
    world.policy.check_invariants();
}

#[test]
fn a_session_that_was_closed_and_is_used_again_is_open() {
    let mut world = World::new(100, 1024);
    world.prompt(&[0, 1], 512, 0);
    world.policy.advise(&[BlockId(1)], Advice::Closed, Time(SECOND_NS));
    assert_eq!(
        world.policy.return_share(BlockId(1), Duration::from_secs(60)),
        Some(0.0)
    );
    world.prompt(&[0, 1], 512, 10);
    world.prompt(&[10, 11], 512, 11);
    assert!(
        world
            .policy
            .return_share(BlockId(1), Duration::from_secs(60))
            .expect("known")
            > 0.0
    );
}

#[test]
fn a_step_that_is_expected_stays_until_its_time_behind_what_is_pinned() {
    let mut world = World::new(100, 1024);
    for chain in 0..3_u32 {
        world.prompt(&[chain * 10], 512, u64::from(chain));
    }
    let now = Time(3 * SECOND_NS);
    let soon = |seconds: u64| Time(seconds * SECOND_NS);
    world.policy.advise(&[BlockId(0)], Advice::ExpectedBy(soon(60)), now);
    world.policy.advise(&[BlockId(10)], Advice::PinnedUntil(soon(60)), now);
    assert_eq!(world.evict(), Some(20));
    assert_eq!(world.evict(), Some(0), "before what is pinned");
    assert_eq!(world.evict(), Some(10));
    world.prompt(&[30], 512, 4);
    world.prompt(&[31], 512, 5);
    world
        .policy
        .advise(&[BlockId(30)], Advice::ExpectedBy(soon(10)), soon(5));
    world.prompt(&[32], 512, 11);
    assert_eq!(world.evict(), Some(30), "its time is over, and it is the oldest");
    world.policy.check_invariants();
}

#[test]
fn of_two_pins_the_last_counts_and_one_of_the_past_ends_it() {
    let mut world = World::new(100, 1024);
    for block in 0..3_u32 {
        world.prompt(&[block], 512, u64::from(block));
    }
    let at = |seconds: u64| Time(seconds * SECOND_NS);
    world.policy.advise(&[BlockId(0)], Advice::PinnedUntil(at(10)), at(3));
    world.policy.advise(&[BlockId(0)], Advice::PinnedUntil(at(100)), at(3));
    world.policy.advise(&[BlockId(1)], Advice::PinnedUntil(at(100)), at(3));
    world.policy.advise(&[BlockId(1)], Advice::PinnedUntil(at(3)), at(3));
    world.prompt(&[9], 512, 20);
    assert_eq!(world.evict(), Some(1), "its pin was taken back");
    assert_eq!(world.policy.pins.len(), 1);
    world.policy.check_invariants();
    for expected in [Some(2), Some(9), Some(0)] {
        assert_eq!(world.evict(), expected);
    }
}

#[test]
fn what_many_share_is_not_over_with_one_session() {
    let mut world = World::new(100, 1024);
    for session in 1..=6_u32 {
        world.prompt(&[0, session * 10], 512, u64::from(session) * 10);
    }
    let now = Time(61 * SECOND_NS);
    assert!(world.policy.visits.at(world.policy.block(0).visit).class.is_shared());
    for block in [0, 60] {
        world.policy.advise(&[BlockId(block)], Advice::Closed, now);
    }
    assert_eq!(world.evict(), Some(60));
    assert_ne!(world.evict(), Some(0));
}

#[test]
fn closing_one_session_leaves_another_that_begins_alike_as_it_is() {
    let mut world = World::new(100, 1024);
    world.prompt(&[0, 1, 10], 512, 0);
    world.prompt(&[0, 1, 20], 512, 100);
    world.prompt(&[5], 512, 110);
    let now = Time(111 * SECOND_NS);
    let first = [0, 1, 10].map(BlockId);
    world.policy.advise(
        &[0, 1, 20].map(BlockId),
        Advice::PinnedUntil(Time(900 * SECOND_NS)),
        now,
    );
    world.policy.advise(&first, Advice::PinnedUntil(now), now);
    world.policy.advise(&first, Advice::Closed, now);
    assert_eq!(world.evict(), Some(10));
    assert_eq!(world.evict(), Some(5), "the other session is pinned");
    assert_eq!(world.evict(), Some(20), "from its end");
    world.policy.check_invariants();
}

#[test]
fn a_pin_outlives_a_use_and_what_was_expected_has_come_with_it() {
    let mut world = World::new(100, 1024);
    world.prompt(&[0, 1], 512, 0);
    world.prompt(&[10, 11], 512, 1);
    let (now, later) = (Time(2 * SECOND_NS), Time(500 * SECOND_NS));
    world
        .policy
        .advise(&[0, 1].map(BlockId), Advice::PinnedUntil(later), now);
    world
        .policy
        .advise(&[10, 11].map(BlockId), Advice::ExpectedBy(later), now);
    world.prompt(&[0, 1], 512, 20);
    world.prompt(&[10, 11], 512, 20);
    assert_eq!(world.policy.pins.len(), 1, "what is over keeps no place");
    world.prompt(&[30], 512, 21);
    assert_eq!(world.evict(), Some(11));
    assert_eq!(world.evict(), Some(10));
    assert_eq!(world.evict(), Some(30));
    assert_eq!(world.evict(), Some(1));
    world.policy.check_invariants();
}

#[test]
fn what_the_next_visit_took_another_way_from_is_left_behind() {
    let mut world = World::new(1_000, 1024);
    world.prompt(&(0..10).collect::<Vec<_>>(), 512, 0);
    world.prompt(&(100..105).collect::<Vec<_>>(), 512, 1);
    world.prompt(&[0, 1, 2, 3, 4, 20, 21], 512, 60);
    let class = |world: &World, block: u32| world.policy.visits.at(world.policy.block(block).visit).class;
    // What is computed of a prompt may come a while after what was found of it.
    world.prompt(&[200], 512, 70);
    assert!(class(&world, 9).is_conversation());
    world.prompt(&[201], 512, 100);
    assert_eq!(class(&world, 9), Class::LEFT);
    assert!(class(&world, 4).is_conversation() && class(&world, 21).is_conversation());
    world.policy.check_invariants();
    let order: Vec<u32> = (0..6).filter_map(|_| world.evict()).collect();
    assert_eq!(order[..5], [9, 8, 7, 6, 5]);
    assert!(order[5] >= 100, "{order:?}");
    // What comes back nevertheless is a conversation again.
    world.prompt(&(0..10).collect::<Vec<_>>(), 512, 120);
    world.prompt(&[202], 512, 200);
    assert!(class(&world, 9).is_conversation());
}

#[test]
fn who_rises_goes_before_those_on_its_level_and_who_falls_after() {
    let mut orders = Orders::default();
    for (block, level) in [(1, 5), (2, 90), (3, 200), (4, 90)] {
        orders.insert(LIST, BlockId(block), level, End::Newest);
    }
    orders.move_to(BlockId(1), 90, End::Oldest);
    orders.move_to(BlockId(3), 90, End::Newest);
    orders.insert(LIST, BlockId(5), LEVEL_PINNED, End::Newest);
    orders.check_invariants();
    let order: Vec<u32> = std::iter::from_fn(|| {
        let BlockId(next) = orders.next(LIST)?;
        orders.remove(LIST, BlockId(next));
        Some(next)
    })
    .collect();
    assert_eq!(order, [1, 2, 4, 3, 5]);
}

/// Blocks of 512 tokens and 4 KiB, each a prompt of its own.
fn put_alone(policy: &mut ReuseHazard, block: u32, namespace: u32, bytes: u32, seconds: u64) {
    let usage = Use {
        parent: None,
        tokens: 512,
        bytes,
        namespace: NamespaceId(namespace),
        fingerprint: u64::from(block) + 1,
    };
    let now = Time(seconds * SECOND_NS);
    policy.appeared(BlockId(block), usage, now);
    policy.insert(LIST, BlockId(block), None, now);
}

fn next_victim(policy: &mut ReuseHazard) -> Option<u32> {
    policy.victim(LIST, false, &mut |_| Verdict::Take).map(|block| block.0)
}

#[test]
fn a_namespace_whose_prompts_come_back_keeps_them_beside_one_whose_do_not() {
    let mut policy = ReuseHazard::new(1 << 14);
    let usage = |block: u32, namespace: u32| Use {
        parent: None,
        tokens: 512,
        bytes: 4096,
        namespace: NamespaceId(namespace),
        fingerprint: u64::from(block) + 1,
    };
    for round in 0..600_u32 {
        let seconds = u64::from(round) * 10;
        put_alone(&mut policy, 2 * round, 1, 4096, seconds);
        put_alone(&mut policy, 2 * round + 1, 2, 4096, seconds);
        if round >= 3 {
            let back = 2 * (round - 3);
            let now = Time((seconds + 1) * SECOND_NS);
            policy.used(BlockId(back), usage(back, 1), now);
            policy.touch(LIST, BlockId(back), None, now);
        }
    }
    put_alone(&mut policy, 5_000, 1, 4096, 6_001);
    put_alone(&mut policy, 5_001, 2, 4096, 6_001);
    // Of one class and age, and only one of them is of a namespace whose prompts come back.
    let mut order = Vec::new();
    while let Some(block) = next_victim(&mut policy) {
        policy.remove(LIST, BlockId(block));
        order.push(block);
    }
    let place = |block: u32| order.iter().position(|other| *other == block);
    assert!(place(5_001) < place(5_000), "{:?} {:?}", place(5_001), place(5_000));
    policy.check_invariants();
}

#[test]
fn what_spares_less_for_its_place_goes_first_and_what_is_deep_in_its_prompt_later() {
    let mut policy = ReuseHazard::new(16);
    put_alone(&mut policy, 0, 0, 4096, 1);
    put_alone(&mut policy, 1, 0, 16_384, 2);
    assert_eq!(
        next_victim(&mut policy),
        Some(1),
        "four times the bytes for as many tokens"
    );

    let chain = |policy: &mut ReuseHazard, first: u32, blocks: u32, seconds: u64| {
        let now = Time(seconds * SECOND_NS);
        for block in first..first + blocks {
            let usage = Use {
                parent: (block > first).then(|| BlockId(block - 1)),
                tokens: 512,
                bytes: 4096,
                namespace: NamespaceId(0),
                fingerprint: u64::from(block) + 1,
            };
            policy.appeared(BlockId(block), usage, now);
            policy.insert(LIST, BlockId(block), usage.parent, now);
        }
    };
    let first_to_go = |depth_cost: f64| {
        let mut policy = ReuseHazard::weighed(16, depth_cost);
        chain(&mut policy, 100, 60, 1);
        chain(&mut policy, 0, 50, 2);
        policy.check_invariants();
        next_victim(&mut policy)
    };
    assert_eq!(first_to_go(0.0), Some(159), "the older one");
    assert_eq!(first_to_go(0.001), Some(49), "the one that takes less to compute");
}

#[test]
fn pins_are_bounded_and_one_namespace_cannot_take_them_all() {
    let mut policy = ReuseHazard::new(0);
    for block in 0..2 * u32::from(PINS_OF_NAMESPACE_MAX) {
        put_alone(&mut policy, block, 7, 4096, 0);
        policy.advise(&[BlockId(block)], Advice::PinnedUntil(Time(9 * SECOND_NS)), Time(0));
    }
    assert_eq!(policy.pins.len(), usize::from(PINS_OF_NAMESPACE_MAX));
    for block in 10_000..10_000 + PINS_MAX as u32 {
        put_alone(&mut policy, block, block, 4096, 0);
        policy.advise(&[BlockId(block)], Advice::PinnedUntil(Time(9 * SECOND_NS)), Time(0));
    }
    assert_eq!(policy.pins.len(), PINS_MAX);
    policy.check_invariants();
    policy.advise(&[BlockId(0)], Advice::PinnedUntil(Time(0)), Time(10 * SECOND_NS));
    assert_eq!(policy.pins.len(), 0, "their time is over");
    assert!(policy.pins_of.iter().all(|pins| *pins == 0));
}

#[test]
fn pins_have_room_again() {
    let mut world = World::new(PINS_MAX + 10, 0);
    for block in 0..PINS_MAX as u32 + 10 {
        world.prompt(&[block], 512, 0);
        world
            .policy
            .advise(&[BlockId(block)], Advice::PinnedUntil(Time(9 * SECOND_NS)), Time(0));
    }
    assert_eq!(world.policy.pins.len(), usize::from(PINS_OF_NAMESPACE_MAX));
    assert!(world.evict().expect("one that is not pinned") >= u32::from(PINS_OF_NAMESPACE_MAX));
}

#[test]
fn what_was_learned_survives_a_restart() {
    let mut world = World::new(10_000, 1 << 12);
    for round in 0..500_u32 {
        world.prompt(&[round * 2, round * 2 + 1], 512, u64::from(round) * 10);
        if round >= 6 {
            world.prompt(&[(round - 6) * 2, (round - 6) * 2 + 1], 512, u64::from(round) * 10 + 1);
        }
    }
    let learned = world.policy.learned().expect("it learns");
    let image = LearnedTables::decode(&learned.encode()).expect("an image");
    let share = |policy: &mut ReuseHazard| {
        let usage = Use {
            parent: None,
            tokens: 512,
            bytes: 0,
            namespace: NamespaceId(0),
            fingerprint: 1,
        };
        policy.appeared(BlockId(9_999), usage, Time(5_000 * SECOND_NS));
        policy
            .return_share(BlockId(9_999), Duration::from_secs(100))
            .expect("known")
    };
    let mut primed = ReuseHazard::new(0);
    primed.learn(&image);
    let (before, after, without) = (
        share(&mut world.policy),
        share(&mut primed),
        share(&mut ReuseHazard::new(0)),
    );
    assert!((before - after).abs() < 0.1, "{before} {after}");
    assert!(
        (before - after).abs() < (before - without).abs() / 2.0,
        "{before} {after} {without}"
    );
}

#[test]
fn a_resident_block_costs_28_bytes_and_12_for_another_list() {
    assert_eq!(size_of::<Block>(), 16);
    let mut world = World::new(0, 0);
    world.parents = vec![None; 200_000];
    world.children = vec![0; 200_000];
    world.cached = vec![false; 200_000];
    let before = world.policy.memory_bytes();
    for chain in 0..10_000 {
        world.prompt(
            &(chain * 16..chain * 16 + 16).collect::<Vec<_>>(),
            512,
            u64::from(chain),
        );
    }
    let each = (world.policy.memory_bytes() - before) as f64 / 160_000.0;
    assert!(each <= 48.0, "{each} bytes a block");
}

#[derive(Clone, Debug)]
enum Step {
    Prompt {
        chain: u32,
        length: u32,
        fork: u32,
        partial: bool,
        pause: u64,
    },
    Evict(u8),
    Close(u32),
    Pin(u32, u64),
    Answer {
        block: u32,
        tokens: u32,
    },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..12_u32, 1..20_u32, 0..40_u32, any::<bool>(), prop_oneof![Just(0), 1..5_u64, 1..4_000_u64])
            .prop_map(|(chain, length, fork, partial, pause)| Step::Prompt { chain, length, fork, partial, pause }),
        3 => (1..30_u8).prop_map(Step::Evict),
        1 => (0..400_u32).prop_map(Step::Close),
        2 => (0..400_u32, prop_oneof![0..32_u32, any::<u32>()]).prop_map(|(block, tokens)| Step::Answer { block, tokens }),
        1 => (0..400_u32, 0..5_000_u64).prop_map(|(block, seconds)| Step::Pin(block, seconds)),
    ]
}

proptest! {
    #[test]
    fn its_tables_agree_whatever_happens(steps in prop::collection::vec(step(), 1..120), ghosts in prop_oneof![Just(0_usize), Just(512), Just(1 << 14)]) {
        let mut world = World::new(1_000, ghosts);
        let mut seconds = 0;
        for step in steps {
            match step {
                Step::Prompt { chain, length, fork, partial, pause } => {
                    seconds += pause;
                    // Chains share their first four blocks, and may leave their own path.
                    let shared = 0..length.min(4);
                    let own = (4..length).map(|depth| {
                        if depth > fork { 500 + (chain * 20 + depth + fork) % 400 } else { 4 + chain * 20 + depth }
                    });
                    let mut blocks: Vec<u32> = shared.chain(own).collect();
                    // A block has one parent as long as it is cached.
                    let end = blocks.iter().enumerate().position(|(index, block)| {
                        let parent = index.checked_sub(1).map(|before| blocks[before]);
                        world.cached[*block as usize] && world.parents[*block as usize] != parent
                    });
                    blocks.truncate(end.unwrap_or(blocks.len()));
                    world.prompt(&blocks, if partial { 70 } else { 512 }, seconds);
                }
                Step::Evict(count) => {
                    for _ in 0..count {
                        world.evict();
                    }
                }
                Step::Answer { block, tokens } => {
                    let mut named = vec![block];
                    while let Some(parent) = world.parents[named[0] as usize] {
                        named.insert(0, parent);
                    }
                    let named: Vec<BlockId> = named.into_iter().map(BlockId).collect();
                    world.policy.advise(&named, Advice::Answered(tokens), Time(seconds * SECOND_NS));
                }
                Step::Close(block) => world.policy.advise(&[BlockId(block)], Advice::Closed, Time(seconds * SECOND_NS)),
                Step::Pin(block, until) => {
                    world.policy.advise(&[BlockId(block)], Advice::PinnedUntil(Time(until * SECOND_NS)), Time(seconds * SECOND_NS));
                }
            }
            world.policy.check_invariants();
        }
        while world.evict().is_some() {}
        prop_assert_eq!(world.policy.cached, 0);
        world.policy.check_invariants();
    }
}
