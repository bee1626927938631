use crate::Labels;
use crate::key_map::{KeyMap, fold, mix_number};

/// Place of [`Labels::Any`] in a table.
const ANY: u16 = u16::MAX;

/// The sets of labels that blocks of one namespace carry, interned: 16 bits in the index for each block.
#[derive(Debug, Default)]
pub(crate) struct LabelTable {
    sets: Vec<(Labels, u64)>,
    free: Vec<u16>,
    by_set: KeyMap<u16>,
    seed: u64,
}

impl LabelTable {
    pub(crate) fn new(seed: u64) -> LabelTable {
        LabelTable {
            seed,
            ..LabelTable::default()
        }
    }

    pub(crate) fn at(&self, place: u16) -> Labels {
        match place {
            0 => Labels::None,
            ANY => Labels::Any,
            place => self.sets[usize::from(place) - 1].0,
        }
    }

    /// The place of a set, for one block more. Where `sets_max` are in use, a new one is taken for [`Labels::Any`].
    pub(crate) fn take(&mut self, labels: Labels, sets_max: usize) -> u16 {
        match labels {
            Labels::None => return 0,
            Labels::Any => return ANY,
            Labels::One(_) | Labels::Two(..) => {}
        }
        let found = self
            .by_set
            .find(mix(self.seed, labels), |&place| self.at(place) == labels)
            .copied();
        if let Some(place) = found {
            self.sets[usize::from(place) - 1].1 += 1;
            return place;
        }
        let place = match self.free.pop() {
            Some(place) => {
                self.sets[usize::from(place) - 1] = (labels, 1);
                place
            }
            None if self.sets.len() >= sets_max.min(usize::from(ANY) - 1) => return ANY,
            None => {
                self.sets.push((labels, 1));
                u16::try_from(self.sets.len()).expect("below ANY")
            }
        };
        let LabelTable { seed, sets, by_set, .. } = self;
        by_set.insert(mix(*seed, labels), place, |&other| {
            mix(*seed, sets[usize::from(other) - 1].0)
        });
        place
    }

    /// A block that took it is gone.
    pub(crate) fn give_back(&mut self, place: u16) {
        if place == 0 || place == ANY {
            return;
        }
        let (labels, blocks) = &mut self.sets[usize::from(place) - 1];
        *blocks -= 1;
        if *blocks == 0 {
            let hash = mix(self.seed, *labels);
            let removed = self.by_set.remove(hash, |&other| other == place);
            assert!(removed.is_some(), "a set in use is in the lookup table");
            self.free.push(place);
        }
    }

    /// How many blocks carry sets of this table, [`Labels::Any`] not counted.
    pub(crate) fn blocks(&self) -> u64 {
        self.sets.iter().map(|(_, blocks)| blocks).sum()
    }

    pub(crate) fn is_any(place: u16) -> bool {
        place == ANY
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let sets = self.sets.capacity() * size_of::<(Labels, u64)>() + self.free.capacity() * size_of::<u16>();
        sets as u64 + self.by_set.memory_bytes()
    }
}

/// Labels come from clients: the seed keeps them from aiming for a bucket.
fn mix(seed: u64, labels: Labels) -> u64 {
    let (one, other) = match labels {
        Labels::None | Labels::Any => (0, 0),
        Labels::One(one) => (one.0, 0),
        Labels::Two(one, other) => (one.0, other.0),
    };
    fold(
        fold(one ^ seed, 0xa076_1d64_78bd_642f) ^ mix_number(other),
        seed.rotate_left(32) | 1,
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Label;

    fn one(number: u64) -> Labels {
        Labels::One(Label(number))
    }

    #[test]
    fn a_set_has_one_place_for_as_long_as_a_block_carries_it() {
        let mut table = LabelTable::new(7);
        let both = Labels::Two(Label(1), Label(2));
        let places = [one(1), both, one(1)].map(|labels| table.take(labels, 10));
        assert_eq!(places[0], places[2]);
        assert_eq!(places.map(|place| table.at(place)), [one(1), both, one(1)]);
        table.give_back(places[0]);
        assert_eq!(table.at(places[2]), one(1));
        table.give_back(places[2]);
        assert_eq!(table.take(one(3), 10), places[0], "its place is used anew");
        assert_eq!(table.blocks(), 2);
    }

    #[test]
    fn a_full_table_takes_new_sets_for_any() {
        let mut table = LabelTable::new(7);
        let first = table.take(one(1), 2);
        table.take(one(2), 2);
        assert_eq!(table.at(2), one(2));
        let third = table.take(one(3), 2);
        assert_eq!(table.at(third), Labels::Any);
        assert_eq!(table.take(one(1), 2), first, "a known one is still known");
        table.give_back(third);
        assert_eq!(table.take(Labels::None, 2), 0);
        assert_eq!(table.at(0), Labels::None);
    }
}
