//! Reading blocks into targets that hold a pattern, and comparing every byte.

use std::ops::RangeInclusive;

use kv_daemon::content::Content;
use kvtier::client::blocking::Namespace;
use kvtier::client::{ClientError, FetchScope, GetOutcome};

use crate::key::{self, Key, LENGTH_MAX};

/// What targets hold before a read.
const PATTERN: u8 = 0xA5;

/// Bytes behind each block's target that no read may touch.
const GUARD_BYTES: usize = 64;

/// What became of one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Hit,
    Miss,
    Busy,
}

/// What was compared so far.
#[derive(Clone, Debug, Default)]
pub(crate) struct Comparison {
    pub(crate) hits: u64,
    pub(crate) verified_bytes: u64,
    pub(crate) wrong_bytes: u64,
    /// Targets that a read left neither untouched nor zeroed nor right.
    pub(crate) mixed_targets: u64,
    /// The first of either, in words.
    pub(crate) first_wrong: Option<String>,
}

impl Comparison {
    pub(crate) fn add(&mut self, other: Comparison) {
        self.hits += other.hits;
        self.verified_bytes += other.verified_bytes;
        self.wrong_bytes += other.wrong_bytes;
        self.mixed_targets += other.mixed_targets;
        self.first_wrong = self.first_wrong.take().or(other.first_wrong);
    }
}

/// Targets for a batch of blocks.
pub(crate) struct Reader<'a> {
    content: &'a Content,
    targets: Vec<Vec<u8>>,
    pub(crate) comparison: Comparison,
}

impl<'a> Reader<'a> {
    pub(crate) fn new(content: &'a Content) -> Reader<'a> {
        Reader {
            content,
            targets: Vec::new(),
            comparison: Comparison::default(),
        }
    }

    /// Reads keys of one namespace; blocks may be of these generations.
    pub(crate) fn read(
        &mut self,
        namespace: &Namespace,
        keys: &[Key],
        scope: FetchScope,
        generations: &RangeInclusive<u64>,
    ) -> Result<Vec<Found>, ClientError> {
        while self.targets.len() < keys.len() {
            self.targets.push(vec![0; LENGTH_MAX + GUARD_BYTES]);
        }
        let mut targets: Vec<&mut [u8]> = Vec::with_capacity(keys.len());
        for (key, target) in keys.iter().zip(&mut self.targets) {
            let target = &mut target[..key.length() + GUARD_BYTES];
            target.fill(PATTERN);
            targets.push(target);
        }
        let hashes: Vec<_> = keys.iter().map(|key| key.hash()).collect();
        let outcomes = namespace.get_into_scoped(&hashes, &mut targets, scope)?;
        let read = outcomes.iter().zip(keys).zip(&targets);
        Ok(read
            .map(|((outcome, key), target)| {
                compare(self.content, *outcome, *key, target, generations, &mut self.comparison)
            })
            .collect())
    }
}

fn compare(
    content: &Content,
    outcome: GetOutcome,
    key: Key,
    target: &[u8],
    generations: &RangeInclusive<u64>,
    comparison: &mut Comparison,
) -> Found {
    let (block, guard) = target.split_at(key.length());
    let all = |bytes: &[u8], value: u8| bytes.iter().all(|byte| *byte == value);
    let untouched = all(block, PATTERN) || all(block, 0);
    let (found, mixed) = match outcome {
        GetOutcome::Hit { length, .. } if length as usize == key.length() => (Found::Hit, false),
        // A block of another length is another block, and none of its bytes are right.
        GetOutcome::Hit { .. } | GetOutcome::TooSmall { .. } => (Found::Hit, true),
        GetOutcome::Miss => (Found::Miss, !untouched),
        GetOutcome::Busy => (Found::Busy, !untouched),
    };
    if mixed || !all(guard, PATTERN) {
        comparison.mixed_targets += 1;
        comparison.wrong_bytes += block.len() as u64;
        let words = || {
            format!(
                "{} was answered with {outcome:?}, and its target is a mixture",
                key::describe(key.id(0))
            )
        };
        comparison.first_wrong.get_or_insert_with(words);
    } else if found == Found::Hit {
        let wrong = wrong_bytes(content, key, block, generations);
        comparison.hits += 1;
        comparison.wrong_bytes += wrong;
        comparison.verified_bytes += block.len() as u64 - wrong;
        if wrong > 0 {
            let words = || {
                let (wanted, claimed) = (key::describe(key.id(0)), Content::claimed_id(block).unwrap_or_default());
                let claimed = key::describe(claimed);
                format!("{wrong} bytes of {wanted}, at generations {generations:?}; its head says {claimed}")
            };
            comparison.first_wrong.get_or_insert_with(words);
        }
    }
    found
}

/// Bytes that are not what the key's block holds under one of these generations.
fn wrong_bytes(content: &Content, key: Key, block: &[u8], generations: &RangeInclusive<u64>) -> u64 {
    let claimed = Content::claimed_id(block).and_then(|id| key.generation_in(id));
    let generation = claimed.filter(|generation| generations.contains(generation));
    content.wrong_bytes(key.id(generation.unwrap_or(*generations.start())), block)
}

#[cfg(test)]
mod tests {
    use super::*;

