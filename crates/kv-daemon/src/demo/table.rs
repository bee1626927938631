//! The demo's answer for people.

use std::fmt::Write;
use std::io::IsTerminal;

use crate::replay::{Report, TierReport};
use crate::size;

/// The table and what to do next.
pub(super) fn render(report: &Report, host_bytes: u64, nvme_bytes: u64) -> String {
    let (bold, plain) = if std::io::stdout().is_terminal() {
        ("\x1b[1m", "\x1b[0m")
    } else {
        ("", "")
    };
    let rule = "─".repeat(78);
    let mut text = String::new();
    let mut line = |words: &str| {
        text.push_str(words);
        text.push('\n');
    };
    line("");
    line(&format!("{bold}  A chat workload through kvtier{plain}"));
    line(&format!("  {rule}"));
    line(&format!(
        "  {} requests, {} prompt tokens in {} blocks of {}; {:.1} s",
        grouped(report.requests),
        grouped(report.input_tokens),
        grouped(report.blocks),
        size::rounded(report.block_bytes),
        report.seconds,
    ));
    line(&format!(
        "  host memory {}, disk {}",
        size::rounded(host_bytes),
        size::rounded(nvme_bytes)
    ));
    line("");
    line(&format!(
        "{bold}  {:<26}{:>9}{:>11}{:>12}{:>10}{:>10}{plain}",
        "", "blocks", "bytes", "rate", "p50", "p99"
    ));
    line(&tier_line(
        "found in host memory",
        report.hit_blocks_host,
        report.hit_bytes_host,
        &report.host,
    ));
    line(&tier_line(
        "found on disk",
        report.hit_blocks_nvme,
        report.hit_bytes_nvme,
        &report.nvme,
    ));
    line(&tier_line(
        "missing, so stored",
        report.put_blocks,
        report.put_bytes,
        &report.puts,
    ));
    if let Some(memcpy_gbps) = report.memcpy_gbps {
        line(&format!(
            "  {:<26}{:>9}{:>11}{:>12}",
            "memcpy of such blocks",
            "",
            "",
            rate(memcpy_gbps)
        ));
    }
    line(&format!("  {rule}"));
    let share = report.prefix_hit_token_ratio * 100.0;
    line(&format!(
        "{bold}  {share:.1} % of all prompt tokens were found{plain}: {} of {} need no computing",
        grouped(report.hit_tokens),
        grouped(report.input_tokens),
    ));
    let verdict = if report.wrong_bytes == 0 {
        "all of them right".to_string()
    } else {
        format!("{} WRONG", grouped(report.wrong_bytes))
    };
    line(&format!(
        "{bold}  {} bytes read were compared{plain} with what was stored: {verdict}",
        grouped(report.verified_bytes)
    ));
    if let Some(amplification) = report.write_amplification.filter(|factor| *factor > 0.0) {
        line(&format!(
            "  the disk wrote {amplification:.2} bytes for each byte kept there"
        ));
    }
    line("");
    line("  rate and times: one call of a client in another process, up to 64 blocks each, copied out;");
    line("  a read from disk waits for the disk. A hit is a prefix of the prompt, as an engine needs it.");
    line("");
    line(&format!("{bold}  What to do next{plain}"));
    line("    kv-daemon serve --host-bytes 8GiB --nvme-bytes 100GiB    keep blocks for your engine");
    line("    kvctl status                                             see what it holds");
    line("    kvctl replay TRACE.jsonl --block-bytes 64KiB             your own trace, every byte checked");
    line("    kvctl bench client                                       its speed beside memcpy on this machine");
    line("");
    text
}

fn tier_line(name: &str, blocks: u64, bytes: u64, tier: &TierReport) -> String {
    let mut line = String::new();
    let time = |microseconds: Option<f64>| match microseconds {
        Some(value) if value >= 10_000.0 => format!("{:.1} ms", value / 1000.0),
        Some(value) => format!("{value:.0} µs"),
        None => "–".to_string(),
    };
    // Writing to a string cannot fail.
    let _ = write!(
        line,
        "  {name:<26}{:>9}{:>11}{:>12}{:>10}{:>10}",
        grouped(blocks),
        size::rounded(bytes),
        tier.gbps.map_or_else(|| "–".to_string(), rate),
        time(tier.p50_us),
        time(tier.p99_us),
    );
    line
}

fn rate(gbps: f64) -> String {
    format!("{gbps:.2} GB/s")
}

/// A number with thin groups of three digits.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{grouped, render};
    use crate::replay::Report;

    #[test]
    fn numbers_are_grouped() {
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(1000), "1,000");
        assert_eq!(grouped(12_345_678), "12,345,678");
    }

    #[test]
    fn the_table_says_what_was_found_and_never_grows_past_eighty_columns() {
        let report = Report {
            requests: 12_031,
            hit_blocks_host: 77,
            wrong_bytes: 3,
            ..Report::default()
        };
        let text = render(&report, 1 << 28, 1 << 29);
        assert!(
            text.contains("12,031 requests") && text.contains("77") && text.contains("3 WRONG"),
            "{text}"
        );
        for line in text.lines().filter(|line| !line.contains("    kv")) {
            assert!(line.chars().count() <= 100, "{line}");
        }
    }
}
