use std::collections::BTreeMap;
use std::time::Duration;

use crate::{SettingsError, Time};

use super::backend::{Backend, BackendProfile, BackendReport, Forecast};
use super::check::{check_gate, check_profile};
use super::gate::{Gate, GateMode, GateReport, GateSettings, Probe};
use super::weigh::weigh;
use super::{Candidate, Decision, Question, RecomputeCoefficients, RecomputeModel};

#[cfg(test)]
mod tests;

/// A backend of the model: a tier, or one peer, that answers or does not by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BackendId(pub u32);

/// A fetch under way, as its driver names it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct FetchId(pub u64);

/// An overdue fetch that is given more time is given this much of what it should still need.
const PATIENCE: f64 = 1.3;

/// Compressed bytes must take at most this share of the time of plain ones.
const COMPRESSION_GAIN: f64 = 0.95;

#[derive(Debug)]
pub(super) struct Served {
    pub(super) backend: Backend,
    pub(super) gate: Gate,
}

#[derive(Debug)]
struct Flight {
    backend: BackendId,
    forecast: Forecast,
    /// Place among all fetches.
    order: u64,
    stored_bytes: u64,
    left_bytes: u64,
    /// Its first byte is there, or nobody waits for it any longer.
    answered: bool,
}

/// What to do about a fetch that is over its soft deadline.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Patience {
    /// What is left comes sooner than a recomputation would end: judge again then.
    Wait {
        /// When.
        until: Time,
    },
    /// Recompute. What still arrives is kept.
    GiveUp,
}

/// Decides for each request whether its cached blocks are fetched, computed, or both, and learns from what came of it.
///
/// Pure: `now` is an argument, fetches and probes are carried out by the caller, and what they took comes back by `observe_*`.
#[derive(Debug)]
pub struct CostModel {
    recompute: RecomputeModel,
    served: Vec<Served>,
    flights: BTreeMap<FetchId, Flight>,
    began: u64,
}

impl CostModel {
    /// A model that knows a profile and no backend.
    #[must_use]
    pub fn new(profile: RecomputeCoefficients) -> CostModel {
        CostModel {
            recompute: RecomputeModel::new(profile),
            served: Vec::new(),
            flights: BTreeMap::new(),
            began: 0,
        }
    }

    /// A further backend; its gate is closed until it was measured.
    ///
    /// # Errors
    /// A field with which nothing could be decided.
    pub fn add_backend(&mut self, profile: BackendProfile, gate: GateSettings) -> Result<BackendId, SettingsError> {
        check_profile(&profile)?;
        check_gate(&gate)?;
        self.served.push(Served {
            backend: Backend::new(profile),
            gate: Gate::new(gate),
        });
        Ok(BackendId((self.served.len() - 1) as u32))
    }

    /// Who decides whether `backend` is asked.
    pub fn set_gate_mode(&mut self, backend: BackendId, mode: GateMode) {
        if let Some(served) = self.served.get_mut(backend.0 as usize) {
            served.gate.set_mode(mode);
        }
    }

    /// The gate of `backend`.
    #[must_use]
    pub fn gate(&self, backend: BackendId, now: Time) -> Option<GateReport> {
        self.served
            .get(backend.0 as usize)
            .map(|served| served.gate.report(now))
    }

    /// What is known of `backend`.
    #[must_use]
    pub fn backend(&self, backend: BackendId, now: Time) -> Option<BackendReport> {
        self.served
            .get(backend.0 as usize)
            .map(|served| served.backend.report(now))
    }

    /// What is known of recomputing.
    #[must_use]
    pub fn recompute(&self) -> &RecomputeModel {
        &self.recompute
    }

    /// A prefill of `tokens` after `before_tokens` took `measured_s`, its wait for a GPU not counted.
    pub fn observe_recompute(&mut self, tokens: u32, before_tokens: u32, measured_s: f64) {
        self.recompute.observe(tokens, before_tokens, measured_s);
    }

    /// Decides for a request, and counts it in the option value of each backend: the option of one that is not asked counts too.
    pub fn decide(&mut self, now: Time, question: &Question, candidates: &[Candidate]) -> Decision {
        let mut best = Decision::nothing(question);
        for candidate in candidates {
            let Some(served) = self.served.get_mut(candidate.backend.0 as usize) else {
                continue;
            };
            let weighed = weigh(&self.recompute, served, now, question, *candidate);
            let (saved_s, recompute_s) = if weighed.matched_tokens == 0 {
                let whole = question.prompt_tokens.saturating_sub(question.local_prefix_tokens);
                let recompute_s = self.recompute.seconds(whole, question.local_prefix_tokens);
                (-served.backend.latency.mean_s(), recompute_s)
            } else {
                (weighed.saved_s(), weighed.recompute_s - weighed.queue_wait_s)
            };
            served.gate.weigh(now, saved_s, recompute_s);
            best = better(best, served.gate.judge(now, weighed));
        }
        best
    }

