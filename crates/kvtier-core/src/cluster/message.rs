use std::sync::Arc;

use super::{Incarnation, Known, Round};
use crate::{Generation, OperationId};

/// A name and the generation that a member has durable and in force.
pub type Raised = (Arc<str>, Generation);

/// What members say to each other. Any of it may be lost, late, repeated or out of order. `incarnation` is the sender's, and `to` the one that is answered:
/// an answer to an earlier run is no answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// Asks for whatever the sender lacks, and with it for a grant. Answered by [`Message::Grant`].
    Renew {
        /// Sender's.
        incarnation: Incarnation,
        /// Sender's count.
        round: Round,
        /// What the sender has durable of the receiver's table; `None` where it knows nothing of this run.
        known: Option<Known>,
    },
    /// What the asker lacks. It counts as a grant of the round if it is `complete`.
    Grant {
        /// The asker's.
        to: Incarnation,
        /// The asker's.
        round: Round,
        /// With `raised` durable the asker knows the sender's table this far.
        known: Known,
        /// Nothing is left after this.
        complete: bool,
        /// At most [`super::ClusterSettings::entries_per_message_max`].
        raised: Vec<Raised>,
    },
    /// What generation of this name has the receiver? Answered by [`Message::Told`].
    Ask {
        /// Sender's.
        incarnation: Incarnation,
        /// Sender's, to be repeated.
        operation: OperationId,
        /// Which.
        name: Arc<str>,
    },
    /// Answers [`Message::Ask`].
    Told {
        /// The asker's.
        to: Incarnation,
        /// The asker's.
        operation: OperationId,
        /// Durable at the sender; zero for a name that was never raised there.
        generation: Generation,
    },
    /// Record this. Answered by [`Message::Stored`] once it is durable and in force.
    Store {
        /// Sender's.
        incarnation: Incarnation,
        /// Sender's, to be repeated.
        operation: OperationId,
        /// Which.
        name: Arc<str>,
        /// At least this.
        generation: Generation,
    },
    /// Answers [`Message::Store`].
    Stored {
        /// The asker's.
        to: Incarnation,
        /// The asker's.
        operation: OperationId,
        /// Durable and in force at the sender.
        generation: Generation,
    },
}
