use std::collections::BTreeMap;

use super::ChatWorkload;
use crate::trace::{TraceReader, write_trace};

#[test]
fn the_same_seed_gives_the_same_workload_and_another_seed_another() {
    let workload = ChatWorkload::default();
    assert_eq!(workload.generate(), workload.generate());
    assert_ne!(workload.generate(), ChatWorkload { seed: 2, ..workload }.generate());
}

#[test]
fn the_defaults_suit_a_demo() {
    let requests = ChatWorkload::default().generate();
    assert!((1_500..6_000).contains(&requests.len()), "{} requests", requests.len());
    let minutes = requests.last().map_or(0, |request| request.timestamp_ms / 60_000);
    assert!((10..60).contains(&minutes), "{minutes} minutes");
}

#[test]
fn equal_ids_mean_equal_prefixes() {
    let mut before: BTreeMap<u64, (usize, Option<u64>)> = BTreeMap::new();
    for request in ChatWorkload::default().generate() {
        for (index, id) in request.hash_ids.iter().enumerate() {
            let place = (index, index.checked_sub(1).map(|before| request.hash_ids[before]));
            assert_eq!(
                *before.entry(*id).or_insert(place),
                place,
                "id {id} follows two different prefixes"
            );
        }
    }
}

#[test]
fn requests_come_in_order_of_time_and_ids_in_order_of_appearance() {
    let requests = ChatWorkload::default().generate();
    assert!(requests.is_sorted_by_key(|request| request.timestamp_ms));
    let mut next = 0;
    for id in requests.iter().flat_map(|request| &request.hash_ids) {
        assert!(*id <= next, "id {id} appears before {next}");
        next = next.max(id + 1);
    }
}

#[test]
fn turns_come_back_with_what_was_said_and_sessions_share_prompts() {
    let requests = ChatWorkload::default().generate();
    let mut seen = std::collections::BTreeSet::new();
    let (mut again, mut total) = (0_u64, 0_u64);
    for id in requests.iter().flat_map(|request| &request.hash_ids) {
        total += 1;
        again += u64::from(!seen.insert(*id));
    }
    assert!(
        again * 100 > total * 40 && again * 100 < total * 90,
        "{again} of {total} ids were seen before"
    );
}

#[test]
fn a_generated_trace_survives_its_file_format() {
    let requests = ChatWorkload {
        sessions: 20,
        ..ChatWorkload::default()
    }
    .generate();
    let mut text = Vec::new();
    write_trace(&requests, &mut text).expect("a vector takes everything");
    let read: Vec<_> = TraceReader::new(&text[..])
        .map(|request| request.expect("valid"))
        .collect();
    assert_eq!(read, requests);
}