    /// Decides as [`CostModel::decide`] would now, without counting.
    #[must_use]
    pub fn explain(&self, now: Time, question: &Question, candidates: &[Candidate]) -> Decision {
        candidates.iter().fold(Decision::nothing(question), |best, candidate| {
            match self.served.get(candidate.backend.0 as usize) {
                Some(served) => {
                    let weighed = weigh(&self.recompute, served, now, question, *candidate);
                    better(best, served.gate.judge(now, weighed))
                }
                None => best,
            }
        })
    }

    /// Whether `backend` would serve faster with bytes compressed to `stored_ratio` of their size that are decompressed at
    /// `decompress_bytes_per_s`, beside the transfer, than it does with plain ones.
    #[must_use]
    pub fn compression_pays(&self, backend: BackendId, stored_ratio: f64, decompress_bytes_per_s: f64) -> bool {
        let Some(served) = self.served.get(backend.0 as usize) else {
            return false;
        };
        let bytes_per_s = served.backend.bandwidth.bytes_per_s();
        let compressed_s = (stored_ratio / bytes_per_s).max(1.0 / decompress_bytes_per_s);
        served.backend.bandwidth.is_measured() && compressed_s < COMPRESSION_GAIN * (1.0 / bytes_per_s)
    }

    /// A fetch that was decided begins.
    pub fn begin_fetch(&mut self, now: Time, fetch: FetchId, decision: &Decision) {
        let Some(backend) = decision.backend else { return };
        if self.flights.contains_key(&fetch) {
            // An id names one fetch at a time: the caller has lost sight of the earlier one.
            self.close(now, fetch);
        }
        let Some(served) = self.served.get_mut(backend.0 as usize) else {
            return;
        };
        let stored = (decision.fetch_bytes as f64 * served.backend.profile.stored_ratio) as u64;
        if served.backend.inflight_fetches == 0 {
            served.backend.progress_at = now;
        }
        served.backend.inflight_fetches += 1;
        served.backend.unanswered_fetches += 1;
        served.backend.inflight_bytes = served.backend.inflight_bytes.saturating_add(stored);
        self.began += 1;
        self.flights.insert(
            fetch,
            Flight {
                backend,
                forecast: decision.forecast,
                order: self.began,
                stored_bytes: stored,
                left_bytes: stored,
                answered: false,
            },
        );
    }

    /// The first byte of a fetch came `lookup_s` after the backend was asked.
    pub fn observe_lookup(&mut self, now: Time, fetch: FetchId, lookup_s: f64) {
        let Some(flight) = self.flights.get_mut(&fetch) else {
            return;
        };
        let Some(served) = self.served.get_mut(flight.backend.0 as usize) else {
            return;
        };
        answer(flight, &mut served.backend);
        served.backend.latency.observe(lookup_s);
        served.backend.progress_at = served.backend.progress_at.max(now);
    }

    /// The backend said what it has, `lookup_s` after it was asked, outside a fetch.
    pub fn observe_answer(&mut self, backend: BackendId, lookup_s: f64) {
        if let Some(served) = self.served.get_mut(backend.0 as usize) {
            served.backend.latency.observe(lookup_s);
        }
    }

    /// A block of `bytes` came out of `stored_bytes`, which took `decompress_s` where they were compressed: later forecasts count with
    /// what is stored there on average.
    pub fn observe_stored(&mut self, backend: BackendId, bytes: u64, stored_bytes: u64, decompress_s: f64) {
        if let Some(served) = self.served.get_mut(backend.0 as usize) {
            served.backend.stored(bytes, stored_bytes, decompress_s);
        }
    }

    /// A part of a fetch arrived: `stored_bytes`, over `took_s`.
    pub fn observe_progress(&mut self, now: Time, fetch: FetchId, stored_bytes: u64, took_s: f64) {
        let Some(flight) = self.flights.get_mut(&fetch) else {
            return;
        };
        let Some(served) = self.served.get_mut(flight.backend.0 as usize) else {
            return;
        };
        let counted = stored_bytes.min(flight.left_bytes);
        flight.left_bytes -= counted;
        served.backend.progress(now, counted, stored_bytes, took_s);
        served.gate.observe(now);
    }

