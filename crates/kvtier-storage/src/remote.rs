//! Bytes kept by somebody else: sealed objects, and the servers that hold them.
//!
//! A server is told nothing: names are keyed digests, contents are sealed, and what it gives back is believed only once it opened. What
//! leaves with an object is its length and when it is asked for.
//!
//! [`ObjectKey`] names, seals and opens; it needs no server. [`ObjectStore`] is what puts, fetches and erases: the feature `redis` brings
//! `redis::RedisStore`, the feature `s3` brings `s3::S3Store`.
//! Absent on purpose: which block is worth a trip, who holds the keys, and retries.

mod object;
#[cfg(feature = "redis")]
pub mod redis;
#[cfg(feature = "s3")]
pub mod s3;
mod store;

pub use object::{Contents, OBJECT_OVERHEAD_BYTES, ObjectError, ObjectGroup, ObjectKey, ObjectName};
pub use store::{Erased, ObjectStore, StoreError};
