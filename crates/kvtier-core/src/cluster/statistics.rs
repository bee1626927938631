/// Counters and gauges of a [`super::Cluster`]. Counters never fall within a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClusterStatistics {
    /// Names with a generation. Gauge.
    pub names: u64,
    /// Raises that some member has not confirmed. Gauge.
    pub operations: u64,
    /// Records in flight. Gauge.
    pub records_in_flight: u64,
    /// Renewals sent, each to all other members.
    pub rounds: u64,
    /// Grants that counted.
    pub grants: u64,
    /// Times that the lease was extended.
    pub renewals: u64,
    /// Times that the lease ran out.
    pub lapses: u64,
    /// Grants given.
    pub granted: u64,
    /// Grants given that left something for the next.
    pub continuations: u64,
    /// Names that others had raised, as they were recorded.
    pub learnt: u64,
    /// Records that failed.
    pub record_failures: u64,
    /// Raises begun.
    pub raises: u64,
    /// Raises that had to go above what another member had.
    pub outbid: u64,
    /// Raises whose deadline passed before a majority had them.
    pub not_stored: u64,
    /// Raises that reached every member or fenced those that they did not.
    pub reached: u64,
    /// Raises that every member has confirmed.
    pub completed: u64,
    /// Asks and stores that were sent again.
    pub resends: u64,
    /// Messages that answer an earlier run, or what is over.
    pub late_messages: u64,
    /// Messages that no member sends: from nobody of the list, too large, of rounds and versions that never were.
    pub invalid_messages: u64,
    /// Messages dropped because of a bound; their senders try again.
    pub busy_messages: u64,
    /// Messages with names that the table had no room for: who sends them cannot renew this member's lease.
    pub names_refused: u64,
    /// Answers of the driver to what it was not asked.
    pub late_events: u64,
}