    /// Whether to go on waiting for a fetch that is over its soft deadline, where recomputing would take `recompute_s`.
    ///
    /// One that nothing was heard of although nothing is before it is taken for lost.
    #[must_use]
    pub fn judge(&mut self, now: Time, fetch: FetchId, recompute_s: f64) -> Patience {
        let Some(flight) = self.flights.get(&fetch) else {
            return Patience::GiveUp;
        };
        let Some(served) = self.served.get_mut(flight.backend.0 as usize) else {
            return Patience::GiveUp;
        };
        let ahead: u64 = self
            .flights
            .values()
            .filter(|other| other.backend == flight.backend && other.order < flight.order)
            .fold(0, |sum: u64, other| sum.saturating_add(other.left_bytes));
        let silent = flight.left_bytes == flight.stored_bytes;
        if !(silent && ahead == 0) {
            let bytes_per_s = served.backend.planned_bytes_per_s(now);
            let left_s = ahead.saturating_add(flight.left_bytes) as f64 / bytes_per_s
                + if silent { served.backend.latency.mean_s() } else { 0.0 };
            if left_s < recompute_s {
                let again_s = (PATIENCE * left_s).clamp(1e-3, 60.0);
                return Patience::Wait {
                    until: now.after(Duration::from_secs_f64(again_s)),
                };
            }
        } else {
            // Its bytes will not hold up others.
            served.backend.inflight_bytes = served.backend.inflight_bytes.saturating_sub(flight.left_bytes);
            if let Some(flight) = self.flights.get_mut(&fetch) {
                flight.stored_bytes = 0;
                flight.left_bytes = 0;
                answer(flight, &mut served.backend);
            }
        }
        Patience::GiveUp
    }

    /// A fetch ended, `actual_s` after it began: everything arrived.
    pub fn observe_fetched(&mut self, now: Time, fetch: FetchId, actual_s: f64) {
        let Some(flight) = self.close(now, fetch) else { return };
        let served = &mut self.served[flight.backend.0 as usize];
        served.backend.calibrate(&flight.forecast, actual_s);
        served.backend.failures.succeed();
        served.gate.succeed(now);
    }

    /// A fetch failed, which was known `after_s` it began.
    pub fn observe_failed(&mut self, now: Time, fetch: FetchId, after_s: f64) {
        let Some(flight) = self.close(now, fetch) else { return };
        let served = &mut self.served[flight.backend.0 as usize];
        served.backend.failures.fail(after_s);
        served.gate.fail(now, served.backend.failures.probability(), false);
    }

    fn close(&mut self, now: Time, fetch: FetchId) -> Option<Flight> {
        let mut flight = self.flights.remove(&fetch)?;
        let backend = &mut self.served.get_mut(flight.backend.0 as usize)?.backend;
        answer(&mut flight, backend);
        backend.inflight_fetches = backend.inflight_fetches.saturating_sub(1);
        backend.inflight_bytes = backend.inflight_bytes.saturating_sub(flight.left_bytes);
        backend.progress_at = backend.progress_at.max(now);
        Some(flight)
    }

    /// When [`CostModel::poll_probe`] is worth calling again.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        self.served
            .iter()
            .filter(|served| is_idle(served))
            .filter_map(|served| served.gate.probe_due())
            .min()
    }

    /// The next probe to send; it is answered by [`CostModel::observe_probed`] or [`CostModel::observe_probe_failed`].
    /// Backends with a fetch in flight are watched by that.
    #[must_use]
    pub fn poll_probe(&mut self, now: Time) -> Option<(BackendId, Probe)> {
        self.served
            .iter_mut()
            .enumerate()
            .filter(|(_, served)| is_idle(served))
            .find_map(|(index, served)| {
                let bytes_per_s = served.backend.bandwidth.bytes_per_s();
                Some((BackendId(index as u32), served.gate.poll_probe(now, bytes_per_s)?))
            })
    }

    /// A probe brought `stored_bytes` over `took_s`, after `lookup_s`.
    pub fn observe_probed(&mut self, now: Time, backend: BackendId, lookup_s: f64, stored_bytes: u64, took_s: f64) {
        let Some(served) = self.served.get_mut(backend.0 as usize) else {
            return;
        };
        served.gate.end_probe();
        served.backend.latency.observe(lookup_s);
        if stored_bytes > 0 && took_s > 0.0 && took_s.is_finite() {
            served.backend.bandwidth.observe(now, stored_bytes, took_s);
        }
        served.backend.failures.succeed();
        served.gate.succeed(now);
    }

    /// A probe failed.
    pub fn observe_probe_failed(&mut self, now: Time, backend: BackendId, after_s: f64) {
        let Some(served) = self.served.get_mut(backend.0 as usize) else {
            return;
        };
        served.gate.end_probe();
        served.backend.failures.fail(after_s);
        served.gate.fail(now, served.backend.failures.probability(), true);
    }
}

/// Others no longer wait behind the lookup of `flight`.
fn answer(flight: &mut Flight, backend: &mut Backend) {
    if !std::mem::replace(&mut flight.answered, true) {
        backend.unanswered_fetches = backend.unanswered_fetches.saturating_sub(1);
    }
}

fn is_idle(served: &Served) -> bool {
    served.backend.inflight_fetches == 0
}

/// What is saved is comparable between backends that have prefixes of different lengths.
fn better(best: Decision, other: Decision) -> Decision {
    if other.matched_tokens > 0 && (best.backend.is_none() || other.saved_s() > best.saved_s()) {
        other
    } else {
        best
    }
}
