//! What a run found.

use std::time::Duration;

use serde_json::{Value, json};

use crate::reader::Comparison;
use crate::worker::Work;

/// Why a block that a flush covered may be missing.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Excuses {
    /// It was deleted or invalidated.
    pub(crate) taken_back: u64,
    /// As many were dropped from NVMe, to make room.
    pub(crate) evicted: u64,
    /// As many had no room when it was flushed, and were found in host memory.
    pub(crate) left_out: u64,
}

impl Excuses {
    pub(crate) fn total(&self) -> u64 {
        self.taken_back + self.evicted + self.left_out
    }
}

/// One round, or all of them.
#[derive(Clone, Debug, Default)]
pub(crate) struct Figures {
    pub(crate) rounds: u64,
    /// Blocks that a finished flush covered.
    pub(crate) flushed_blocks: u64,
    /// Blocks that were there after the restart, whatever they owe it to.
    pub(crate) came_back_blocks: u64,
    /// Covered blocks that were not, though nothing excuses it.
    pub(crate) lost_after_flush: u64,
    /// Blocks that an earlier restart had brought back and a later one, with no less room, did not.
    pub(crate) lost_again: u64,
    /// The first of what is lost or came back against a delete, in words.
    pub(crate) first_lost: Option<String>,
    /// Covered blocks that were not, with an excuse.
    pub(crate) excused: Excuses,
    /// Blocks that a smaller tier had no room for.
    pub(crate) shrunk_away: u64,
    /// Deleted blocks that were there after the restart, with the right bytes; no flush had made the delete durable.
    pub(crate) undeleted: u64,
    /// The same though one had.
    pub(crate) deletes_undone: u64,
    /// Namespaces whose generation fell below one that was acknowledged.
    pub(crate) generations_undone: u64,
    pub(crate) evictions: u64,
    pub(crate) relocations: u64,
    pub(crate) corrupt: u64,
    pub(crate) work: Work,
    /// What was read after restarts.
    pub(crate) check: Comparison,
    /// Of the slowest start.
    pub(crate) ready_after: Duration,
}

impl Figures {
    pub(crate) fn add(&mut self, other: Figures) {
        self.rounds += other.rounds;
        self.flushed_blocks += other.flushed_blocks;
        self.came_back_blocks += other.came_back_blocks;
        self.lost_after_flush += other.lost_after_flush;
        self.lost_again += other.lost_again;
        self.first_lost = self.first_lost.take().or(other.first_lost);
        self.excused.taken_back += other.excused.taken_back;
        self.excused.evicted += other.excused.evicted;
        self.excused.left_out += other.excused.left_out;
        self.shrunk_away += other.shrunk_away;
        self.undeleted += other.undeleted;
        self.deletes_undone += other.deletes_undone;
        self.generations_undone += other.generations_undone;
        self.evictions += other.evictions;
        self.relocations += other.relocations;
        self.corrupt += other.corrupt;
        self.work.add(other.work);
        self.check.add(other.check);
        self.ready_after = self.ready_after.max(other.ready_after);
    }

    pub(crate) fn verified_bytes(&self) -> u64 {
        self.work.comparison.verified_bytes + self.check.verified_bytes
    }

    pub(crate) fn wrong_bytes(&self) -> u64 {
        self.work.comparison.wrong_bytes + self.check.wrong_bytes
    }

    fn mixed_targets(&self) -> u64 {
        self.work.comparison.mixed_targets + self.check.mixed_targets
    }

    /// What is wrong, in words.
    pub(crate) fn complaint(&self) -> Option<String> {
        let mut complaints = Vec::new();
        let first = self
            .check
            .first_wrong
            .as_ref()
            .or(self.work.comparison.first_wrong.as_ref());
        for (count, what) in [
            (self.wrong_bytes(), "bytes were wrong"),
            (self.mixed_targets(), "targets were a mixture"),
            (self.lost_after_flush, "blocks that a flush covered are lost"),
            (
                self.lost_again,
                "blocks that were there after the restart before are lost",
            ),
            (self.generations_undone, "acknowledged invalidations were undone"),
            (self.deletes_undone, "deletes that a flush covered were undone"),
        ] {
            if count > 0 {
                complaints.push(format!("{count} {what}"));
            }
        }
        complaints.extend(first.cloned());
        complaints.extend(self.first_lost.clone());
        (!complaints.is_empty()).then(|| complaints.join("; "))
    }

    pub(crate) fn to_json(&self) -> Value {
        json!({
            "rounds": self.rounds,
            "flushed_blocks": self.flushed_blocks,
            "came_back_blocks": self.came_back_blocks,
            "verified_bytes": self.verified_bytes(),
            "wrong_bytes": self.wrong_bytes(),
            "lost_after_flush": self.lost_after_flush,
            "lost_again": self.lost_again,
            "excused": self.excused.total(),
            "excused_taken_back": self.excused.taken_back,
            "excused_evicted": self.excused.evicted,
            "excused_left_out": self.excused.left_out,
            "mixed_targets": self.mixed_targets(),
            "generations_undone": self.generations_undone,
            "deletes_undone": self.deletes_undone,
            "undeleted": self.undeleted,
            "shrunk_away": self.shrunk_away,
            "evictions": self.evictions,
            "relocations": self.relocations,
            "corrupt": self.corrupt,
            "puts": self.work.puts,
            "put_bytes": self.work.put_bytes,
            "deletes": self.work.deletes,
            "busy": self.work.busy,
            "ready_after_ms_max": u64::try_from(self.ready_after.as_millis()).unwrap_or(u64::MAX),
        })
    }
}

/// Prints figures, one a line, or as JSON.
pub(crate) fn print(figures: &Value, json: bool) {
    if json {
        println!("{figures}");
        return;
    }
    for (name, value) in figures.as_object().into_iter().flatten() {
        println!("{name:<22}{value:>16}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_of_what_must_not_be_is_a_complaint() {
        let good = Figures {
            flushed_blocks: 1,
            excused: Excuses {
                evicted: 9,
                ..Excuses::default()
            },
            ..Figures::default()
        };
        assert_eq!(good.complaint(), None);
        let wrong = Comparison {
            wrong_bytes: 1,
            ..Comparison::default()
        };
        let bad = [
            Figures {
                deletes_undone: 1,
                ..good.clone()
            },
            Figures {
                lost_after_flush: 1,
                ..good.clone()
            },
            Figures {
                generations_undone: 1,
                ..good.clone()
            },
            Figures {
                check: wrong.clone(),
                ..good.clone()
            },
            Figures {
                work: Work {
                    comparison: wrong,
                    ..Work::default()
                },
                ..good
            },
        ];
        assert!(bad.iter().all(|figures| figures.complaint().is_some()));
    }
}
