use std::fmt;
use std::time::Duration;

use crate::Time;

use super::{Decision, Reason};

#[cfg(test)]
mod tests;

/// Who decides whether a backend is asked at all.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum GateMode {
    /// What was measured.
    #[default]
    Auto,
    /// Always asked; each request still decides by itself.
    On,
    /// Never asked.
    Off,
}

/// When a gate turns and how it probes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateSettings {
    /// Opens above this option value, a share of what recomputing takes.
    pub enable_value: f64,
    /// Closes below this option value.
    pub disable_value: f64,
    /// Closed for at least this long, seconds.
    pub enable_dwell_s: f64,
    /// Open for at least this long, seconds.
    pub disable_dwell_s: f64,
    /// An estimate older than this opens nothing, seconds.
    pub estimate_age_max_s: f64,
    /// Weight of the newest request in the option value.
    pub value_weight: f64,
    /// Failures in a row that break the circuit.
    pub failures_max: u32,
    /// A probability of failure that breaks it.
    pub failure_probability_max: f64,
    /// Failures in a row that break it also for those whom a failure costs nothing: who computes while it fetches.
    pub failures_max_harmless: u32,
    /// The probability that does.
    pub failure_probability_max_harmless: f64,
    /// How long it stays broken at first, seconds; doubled each time.
    pub break_s: f64,
    /// And at most, seconds.
    pub break_max_s: f64,
    /// Successes after which the next break is a first one again.
    pub successes_to_heal: u32,
    /// A probe goes out when nothing was observed for this long, seconds.
    pub probe_interval_s: f64,
    /// Bytes of a probe at most.
    pub probe_bytes_max: u64,
    /// Share of the link that probes may take.
    pub probe_share_max: f64,
}

impl Default for GateSettings {
    fn default() -> GateSettings {
        GateSettings {
            enable_value: 0.02,
            disable_value: 0.005,
            enable_dwell_s: 2.0,
            disable_dwell_s: 5.0,
            estimate_age_max_s: 20.0,
            value_weight: 0.05,
            failures_max: 2,
            failure_probability_max: 0.3,
            failures_max_harmless: 8,
            failure_probability_max_harmless: 0.6,
            break_s: 1.0,
            break_max_s: 30.0,
            successes_to_heal: 3,
            probe_interval_s: 3.0,
            probe_bytes_max: 8_000_000,
            probe_share_max: 0.002,
        }
    }
}

/// Why a gate is open or closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GateReason {
    /// Asking it pays.
    Pays,
    /// Asking it has not paid enough.
    DoesNotPay,
    /// Nothing is known of it yet.
    Unmeasured,
    /// What is known of it is too old.
    Stale,
    /// It failed: closed until a probe succeeds.
    Broken,
    /// The operator said on.
    ForcedOn,
    /// The operator said off.
    ForcedOff,
}

impl fmt::Display for GateReason {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            GateReason::Pays => "asking it pays",
            GateReason::DoesNotPay => "asking it does not pay",
            GateReason::Unmeasured => "it was not measured yet",
            GateReason::Stale => "its last measurement is too old",
            GateReason::Broken => "it failed, and no probe has succeeded since",
            GateReason::ForcedOn => "it was switched on by hand",
            GateReason::ForcedOff => "it was switched off by hand",
        })
    }
}

/// A gate as an operator sees it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GateReport {
    /// Who decides.
    pub mode: GateMode,
    /// Whether the backend is asked.
    pub open: bool,
    /// Why.
    pub reason: GateReason,
    /// Option value: what asking saves, as a share of what recomputing takes.
    pub value: f64,
    /// Times that it opened or closed.
    pub flips: u64,
    /// Times that the circuit broke.
    pub breaks: u64,
    /// Probes sent.
    pub probes: u64,
    /// Their bytes.
    pub probe_bytes: u64,
}

