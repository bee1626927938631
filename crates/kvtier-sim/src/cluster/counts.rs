use std::collections::BTreeMap;
use std::fmt::Write as _;

use kvtier_core::cluster::{ClusterAction, ClusterStatistics, Message, Reach};

/// Everything that has to occur.
const OCCURRENCES: &[&str] = &[
    "action renew",
    "action grant",
    "action ask",
    "action told",
    "action store",
    "action stored",
    "action record",
    "action serves",
    "action serves_no_more",
    "action reached_all",
    "action reached_expired",
    "action not_stored",
    "action reached_unfenced",
    "action reached_unconfirmed",
    "action confirmed",
    "action completed",
    "event recorded",
    "event not_recorded",
    "event timeout",
    "event reached_after_not_stored",
    "event raised_busy",
    "event raise_resumed",
    "event reached_resumed",
    "event noted",
    "event abandoned",
    "event published",
    "event unsettled",
    "fault lost",
    "fault late",
    "fault duplicate",
    "fault answered_twice",
    "fault invalid",
    "fault record_fails",
    "fault recorded_and_fails",
    "fault record_slow",
    "fault timer_late",
    "fault cut",
    "fault cut_one_way",
    "fault kill",
    "fault kill_while_recording",
    "fault kill_between_durable_and_answer",
    "fault reboot",
    "fault stall",
    "rule grants",
    "rule renewals",
    "rule lapses",
    "rule continuations",
    "rule learnt",
    "rule outbid",
    "rule resends",
    "rule late_messages",
    "rule invalid_messages",
    "rule busy_messages",
    "rule late_events",
];

/// How often each thing occurred. What never occurs is not tested: [`ClusterCounts::missing`] names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClusterCounts(BTreeMap<&'static str, u64>);

impl Default for ClusterCounts {
    fn default() -> Self {
        ClusterCounts(OCCURRENCES.iter().map(|name| (*name, 0)).collect())
    }
}

impl ClusterCounts {
    pub(super) fn count(&mut self, name: &'static str) {
        self.add_to(name, 1);
    }

    fn add_to(&mut self, name: &'static str, more: u64) {
        debug_assert!(OCCURRENCES.contains(&name), "{name} is not a known occurrence");
        *self.0.entry(name).or_default() += more;
    }

    pub(super) fn action(&mut self, action: &ClusterAction) {
        self.count(match action {
            ClusterAction::Send { message, .. } => match message {
                Message::Renew { .. } => "action renew",
                Message::Grant { .. } => "action grant",
                Message::Ask { .. } => "action ask",
                Message::Told { .. } => "action told",
                Message::Store { .. } => "action store",
                Message::Stored { .. } => "action stored",
            },
            ClusterAction::Record { .. } => "action record",
            ClusterAction::Serving { serving: true } => "action serves",
            ClusterAction::Serving { serving: false } => "action serves_no_more",
            ClusterAction::Reached { reach, .. } => match reach {
                Reach::Fenced { expired, .. } if expired.is_empty() => "action reached_all",
                Reach::Fenced { .. } => "action reached_expired",
                Reach::NotStored { .. } => "action not_stored",
                Reach::Unfenced { unconfirmed, .. } if unconfirmed.is_empty() => "action reached_unfenced",
                Reach::Unfenced { .. } => "action reached_unconfirmed",
            },
            ClusterAction::Confirmed { .. } => "action confirmed",
            ClusterAction::Completed { .. } => "action completed",
        });
    }

    /// A run of a member has ended.
    pub(super) fn run(&mut self, statistics: &ClusterStatistics) {
        for (name, count) in [
            ("rule grants", statistics.grants),
            ("rule renewals", statistics.renewals),
            ("rule lapses", statistics.lapses),
            ("rule continuations", statistics.continuations),
            ("rule learnt", statistics.learnt),
            ("rule outbid", statistics.outbid),
            ("rule resends", statistics.resends),
            ("rule late_messages", statistics.late_messages),
            ("rule invalid_messages", statistics.invalid_messages),
            ("rule busy_messages", statistics.busy_messages),
            ("rule late_events", statistics.late_events),
        ] {
            self.add_to(name, count);
        }
    }

    /// Adds what another world counted.
    pub fn add(&mut self, other: &ClusterCounts) {
        for (name, count) in &other.0 {
            *self.0.entry(name).or_default() += count;
        }
    }

    /// What never occurred.
    #[must_use]
    pub fn missing(&self) -> Vec<&'static str> {
        let none = self.0.iter().filter(|(_, count)| **count == 0);
        none.map(|(name, _)| *name).collect()
    }

    /// A table to read.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        for (name, count) in &self.0 {
            // Writing to a string cannot fail.
            let _ = writeln!(text, "{name:<44} {count:>12}");
        }
        text
    }

    /// `{name: count, ..}`.
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        let counts = self.0.iter().map(|(name, count)| ((*name).to_owned(), (*count).into()));
        serde_json::Value::Object(counts.collect())
    }
}
