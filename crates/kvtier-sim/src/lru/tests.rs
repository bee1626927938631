use super::{LeafLru, replay, unique_blocks};
use crate::workload::ChatWorkload;

#[test]
fn a_parent_outlives_its_cached_children() {
    let mut cache = LeafLru::new(3);
    assert_eq!(cache.request(&[1, 2]), 0);
    assert_eq!(cache.request(&[9]), 0);
    // 2 is the oldest leaf: 1 is as old, but 2 needs it.
    assert_eq!(cache.request(&[8]), 0);
    assert_eq!(cache.request(&[1, 2]), 1);
}

#[test]
fn a_prompt_longer_than_the_cache_keeps_its_head() {
    let mut cache = LeafLru::new(2);
    cache.request(&[1, 2, 3, 4]);
    assert_eq!(cache.request(&[1, 2, 3, 4]), 2);
}

#[test]
fn more_room_hits_more_until_everything_fits() {
    let requests = ChatWorkload {
        sessions: 200,
        ..ChatWorkload::default()
    }
    .generate();
    let unique = unique_blocks(&requests);
    let ratios: Vec<f64> = [1, 5, 25, 50, 100]
        .iter()
        .map(|percent| replay(&requests, unique * percent / 100).ratio())
        .collect();
    assert!(ratios.is_sorted(), "{ratios:?}");
    assert!(
        ratios[0] < ratios[4] * 0.7,
        "a hundredth of the room cannot hit nearly as much: {ratios:?}"
    );
    assert_eq!(replay(&requests, unique), replay(&requests, unique * 2));
}