    const KEY: Key = Key {
        namespace: 0,
        worker: 1,
        number: 5,
    };

    fn read(outcome: GetOutcome, change: impl FnOnce(&mut [u8])) -> Comparison {
        let content = Content::default();
        let mut target = vec![PATTERN; KEY.length() + GUARD_BYTES];
        if outcome.is_hit() {
            content.fill(KEY.id(4), &mut target[..KEY.length()]);
        }
        change(&mut target);
        let mut comparison = Comparison::default();
        compare(&content, outcome, KEY, &target, &(4..=5), &mut comparison);
        comparison
    }

    fn hit() -> GetOutcome {
        let length = u32::try_from(KEY.length()).expect("a short block");
        let tier = kvtier::Tier::Nvme;
        GetOutcome::Hit { length, tier }
    }

    #[test]
    fn a_right_block_an_untouched_miss_and_a_zeroed_miss_are_good() {
        assert_eq!(read(hit(), |_| ()).verified_bytes, KEY.length() as u64);
        for outcome in [read(hit(), |_| ()), read(GetOutcome::Miss, |_| ())] {
            assert_eq!((outcome.wrong_bytes, outcome.mixed_targets), (0, 0));
        }
        let zeroed = read(GetOutcome::Miss, |target| target[..KEY.length()].fill(0));
        assert_eq!((zeroed.wrong_bytes, zeroed.hits), (0, 0));
    }

    #[test]
    fn one_wrong_bit_an_older_generation_and_another_namespace_are_found() {
        let content = Content::default();
        assert_eq!(read(hit(), |target| target[100] ^= 1).wrong_bytes, 1);
        let old = read(hit(), |target| content.fill(KEY.id(3), &mut target[..KEY.length()]));
        assert!(old.wrong_bytes > 0 && old.first_wrong.is_some_and(|words| words.contains("generation 3")));
        let other = Key { namespace: 1, ..KEY };
        let foreign = read(hit(), |target| content.fill(other.id(4), &mut target[..KEY.length()]));
        assert!(foreign.wrong_bytes > KEY.length() as u64 / 2);
    }

    #[test]
    fn a_target_that_a_miss_left_half_written_and_a_guard_that_was_touched_are_found() {
        let half = read(GetOutcome::Miss, |target| target[..100].fill(0));
        assert_eq!((half.mixed_targets, half.wrong_bytes), (1, KEY.length() as u64));
        let beyond = read(hit(), |target| target[KEY.length()] = 0);
        assert_eq!(beyond.mixed_targets, 1);
        assert_eq!(read(GetOutcome::TooSmall { length: 9 }, |_| ()).mixed_targets, 1);
    }
}
