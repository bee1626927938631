use std::collections::BTreeMap;
use std::fmt::Write;

use kvtier_core::{Action, Completion, Event, Failure, Tier};

/// Something that goes wrong in a world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A completion that never comes: only a reset ends the operation.
    Lost,
    /// A completion that comes after its tier was reset.
    Late,
    /// A completion that comes twice.
    Duplicate,
    /// A completion for an operation that nobody asked for.
    Unknown,
    /// A device error before anything was done.
    Io,
    /// A device error after a part was done.
    IoHalfway,
    /// A device queue that is full.
    Busy,
    /// A device that drops an operation because its time is over.
    Deadline,
    /// No room for a segment or a record.
    Full,
    /// A write that is reported as done, of which only a part arrived.
    TornWrite,
    /// A bit of a record flips at rest.
    BitFlip,
    /// A device that takes many times as long as usual.
    Slow,
    /// The timer that drives the manager fires late.
    LateTimer,
    /// A client's process dies with all it holds.
    ClientGone,
    /// A client's connection breaks while its process lives on and still maps the memory.
    ClientLost,
    /// A client's process stops, outlives all its leases and reservations, and wakes up.
    ClientStalled,
    /// A client names leases, reservations or namespaces that are not its own, or lengths over its slots'.
    ClientLies,
    /// The process that holds the manager dies.
    Kill,
    /// Its machine loses power.
    PowerCut,
    /// A restart gives the NVMe tier another size.
    Resize,
    /// A restart finds an older image of the register and the NVMe tier.
    Restored,
    /// A move that takes long, and its namespace is purged meanwhile.
    PurgedMeanwhile,
    /// The manager stops giving out leases and reservations.
    Drain,
}

impl Fault {
    const ALL: [Fault; 23] = [
        Fault::Lost,
        Fault::Late,
        Fault::Duplicate,
        Fault::Unknown,
        Fault::Io,
        Fault::IoHalfway,
        Fault::Busy,
        Fault::Deadline,
        Fault::Full,
        Fault::TornWrite,
        Fault::BitFlip,
        Fault::Slow,
        Fault::LateTimer,
        Fault::ClientGone,
        Fault::ClientLost,
        Fault::ClientStalled,
        Fault::ClientLies,
        Fault::Kill,
        Fault::PowerCut,
        Fault::Resize,
        Fault::Restored,
        Fault::PurgedMeanwhile,
        Fault::Drain,
    ];
}

const ACTIONS: [&str; 22] = [
    "open_segment",
    "close_segment",
    "seal_segment",
    "demote",
    "promote",
    "relocate",
    "sync_tier",
    "reset_tier",
    "record_generation",
    "forget_record",
    "fetch_done",
    "reserve_done",
    "invalidated",
    "flushed",
    "zero_host_segment",
    "erase_records",
    "destroyed",
    "forgotten",
    "promote_to_hbm",
    "open_hbm_segment",
    "close_hbm_segment",
    "zero_hbm_segment",
];

/// The name under which an action is counted.
pub(crate) fn action_name(action: &Action) -> &'static str {
    let index = match action {
        Action::OpenSegment { tier: Tier::Hbm, .. } => 19,
        Action::CloseSegment { tier: Tier::Hbm, .. } => 20,
        Action::ZeroSegment { tier: Tier::Hbm, .. } => 21,
        Action::OpenSegment { .. } => 0,
        Action::CloseSegment { .. } => 1,
        Action::SealSegment { .. } => 2,
        Action::Demote { .. } => 3,
        Action::Promote { .. } => 4,
        Action::Relocate { .. } => 5,
        Action::SyncTier { .. } => 6,
        Action::ResetTier { .. } => 7,
        Action::RecordGeneration { .. } => 8,
        Action::ForgetRecord { .. } => 9,
        Action::FetchDone { .. } => 10,
        Action::ReserveDone { .. } => 11,
        Action::Invalidated { .. } => 12,
        Action::Flushed { .. } => 13,
        Action::ZeroSegment { .. } => 14,
        Action::EraseRecords { .. } => 15,
        Action::Destroyed { .. } => 16,
        Action::Forgotten { .. } => 17,
        Action::PromoteToHbm { .. } => 18,
    };
    ACTIONS[index]
}

const EVENTS: [&str; 8] = ["done", "written", "busy", "io", "corrupt", "full", "deadline", "erased"];

fn event_name(event: &Event) -> &'static str {
    let index = match event.outcome {
        Ok(Completion::Done) => 0,
        Ok(Completion::Written { .. }) => 1,
        Err(Failure::Busy) => 2,
        Err(Failure::Io) => 3,
        Err(Failure::Corrupt) => 4,
        Err(Failure::Full) => 5,
        Err(Failure::Deadline) => 6,
        Ok(Completion::Erased { .. }) => 7,
    };
    EVENTS[index]
}

