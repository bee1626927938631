use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::acknowledgements::milliseconds;
use super::foreground::{Foreground, Gets};
use super::stand::cold;
use super::{Options, Row, Stand};
use crate::ranks::{median, rounded};
use crate::{BenchError, load};

const VERIFIED: &str = "verified_physical_purge";

/// What one physical purge came to.
struct Round {
    acknowledged: Duration,
    key_destroyed_seconds: f64,
    elapsed: Duration,
    undisturbed: Gets,
    disturbed: Gets,
    is_verified: bool,
}

/// Purges the tenant physically, again and again, and adds what that cost to the row.
pub(super) fn measure(
    options: &Options,
    mut stand: Stand,
    row: &mut Row,
    progress: &mut dyn FnMut(&str),
) -> Result<(), BenchError> {
    let mut rounds = Vec::new();
    let (mut gets, mut from_nvme) = (0, 0);
    for number in 1..=options.rounds() {
        if number > 1 {
            progress(&format!("filling a node with {} blocks once more", row.blocks));
            stand = stand.anew()?;
        }
        row.load.push(load());
        let before = stand.node.status().counters.fetch_hits_nvme;
        let round = round(&stand, options.quick)?;
        from_nvme += stand.node.status().counters.fetch_hits_nvme - before;
        gets += round.undisturbed.count() + round.disturbed.count();
        progress(&format!(
            "{} blocks, purge {number}: acknowledged in {:.2} ms, key destroyed in {:.2} ms, all in {:.2} s, gets p99 {:.0} µs (host {:.0}), before and after {:.0} µs (host {:.0}); load {}",
            row.blocks,
            milliseconds(round.acknowledged),
            round.key_destroyed_seconds * 1e3,
            round.elapsed.as_secs_f64(),
            round.disturbed.all(0.99),
            round.disturbed.of_host(0.99),
            round.undisturbed.all(0.99),
            round.undisturbed.of_host(0.99),
            load()
        ));
        rounds.push(round);
    }
    let each = |of: &dyn Fn(&Round) -> f64| -> Vec<f64> { rounds.iter().map(of).collect() };
    let middle = |of: &dyn Fn(&Round) -> f64| rounded(median(each(of)));
    let largest = |of: &dyn Fn(&Round) -> f64| rounded(each(of).into_iter().fold(0.0, f64::max));
    let ratio = |round: &Round| rounded(round.disturbed.all(0.99) / round.undisturbed.all(0.99));
    row.first_ack_ms = middle(&|round| milliseconds(round.acknowledged));
    let acknowledged = each(&|round| milliseconds(round.acknowledged));
    row.first_ack_min_ms = rounded(acknowledged.into_iter().fold(f64::INFINITY, f64::min));
    row.key_destroyed_ms = middle(&|round| round.key_destroyed_seconds * 1e3);
    row.key_destroyed_max_ms = largest(&|round| round.key_destroyed_seconds * 1e3);
    row.physical_seconds = middle(&|round| round.elapsed.as_secs_f64());
    row.physical_max_seconds = largest(&|round| round.elapsed.as_secs_f64());
    row.foreground_p99_ratios = each(&ratio);
    row.foreground_p99_ratio = middle(&ratio);
    row.undisturbed_p50_us = middle(&|round| round.undisturbed.all(0.5));
    row.undisturbed_p99_us = middle(&|round| round.undisturbed.all(0.99));
    row.undisturbed_host_p99_us = middle(&|round| round.undisturbed.of_host(0.99));
    row.foreground_p50_us = middle(&|round| round.disturbed.all(0.5));
    row.foreground_p99_us = middle(&|round| round.disturbed.all(0.99));
    row.foreground_host_p99_us = middle(&|round| round.disturbed.of_host(0.99));
    row.foreground_gets = rounds.iter().map(|round| round.disturbed.count()).sum();
    row.foreground_nvme_share = rounded(from_nvme as f64 / gets as f64);
    row.verified = rounds.iter().all(|round| round.is_verified);
    row.rounds = options.rounds();
    Ok(())
}

fn round(stand: &Stand, quick: bool) -> Result<Round, BenchError> {
    let (client, namespace) = stand.nearby()?;
    let mut foreground = Foreground::begin(&namespace, cold(stand.blocks))?;
    let undisturbed_for = |foreground: &mut Foreground<'_>| {
        let stretch = while_getting(foreground, || {
            std::thread::sleep(Duration::from_millis(if quick { 300 } else { 6_000 }));
            Ok(())
        });
        stretch.map(|(_, gets)| gets)
    };
    let mut undisturbed = undisturbed_for(&mut foreground)?;
    let destroyed_before = stand.node.status().purges.purge_key_destroyed.sum_seconds;
    let ((acknowledged, elapsed, receipt), disturbed) = while_getting(&mut foreground, || {
        let begun = Instant::now();
        let job = stand.purge_tenant()?;
        let acknowledged = begun.elapsed();
        let receipt = stand.await_receipt(&job)?;
        Ok((acknowledged, begun.elapsed(), receipt))
    })?;
    undisturbed.add(undisturbed_for(&mut foreground)?);
    client.goodbye().map_err(super::stand::failed("goodbye"))?;
    Ok(Round {
        acknowledged,
        key_destroyed_seconds: stand.node.status().purges.purge_key_destroyed.sum_seconds - destroyed_before,
        elapsed,
        undisturbed,
        disturbed,
        is_verified: receipt["guarantee"] == VERIFIED,
    })
}

/// Does something while another thread gets blocks.
fn while_getting<R>(
    foreground: &mut Foreground<'_>,
    work: impl FnOnce() -> Result<R, BenchError>,
) -> Result<(R, Gets), BenchError> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let gets = scope.spawn(|| foreground.run(&stop));
        let done = work();
        stop.store(true, Ordering::Release);
        let gets = gets.join().expect("the getting thread does not panic")?;
        Ok((done?, gets))
    })
}
