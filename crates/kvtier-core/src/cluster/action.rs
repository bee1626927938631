use super::{MemberId, Message, Raised};
use crate::{Generation, OperationId};

/// How far a purge got.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Fenced: no member serves an older generation any more.
    Fenced {
        /// These have it in force, the coordinator among them.
        confirmed: Vec<MemberId>,
        /// These have not said so, but any lease that they held is over: before they serve again they learn it.
        expired: Vec<MemberId>,
    },
    /// Fenced, but its deadline passed before a majority had it. It is not given up: [`Reach::Fenced`] follows when it can.
    NotStored {
        /// These have it in force, the coordinator among them if it could record what it chose.
        confirmed: Vec<MemberId>,
        /// These may serve older generations.
        unconfirmed: Vec<MemberId>,
    },
    /// Not fenced: all have confirmed, or the deadline has passed.
    Unfenced {
        /// These have it in force.
        confirmed: Vec<MemberId>,
        /// These may serve older generations.
        unconfirmed: Vec<MemberId>,
    },
}

/// What the driver must do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClusterAction {
    /// Not answered. Send this, or lose it: whatever matters is sent again.
    Send {
        /// To whom.
        to: MemberId,
        /// What.
        message: Message,
    },
    /// Answered with [`ClusterEvent`]. Raise these names in the register to at least these generations; answer only when they are durable and in force,
    /// which means that no read that starts later returns an older block.
    Record {
        /// Answer with this.
        operation: OperationId,
        /// Never empty.
        raised: Vec<Raised>,
    },
    /// Not answered. The member may serve from now on, or may no longer. For logs and events: reads ask [`super::Cluster::is_serving`].
    Serving {
        /// Whether it may.
        serving: bool,
    },
    /// Not answered. A purge got this far. Once for each, or twice where [`Reach::NotStored`] came first.
    Reached {
        /// From [`super::Cluster::raise`].
        operation: OperationId,
        /// What was raised to; above what was asked for where others had more.
        generation: Generation,
        /// How far.
        reach: Reach,
    },
    /// Not answered. After `Reached`: one more member has it in force.
    Confirmed {
        /// From [`super::Cluster::raise`].
        operation: OperationId,
        /// Who.
        member: MemberId,
    },
    /// Not answered. After `Reached`: every member has confirmed, and the operation is over.
    Completed {
        /// From [`super::Cluster::raise`].
        operation: OperationId,
    },
}

/// How the driver answers [`ClusterAction::Record`]. Unknown and late ids are ignored on purpose and counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterEvent {
    /// Of the action answered.
    pub operation: OperationId,
    /// All of it is durable and in force. Where not, it counts as not learnt. If some of it is in force all the same, the driver says so by
    /// [`super::Cluster::note`] once it is sure: until then no block is published under it.
    pub recorded: bool,
}
