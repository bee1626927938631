use std::fmt;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::size;

/// What a replay found.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Report {
    /// Requests sent.
    pub requests: u64,
    /// Blocks that they name.
    pub blocks: u64,
    /// Bytes of a block.
    pub block_bytes: u64,
    /// Prompt tokens of all requests.
    pub input_tokens: u64,
    /// Tokens of the prompts' prefixes that were found.
    pub hit_tokens: u64,
    /// The one by the other.
    pub prefix_hit_token_ratio: f64,
    /// Bytes read that were right.
    pub verified_bytes: u64,
    /// Bytes read that were wrong. Anything but zero is a bug.
    pub wrong_bytes: u64,
    /// The first block with wrong bytes, in words.
    pub first_wrong: Option<String>,
    /// Blocks found in host memory.
    pub hit_blocks_host: u64,
    /// Blocks found on NVMe.
    pub hit_blocks_nvme: u64,
    /// Of the blocks that lay on NVMe when their request came, the share that was in host memory when it was their turn, because they
    /// were read ahead. `None` where there was none, or the daemon does not say.
    pub prefetched_share: Option<f64>,
    /// Their bytes.
    pub hit_bytes_host: u64,
    /// Their bytes.
    pub hit_bytes_nvme: u64,
    /// Blocks behind the found prefix.
    pub miss_blocks: u64,
    /// Of these, blocks that were stored.
    pub put_blocks: u64,
    /// Their bytes.
    pub put_bytes: u64,
    /// Of these, blocks that were there already, behind a gap.
    pub put_present: u64,
    /// Of these, blocks given up because the daemon had no room in time.
    pub put_busy: u64,
    /// Time of the whole replay.
    pub seconds: f64,
    /// Bytes read and stored in that time, 10^9 a second; making and checking them included.
    pub gbps: f64,
    /// Time of a get, microseconds: median.
    pub p50_us: Option<f64>,
    /// Time of a get, microseconds: 99th percentile.
    pub p99_us: Option<f64>,
    /// Gets answered from host memory alone.
    pub host: TierReport,
    /// Gets that had to wait for NVMe.
    pub nvme: TierReport,
    /// Puts.
    pub puts: TierReport,
    /// Rate of a memcpy of such blocks in the same process, 10^9 bytes a second, when asked for.
    pub memcpy_gbps: Option<f64>,
    /// Bytes written to NVMe for each byte kept there, when the daemon says.
    pub write_amplification: Option<f64>,
}

/// One kind of calls. A call carries up to 64 blocks.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct TierReport {
    /// Calls.
    pub calls: u64,
    /// Bytes moved, 10^9 a second of time in calls, copying out or in included.
    pub gbps: Option<f64>,
    /// Time of a call, microseconds: median.
    pub p50_us: Option<f64>,
    /// Time of a call, microseconds: 99th percentile.
    pub p99_us: Option<f64>,
}

impl fmt::Display for Report {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let time = |value: Option<f64>| value.map_or_else(|| "–".to_string(), |value| format!("{value:.0} µs"));
        writeln!(formatter, "requests          {}", self.requests)?;
        writeln!(
            formatter,
            "prefix hit ratio  {:.4} of {} tokens",
            self.prefix_hit_token_ratio, self.input_tokens
        )?;
        writeln!(
            formatter,
            "hits              {} blocks from host memory, {} from NVMe",
            self.hit_blocks_host, self.hit_blocks_nvme
        )?;
        if let Some(share) = self.prefetched_share {
            writeln!(formatter, "read ahead        {share:.4} of the blocks that lay on NVMe")?;
        }
        writeln!(
            formatter,
            "misses            {} blocks; {} stored, {} there already, {} without room",
            self.miss_blocks, self.put_blocks, self.put_present, self.put_busy
        )?;
        writeln!(
            formatter,
            "verified          {} bytes, {} wrong",
            self.verified_bytes, self.wrong_bytes
        )?;
        writeln!(
            formatter,
            "gets              p50 {}, p99 {}",
            time(self.p50_us),
            time(self.p99_us)
        )?;
        if let Some(amplification) = self.write_amplification {
            writeln!(
                formatter,
                "NVMe              {amplification:.2} bytes written for each kept"
            )?;
        }
        let moved = size::rounded(self.hit_bytes_host + self.hit_bytes_nvme + self.put_bytes);
        writeln!(
            formatter,
            "time              {:.2} s, {moved} moved and checked, {:.2} GB/s",
            self.seconds, self.gbps
        )
    }
}

/// Times of calls of one kind.
#[derive(Debug, Default)]
pub(super) struct Calls {
    microseconds: Vec<f32>,
    bytes: u64,
    time: Duration,
}

impl Calls {
    /// One call: how long it took to answer, how many bytes came or went, and how long that took altogether.
    pub(super) fn record(&mut self, answered: Duration, bytes: u64, altogether: Duration) {
        self.microseconds.push(answered.as_secs_f32() * 1e6);
        self.bytes += bytes;
        self.time += altogether;
    }

    fn add(&mut self, other: Calls) {
        self.microseconds.extend(other.microseconds);
        self.bytes += other.bytes;
        self.time += other.time;
    }

