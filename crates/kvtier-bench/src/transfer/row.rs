use serde::Serialize;

use crate::Bar;

/// One measured case beside the rawest way to do the same.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// `read`: of memory; `peer_get`: of blocks of another node, by a client.
    pub case: &'static str,
    /// `loopback`, `shm`, `tcp` or `verbs`.
    pub transport: &'static str,
    /// Bytes of one piece.
    pub bytes: u64,
    /// Pieces of one batch.
    pub batch: u64,
    /// Connections (`tcp`) or lanes (`verbs`) of both; 0 where there are none.
    pub connections: u64,
    /// Rate in 10^9 bytes a second: median over rounds.
    pub gbps: f64,
    /// The same of the raw way: memcpy, a socket, or a minimal loop of RDMA reads.
    pub raw_gbps: f64,
    /// Rate by raw rate of the same round: median over rounds.
    pub ratio_to_raw: f64,
    /// Time of one batch, microseconds: median over all rounds.
    pub p50_us: f64,
    /// The same of the raw way.
    pub raw_p50_us: f64,
    /// 99th percentile over all rounds.
    pub p99_us: f64,
    /// CPU seconds, both ends together, for 10^9 bytes: median over rounds.
    pub cpu_s_per_gb: f64,
    /// The same of the raw way.
    pub raw_cpu_s_per_gb: f64,
    /// Rounds behind the medians.
    pub rounds: u32,
    /// Load average over a minute, before the case.
    pub load: String,
}

/// Compares rows with the promised figures. For people, never for a test: whether a time is met depends on the machine's
/// other load.
#[must_use]
pub fn meets(rows: &[Row]) -> Vec<Bar> {
    let mut bars = Vec::new();
    for row in rows {
        let named = |what: &str| {
            format!(
                "{} {what}, {} bytes, batch {}, {} connections",
                row.transport, row.bytes, row.batch, row.connections
            )
        };
        let mut bar = |what: &str, measured: f64, limit: f64, at_least: bool| {
            let met = if at_least { measured >= limit } else { measured <= limit };
            let words = format!(
                "{} {limit} of the raw way",
                if at_least { "at least" } else { "at most" }
            );
            bars.push(Bar {
                name: named(what),
                measured,
                limit,
                met,
                words,
            });
        };
        match row.transport {
            _ if row.case != "read" => {}
            "tcp" if row.bytes >= 1 << 20 => {
                bar("rate", row.ratio_to_raw, 0.9, true);
                bar("CPU", row.cpu_s_per_gb / row.raw_cpu_s_per_gb, 1.25, false);
            }
            "tcp" if row.batch == 1 => bar("p50", row.p50_us / row.raw_p50_us, 1.5, false),
            "shm" => bar("rate", row.ratio_to_raw, 0.8, true),
            "verbs" => bar("rate", row.ratio_to_raw, 0.9, true),
            _ => {}
        }
    }
    bars
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_case_misses_its_bar_and_a_fast_one_meets_it() {
        let row = Row {
            case: "read",
            transport: "tcp",
            bytes: 1 << 20,
            batch: 1,
            ratio_to_raw: 0.91,
            cpu_s_per_gb: 0.6,
            raw_cpu_s_per_gb: 0.4,
            ..Row::default()
        };
        let met: Vec<bool> = meets(&[row]).iter().map(|bar| bar.met).collect();
        assert_eq!(met, [true, false]);
    }
}