/// A bounded read that nobody waits for, to learn whether a backend is there and how fast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Stored bytes to read.
    pub bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Circuit {
    /// Requests flow.
    Whole,
    /// Nothing until then, then a probe.
    Broken { until: Time },
    /// A probe succeeded: requests flow, and the first failure breaks it for longer.
    Healing { successes: u32 },
}

/// Whether a backend is asked at all: by the value of having it as an option, with a breaker and probes.
///
/// Each request decides by itself whether to fetch; the gate spares the lookups of a backend that never wins. It starts closed.
#[derive(Clone, Debug)]
pub(super) struct Gate {
    settings: GateSettings,
    mode: GateMode,
    enabled: bool,
    switched_at: Option<Time>,
    /// Averages of what having the option saved, and of what recomputing takes.
    saved_s: f64,
    recompute_s: f64,
    circuit: Circuit,
    failures_in_row: u32,
    /// It has failed so often that even a harmless fetch is not worth its trouble.
    dead: bool,
    break_s: f64,
    observed_at: Option<Time>,
    probe_at: Time,
    probing: bool,
    flips: u64,
    breaks: u64,
    probes: u64,
    probe_bytes: u64,
}

impl Gate {
    pub(super) fn new(settings: GateSettings) -> Gate {
        Gate {
            settings,
            mode: GateMode::Auto,
            enabled: false,
            switched_at: None,
            saved_s: 0.0,
            recompute_s: 0.0,
            circuit: Circuit::Whole,
            failures_in_row: 0,
            dead: false,
            break_s: settings.break_s,
            observed_at: None,
            probe_at: Time::ZERO,
            probing: false,
            flips: 0,
            breaks: 0,
            probes: 0,
            probe_bytes: 0,
        }
    }

    pub(super) fn set_mode(&mut self, mode: GateMode) {
        self.mode = mode;
    }

    /// Whether the backend is asked now, and why; `harmless` by one whom a failure costs nothing.
    pub(super) fn state(&self, now: Time, harmless: bool) -> (bool, GateReason) {
        match self.mode {
            GateMode::On => return (true, GateReason::ForcedOn),
            GateMode::Off => return (false, GateReason::ForcedOff),
            GateMode::Auto => {}
        }
        let Some(observed_at) = self.observed_at else {
            return (false, GateReason::Unmeasured);
        };
        match self.circuit {
            Circuit::Broken { .. } if !harmless || self.dead => (false, GateReason::Broken),
            _ if now.since(observed_at).as_secs_f64() > self.settings.estimate_age_max_s => (false, GateReason::Stale),
            _ if self.enabled => (true, GateReason::Pays),
            _ => (false, GateReason::DoesNotPay),
        }
    }

    /// What a recomputation takes on average, seconds; zero where none was weighed.
    pub(super) fn recompute_s(&self) -> f64 {
        self.recompute_s
    }

    /// A plan as it stands where the gate is closed to it.
    pub(super) fn judge(&self, now: Time, mut weighed: Decision) -> Decision {
        let harmless = weighed.is_harmless();
        let (open, reason) = self.state(now, harmless);
        if !open {
            weighed.recompute_instead(Reason::GateClosed(reason));
        }
        weighed
    }

    /// Share of a recomputation that the option saves.
    pub(super) fn value(&self) -> f64 {
        if self.recompute_s > 0.0 {
            self.saved_s / self.recompute_s
        } else {
            0.0
        }
    }

    /// A request could have saved `saved_s` (negative: it pays a lookup for nothing) of `recompute_s`, fetched or not.
    pub(super) fn weigh(&mut self, now: Time, saved_s: f64, recompute_s: f64) {
        let weight = if self.recompute_s == 0.0 {
            1.0
        } else {
            self.settings.value_weight
        };
        self.saved_s += weight * (saved_s - self.saved_s);
        self.recompute_s += weight * (recompute_s - self.recompute_s);
        let Some(observed_at) = self.observed_at else { return };
        let in_state_s = self.switched_at.map_or(f64::INFINITY, |at| now.since(at).as_secs_f64());
        let fresh = now.since(observed_at).as_secs_f64() <= self.settings.estimate_age_max_s;
        let turn = if self.enabled {
            self.value() < self.settings.disable_value && in_state_s >= self.settings.disable_dwell_s
        } else {
            self.value() > self.settings.enable_value && fresh && in_state_s >= self.settings.enable_dwell_s
        };
        if turn {
            self.enabled = !self.enabled;
            self.switched_at = Some(now);
            self.flips += 1;
        }
    }

