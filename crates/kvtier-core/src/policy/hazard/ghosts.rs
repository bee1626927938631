//! Ghosts: what is remembered of blocks that are not cached any more, sixteen bytes each.

/// A remembered block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Ghost {
    /// What tells blocks apart; two of the same would be taken for one.
    pub(super) fingerprint: u64,
    /// Place of its last visit.
    pub(super) visit: u32,
    /// The visit's tag.
    pub(super) tag: u16,
    /// Blocks known to follow it, saturating.
    pub(super) fan_out: u8,
    /// How often it was used, saturating. Never 0: that is an empty place.
    pub(super) uses: u8,
}

const EMPTY: Ghost = Ghost {
    fingerprint: 0,
    visit: 0,
    tag: 0,
    fan_out: 0,
    uses: 0,
};
/// Places that a fingerprint may lie in: one cache line and the next.
const WAYS: usize = 8;
const SETS_FIRST: usize = 64;

/// A table of at most so many ghosts; where a set is full, one that is of no use any more goes, or the oldest.
#[derive(Debug)]
pub(super) struct Ghosts {
    places: Vec<Ghost>,
    used: usize,
    ghosts_max: usize,
}

impl Ghosts {
    pub(super) fn new(ghosts_max: usize) -> Ghosts {
        Ghosts {
            places: Vec::new(),
            used: 0,
            ghosts_max,
        }
    }

    fn set(&self, fingerprint: u64) -> usize {
        let sets = self.places.len() / WAYS;
        // Clients choose what fingerprints are made of; the caller has mixed a secret in.
        (fingerprint as usize & (sets - 1)) * WAYS
    }

    /// Takes the ghost of a block out.
    pub(super) fn take(&mut self, fingerprint: u64) -> Option<Ghost> {
        if self.places.is_empty() {
            return None;
        }
        let set = self.set(fingerprint);
        let found = self.places[set..set + WAYS]
            .iter_mut()
            .find(|ghost| ghost.uses > 0 && ghost.fingerprint == fingerprint)?;
        self.used -= 1;
        Some(std::mem::replace(found, EMPTY))
    }

    /// Remembers a block. `age` says how old a ghost is, `None` where its visit is no more. Answers who had to go for it.
    pub(super) fn put(&mut self, ghost: Ghost, age: impl Fn(&Ghost) -> Option<u32>) -> Option<Ghost> {
        if self.ghosts_max < SETS_FIRST * WAYS {
            return Some(ghost);
        }
        if self.used * 4 >= self.places.len() * 3 && self.places.len() * 2 <= self.ghosts_max.max(SETS_FIRST * WAYS) {
            self.grow(&age);
        }
        let set = self.set(ghost.fingerprint);
        let places = &mut self.places[set..set + WAYS];
        let order = |ghost: &Ghost| match ghost.uses {
            0 => u64::MAX,
            _ => age(ghost).map_or(u64::MAX - 1, u64::from),
        };
        let place = places
            .iter_mut()
            .max_by_key(|ghost| order(ghost))
            .expect("a set has ways");
        let gone = std::mem::replace(place, ghost);
        if gone.uses == 0 {
            self.used += 1;
            return None;
        }
        Some(gone).filter(|gone| age(gone).is_some())
    }

    fn grow(&mut self, age: &impl Fn(&Ghost) -> Option<u32>) {
        let length = (self.places.len() * 2).max(SETS_FIRST * WAYS);
        let older = std::mem::replace(&mut self.places, vec![EMPTY; length]);
        self.used = 0;
        for ghost in older.into_iter().filter(|ghost| ghost.uses > 0 && age(ghost).is_some()) {
            // A set of the smaller table becomes two: there is room.
            let set = self.set(ghost.fingerprint);
            let mut places = self.places[set..set + WAYS].iter_mut();
            *places.find(|place| place.uses == 0).expect("half of a set") = ghost;
            self.used += 1;
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Ghost> {
        self.places.iter().filter(|ghost| ghost.uses > 0)
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.places.capacity() * size_of::<Ghost>()) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ghost(number: u64) -> Ghost {
        Ghost {
            fingerprint: number.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            visit: number as u32,
            tag: 0,
            fan_out: 1,
            uses: 1,
        }
    }

    #[test]
    fn a_ghost_costs_sixteen_bytes_and_is_taken_once() {
        assert_eq!(size_of::<Ghost>(), 16);
        let mut ghosts = Ghosts::new(1 << 16);
        for number in 0..10_000 {
            ghosts.put(ghost(number), |_| Some(0));
        }
        let found: Vec<bool> = (0..10_000)
            .map(|number| ghosts.take(ghost(number).fingerprint).is_some())
            .collect();
        assert!(found.iter().filter(|found| **found).count() > 9_900);
        assert_eq!(ghosts.take(ghost(1).fingerprint), None);
        assert_eq!(ghosts.iter().count(), 0);
    }

    #[test]
    fn a_full_table_lets_the_oldest_go_and_says_so() {
        let mut ghosts = Ghosts::new(512);
        let mut gone = Vec::new();
        for number in 0..5_000 {
            gone.extend(ghosts.put(ghost(number), |ghost| Some(5_000 - ghost.visit)));
        }
        assert_eq!(ghosts.memory_bytes(), 512 * 16);
        assert_eq!(gone.len() + ghosts.iter().count(), 5_000);
        assert!(ghosts.iter().all(|ghost| ghost.visit > 3_500));
    }

    #[test]
    fn a_ghost_whose_visit_is_no_more_goes_before_older_ones() {
        let mut ghosts = Ghosts::new(512);
        for number in 0..5_000 {
            let gone = ghosts.put(ghost(number), |ghost| (ghost.visit % 2 == 0).then_some(ghost.visit));
            assert!(gone.is_none_or(|gone| gone.visit % 2 == 0));
        }
    }

    #[test]
    fn without_room_for_ghosts_none_is_kept() {
        let mut ghosts = Ghosts::new(0);
        assert_eq!(ghosts.put(ghost(1), |_| Some(0)), Some(ghost(1)));
        assert_eq!(ghosts.take(ghost(1).fingerprint), None);
    }
}
