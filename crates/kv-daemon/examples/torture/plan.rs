//! What is drawn before a round begins.

use std::time::Duration;

use kvtier_sim::Random;

use crate::key::NAMESPACES;

const MIB: u64 = 1 << 20;

/// What goes on between the flush and the kill, and how much room there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Small tiers. After the flush only gets go on, so that nothing has to be evicted from NVMe.
    Quiet,
    /// Small tiers. Everything goes on after the flush: the kill falls into reclaim.
    Churn,
    /// NVMe has room for everything. Everything goes on after the flush.
    Roomy,
}

impl Kind {
    fn of(round: u64) -> Kind {
        match round % 4 {
            1 => Kind::Quiet,
            3 => Kind::Churn,
            _ => Kind::Roomy,
        }
    }

    pub(crate) fn is_small(self) -> bool {
        self != Kind::Roomy
    }

    pub(crate) fn name(self) -> &'static str {
        match self {
            Kind::Quiet => "quiet",
            Kind::Churn => "churn",
            Kind::Roomy => "roomy",
        }
    }
}

/// What a daemon is started with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Shape {
    pub(crate) host_bytes: u64,
    pub(crate) nvme_bytes: u64,
    pub(crate) segment_bytes: u64,
    pub(crate) engine: &'static str,
    pub(crate) encryption: &'static str,
}

impl Shape {
    pub(crate) fn draw(small: bool, random: &mut Random) -> Shape {
        Shape {
            host_bytes: if small { 16 * MIB } else { 32 * MIB },
            nvme_bytes: if small { 64 * MIB } else { 1024 * MIB },
            segment_bytes: random.pick(&[2 * MIB, 4 * MIB, 8 * MIB]),
            engine: random.pick(&["auto", "threads"]),
            encryption: random.pick(&["aes-256-gcm", "none"]),
        }
    }
}

/// Harm that a run does to itself, to see that it is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Plant {
    /// A segment file is gone.
    Segment,
    /// The register of namespaces is as it was before an invalidation that was acknowledged.
    Register,
}

/// One round.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    pub(crate) kind: Kind,
    pub(crate) load: Shape,
    /// What the daemon is started with after the kill: never less room.
    pub(crate) check: Shape,
    pub(crate) flush_after: Duration,
    pub(crate) kill_after: Duration,
    /// Moments after the start, each with a namespace.
    pub(crate) invalidations: Vec<(Duration, usize)>,
    /// Bytes that may be put before the flush.
    pub(crate) put_bytes: u64,
    /// Bytes that may be put after it.
    pub(crate) put_bytes_after: u64,
    /// The daemon that was asked afterwards is killed, too, instead of stopped in order.
    pub(crate) kill_again: bool,
}

impl Plan {
    /// The plan of a round, counted from 1.
    pub(crate) fn draw(round: u64, random: &mut Random) -> Plan {
        let kind = Kind::of(round);
        let mut milliseconds = |low, high| Duration::from_millis(random.between(low, high));
        let flush_after = milliseconds(300, 900);
        let kill_after = milliseconds(10, 300);
        let mut invalidations = Vec::new();
        if random.chance(300) {
            invalidations.push((flush_after.mul_f64(0.7), random.index(NAMESPACES.len())));
        }
        if kind != Kind::Quiet && random.chance(250) {
            // Perhaps at the very moment of the kill.
            let late = kill_after.mul_f64(random.between(0, 100) as f64 / 100.0);
            invalidations.push((flush_after + late, random.index(NAMESPACES.len())));
        }
        let load = Shape::draw(kind.is_small(), random);
        let mut check = Shape::draw(kind.is_small() && random.chance(500), random);
        check.nvme_bytes = check.nvme_bytes.max(load.nvme_bytes);
        Plan {
            kind,
            load,
            check,
            flush_after,
            kill_after,
            invalidations,
            put_bytes: if kind.is_small() { 120 * MIB } else { 64 * MIB },
            put_bytes_after: match kind {
                Kind::Quiet => 0,
                Kind::Churn => 64 * MIB,
                Kind::Roomy => 32 * MIB,
            },
            kill_again: random.chance(500),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_fixes_the_plans_and_no_check_has_less_room_than_its_load() {
        for round in 1..200 {
            let plan = Plan::draw(round, &mut Random::new(round));
            let again = Plan::draw(round, &mut Random::new(round));
            assert_eq!(format!("{plan:?}"), format!("{again:?}"));
            assert!(plan.check.nvme_bytes >= plan.load.nvme_bytes);
            assert_eq!(plan.kind.is_small(), round % 2 == 1, "small and roomy take turns");
            let flush = plan.flush_after;
            let quiet = plan.invalidations.iter().all(|(at, _)| *at < flush);
            assert!(plan.kind != Kind::Quiet || quiet, "nothing but gets after the flush");
        }
    }
}
