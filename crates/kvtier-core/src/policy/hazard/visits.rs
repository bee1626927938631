//! Visits: each use of a prefix, with the blocks that were used last in it.

use super::ages::{BINS, EDGES};
use super::class::{Class, Conversation};

pub(super) const NONE: u32 = u32::MAX;

/// Set on a visit.
pub(super) mod mark {
    /// A cache of this size that keeps what was used last would hold its blocks.
    pub(crate) const RECENT: u8 = 1;
    /// The session is over: its blocks go first.
    pub(crate) const CLOSED: u8 = 2;
    /// Its blocks stay until the pin's deadline, as far as that is possible.
    pub(crate) const PINNED: u8 = 4;
    /// It is to be used again before a deadline.
    pub(crate) const EXPECTED: u8 = 8;
    /// The next visit used some of its blocks.
    pub(crate) const PARTED: u8 = 16;
}

/// One use of a prefix: the blocks for which it was the last use.
#[derive(Clone, Debug)]
pub(super) struct Visit {
    /// When, in ticks. Ages are below 2^32 ticks, fifty days.
    pub(super) time: u32,
    /// Tokens of the prompt up to the deepest block.
    pub(super) tokens: u32,
    /// Those that were not known before.
    pub(super) fresh_tokens: u32,
    /// Ticks since the visit before; [`NONE`] where there was none.
    pub(super) pause: u32,
    /// The block that joined last. On a free place the next free one.
    pub(super) newest_block: u32,
    /// Blocks in it, at the beginning.
    pub(super) size: u32,
    /// Blocks that were not used again, cached or remembered.
    pub(super) left: u32,
    newer: u32,
    older: u32,
    /// Tells apart visits that had the same place.
    pub(super) tag: u16,
    pub(super) class: Class,
    pub(super) bin: u8,
    pub(super) turn: u8,
    pub(super) marks: u8,
    pub(super) level: u8,
    /// Whose it is: the place of its namespace among [`super::tenants::Tenants`].
    pub(super) tenant: u8,
    /// How much more a byte of its blocks spares than one of blocks of late, in levels.
    pub(super) density: i8,
    /// How long its answer is, as [`super::class::answer`] has it; 0 as long as that is not known.
    pub(super) answer: u8,
}

impl Visit {
    /// The share that was not used again.
    pub(super) fn share(&self) -> f32 {
        self.left as f32 / self.size as f32
    }

    /// The class that it has as one to a conversation.
    pub(super) fn conversation(&self) -> Class {
        Class::conversation(Conversation {
            turn: self.turn,
            pause: Some(self.pause).filter(|pause| *pause != NONE),
            fresh_tokens: self.fresh_tokens,
            tokens: self.tokens,
            answer: self.answer,
        })
    }

    pub(super) fn is(&self, marks: u8) -> bool {
        self.marks & marks != 0
    }
}

/// All visits, in the order of their times.
#[derive(Debug)]
pub(super) struct Visits {
    visits: Vec<Visit>,
    free: u32,
    pub(super) live: usize,
    newest: u32,
    oldest: u32,
    /// The oldest of each bin of age.
    oldest_of: [u32; BINS],
    /// The oldest with [`mark::RECENT`].
    oldest_recent: u32,
    /// Blocks of visits with [`mark::RECENT`].
    recent_blocks: u64,
    next_tag: u16,
}

impl Visits {
    pub(super) fn new() -> Visits {
        Visits {
            visits: Vec::new(),
            free: NONE,
            live: 0,
            newest: NONE,
            oldest: NONE,
            oldest_of: [NONE; BINS],
            oldest_recent: NONE,
            recent_blocks: 0,
            next_tag: 0,
        }
    }

    pub(super) fn at(&self, visit: u32) -> &Visit {
        &self.visits[visit as usize]
    }

    pub(super) fn at_mut(&mut self, visit: u32) -> &mut Visit {
        &mut self.visits[visit as usize]
    }

    /// Whether there is still the visit that had this tag.
    pub(super) fn is_live(&self, visit: u32, tag: u16) -> bool {
        self.visits
            .get(visit as usize)
            .is_some_and(|entry| entry.tag == tag && entry.size > 0)
    }

    /// A visit without blocks, newer than all others.
    pub(super) fn open(&mut self, time: u32, class: Class) -> u32 {
        let place = match self.free {
            NONE => self.visits.len() as u32,
            place => place,
        };
        let visit = Visit {
            time,
            tokens: 0,
            fresh_tokens: 0,
            pause: NONE,
            newest_block: NONE,
            size: 0,
            left: 0,
            newer: NONE,
            older: self.newest,
            tag: self.next_tag,
            class,
            bin: 0,
            turn: 0,
            marks: mark::RECENT,
            level: 0,
            tenant: 0,
            density: 0,
            answer: 0,
        };
        self.next_tag = self.next_tag.wrapping_add(1);
        if self.free == NONE {
            self.visits.push(visit);
        } else {
            self.free = self.at(place).newest_block;
            *self.at_mut(place) = visit;
        }
        self.live += 1;
        match std::mem::replace(&mut self.newest, place) {
            NONE => self.oldest = place,
            older => self.at_mut(older).newer = place,
        }
        if self.oldest_of[0] == NONE {
            self.oldest_of[0] = place;
        }
        if self.oldest_recent == NONE {
            self.oldest_recent = place;
        }
        place
    }

