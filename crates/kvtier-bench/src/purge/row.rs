use serde::Serialize;

use crate::Bar;

/// One size. Times are wall-clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// Blocks of 4 KiB in the index, and in the namespace that is purged physically.
    pub blocks: u64,
    /// From the call to the acknowledgement of an invalidating purge of a namespace of few blocks: median.
    pub ack_p50_ms: f64,
    /// The same: 99th percentile.
    pub ack_p99_ms: f64,
    /// A 4 KiB overwrite and fdatasync on the same file system, alternated with the acknowledgements: 99th percentile.
    pub fdatasync_p99_ms: f64,
    /// From the request for a physical purge to the older wrapped key overwritten and synced: median over rounds.
    pub key_destroyed_ms: f64,
    /// From the request for a physical purge to its receipt: median over rounds.
    pub physical_seconds: f64,
    /// 99th percentile of another tenant's gets during the physical purge by that right before and after: median over rounds.
    pub foreground_p99_ratio: f64,
    /// The overwrite and fdatasync: median.
    pub fdatasync_p50_ms: f64,
    /// Acknowledgement of the purge of the full namespace: median over rounds.
    pub first_ack_ms: f64,
    /// The same: the fastest.
    pub first_ack_min_ms: f64,
    /// Acknowledgement of `Node::invalidate`, which no journal precedes: median.
    pub invalidate_p50_ms: f64,
    /// The same: 99th percentile.
    pub invalidate_p99_ms: f64,
    /// Behind each of the percentiles above.
    pub acknowledgements: u32,
    /// Longest [`Row::key_destroyed_ms`] of a round.
    pub key_destroyed_max_ms: f64,
    /// Longest [`Row::physical_seconds`] of a round.
    pub physical_max_seconds: f64,
    /// Each round's ratio.
    pub foreground_p99_ratios: Vec<f64>,
    /// Gets of the other tenant right before and after: median over rounds of medians.
    pub undisturbed_p50_us: f64,
    /// The same of 99th percentiles.
    pub undisturbed_p99_us: f64,
    /// Gets during the purge: median over rounds of medians.
    pub foreground_p50_us: f64,
    /// The same of 99th percentiles.
    pub foreground_p99_us: f64,
    /// The same of those that host memory served.
    pub foreground_host_p99_us: f64,
    /// Host memory alone, right before and after.
    pub undisturbed_host_p99_us: f64,
    /// Gets during the purges, all rounds.
    pub foreground_gets: u64,
    /// What of them NVMe served.
    pub foreground_nvme_share: f64,
    /// Physical purges behind the medians.
    pub rounds: u32,
    /// Every receipt said `verified_physical_purge`.
    pub verified: bool,
    /// Load average over a minute, before each round.
    pub load: Vec<String>,
}

/// Compares rows with the promised figures. For people, never for a test: whether a time is met depends on the machine's
/// other load.
#[must_use]
pub fn meets(rows: &[Row]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let mut at_most = |name: String, measured: f64, limit: f64, words: &str| {
        bars.push(Bar {
            name,
            measured,
            limit,
            met: measured <= limit,
            words: words.to_owned(),
        });
    };
    for row in rows {
        let named = |what: &str| format!("{what} at {} blocks", row.blocks);
        at_most(
            named("acknowledgement, ms"),
            row.ack_p99_ms,
            3.0 * row.fdatasync_p99_ms,
            "p99 at most 3 of fdatasync's p99",
        );
        at_most(
            named("key destroyed, ms"),
            row.key_destroyed_ms,
            5.0 * row.fdatasync_p99_ms,
            "within 5 of fdatasync's p99",
        );
        at_most(
            named("foreground gets"),
            row.foreground_p99_ratio,
            1.5,
            "p99 during a physical purge by p99 before and after",
        );
        at_most(
            named("physical purge, s"),
            row.physical_seconds,
            60.0,
            "verified in under a minute",
        );
    }
    if let [small, .., large] = rows {
        for (name, of, promise) in [
            (
                "acknowledgement",
                (small.ack_p50_ms, large.ack_p50_ms),
                "p50 independent of size",
            ),
            (
                "first acknowledgement",
                (small.first_ack_min_ms, large.first_ack_min_ms),
                "fastest independent of size",
            ),
        ] {
            at_most(
                format!("{name}, {} by {} blocks", large.blocks, small.blocks),
                of.1 / of.0,
                1.5,
                promise,
            );
        }
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_promise_is_judged_by_what_was_measured_beside_it() {
        let small = Row {
            blocks: 10,
            ack_p50_ms: 1.0,
            ack_p99_ms: 2.9,
            fdatasync_p99_ms: 1.0,
            key_destroyed_ms: 5.1,
            first_ack_min_ms: 1.0,
            foreground_p99_ratio: 1.4,
            physical_seconds: 1.0,
            ..Row::default()
        };
        let large = Row {
            ack_p50_ms: 1.4,
            first_ack_min_ms: 1.6,
            foreground_p99_ratio: 1.6,
            physical_seconds: 61.0,
            ..small.clone()
        };
        let met: Vec<bool> = meets(&[small, large]).iter().map(|bar| bar.met).collect();
        let small_and_large = [true, false, true, true, true, false, false, false];
        assert_eq!(met, [small_and_large.as_slice(), &[true, false]].concat());
    }

    #[test]
    fn a_row_has_the_promised_keys() {
        let json = serde_json::to_value(Row::default()).expect("plain data");
        for key in [
            "blocks",
            "ack_p50_ms",
            "ack_p99_ms",
            "fdatasync_p99_ms",
            "key_destroyed_ms",
            "physical_seconds",
            "foreground_p99_ratio",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
    }
}
