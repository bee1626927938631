use std::fmt;

use serde::Serialize;

/// One measured case. Fields that mean nothing for a case are null.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Row {
    /// `memcpy`, `echo`, `get_into`, `put_from`, `get_in_place`, `lookup` or `index`.
    pub case: &'static str,
    /// Bytes of one block; of one message for `echo`; of index memory a block, by /proc, for `index`.
    pub bytes: u64,
    /// Blocks or keys in one call; resident blocks for `index`.
    pub batch: u64,
    /// Rate in 10^9 bytes a second: median over rounds of bytes by time spent in calls.
    pub gbps: Option<f64>,
    /// Median time of the memcpy of the same shape and direction by the median time of a call, in the same round: median
    /// over rounds.
    pub ratio_to_memcpy: Option<f64>,
    /// Time of one call, microseconds: median over rounds of the rounds' medians.
    pub p50_us: Option<f64>,
    /// Time of one call, microseconds: 99th percentile over all rounds.
    pub p99_us: Option<f64>,
    /// CPU seconds, client and daemon together, for 10^9 bytes: median over rounds.
    pub cpu_s_per_gb: Option<f64>,
    /// Median of the echoes measured right before this case: median over rounds.
    pub echo_p50_us: Option<f64>,
    /// Size of the pages behind host memory.
    pub page_kib: Option<u32>,
    /// CPU time, both processes together, of one call: median over rounds. Shows that nobody polls.
    pub cpu_us: Option<f64>,
    /// Which way a `memcpy` went: `get` (shared to private memory) or `put`.
    pub direction: Option<&'static str>,
    /// What the daemon itself reports, for `index`.
    pub status_bytes_per_block: Option<f64>,
    /// Rounds behind the medians.
    pub rounds: u32,
    /// Bytes that are cycled through.
    pub working_set_bytes: u64,
    /// Who ran on which core.
    pub placement: String,
}

/// A figure that the design promises, beside what was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Bar {
    /// Which case, and of which shape.
    pub name: String,
    /// The measured value.
    pub measured: f64,
    /// The value to reach.
    pub limit: f64,
    /// Whether it is reached.
    pub met: bool,
    /// For people: the promise in words.
    pub words: String,
}

impl fmt::Display for Bar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Bar {
            name,
            measured,
            limit,
            met,
            words,
        } = self;
        let verdict = if *met { "meets" } else { "MISSES" };
        // Small figures are CPU seconds and shares: two decimals would hide which side of the limit they are on.
        let digits = if *limit < 2.0 { 3 } else { 2 };
        write!(
            f,
            "{verdict}: {name}: {measured:.digits$} ({words}; limit {limit:.digits$})"
        )
    }
}

const MIB: u64 = 1 << 20;

/// Compares rows with the promised figures. Rows that are missing are passed over. For people, never for a test: whether
/// a time is met depends on the machine's other load.
#[must_use]
pub fn meets(rows: &[Row]) -> Vec<Bar> {
    let mut bars = Vec::new();
    for row in rows {
        match row.case {
            "get_into" | "put_from" if row.batch > 1 => bars.extend(rate_bar(row, 0.90)),
            "get_into" | "put_from" => bars.extend(single_bar(row, rows)),
            "get_in_place" if row.batch > 1 => bars.extend(rate_bar(row, 5.0)),
            "lookup" => bars.extend(lookup_bar(row)),
            "index" => {
                let sources = [
                    ("by /proc", Some(row.bytes as f64)),
                    ("by status", row.status_bytes_per_block),
                ];
                bars.extend(sources.into_iter().filter_map(|(source, measured)| {
                    at_most(
                        format!("index {source}"),
                        measured?,
                        128.0,
                        "at most 128 bytes a block".to_owned(),
                    )
                }));
            }
            _ => {}
        }
    }
    bars
}

fn shape(row: &Row) -> String {
    let bytes = if row.bytes >= MIB {
        format!("{} MiB", row.bytes / MIB)
    } else {
        format!("{} KiB", row.bytes >> 10)
    };
    format!("{} {} x {bytes}", row.case, row.batch)
}

