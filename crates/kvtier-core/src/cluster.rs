//! Purges that reach every member of a cluster, and the fence that keeps a member that cannot be reached from serving what was purged.
//!
//! [`Cluster`] is one member's state machine: pure like the rest of this room, it sends and records only through
//! [`ClusterAction`]s. Each member has a table of names and generations, merged by maximum and durable: an action of its own asks
//! the driver to record what was learnt, and nothing is granted, told or confirmed before the driver has said that it is durable **and in force**.
//! Names are `Arc<str>`, as they go over the wire (`DOMAIN/NAME`): a number that one node gave a name means nothing to another.
//!
//! **Renewal.** At its start and every [`ClusterSettings::renew_every`] a member sends [`Message::Renew`] to all others: the number of the round, and how
//! much of the receiver's table it has durable ([`Known`]). The answer, [`Message::Grant`], carries the rest in bounded pieces; where nothing
//! changed it is a few dozen bytes. A grant counts once all that it carried is durable and nothing more is to come.
//! With [`ClusterSettings::fenced`], a member that a majority of the list (itself included) granted a round serves until that round's **sending** plus
//! [`ClusterSettings::lease_ttl`], on its own clock. Without, the same exchange spreads generations and nothing lapses.
//!
//! **Raise.** A purge takes four steps at its coordinator, whose own register was raised before ([`Cluster::raise`]):
//! 1. *Ask*: what generation does each member have of this name? With a fence a majority has to tell. If any is not below the one raised, the coordinator
//!    raises its own above them first: a purge may not hide behind another's generation, under which blocks were written before it began.
//! 2. *Store*: every member records the generation. It is stored when a majority has it.
//! 3. *Wait*, from the moment at which the coordinator knows of that majority: until every member has confirmed, or for a lease and the drift of the clocks.
//!    A renewal sent after that moment meets a member that stored the generation and takes it along; a lease renewed before it is over by then.
//! 4. [`ClusterAction::Reached`]; later confirmations follow one by one ([`ClusterAction::Confirmed`]) until there is nobody left ([`ClusterAction::Completed`]).
//!
//! **Settled.** Step 1 finds only what a majority has. With a fence a block may therefore be published under a generation only when the
//! member knows that a majority has it ([`Cluster::is_settled`]); until then, for a trip or at most a renewal after a purge, puts of that namespace are refused.
//!
//! **What the driver owes.** A clock that goes on while the machine sleeps, read after a message was taken and before one is sent. Senders that were
//! authenticated. Every [`ClusterAction::Record`] answered. An [`Incarnation`] that no earlier run had. [`Cluster::is_serving`] asked
//! again after a read's bytes have arrived. And a register that never falls: who starts from an older image than the one he had must not join (the
//! anchor refuses that), for a majority that forgets proves nothing.

mod action;
mod fence;
mod learning;
mod machine;
mod member;
mod message;
#[cfg(feature = "mutants")]
mod mutant;
mod name_table;
mod raise;
mod settings;
mod statistics;

#[cfg(test)]
mod tests;

pub use action::{ClusterAction, ClusterEvent, Reach};
pub use machine::{Cluster, RaiseRefusal, RaiseRequest};
pub use member::{Incarnation, Known, MemberId, Round, Version};
pub use message::{Message, Raised};
#[cfg(feature = "mutants")]
pub use mutant::ClusterMutant;
pub use settings::{CheckedClusterSettings, ClusterSettings};
pub use statistics::ClusterStatistics;
