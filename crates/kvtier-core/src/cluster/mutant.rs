/// A bug planted at run time in a [`super::Cluster`], for the simulator to find. Without the feature `mutants` none of this is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ClusterMutant {
    /// A lease counts from when its majority was had, not from when the round was sent.
    LeaseFromReceipt,
    /// A grant counts before what it carried is durable.
    GrantBeforeDurable,
    /// A grant counts although more was to come.
    IncompleteGrantCounts,
    /// Less than half of the list passes for a majority.
    MinorityIsMajority,
    /// The wait for leases to expire leaves out the drift of the clocks.
    WaitWithoutDrift,
    /// The wait counts from when the raise began, not from when a majority had it.
    WaitFromRaise,
    /// Who has not confirmed counts as expired as soon as a majority has it.
    WaitSkipped,
    /// A grant that was given to an earlier incarnation counts.
    LateGrantAccepted,
    /// A confirmation that was given to an earlier incarnation counts.
    LateStoredAccepted,
    /// A member confirms what is not durable yet.
    ConfirmBeforeDurable,
    /// Versions of an earlier incarnation pass for this one's.
    StaleVersionTrusted,
    /// A raise does not go above what others have.
    OutbidSkipped,
    /// Blocks are published under generations that no majority has.
    UnsettledPublished,
    /// An older generation replaces a newer one.
    MergeByLatest,
    /// A raise is forgotten once it has reached.
    SilentAfterReach,
    /// Any number of raises is open.
    UnboundedOperations,
}

impl ClusterMutant {
    /// Every mutant, by name.
    pub const ALL: &[(&str, ClusterMutant)] = &[
        ("lease_from_receipt", ClusterMutant::LeaseFromReceipt),
        ("grant_before_durable", ClusterMutant::GrantBeforeDurable),
        ("incomplete_grant_counts", ClusterMutant::IncompleteGrantCounts),
        ("minority_is_majority", ClusterMutant::MinorityIsMajority),
        ("wait_without_drift", ClusterMutant::WaitWithoutDrift),
        ("wait_from_raise", ClusterMutant::WaitFromRaise),
        ("wait_skipped", ClusterMutant::WaitSkipped),
        ("late_grant_accepted", ClusterMutant::LateGrantAccepted),
        ("late_stored_accepted", ClusterMutant::LateStoredAccepted),
        ("confirm_before_durable", ClusterMutant::ConfirmBeforeDurable),
        ("stale_version_trusted", ClusterMutant::StaleVersionTrusted),
        ("outbid_skipped", ClusterMutant::OutbidSkipped),
        ("unsettled_published", ClusterMutant::UnsettledPublished),
        ("merge_by_latest", ClusterMutant::MergeByLatest),
        ("silent_after_reach", ClusterMutant::SilentAfterReach),
        ("unbounded_operations", ClusterMutant::UnboundedOperations),
    ];
}
