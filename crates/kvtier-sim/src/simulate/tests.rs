use std::collections::BTreeMap;

use super::classic::BlockCache;
use super::*;
use crate::family::Family;
use crate::random::Random;

fn prompts(chains: &[&[u64]]) -> Prompts {
    let requests: Vec<TraceRequest> = (0..)
        .zip(chains)
        .map(|(number, ids)| TraceRequest {
            timestamp_ms: number * 1000,
            input_tokens: ids.len() as u64 * 512,
            output_tokens: 1,
            hash_ids: ids.to_vec(),
        })
        .collect();
    Prompts::new(&requests, 512)
}

/// Prompts that share prefixes of a small tree.
fn small(random: &mut Random, requests: usize) -> Prompts {
    let chains: Vec<Vec<u64>> = (0..requests)
        .map(|_| {
            let mut ids = Vec::new();
            let mut node = 0;
            for depth in 0..random.between(1, 4) {
                node = node * 3 + 1 + random.below(2 + depth % 2);
                ids.push(node);
            }
            ids
        })
        .collect();
    let chains: Vec<&[u64]> = chains.iter().map(Vec::as_slice).collect();
    prompts(&chains)
}

/// The most blocks that any cache of whole prefixes can hit: every way to keep what was cached or asked for is tried.
fn exhaustive(prompts: &Prompts, capacity_blocks: usize) -> u64 {
    let mut parents = BTreeMap::new();
    for prompt in &prompts.prompts {
        let mut parent = None;
        for (block, _) in &prompt.blocks {
            parents.insert(*block, parent);
            parent = Some(*block);
        }
    }
    assert!(prompts.blocks <= 24, "small traces only");
    let closed = |set: u32| {
        (0..prompts.blocks as u32)
            .all(|block| set >> block & 1 == 0 || parents[&block].is_none_or(|parent: u32| set >> parent & 1 == 1))
    };
    // Hits so far, by what is cached.
    let mut states = BTreeMap::from([(0_u32, 0_u64)]);
    for prompt in &prompts.prompts {
        let asked = prompt.blocks.iter().fold(0, |set, (block, _)| set | 1 << block);
        let mut next: BTreeMap<u32, u64> = BTreeMap::new();
        for (cached, hits) in states {
            let hit = prompt
                .blocks
                .iter()
                .take_while(|(block, _)| cached >> block & 1 == 1)
                .count() as u64;
            let available = cached | asked;
            let mut kept = available;
            loop {
                if kept.count_ones() as usize <= capacity_blocks && closed(kept) {
                    let best = next.entry(kept).or_insert(0);
                    *best = (*best).max(hits + hit);
                }
                if kept == 0 {
                    break;
                }
                kept = (kept - 1) & available;
            }
        }
        states = next;
    }
    states.into_values().max().unwrap_or(0)
}

#[test]
fn opt_hits_what_an_exhaustive_search_hits() {
    let mut hits = 0;
    for seed in 0..150 {
        let mut random = Random::new(seed);
        let requests = random.between(3, 8) as usize;
        let prompts = small(&mut random, requests);
        if prompts.blocks > 12 {
            continue;
        }
        for capacity_blocks in 0..6 {
            let opt = simulate(&prompts, Policy::Opt, capacity_blocks, &mut || ());
            let best = exhaustive(&prompts, capacity_blocks);
            assert_eq!(
                opt.hit_blocks, best,
                "seed {seed}, {capacity_blocks} blocks: {prompts:?}"
            );
            hits += best;
        }
    }
    assert!(hits > 500, "{hits} hits are too few to compare anything");
}

