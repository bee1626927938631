use std::time::Duration;

use kvtier_core::cluster::ClusterSettings;

use crate::random::Random;

/// How often each fault strikes, in thousandths of its occasions. Each seed switches off about half of them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rates {
    pub(super) lost: u64,
    pub(super) late: u64,
    pub(super) duplicate: u64,
    pub(super) invalid: u64,
    pub(super) record_fails: u64,
    pub(super) record_slow: u64,
    pub(super) timer_late: u64,
    pub(super) cut: u64,
    pub(super) kill: u64,
    pub(super) stall: u64,
}

/// All that a seed decides before its world begins.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    /// Each member's, but for its place.
    pub(super) settings: ClusterSettings,
    pub(super) names: usize,
    pub(super) rates: Rates,
    /// What the operator and the clients do, and how long between two of it.
    pub(super) steps: u64,
    pub(super) step_gap_ns: u64,
    /// Mean time of a message on its way.
    pub(super) latency_ns: u64,
    /// Mean time of a record.
    pub(super) record_ns: u64,
    /// How often a step is a purge, thousandths.
    pub(super) raise_permille: u64,
    /// Whether killed members also come up with another clock, as after a reboot.
    pub(super) reboots: bool,
}

impl Plan {
    pub(super) fn new(random: &mut Random) -> Plan {
        let fenced = random.chance(800);
        let lease_ns = random.pick(&[20_000_000, 50_000_000, 100_000_000]);
        let renew_ns = lease_ns / random.between(3, 8);
        let resend_ns = random.pick(&[1_000_000, 5_000_000]);
        let settings = ClusterSettings {
            members: if fenced {
                random.pick(&[3, 3, 5])
            } else {
                random.pick(&[2, 3, 5])
            },
            fenced,
            lease_ttl: Duration::from_nanos(lease_ns),
            renew_every: Duration::from_nanos(renew_ns),
            drift_permille: random.pick(&[0, 10, 100, 300]),
            resend_after: Duration::from_nanos(resend_ns),
            resend_after_max: Duration::from_nanos(resend_ns * random.pick(&[1, 4, 16])),
            operations_max: random.pick(&[2, 5, 64]),
            records_in_flight_max: random.pick(&[1, 3, 16]),
            names_max: 16,
            name_bytes_max: 16,
            entries_per_message_max: random.pick(&[1, 2, 16]),
            ..ClusterSettings::default()
        };
        Plan {
            names: random.between(1, 6) as usize,
            rates: rates(random),
            steps: random.between(60, 200),
            step_gap_ns: lease_ns / random.pick(&[4, 10, 20]),
            latency_ns: random.pick(&[50_000, 500_000, renew_ns / 4]),
            record_ns: random.pick(&[20_000, 1_000_000, renew_ns / 2]),
            raise_permille: random.pick(&[20, 100, 250]),
            reboots: random.chance(500),
            settings,
        }
    }
}

fn rates(random: &mut Random) -> Rates {
    let mut rate = |often: &[u64]| if random.chance(500) { random.pick(often) } else { 0 };
    Rates {
        lost: rate(&[20, 100, 400]),
        late: rate(&[10, 50, 200]),
        duplicate: rate(&[20, 100]),
        invalid: rate(&[5, 20]),
        record_fails: rate(&[50, 300]),
        record_slow: rate(&[50, 300]),
        timer_late: rate(&[20, 200]),
        cut: rate(&[20, 80]),
        kill: rate(&[10, 40]),
        stall: rate(&[10, 40]),
    }
}
