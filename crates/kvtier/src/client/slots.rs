use std::collections::HashMap;
use std::time::{Duration, Instant};

use kvtier_core::ReservationId;

use crate::wire::{Ahead, Slot};

/// Blocks up to this length may be written ahead of a reserve's answer.
const AHEAD_BLOCK_BYTES_MAX: u32 = 4 << 20;

/// Longest that a slot is held for a put that may not come. Who purges memory waits for whoever holds some: this is well
/// below the node's `purge_lease_grace_ms`.
const LIFE_MAX: Duration = Duration::from_secs(2);

/// Slots granted ahead, by length class, and their ages.
///
/// A slot is used only in the first half of its life, and for at most [`LIFE_MAX`]: one that expires under its writer costs
/// the put a second trip.
#[derive(Debug)]
pub(super) struct Slots {
    classes: HashMap<u32, Vec<(Slot, Instant)>>,
    bytes_max: u32,
    life: Duration,
}

impl Slots {
    pub(super) fn new(bytes_max: u32, ttl_ms: u64) -> Slots {
        Slots {
            classes: HashMap::new(),
            bytes_max,
            life: Duration::from_millis(ttl_ms / 2).min(LIFE_MAX),
        }
    }

    /// The length that slots for `length` bytes are granted with: what the node rounds to anyway.
    pub(super) fn class_of(length: u32) -> u32 {
        length.checked_next_multiple_of(4096).unwrap_or(length)
    }

    pub(super) fn take(&mut self, length: u32, now: Instant) -> Option<Slot> {
        let class = self.classes.get_mut(&Slots::class_of(length))?;
        let (slot, granted) = class.pop()?;
        if now.duration_since(granted) < self.life {
            return Some(slot);
        }
        // The youngest is at the end: all others are old too. Leave them to `expire`.
        class.push((slot, granted));
        None
    }

    pub(super) fn put(&mut self, slots: impl Iterator<Item = Slot>, now: Instant) {
        for slot in slots {
            self.classes
                .entry(Slots::class_of(slot.extent.length))
                .or_default()
                .push((slot, now));
        }
    }

    /// What to ask for so that the next put of `count` blocks of `length` takes one trip.
    pub(super) fn wanted(&self, length: u32, count: usize) -> Ahead {
        if length == 0 || length > AHEAD_BLOCK_BYTES_MAX || self.bytes_max == 0 {
            return Ahead::default();
        }
        let length = Slots::class_of(length);
        let most = (self.bytes_max / length).max(1);
        let target = u32::try_from(count).unwrap_or(u32::MAX).min(most).min(1024);
        let held = self
            .classes
            .get(&length)
            .map_or(0, |class| u32::try_from(class.len()).unwrap_or(u32::MAX));
        match target.saturating_sub(held) {
            0 => Ahead::default(),
            count => Ahead { length, count },
        }
    }

    /// Most bytes to write ahead of an answer; one block may be longer.
    pub(super) fn bytes_max(&self) -> usize {
        usize::try_from(self.bytes_max).unwrap_or(usize::MAX)
    }

    /// Takes out what is past the first half of its life, to abandon it.
    pub(super) fn expire(&mut self, now: Instant, expired: &mut Vec<ReservationId>) {
        let life = self.life;
        for class in self.classes.values_mut() {
            class.retain(|(slot, granted)| {
                let young = now.duration_since(*granted) < life;
                if !young {
                    expired.push(slot.reservation);
                }
                young
            });
        }
        self.classes.retain(|_, class| !class.is_empty());
    }

    /// Takes everything out, to abandon it.
    pub(super) fn give_back(&mut self, slots: &mut Vec<ReservationId>) {
        slots.extend(
            self.classes
                .drain()
                .flat_map(|(_, class)| class)
                .map(|(slot, _)| slot.reservation),
        );
    }

    /// How long until [`Slots::expire`] has something to do; `None` while nothing is held.
    pub(super) fn expires_in(&self, now: Instant) -> Option<Duration> {
        let oldest = self.classes.values().flatten().map(|(_, granted)| *granted).min()?;
        Some(self.life.saturating_sub(now.duration_since(oldest)))
    }
}