#[test]
fn no_policy_beats_opt_and_none_holds_more_than_fits() {
    for family in [Family::Chat, Family::Scan] {
        let requests = family.generate(5);
        let prompts = Prompts::new(&requests[..1_000], 512);
        for capacity_blocks in [1, 7, 100, prompts.blocks() / 4, prompts.blocks()] {
            let opt = simulate(&prompts, Policy::Opt, capacity_blocks, &mut || ());
            for policy in Policy::ALL {
                let simulated = simulate(&prompts, policy, capacity_blocks, &mut || ());
                assert!(
                    simulated.hit_blocks <= opt.hit_blocks,
                    "{policy} at {capacity_blocks} blocks of {family:?}"
                );
                assert_eq!((simulated.tokens, simulated.blocks), (opt.tokens, opt.blocks));
                if capacity_blocks == prompts.blocks() && !matches!(policy, Policy::WTinyLfu | Policy::S3Fifo) {
                    assert_eq!(simulated, opt, "{policy} with room for all");
                }
            }
        }
    }
}

#[test]
fn the_simulated_lru_is_the_yardstick_of_the_state_machine() {
    let requests = Family::Chat.generate(2);
    let prompts = Prompts::new(&requests, 512);
    for capacity_blocks in [50, 500, 3_000] {
        let simulated = simulate(&prompts, Policy::Lru, capacity_blocks, &mut || ());
        let yardstick = crate::lru::replay(&requests, capacity_blocks);
        assert!(
            (simulated.token_ratio() - yardstick.ratio()).abs() < 0.002,
            "{simulated:?} {yardstick:?}"
        );
    }
}

#[test]
fn a_block_counts_only_with_its_whole_prefix() {
    let prompts = prompts(&[&[1, 2, 3], &[9, 2, 3], &[1, 2, 3]]);
    let simulated = simulate(&prompts, Policy::Lfu, 100, &mut || ());
    assert_eq!((simulated.hit_blocks, simulated.blocks), (3, 9));
    assert_eq!((simulated.hit_tokens, simulated.tokens), (1536, 9 * 512));
}

/// Points that hazards are behind recency, mean of twenty seeds, at each size.
fn behind(family: Family) -> [f64; 5] {
    const SEEDS: u64 = 20;
    let mut behind = [0.0; 5];
    for seed in 0..SEEDS {
        let prompts = Prompts::new(&family.generate(1000 + seed), 512);
        for (behind, share) in behind.iter_mut().zip([1, 5, 10, 25, 50]) {
            let capacity_blocks = (prompts.blocks() * share / 100).max(1);
            let ratio = |policy| simulate(&prompts, policy, capacity_blocks, &mut || ()).token_ratio();
            *behind += (ratio(Policy::Lru) - ratio(Policy::Hazard)) * 100.0 / SEEDS as f64;
        }
    }
    behind
}

#[test]
fn hazards_are_never_much_worse_than_recency_where_they_may_learn_nothing() {
    for family in [Family::Uniform, Family::Agent] {
        let behind = behind(family);
        assert!(behind.iter().all(|points| *points <= 0.3), "{family:?}: {behind:.2?}");
    }
}

#[test]
fn hazards_beat_recency_where_there_is_something_to_learn() {
    for (family, points) in [
        (Family::Scan, 10.0),
        (Family::Loop, 2.0),
        (Family::Zipf, 8.0),
        (Family::Chat, 3.0),
    ] {
        let behind = behind(family);
        assert!(behind.iter().all(|points| *points <= 0.3), "{family:?}: {behind:.2?}");
        assert!(behind[1] <= -points, "{family:?} at 5 %: {behind:.2?}");
    }
}

/// Prompts that are alike: those with short answers are asked again five minutes later, the others never.
fn readers(rounds: u64) -> Vec<TraceRequest> {
    let request = |at_s: u64, session: u64, output_tokens| TraceRequest {
        timestamp_ms: at_s * 1_000,
        input_tokens: 8 * 512,
        output_tokens,
        hash_ids: (session * 8..session * 8 + 8).collect(),
    };
    let begun = (0..rounds).flat_map(|round| {
        [
            request(round * 4, round * 2, 5),
            request(round * 4 + 2, round * 2 + 1, 500),
        ]
    });
    let again = (0..rounds).map(|round| request(round * 4 + 301, round * 2, 5));
    let mut requests: Vec<TraceRequest> = begun.chain(again).collect();
    requests.sort_by_key(|request| request.timestamp_ms);
    requests
}