    fn report(&mut self) -> TierReport {
        self.microseconds.sort_by(f32::total_cmp);
        TierReport {
            calls: self.microseconds.len() as u64,
            gbps: rate(self.bytes, self.time.as_secs_f64()),
            p50_us: percentile(&self.microseconds, 50),
            p99_us: percentile(&self.microseconds, 99),
        }
    }
}

/// What one worker counted.
#[derive(Debug, Default)]
pub(super) struct Tally {
    pub(super) requests: u64,
    pub(super) blocks: u64,
    pub(super) input_tokens: u64,
    pub(super) hit_tokens: u64,
    pub(super) verified_bytes: u64,
    pub(super) wrong_bytes: u64,
    pub(super) first_wrong: Option<String>,
    pub(super) hit_blocks_host: u64,
    pub(super) hit_blocks_nvme: u64,
    pub(super) put_blocks: u64,
    pub(super) put_present: u64,
    pub(super) put_busy: u64,
    pub(super) miss_blocks: u64,
    pub(super) host: Calls,
    pub(super) nvme: Calls,
    pub(super) empty: Calls,
    pub(super) puts: Calls,
}

impl Tally {
    pub(super) fn add(&mut self, other: Tally) {
        self.requests += other.requests;
        self.blocks += other.blocks;
        self.input_tokens += other.input_tokens;
        self.hit_tokens += other.hit_tokens;
        self.verified_bytes += other.verified_bytes;
        self.wrong_bytes += other.wrong_bytes;
        self.first_wrong = self.first_wrong.take().or(other.first_wrong);
        self.hit_blocks_host += other.hit_blocks_host;
        self.hit_blocks_nvme += other.hit_blocks_nvme;
        self.put_blocks += other.put_blocks;
        self.put_present += other.put_present;
        self.put_busy += other.put_busy;
        self.miss_blocks += other.miss_blocks;
        self.host.add(other.host);
        self.nvme.add(other.nvme);
        self.empty.add(other.empty);
        self.puts.add(other.puts);
    }

    #[expect(clippy::cast_precision_loss, reason = "ratios and rates")]
    pub(super) fn report(mut self, seconds: f64, block_bytes: u64) -> Report {
        let (host, nvme, puts) = (self.host.report(), self.nvme.report(), self.puts.report());
        let mut gets = self.empty.microseconds;
        gets.extend(self.host.microseconds);
        gets.extend(self.nvme.microseconds);
        gets.sort_by(f32::total_cmp);
        let moved = (self.hit_blocks_host + self.hit_blocks_nvme + self.put_blocks) * block_bytes;
        Report {
            requests: self.requests,
            blocks: self.blocks,
            block_bytes,
            input_tokens: self.input_tokens,
            hit_tokens: self.hit_tokens,
            prefix_hit_token_ratio: if self.input_tokens == 0 {
                0.0
            } else {
                self.hit_tokens as f64 / self.input_tokens as f64
            },
            verified_bytes: self.verified_bytes,
            wrong_bytes: self.wrong_bytes,
            first_wrong: self.first_wrong,
            hit_blocks_host: self.hit_blocks_host,
            hit_blocks_nvme: self.hit_blocks_nvme,
            prefetched_share: None,
            hit_bytes_host: self.hit_blocks_host * block_bytes,
            hit_bytes_nvme: self.hit_blocks_nvme * block_bytes,
            miss_blocks: self.miss_blocks,
            put_blocks: self.put_blocks,
            put_bytes: self.put_blocks * block_bytes,
            put_present: self.put_present,
            put_busy: self.put_busy,
            seconds,
            gbps: rate(moved, seconds).unwrap_or(0.0),
            p50_us: percentile(&gets, 50),
            p99_us: percentile(&gets, 99),
            host,
            nvme,
            puts,
            memcpy_gbps: None,
            write_amplification: None,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a rate")]
fn rate(bytes: u64, seconds: f64) -> Option<f64> {
    (bytes > 0 && seconds > 0.0).then(|| bytes as f64 / seconds / 1e9)
}

fn percentile(sorted: &[f32], percent: usize) -> Option<f64> {
    let last = sorted.len().checked_sub(1)?;
    sorted.get(last * percent / 100).map(|value| f64::from(*value))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ratio_is_of_tokens_and_the_percentiles_of_calls() {
        let mut first = Tally {
            requests: 1,
            input_tokens: 1000,
            hit_tokens: 512,
            hit_blocks_host: 1,
            ..Tally::default()
        };
        first
            .host
            .record(Duration::from_micros(10), 4096, Duration::from_micros(20));
        let mut second = Tally {
            requests: 1,
            input_tokens: 1000,
            ..Tally::default()
        };
        second.empty.record(Duration::from_micros(30), 0, Duration::ZERO);
        first.add(second);
        let report = first.report(2.0, 4096);
        assert_eq!((report.requests, report.prefix_hit_token_ratio), (2, 0.256));
        assert_eq!(report.hit_bytes_host, 4096);
        assert_eq!(report.p50_us.map(f64::round), Some(10.0));
        assert_eq!(report.host.calls, 1);
        assert_eq!(Tally::default().report(0.0, 1).prefix_hit_token_ratio, 0.0);
    }
}
