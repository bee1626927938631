//! How an engine asks a node for blocks.
//!
//! A get leases blocks and hands them out in place, as memory that the node shares; a put writes into such memory and
//! seals. [`blocking::Namespace::get_into`] and [`blocking::Namespace::put_from`] do both for callers with buffers of
//! their own. The same operations as `async fn`s are on [`Namespace`].
//!
//! What is released rides in front of the next request, or goes alone after about 10 ms, so that a release never costs a
//! trip. A connection that fails is made anew by the next call; what was leased over the old one stays mapped but
//! answers `Closed`. After a fork the child must connect for itself: the parent's client answers `Closed` there.
//!
//! [`Submissions`] runs gets on threads of its own and says by a descriptor when one has ended. Memory that no `&mut [u8]`
//! may name, because others write it too, is a [`ForeignSlice`].
//!
//! Read first: [`blocking::Client`], [`BlockHandle`] (a leased block), [`blocking::BlockWriter`] (an unpublished one).

mod advice;
mod asynchronous;
mod batch;
pub mod blocking;
mod device_memory;
mod error;
mod foreign;
mod handle;
mod known;
mod link;
mod locks;
mod options;
mod outcome;
mod put;
mod returns;
mod session;
mod slots;
mod submissions;
#[cfg(test)]
mod tests;

pub use advice::Advice;
pub use asynchronous::{BlockWriter, Client, Namespace};
pub use error::ClientError;
pub use handle::BlockHandle;
pub use kvtier_core::FetchScope;
pub use kvtier_transfer::memory::ForeignSlice;
pub use options::ClientOptions;
pub use outcome::{Flushed, GetOutcome, PutOutcome, Watched, Writing, prefix_len};
pub use submissions::{Completion, SubmissionOptions, Submissions, Ticket};

pub use crate::wire::Lineage;