    /// Something was learned of the link.
    pub(super) fn observe(&mut self, now: Time) {
        self.observed_at = Some(self.observed_at.map_or(now, |at| at.max(now)));
        self.put_off_probe(now);
    }

    fn put_off_probe(&mut self, now: Time) {
        self.probe_at = self
            .probe_at
            .max(now.after(Duration::from_secs_f64(self.settings.probe_interval_s)));
    }

    /// A fetch or a probe was answered.
    pub(super) fn succeed(&mut self, now: Time) {
        self.observe(now);
        self.failures_in_row = 0;
        self.dead = false;
        match &mut self.circuit {
            Circuit::Broken { .. } => self.circuit = Circuit::Healing { successes: 1 },
            Circuit::Healing { successes } => {
                *successes += 1;
                if *successes >= self.settings.successes_to_heal {
                    self.circuit = Circuit::Whole;
                    self.break_s = self.settings.break_s;
                }
            }
            Circuit::Whole => {}
        }
    }

    /// A fetch or a probe failed, as did `probability` of the last ones.
    pub(super) fn fail(&mut self, now: Time, probability: f64, by_probe: bool) {
        if self.observed_at.is_some() {
            self.observe(now);
        } else {
            // What was never measured is not known better by a failure: it stays closed.
            self.put_off_probe(now);
        }
        self.failures_in_row += 1;
        self.dead |= self.failures_in_row >= self.settings.failures_max_harmless
            || probability > self.settings.failure_probability_max_harmless;
        let broken = match self.circuit {
            // One that was asked before the circuit broke breaks it no further.
            Circuit::Broken { .. } => by_probe,
            Circuit::Healing { .. } => true,
            Circuit::Whole => {
                self.failures_in_row >= self.settings.failures_max
                    || probability > self.settings.failure_probability_max
            }
        };
        if broken {
            self.circuit = Circuit::Broken {
                until: now.after(Duration::from_secs_f64(self.break_s)),
            };
            self.break_s = (2.0 * self.break_s).min(self.settings.break_max_s);
            self.breaks += 1;
        }
    }

    /// When a probe is due, where nothing else is observed first; nothing while one is under way.
    pub(super) fn probe_due(&self) -> Option<Time> {
        if self.probing || self.mode == GateMode::Off {
            return None;
        }
        Some(match self.circuit {
            Circuit::Broken { until } => until,
            _ => self.probe_at,
        })
    }

    /// Sends a probe down a link of about `bytes_per_s`, if one is due.
    pub(super) fn poll_probe(&mut self, now: Time, bytes_per_s: f64) -> Option<Probe> {
        if self.probe_due().is_none_or(|due| now < due) {
            return None;
        }
        let affordable = self.settings.probe_share_max * bytes_per_s * self.settings.probe_interval_s;
        let bytes = (affordable as u64).clamp(64 << 10, self.settings.probe_bytes_max.max(64 << 10));
        self.probing = true;
        self.probes += 1;
        self.probe_bytes += bytes;
        Some(Probe { bytes })
    }

    /// The probe under way was answered, or failed.
    pub(super) fn end_probe(&mut self) {
        self.probing = false;
    }

    pub(super) fn report(&self, now: Time) -> GateReport {
        let (open, reason) = self.state(now, false);
        GateReport {
            mode: self.mode,
            open,
            reason,
            value: self.value(),
            flips: self.flips,
            breaks: self.breaks,
            probes: self.probes,
            probe_bytes: self.probe_bytes,
        }
    }
}