#[test]
fn how_long_answers_were_tells_who_comes_back() {
    let prompts = Prompts::new(&readers(2_000), 512);
    // Room for four minutes of them.
    let ratio = |prompts: &Prompts, policy| simulate(prompts, policy, 1_000, &mut || ()).token_ratio();
    let told = ratio(&prompts, Policy::Hazard);
    let silent = prompts.clone().without_answers();
    let (untold, recency) = (ratio(&silent, Policy::Hazard), ratio(&silent, Policy::Lru));
    assert!(told > untold + 0.05 && told > 0.3, "{told} {untold} {recency}");
    assert_eq!(
        ratio(&prompts, Policy::Lru).to_bits(),
        recency.to_bits(),
        "recency makes nothing of it"
    );
}

#[test]
fn what_was_learned_on_one_half_helps_on_the_other() {
    let requests = Family::Chat.generate(11);
    let (first, second) = requests.split_at(requests.len() / 2);
    let (first, second) = (Prompts::new(first, 512), Prompts::new(second, 512));
    let capacity_blocks = second.blocks() / 50;
    let (_, learned) = simulate_learned(&first, &LearnedTables::default(), capacity_blocks);
    let (primed, _) = simulate_learned(&second, &learned, capacity_blocks);
    let (cold, _) = simulate_learned(&second, &LearnedTables::default(), capacity_blocks);
    assert!(primed.token_ratio() > cold.token_ratio(), "{primed:?} {cold:?}");
}

#[test]
fn the_policys_tables_agree_after_a_long_run() {
    for family in Family::ALL {
        let prompts = Prompts::new(&family.generate(4), 512);
        let mut cache = tree::TreeCache::new(ReuseHazard::new(2_000), prompts.blocks(), 300);
        let _ = run(&mut cache, &prompts.prompts, &mut || ());
        cache.check_invariants();
    }
}

#[test]
fn classic_caches_hold_no_more_than_fits_and_what_was_just_used() {
    fn check(mut cache: impl BlockCache, name: &str, capacity_blocks: usize, keeps_last: bool) {
        let mut random = Random::new(3);
        for _ in 0..20_000 {
            let block = random.index(200).min(random.index(200)) as u32;
            cache.access(block);
            assert!(cache.len() <= capacity_blocks, "{name}");
            assert!(!keeps_last || cache.contains(block), "{name}");
        }
        let cached = (0..200).filter(|block| cache.contains(*block)).count();
        assert_eq!(cached, cache.len(), "{name}");
        assert_eq!(cached, capacity_blocks, "{name} is full");
    }
    for capacity_blocks in [10, 64] {
        check(classic::Lfu::new(200, capacity_blocks), "lfu", capacity_blocks, true);
        check(
            classic::S3Fifo::new(200, capacity_blocks),
            "s3-fifo",
            capacity_blocks,
            true,
        );
        check(
            classic::Sieve::new(200, capacity_blocks),
            "sieve",
            capacity_blocks,
            true,
        );
        check(classic::Arc::new(200, capacity_blocks), "arc", capacity_blocks, true);
        check(classic::Lirs::new(200, capacity_blocks), "lirs", capacity_blocks, true);
        check(
            classic::WTinyLfu::new(200, capacity_blocks),
            "w-tinylfu",
            capacity_blocks,
            true,
        );
    }
}

#[test]
fn policies_are_named_as_they_are_printed() {
    for policy in Policy::ALL {
        assert_eq!(policy.name().parse(), Ok(policy));
    }
    assert!(
        "fifo"
            .parse::<Policy>()
            .expect_err("not one of them")
            .contains("s3-fifo")
    );
}
