use super::{Gate, GateMode, GateReason, GateSettings};
use crate::Time;

fn at(seconds: f64) -> Time {
    Time((seconds * 1e9) as u64)
}

/// A gate that was measured at the origin.
fn measured() -> Gate {
    let mut gate = Gate::new(GateSettings::default());
    gate.succeed(at(0.0));
    gate
}

fn is_open(gate: &Gate, seconds: f64) -> bool {
    gate.state(at(seconds), false).0
}

#[test]
fn a_gate_is_closed_until_something_was_measured_however_good_it_looks() {
    let mut gate = Gate::new(GateSettings::default());
    for second in 0..100 {
        gate.weigh(at(f64::from(second)), 1.0, 1.0);
    }
    assert_eq!(gate.state(at(100.0), false), (false, GateReason::Unmeasured));
    gate.succeed(at(100.0));
    gate.weigh(at(100.1), 1.0, 1.0);
    assert_eq!(gate.state(at(100.1), false), (true, GateReason::Pays));
}

#[test]
fn a_probe_that_failed_measured_nothing() {
    // A server too slow for its first probe was asked at the speed that the settings assume.
    let mut gate = Gate::new(GateSettings::default());
    gate.fail(at(2.0), 0.02, true);
    gate.weigh(at(2.1), 1.0, 1.0);
    assert_eq!(gate.state(at(2.1), false), (false, GateReason::Unmeasured));
    assert!(
        gate.probe_due().is_some_and(|due| due > at(2.0)),
        "it is probed again, and not at once"
    );
    gate.succeed(at(6.0));
    gate.weigh(at(6.1), 1.0, 1.0);
    assert_eq!(gate.state(at(6.1), false), (true, GateReason::Pays));
}

#[test]
fn a_transient_backlog_does_not_close_a_good_link() {
    let mut gate = measured();
    for _ in 0..20 {
        gate.weigh(at(1.0), 0.5, 1.0);
    }
    // For ten requests the queue eats the whole gain.
    for index in 0..10 {
        gate.observe(at(2.0 + f64::from(index)));
        gate.weigh(at(2.0 + f64::from(index)), 0.0, 1.0);
    }
    assert!(is_open(&gate, 12.0), "value {}", gate.value());
}

#[test]
fn a_link_that_never_pays_closes_after_its_dwell_and_opens_again_when_it_does() {
    let mut gate = measured();
    gate.weigh(at(0.0), 0.5, 1.0);
    assert!(is_open(&gate, 0.0));
    // Hundreds of requests within the dwell change nothing.
    for _ in 0..500 {
        gate.weigh(at(4.9), 0.0, 1.0);
    }
    assert!(is_open(&gate, 4.9));
    gate.weigh(at(5.1), 0.0, 1.0);
    assert_eq!(gate.state(at(5.1), false), (false, GateReason::DoesNotPay));
    gate.weigh(at(6.0), 0.9, 1.0);
    assert!(!is_open(&gate, 6.0), "closed for less than the dwell");
    gate.weigh(at(7.2), 0.9, 1.0);
    assert!(is_open(&gate, 7.2));
    assert_eq!(gate.report(at(7.2)).flips, 3);
}

#[test]
fn misses_pay_the_lookup_until_the_gate_closes() {
    let mut gate = measured();
    gate.weigh(at(0.0), 0.5, 1.0);
    for index in 0..400 {
        gate.weigh(at(f64::from(index) * 0.1), -0.005, 0.1);
    }
    assert!(gate.value() < 0.0);
    assert!(!is_open(&gate, 40.0));
}

#[test]
fn an_estimate_that_is_too_old_opens_nothing() {
    let mut gate = measured();
    gate.weigh(at(0.0), 0.5, 1.0);
    assert!(is_open(&gate, 19.0));
    assert_eq!(gate.state(at(21.0), false), (false, GateReason::Stale));
    gate.observe(at(22.0));
    assert!(is_open(&gate, 22.0));
}

#[test]
fn two_failures_break_the_circuit_for_twice_as_long_each_time_and_a_probe_heals_it() {
    let mut gate = measured();
    gate.weigh(at(0.0), 0.5, 1.0);
    gate.fail(at(1.0), 0.05, false);
    assert!(is_open(&gate, 1.0));
    gate.fail(at(1.0), 0.1, false);
    assert_eq!(gate.state(at(1.0), false), (false, GateReason::Broken));
    let mut due = Vec::new();
    for _ in 0..7 {
        let probe_at = gate.probe_due().expect("a probe");
        due.push(probe_at);
        assert!(gate.poll_probe(Time(probe_at.0 - 1), 1e9).is_none());
        assert!(gate.poll_probe(probe_at, 1e9).is_some());
        assert_eq!(gate.probe_due(), None, "one probe at a time");
        gate.end_probe();
        gate.fail(probe_at, 0.5, true);
    }
    let gaps: Vec<u64> = due
        .windows(2)
        .map(|pair| (pair[1].0 - pair[0].0) / 1_000_000_000)
        .collect();
    assert_eq!(gaps, [2, 4, 8, 16, 30, 30]);
    let probe_at = gate.probe_due().expect("a probe");
    assert!(gate.poll_probe(probe_at, 1e9).is_some());
    gate.end_probe();
    gate.succeed(probe_at);
    assert!(gate.state(probe_at, false).0, "a probe half-opens it");
    // One failure while it heals breaks it again.
    gate.fail(probe_at, 0.1, false);
    assert_eq!(gate.state(probe_at, false), (false, GateReason::Broken));
}

#[test]
fn whom_a_failure_costs_nothing_is_let_through_until_the_backend_is_dead() {
    let mut gate = measured();
    gate.weigh(at(0.0), 0.5, 1.0);
    for _ in 0..7 {
        gate.fail(at(1.0), 0.2, false);
    }
    assert!(!gate.state(at(1.0), false).0);
    assert!(gate.state(at(1.0), true).0);
    gate.fail(at(1.0), 0.2, false);
    assert!(!gate.state(at(1.0), true).0);
}

#[test]
fn a_mode_set_by_hand_wins() {
    let mut gate = Gate::new(GateSettings::default());
    gate.set_mode(GateMode::On);
    assert_eq!(gate.state(at(0.0), false), (true, GateReason::ForcedOn));
    gate.set_mode(GateMode::Off);
    gate.succeed(at(0.0));
    gate.weigh(at(0.0), 0.5, 1.0);
    assert_eq!(gate.state(at(0.0), false), (false, GateReason::ForcedOff));
    assert_eq!(gate.probe_due(), None, "what is off is not probed");
}

#[test]
fn probes_of_a_slow_link_are_small() {
    for (bytes_per_s, bytes) in [(12e9, 8_000_000), (1e9, 6_000_000), (1e6, 64 << 10)] {
        let mut gate = Gate::new(GateSettings::default());
        assert_eq!(gate.poll_probe(at(0.0), bytes_per_s).expect("a probe").bytes, bytes);
    }
}
