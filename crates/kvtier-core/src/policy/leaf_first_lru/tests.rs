use super::*;

const LIST: ListId = ListId {
    plane: Plane::Host,
    index: 3,
};

fn order(policy: &mut LeafFirstLru, children: &mut [u32]) -> Vec<u32> {
    let mut order = Vec::new();
    loop {
        let judge = &mut |block: BlockId| {
            if children[block.0 as usize] > 0 {
                Verdict::Park
            } else {
                Verdict::Take
            }
        };
        let Some(victim) = policy.victim(LIST, false, judge) else {
            break;
        };
        policy.remove(LIST, victim);
        policy.check_invariants();
        order.push(victim.0);
        // In these tests block n is the parent of block n + 1.
        if victim.0 > 0 {
            children[victim.0 as usize - 1] -= 1;
            policy.unpark(LIST, BlockId(victim.0 - 1));
        }
    }
    order
}

#[test]
fn the_least_recently_used_goes_first() {
    let mut policy = LeafFirstLru::new();
    for block in 0..4 {
        policy.insert(LIST, BlockId(block), None, Time(0));
    }
    policy.touch(LIST, BlockId(0), None, Time(1));
    policy.insert_oldest(LIST, BlockId(9));
    let mut taken = Vec::new();
    while let Some(victim) = policy.victim(LIST, false, &mut |_| Verdict::Take) {
        policy.remove(LIST, victim);
        taken.push(victim.0);
    }
    assert_eq!(taken, [9, 1, 2, 3, 0]);
}

#[test]
fn a_chain_goes_leaf_first_and_each_block_is_judged_at_most_twice() {
    const LENGTH: u32 = 10_000;
    let mut policy = LeafFirstLru::new();
    let mut children: Vec<u32> = (0..LENGTH).map(|block| u32::from(block + 1 < LENGTH)).collect();
    for block in 0..LENGTH {
        policy.insert(LIST, BlockId(block), None, Time(0));
    }
    let mut judged = 0;
    let mut taken = Vec::new();
    while let Some(victim) = policy.victim(LIST, false, &mut |block: BlockId| {
        judged += 1;
        if children[block.0 as usize] > 0 {
            Verdict::Park
        } else {
            Verdict::Take
        }
    }) {
        policy.remove(LIST, victim);
        taken.push(victim.0);
        if victim.0 > 0 {
            children[victim.0 as usize - 1] -= 1;
            policy.unpark(LIST, BlockId(victim.0 - 1));
        }
    }
    assert_eq!(taken, (0..LENGTH).rev().collect::<Vec<_>>());
    assert!(judged <= 2 * LENGTH, "{judged} judgements");
}

#[test]
fn a_parked_block_that_is_touched_is_the_last_again() {
    let mut policy = LeafFirstLru::new();
    for block in 0..3 {
        policy.insert(LIST, BlockId(block), None, Time(0));
    }
    let parked = policy.victim(LIST, false, &mut |block| {
        if block.0 == 0 { Verdict::Park } else { Verdict::Take }
    });
    assert_eq!(parked, Some(BlockId(1)));
    policy.touch(LIST, BlockId(0), None, Time(1));
    policy.unpark(LIST, BlockId(0));
    let mut children = [0, 0, 0];
    children[0] = 1;
    children[1] = 1;
    assert_eq!(order(&mut policy, &mut children), [2, 1, 0]);
}

#[test]
fn a_shelved_block_waits_for_its_holder() {
    let mut policy = LeafFirstLru::new();
    policy.insert(LIST, BlockId(5), None, Time(0));
    assert_eq!(policy.victim(LIST, true, &mut |_| Verdict::Shelve), None);
    assert_eq!(policy.length(LIST), 1);
    policy.unpark(LIST, BlockId(5));
    assert_eq!(policy.victim(LIST, true, &mut |_| Verdict::Take), Some(BlockId(5)));
    policy.check_invariants();
}

#[test]
fn links_are_allocated_only_where_a_plane_is_used() {
    let mut policy = LeafFirstLru::new();
    policy.insert(LIST, BlockId(0), None, Time(0));
    let one_plane = policy.memory_bytes();
    assert!(one_plane < 4096 * 13, "{one_plane}");
    policy.insert(
        ListId {
            plane: Plane::Namespace,
            index: 0,
        },
        BlockId(0),
        None,
        Time(0),
    );
    assert!(policy.memory_bytes() > one_plane);
}

#[test]
fn what_is_used_beside_another_goes_just_before_it() {
    let mut policy = LeafFirstLru::new();
    policy.insert(LIST, BlockId(0), None, Time(0));
    policy.insert(LIST, BlockId(1), Some(BlockId(0)), Time(0));
    policy.insert(LIST, BlockId(2), Some(BlockId(1)), Time(0));
    policy.insert(LIST, BlockId(9), None, Time(0));
    policy.insert(LIST, BlockId(3), Some(BlockId(2)), Time(0));
    policy.touch(LIST, BlockId(9), Some(BlockId(3)), Time(0));
    policy.check_invariants();
    policy.shelve(LIST, BlockId(3));
    // One that is off the order has no place beside it.
    policy.touch(LIST, BlockId(0), Some(BlockId(3)), Time(0));
    policy.check_invariants();
    let mut taken = Vec::new();
    while let Some(victim) = policy.victim(LIST, false, &mut |_| Verdict::Take) {
        policy.remove(LIST, victim);
        taken.push(victim.0);
    }
    assert_eq!(taken, [9, 2, 1, 0]);
}

#[test]
fn a_block_is_recent_for_a_moment() {
    let mut policy = LeafFirstLru::new();
    policy.insert(LIST, BlockId(0), None, Time(5 << 20));
    assert!(policy.is_recent(BlockId(0), Time(69 << 20)));
    assert!(!policy.is_recent(BlockId(0), Time(70 << 20)));
}
