use super::{Incarnation, Known, MemberId, Raised, Round};
use crate::OperationId;

/// What is done once a record is durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// The grant that carried it counts.
    Grant { known: Known, round: Round, complete: bool },
    /// It is confirmed.
    Confirm {
        incarnation: Incarnation,
        operation: OperationId,
    },
    /// A raise of this member's own goes on.
    Raise(OperationId),
}

/// Generations that are being recorded.
pub(super) struct Learning {
    /// Who has them; this member itself for a raise of its own.
    pub(super) from: MemberId,
    pub(super) raised: Vec<Raised>,
    pub(super) then: Then,
}
