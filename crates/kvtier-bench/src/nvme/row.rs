use serde::Serialize;

use crate::Bar;

/// One line of the answer.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(untagged)]
pub enum Row {
    /// Bytes that moved.
    Transfer(Transfer),
    /// A tier that was opened again.
    Reopen(Reopen),
}

/// Reads or writes of one shape.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Transfer {
    /// `read` or `write`.
    pub case: &'static str,
    /// Bytes of one record.
    pub bytes: u64,
    /// Records asked for at a time.
    pub depth: u32,
    /// `none` or `aes-256-gcm`.
    pub encryption: &'static str,
    /// Rate of the tier in 10^9 bytes a second: median over rounds.
    pub gbps: f64,
    /// Rate of the raw ring: median over rounds.
    pub raw_gbps: f64,
    /// Rate of the tier by the rate of the raw ring in the same round: median over rounds.
    pub ratio_to_raw: f64,
    /// Time of one record, microseconds: median over rounds of the rounds' medians.
    pub p50_us: f64,
    /// The same of the raw ring.
    pub raw_p50_us: f64,
    /// Time of one record, microseconds: 99th percentile over all rounds.
    pub p99_us: f64,
    /// CPU seconds of this process, all its threads, user and system, for 10^9 bytes: median over rounds.
    pub cpu_s_per_gb: f64,
    /// The same of the raw ring.
    pub raw_cpu_s_per_gb: f64,
    /// One pass of the tier's check over memory that the disk just filled: CPU seconds for 10^9 bytes, median over rounds.
    pub check_cpu_s_per_gb: f64,
    /// Size of the pages that the device reads or writes.
    pub page_kib: u32,
    /// Rounds behind the medians.
    pub rounds: u32,
}

/// A tier that was opened on the segments of an earlier run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Reopen {
    /// `reopen`.
    pub case: &'static str,
    /// From the call that opens the tier to a tier manager that knows every block.
    pub seconds: f64,
    /// Blocks that it knows.
    pub blocks: u64,
    /// Bytes read from files for each.
    pub bytes_per_block: f64,
}

/// Compares rows with the promised figures. For people, never for a test: whether a time is met depends on the machine's
/// other load.
#[must_use]
pub fn meets(rows: &[Row]) -> Vec<Bar> {
    rows.iter()
        .flat_map(|row| match row {
            Row::Transfer(row) if row.depth == 1 => vec![latency_bar(row)],
            Row::Transfer(row) => vec![rate_bar(row), cpu_bar(row)],
            Row::Reopen(row) => reopen_bars(row),
        })
        .collect()
}

const SMALL_BYTES: u64 = 128 << 10;

fn rate_bar(row: &Transfer) -> Bar {
    let limit = match (row.encryption, row.bytes) {
        ("none", ..=SMALL_BYTES) => 0.90,
        ("none", _) => 0.92,
        _ => 0.88,
    };
    at_least(
        shape(row),
        row.ratio_to_raw,
        limit,
        format!("at least {limit:.2} of the raw ring"),
    )
}

fn cpu_bar(row: &Transfer) -> Bar {
    let passes = if row.bytes <= SMALL_BYTES { 1.5 } else { 1.15 };
    at_most(
        format!("{}, CPU s/GB", shape(row)),
        row.cpu_s_per_gb,
        row.raw_cpu_s_per_gb + 0.02 + passes * row.check_cpu_s_per_gb,
        format!("at most the raw ring's + 0.02 + {passes} checks"),
    )
}

fn latency_bar(row: &Transfer) -> Bar {
    let factor = if row.encryption == "none" { 1.15 } else { 1.35 };
    at_most(
        format!("{}, p50 µs", shape(row)),
        row.p50_us,
        factor * row.raw_p50_us,
        format!("at most {factor} of the raw ring's"),
    )
}

fn reopen_bars(row: &Reopen) -> Vec<Bar> {
    let name = format!("reopen of {} blocks", row.blocks);
    vec![
        at_most(format!("{name}, seconds"), row.seconds, 2.0, "under 2 s".to_owned()),
        at_most(
            format!("{name}, bytes a block"),
            row.bytes_per_block,
            160.0,
            "under 160 bytes read a block".to_owned(),
        ),
    ]
}

fn shape(row: &Transfer) -> String {
    let bytes = match row.bytes {
        0..0x10_0000 => format!("{} KiB", row.bytes >> 10),
        _ => format!("{} MiB", row.bytes >> 20),
    };
    format!("{} {bytes} at depth {}, {}", row.case, row.depth, row.encryption)
}

fn at_least(name: String, measured: f64, limit: f64, words: String) -> Bar {
    Bar {
        name,
        measured,
        limit,
        met: measured >= limit,
        words,
    }
}

fn at_most(name: String, measured: f64, limit: f64, words: String) -> Bar {
    Bar {
        name,
        measured,
        limit,
        met: measured <= limit,
        words,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(bytes: u64, depth: u32, encryption: &'static str) -> Transfer {
        Transfer {
            case: "read",
            bytes,
            depth,
            encryption,
            ratio_to_raw: 0.91,
            p50_us: 120.0,
            raw_p50_us: 100.0,
            cpu_s_per_gb: 0.1,
            raw_cpu_s_per_gb: 0.05,
            check_cpu_s_per_gb: 0.025,
            ..Transfer::default()
        }
    }

    fn met(row: Row) -> Vec<bool> {
        meets(&[row]).iter().map(|bar| bar.met).collect()
    }

    #[test]
    fn a_rate_is_judged_by_size_and_encryption_and_its_cpu_by_the_raw_ring_and_the_check() {
        // 0.05 + 0.02 + 1.5 * 0.025 = 0.1075 and 0.05 + 0.02 + 1.15 * 0.025 = 0.09875.
        assert_eq!(met(Row::Transfer(row(128 << 10, 32, "none"))), [true, true]);
        assert_eq!(met(Row::Transfer(row(1 << 20, 8, "none"))), [false, false]);
        assert_eq!(met(Row::Transfer(row(4 << 20, 8, "aes-256-gcm"))), [true, false]);
    }

    #[test]
    fn at_a_depth_of_one_the_time_is_judged() {
        assert_eq!(met(Row::Transfer(row(1 << 20, 1, "none"))), [false]);
        assert_eq!(met(Row::Transfer(row(1 << 20, 1, "aes-256-gcm"))), [true]);
    }

    #[test]
    fn a_reopening_is_judged_by_time_and_by_bytes() {
        let reopen = Reopen {
            case: "reopen",
            seconds: 1.5,
            blocks: 1 << 20,
            bytes_per_block: 170.0,
        };
        assert_eq!(met(Row::Reopen(reopen)), [true, false]);
    }

    #[test]
    fn a_row_has_the_promised_keys_and_no_other_level() {
        let json = serde_json::to_value(Row::Transfer(row(1 << 20, 8, "none"))).expect("plain data");
        for key in [
            "case",
            "bytes",
            "depth",
            "encryption",
            "gbps",
            "raw_gbps",
            "ratio_to_raw",
            "p50_us",
            "raw_p50_us",
            "p99_us",
            "cpu_s_per_gb",
            "raw_cpu_s_per_gb",
            "check_cpu_s_per_gb",
            "page_kib",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
    }
}