    /// A block more, counted as one that was used last in this visit.
    pub(super) fn gain(&mut self, visit: u32) {
        let entry = self.at_mut(visit);
        entry.size += 1;
        entry.left += 1;
        if entry.is(mark::RECENT) {
            self.recent_blocks += 1;
        }
    }

    /// A block was used again or is remembered no more. Without any left, the visit is over: true.
    pub(super) fn lose(&mut self, visit: u32) -> bool {
        let entry = self.at_mut(visit);
        entry.left -= 1;
        let (over, recent) = (entry.left == 0, entry.is(mark::RECENT));
        if recent {
            self.recent_blocks -= 1;
        }
        if over {
            self.close(visit);
        }
        over
    }

    fn close(&mut self, visit: u32) {
        let Visit { newer, older, bin, .. } = *self.at(visit);
        if self.oldest_of[usize::from(bin)] == visit {
            self.oldest_of[usize::from(bin)] = if newer != NONE && self.at(newer).bin == bin {
                newer
            } else {
                NONE
            };
        }
        if self.oldest_recent == visit {
            self.oldest_recent = newer;
        }
        if newer == NONE {
            self.newest = older;
        } else {
            self.at_mut(newer).older = older;
        }
        if older == NONE {
            self.oldest = newer;
        } else {
            self.at_mut(older).newer = newer;
        }
        let free = std::mem::replace(&mut self.free, visit);
        let entry = self.at_mut(visit);
        entry.size = 0;
        entry.newest_block = free;
        self.live -= 1;
    }

    /// The oldest visit of a bin that has outgrown it.
    pub(super) fn outgrown(&self, bin: usize, now: u32) -> Option<u32> {
        let visit = self.oldest_of[bin];
        (visit != NONE && now.wrapping_sub(self.at(visit).time) >= EDGES[bin + 1]).then_some(visit)
    }

    /// When the oldest of any bin outgrows it, in ticks from `now`.
    pub(super) fn next_outgrown(&self, now: u32) -> u32 {
        let due = |bin: usize| {
            let visit = self.oldest_of[bin];
            (visit != NONE).then(|| EDGES[bin + 1].saturating_sub(now.wrapping_sub(self.at(visit).time)))
        };
        (0..BINS - 1).filter_map(due).min().unwrap_or(u32::MAX)
    }

    /// Moves the oldest of its bin to the next one.
    pub(super) fn grow_older(&mut self, visit: u32) {
        let Visit { newer, bin, .. } = *self.at(visit);
        let bin = usize::from(bin);
        self.oldest_of[bin] = if newer != NONE && usize::from(self.at(newer).bin) == bin {
            newer
        } else {
            NONE
        };
        self.at_mut(visit).bin += 1;
        if self.oldest_of[bin + 1] == NONE {
            self.oldest_of[bin + 1] = visit;
        }
    }

    /// Takes [`mark::RECENT`] from the oldest, as long as the others have this many blocks.
    pub(super) fn keep_recent(&mut self, blocks: u64) {
        while self.oldest_recent != NONE {
            let visit = self.oldest_recent;
            let entry = self.at_mut(visit);
            let (left, newer) = (u64::from(entry.left), entry.newer);
            if self.recent_blocks < blocks + left || newer == NONE {
                return;
            }
            self.at_mut(visit).marks &= !mark::RECENT;
            self.recent_blocks -= left;
            self.oldest_recent = newer;
        }
    }

    /// From the oldest to the newest.
    pub(super) fn iter(&self) -> impl Iterator<Item = u32> {
        std::iter::successors(Some(self.oldest).filter(|visit| *visit != NONE), |visit| {
            Some(self.at(*visit).newer).filter(|newer| *newer != NONE)
        })
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        (self.visits.capacity() * size_of::<Visit>()) as u64
    }

    pub(super) fn check_invariants(&self) {
        let (mut live, mut recent, mut older, mut bin, mut marked) = (0, 0, NONE, u8::MAX, false);
        for visit in self.iter() {
            let entry = self.at(visit);
            assert!(
                entry.left > 0 && entry.left <= entry.size,
                "a live visit has blocks left"
            );
            assert_eq!(entry.older, older, "visit {visit} knows the one before");
            assert!(entry.bin <= bin, "who is newer is in no later bin");
            if entry.bin != bin {
                assert_eq!(
                    self.oldest_of[usize::from(entry.bin)],
                    visit,
                    "the oldest of bin {}",
                    entry.bin
                );
            }
            assert!(!marked || entry.is(mark::RECENT), "all that is newer is recent too");
            if entry.is(mark::RECENT) && !marked {
                marked = true;
                assert_eq!(self.oldest_recent, visit, "the oldest recent one");
            }
            recent += if entry.is(mark::RECENT) {
                u64::from(entry.left)
            } else {
                0
            };
            live += 1;
            older = visit;
            bin = entry.bin;
        }
        assert_eq!(
            (self.newest, self.live, self.recent_blocks),
            (older, live, recent),
            "sums over visits"
        );
        assert_eq!(size_of::<Visit>(), 48, "memory of a visit");
    }
}