const ANSWERS: [&str; 31] = [
    "fetched_miss",
    "fetched_busy",
    "fetched_from_hbm",
    "fetched_from_host",
    "fetched_from_nvme",
    "fetch_waited",
    "reserved_present",
    "reserved_busy",
    "reserved_granted",
    "reserve_waited",
    "granted_ahead",
    "sealed_published",
    "sealed_present",
    "sealed_stale",
    "sealed_busy",
    "sealed_invalid",
    "deleted",
    "refused_denied",
    "refused_busy",
    "refused_draining",
    "refused_invalid",
    "refused_unknown_client",
    "came_back",
    "came_back_as_flushed",
    "refused_behind_anchor",
    "advanced_above_anchor",
    "purge_resumed",
    "purge_acknowledged",
    "purged_by_label",
    "present_under_label",
    "sealed_over_another",
];

/// How often each thing occurred. What never occurs is not tested: [`Counts::missing`] names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Actions the manager asked for, by kind.
    pub actions: BTreeMap<&'static str, u64>,
    /// Events it was given, by outcome.
    pub events: BTreeMap<&'static str, u64>,
    /// Answers clients were given, by kind.
    pub answers: BTreeMap<&'static str, u64>,
    /// Faults, by kind.
    pub faults: BTreeMap<String, u64>,
}

impl Default for Counts {
    fn default() -> Self {
        Counts {
            actions: ACTIONS.iter().map(|name| (*name, 0)).collect(),
            events: EVENTS.iter().map(|name| (*name, 0)).collect(),
            answers: ANSWERS.iter().map(|name| (*name, 0)).collect(),
            faults: Fault::ALL.iter().map(|fault| (fault_name(*fault), 0)).collect(),
        }
    }
}

fn fault_name(fault: Fault) -> String {
    let mut name = String::new();
    for (index, letter) in format!("{fault:?}").chars().enumerate() {
        if letter.is_uppercase() && index > 0 {
            name.push('_');
        }
        name.push(letter.to_ascii_lowercase());
    }
    name
}

/// Counters of one world; [`Counts`] once it has ended.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    actions: BTreeMap<&'static str, u64>,
    events: BTreeMap<&'static str, u64>,
    answers: BTreeMap<&'static str, u64>,
    faults: BTreeMap<Fault, u64>,
}

impl Tally {
    pub(crate) fn action(&mut self, action: &Action) {
        *self.actions.entry(action_name(action)).or_default() += 1;
    }

    pub(crate) fn event(&mut self, event: &Event) {
        *self.events.entry(event_name(event)).or_default() += 1;
    }

    pub(crate) fn answer(&mut self, name: &'static str) {
        debug_assert!(ANSWERS.contains(&name), "{name} is not a known answer");
        *self.answers.entry(name).or_default() += 1;
    }

    pub(crate) fn fault(&mut self, fault: Fault) {
        *self.faults.entry(fault).or_default() += 1;
    }

    pub(crate) fn counts(&self) -> Counts {
        let mut counts = Counts::default();
        for (name, count) in &self.actions {
            *counts.actions.entry(name).or_default() += count;
        }
        for (name, count) in &self.events {
            *counts.events.entry(name).or_default() += count;
        }
        for (name, count) in &self.answers {
            *counts.answers.entry(name).or_default() += count;
        }
        for (fault, count) in &self.faults {
            *counts.faults.entry(fault_name(*fault)).or_default() += count;
        }
        counts
    }
}

impl Counts {
    /// Adds what another world counted.
    pub fn add(&mut self, other: &Counts) {
        for (mine, theirs) in [
            (&mut self.actions, &other.actions),
            (&mut self.events, &other.events),
            (&mut self.answers, &other.answers),
        ] {
            for (name, count) in theirs {
                *mine.entry(name).or_default() += count;
            }
        }
        for (name, count) in &other.faults {
            *self.faults.entry(name.clone()).or_default() += count;
        }
    }

    /// What never occurred, as `group name`.
    #[must_use]
    pub fn missing(&self) -> Vec<String> {
        self.groups()
            .into_iter()
            .flat_map(|(group, counts)| {
                counts
                    .into_iter()
                    .filter(|(_, count)| *count == 0)
                    .map(move |(name, _)| format!("{group} {name}"))
            })
            .collect()
    }

    fn groups(&self) -> [(&'static str, Vec<(&str, u64)>); 4] {
        let plain = |counts: &BTreeMap<&'static str, u64>| counts.iter().map(|(name, count)| (*name, *count)).collect();
        [
            ("action", plain(&self.actions)),
            ("event", plain(&self.events)),
            ("answer", plain(&self.answers)),
            (
                "fault",
                self.faults
                    .iter()
                    .map(|(name, count)| (name.as_str(), *count))
                    .collect(),
            ),
        ]
    }

    /// A table to read.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (group, counts) in self.groups() {
            for (name, count) in counts {
                // Writing to a string cannot fail.
                let _ = writeln!(text, "{group:<7} {name:<24} {count:>12}");
            }
        }
        text
    }

    /// `{"action": {name: count, ..}, "event": .., "answer": .., "fault": ..}`.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let groups = self.groups().into_iter().map(|(group, counts)| {
            let counts = counts
                .into_iter()
                .map(|(name, count)| (name.to_owned(), count.into()))
                .collect();
            (group.to_owned(), serde_json::Value::Object(counts))
        });
        serde_json::Value::Object(groups.collect())
    }
}