fn rate_bar(row: &Row, limit: f64) -> Option<Bar> {
    let measured = row.ratio_to_memcpy?;
    Some(Bar {
        name: shape(row),
        measured,
        limit,
        met: measured >= limit,
        words: format!("at least {limit:.2} of memcpy"),
    })
}

fn single_bar(row: &Row, rows: &[Row]) -> Option<Bar> {
    let direction = if row.case == "put_from" { "put" } else { "get" };
    let memcpy = rows
        .iter()
        .find(|other| {
            other.case == "memcpy"
                && (other.bytes, other.batch, other.direction) == (row.bytes, row.batch, Some(direction))
        })?
        .p50_us?;
    let limit = 1.05 * memcpy + (1.5 * row.echo_p50_us?).max(12.0);
    at_most(
        shape(row),
        row.p50_us?,
        limit,
        "p50 at most 1.05 memcpy + max(1.5 echoes, 12 µs)".to_owned(),
    )
}

fn lookup_bar(row: &Row) -> Option<Bar> {
    let echo = row.echo_p50_us?;
    let (limit, words) = if row.batch == 1 {
        (
            (1.5 * echo).max(echo + 3.0),
            "p50 at most max(1.5 echoes, an echo + 3 µs)",
        )
    } else {
        (echo + 80.0, "p50 at most an echo + 80 µs")
    };
    at_most(
        format!("lookup of {} keys", row.batch),
        row.p50_us?,
        limit,
        words.to_owned(),
    )
}

fn at_most(name: String, measured: f64, limit: f64, words: String) -> Option<Bar> {
    Some(Bar {
        name,
        measured,
        limit,
        met: measured <= limit,
        words,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(case: &'static str, bytes: u64, batch: u64) -> Row {
        Row {
            case,
            bytes,
            batch,
            echo_p50_us: Some(40.0),
            ..Row::default()
        }
    }

    #[test]
    fn a_batch_is_judged_by_its_ratio_and_a_single_block_by_its_time_beyond_memcpy() {
        let rows = [
            Row {
                ratio_to_memcpy: Some(0.91),
                ..row("get_into", MIB, 16)
            },
            Row {
                ratio_to_memcpy: Some(0.89),
                ..row("put_from", MIB, 16)
            },
            Row {
                p50_us: Some(100.0),
                direction: Some("get"),
                ..row("memcpy", MIB, 1)
            },
            Row {
                p50_us: Some(200.0),
                direction: Some("put"),
                ..row("memcpy", MIB, 1)
            },
            Row {
                p50_us: Some(166.0),
                ..row("get_into", MIB, 1)
            },
            Row {
                p50_us: Some(266.0),
                ..row("put_from", MIB, 1)
            },
        ];
        let bars = meets(&rows);
        let met: Vec<bool> = bars.iter().map(|bar| bar.met).collect();
        // 1.05 * 100 + 60 = 165 and 1.05 * 200 + 60 = 270.
        assert_eq!(met, [true, false, false, true]);
    }

    #[test]
    fn a_lookup_is_judged_by_the_echo_beside_it_and_the_index_by_both_of_its_sources() {
        let rows = [
            Row {
                p50_us: Some(60.0),
                ..row("lookup", 4096, 1)
            },
            Row {
                p50_us: Some(121.0),
                ..row("lookup", 4096, 256)
            },
            Row {
                status_bytes_per_block: Some(90.0),
                ..row("index", 130, 1 << 20)
            },
        ];
        let bars = meets(&rows);
        assert_eq!(
            bars.iter().map(|bar| bar.met).collect::<Vec<_>>(),
            [true, false, false, true]
        );
    }

    #[test]
    fn a_row_has_the_promised_keys() {
        let json = serde_json::to_value(Row::default()).expect("plain data");
        for key in [
            "case",
            "bytes",
            "batch",
            "gbps",
            "ratio_to_memcpy",
            "p50_us",
            "p99_us",
            "cpu_s_per_gb",
            "echo_p50_us",
            "page_kib",
        ] {
            assert!(json.get(key).is_some(), "{key} is missing");
        }
    }
}
