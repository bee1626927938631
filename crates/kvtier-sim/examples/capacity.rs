//! What the tier manager hits on a trace and writes for that, beside an exact leaf-first LRU of the same bytes.
//!
//! `cargo run --release -p kvtier-sim --example capacity -- TRACE [HOST_MIB NVME_MIB BLOCK_KIB SEGMENT_KIB]`

use kvtier_core::CoreSettings;
use kvtier_sim::capacity::{Pace, replay_paced, replay_restarted};
use kvtier_sim::{TraceReader, TraceRequest, lru};
use std::fs::File;
use std::io::BufReader;
use std::time::Duration;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let Some(path) = arguments.first() else {
        return Err("name a trace".into());
    };
    let number = |index: usize, default: u64| arguments.get(index).map_or(Ok(default), |text| text.parse());
    let (host, nvme, block) = (number(1, 16)?, number(2, 286)?, number(3, 16)?);
    let requests: Vec<TraceRequest> = TraceReader::new(BufReader::new(File::open(path)?)).collect::<Result<_, _>>()?;
    let exact = lru::replay(&requests, ((host + nvme) * 1024 / block) as usize).ratio();
    println!("exact leaf-first LRU of {} MiB: {exact:.4}", host + nvme);
    println!("latency_us  gb_per_s  hit_ratio  points  write_amplification  demoted_mib  relocated_mib  busy  seconds");
    for (latency_us, rate) in [
        (0, 0),
        (20, 0),
        (100, 0),
        (100, 2),
        (100, 1),
        (1000, 1),
        (5000, 1),
        (1000, 0),
    ] {
        let settings = CoreSettings {
            host_bytes: host << 20,
            nvme_bytes: nvme << 20,
            nvme_segment_bytes: number(4, 4096)? << 10,
            ..CoreSettings::default()
        };
        let pace = Pace {
            latency: Duration::from_micros(latency_us),
            device_bytes_per_second: rate * 1_000_000_000,
            trip: Duration::from_micros(if latency_us > 0 { 30 } else { 0 }),
            block: Duration::from_micros(if latency_us > 0 { 5 } else { 0 }),
        };
        let report = replay_paced(&requests, settings.check()?, (block << 10) as u32, pace);
        println!(
            "{latency_us:>10}  {rate:>8}  {:>9.4}  {:>6.2}  {:>19.3}  {:>11}  {:>13}  {:>4}  {:>7.1}",
            report.tokens.ratio(),
            100.0 * (report.tokens.ratio() - exact),
            report.write_amplification(),
            report.demoted_bytes >> 20,
            report.relocated_bytes >> 20,
            report.busy,
            report.took.as_secs_f64(),
        );
    }
    let settings = CoreSettings {
        host_bytes: host << 20,
        nvme_bytes: nvme << 20,
        nvme_segment_bytes: number(4, 4096)? << 10,
        ..CoreSettings::default()
    }
    .check()?;
    let half = requests.len() / 2;
    let restarted = replay_restarted(&requests, half, &settings, (block << 10) as u32, Pace::default());
    let whole = replay_paced(&requests, settings.clone(), (block << 10) as u32, Pace::default()).tokens;
    let first = replay_paced(&requests[..half], settings, (block << 10) as u32, Pace::default()).tokens;
    println!(
        "second half: {:.4}, after a flush and a restart {:.4}",
        (whole.hit - first.hit) as f64 / (whole.total - first.total) as f64,
        restarted.tokens.ratio()
    );
    Ok(())
}
