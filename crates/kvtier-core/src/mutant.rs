/// A bug planted at run time, for the simulator to find. Without the feature `mutants` none of this is compiled.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mutant {
    /// Publishes a block when its slot is reserved.
    SealBeforeWrite,
    /// Frees the slot of an evicted block although a lease holds it.
    EarlySlotReuse,
    /// A read does not compare generations.
    SkippedGenerationCheck,
    /// Drops the host copy although its write to NVMe failed.
    LostDemotion,
    /// Counts a release twice.
    DoubleRelease,
    /// Takes the answer of an operation that was already failed by a reset.
    LateCompletionAccepted,
    /// Reclaims a host segment although leases hold slots in it.
    ReclaimUnderLease,
    /// A lease or reservation that expires frees its slot while the holder lives.
    SkipQuarantine,
    /// Acknowledges an invalidation before it is recorded.
    AckBeforeRecorded,
    /// Leases a block being promoted before its bytes arrived.
    PromotePublishesBeforeRead,
    /// A client that disconnects leaves its reservations behind.
    LeakedReservationOnDisconnect,
    /// Releases a lease for a client that does not hold it.
    ForeignReleaseAccepted,
    /// After a relocation the index still names the old extent.
    WrongExtentOnRelocate,
    /// A seal does not compare generations.
    SealIgnoresGeneration,
    /// Forgets a block whose children are cached.
    EvictParentBeforeChild,
    /// Lets any number of fetches and reserves wait.
    UnboundedWaiting,
    /// Forgetting a block does not give its slot back.
    ForgetLeaksSlot,
    /// Takes records of an older generation back after a restart.
    RestoreOlderGeneration,
    /// Of two records of one key, takes the older one back.
    RestoreOlderCopy,
    /// Appends to a restored segment, from its front.
    RestoredExtentReused,
    /// A flush answers before its writes are synced.
    FlushBeforeSync,
    /// Closes an emptied segment before the copies of its records are synced.
    CloseBeforeSync,
    /// Writes blocks to NVMe whose generation is not on record.
    DemoteBeforeRecorded,
    /// A block deleted while it is written is not forgotten on the device.
    DeleteMissesWrite,
    /// Leases a promotion whose namespace was invalidated before its bytes arrived.
    SkippedRecheck,
    /// A driver serves a namespace at the generation of a restored register, whatever the anchor knows. Planted where the
    /// driver is.
    RegisterResetOnRestore,
    /// A destruction does not wait for moves in flight.
    DestroySkipsMoves,
    /// A destruction passes over slots that somebody holds, and says nothing of them.
    DestroyForgetsHeld,
    /// A destruction overwrites the records of cached blocks too.
    DestroyErasesKept,
    /// A destruction is reported before the last overwriting was answered.
    DestroyedBeforeErased,
    /// Forgetting a scope does not refuse those who began to write before.
    ForgetWithoutFence,
    /// A block that is cached does not get the labels of later puts.
    PresentKeepsLabels,
    /// A restart does not bring the labels of blocks back.
    LabelsLostOnRestore,
    /// A destruction leaves device memory as it is.
    DestroySkipsHbm,
    /// The copy of a forgotten block in device memory stays known.
    HbmForgetsNothing,
    /// A copy to device memory counts although the device failed.
    HbmPublishesFailedCopy,
}

impl Mutant {
    /// Every mutant, by name.
    pub const ALL: &[(&str, Mutant)] = &[
        ("seal_before_write", Mutant::SealBeforeWrite),
        ("early_slot_reuse", Mutant::EarlySlotReuse),
        ("skipped_generation_check", Mutant::SkippedGenerationCheck),
        ("lost_demotion", Mutant::LostDemotion),
        ("double_release", Mutant::DoubleRelease),
        ("late_completion_accepted", Mutant::LateCompletionAccepted),
        ("reclaim_under_lease", Mutant::ReclaimUnderLease),
        ("skip_quarantine", Mutant::SkipQuarantine),
        ("ack_before_recorded", Mutant::AckBeforeRecorded),
        ("promote_publishes_before_read", Mutant::PromotePublishesBeforeRead),
        (
            "leaked_reservation_on_disconnect",
            Mutant::LeakedReservationOnDisconnect,
        ),
        ("foreign_release_accepted", Mutant::ForeignReleaseAccepted),
        ("wrong_extent_on_relocate", Mutant::WrongExtentOnRelocate),
        ("seal_ignores_generation", Mutant::SealIgnoresGeneration),
        ("evict_parent_before_child", Mutant::EvictParentBeforeChild),
        ("unbounded_waiting", Mutant::UnboundedWaiting),
        ("forget_leaks_slot", Mutant::ForgetLeaksSlot),
        ("restore_older_generation", Mutant::RestoreOlderGeneration),
        ("restore_older_copy", Mutant::RestoreOlderCopy),
        ("restored_extent_reused", Mutant::RestoredExtentReused),
        ("flush_before_sync", Mutant::FlushBeforeSync),
        ("close_before_sync", Mutant::CloseBeforeSync),
        ("demote_before_recorded", Mutant::DemoteBeforeRecorded),
        ("delete_misses_write", Mutant::DeleteMissesWrite),
        ("skipped_recheck", Mutant::SkippedRecheck),
        ("register_reset_on_restore", Mutant::RegisterResetOnRestore),
        ("destroy_skips_moves", Mutant::DestroySkipsMoves),
        ("destroy_forgets_held", Mutant::DestroyForgetsHeld),
        ("destroy_erases_kept", Mutant::DestroyErasesKept),
        ("destroyed_before_erased", Mutant::DestroyedBeforeErased),
        ("forget_without_fence", Mutant::ForgetWithoutFence),
        ("present_keeps_labels", Mutant::PresentKeepsLabels),
        ("labels_lost_on_restore", Mutant::LabelsLostOnRestore),
        ("destroy_skips_hbm", Mutant::DestroySkipsHbm),
        ("hbm_forgets_nothing", Mutant::HbmForgetsNothing),
        ("hbm_publishes_failed_copy", Mutant::HbmPublishesFailedCopy),
    ];
}
