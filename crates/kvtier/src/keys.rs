//! What a restart must know of namespaces: their numbers, their generations, and the keys of what lies on NVMe.
//!
//! Read first: [`StateFiles`] (all of it, opened), [`Register`] (namespaces), [`MasterKey`] (what wraps their keys).
//!
//! Absent on purpose: how records are sealed (that is the storage's), and which generation comes next (the core's).
//!
//! Three files of the state directory, little-endian, fixed width, versioned; what is reserved is zero. The register is
//! locked for as long as it is open.
//!
//! # `master.key`
//!
//! 64 hexadecimal digits, mode 0600, made at the first start; or any file that the operator names. Beside it, during a
//! rotation, `master.key.next`.
//!
//! # `register`
//!
//! ```text
//! 0        4096     8192     12288    16384    20480
//! | header | slot 0          | slot 1          | ...
//! |        | half 0 | half 1 | half 0 | half 1 |
//! ```
//!
//! A slot's number is its namespace's id, for good. Of its two halves the one with the higher sequence counts. A change
//! overwrites the other half and is durable with one sync; then, when nobody waits, the half that counted before is
//! overwritten with the same bytes, so that an older generation and its key are in neither half. A half that was torn
//! fails its checksum, and the other one still counts. Each lies in a page of its own, so that no device writes both at
//! once, and uses one sector of it.
//!
//! Header (its page's first 512 bytes; written once):
//! ```text
//!   0   8  magic "kvtier\x01R"
//!   8   4  version (1)
//!  12   4  bytes of a half (4096)
//!  16  16  incarnation: random, drawn when the register is made; binds every half to it
//!  32 476  reserved
//! 508   4  CRC32C of bytes 0..508
//! ```
//! Half (its page's first 512 bytes):
//! ```text
//!   0   4  magic "kv\x01S"
//!   4   2  version (1)
//!   6   2  state: 1 a namespace, 2 lost (damaged once; the number is never used again)
//!   8  16  incarnation
//!  24   4  slot
//!  28   2  bytes of the domain's label
//!  30   2  bytes of the namespace's name
//!  32   8  sequence
//!  40   8  generation
//!  48  16  id of the master key: 16 bytes of its BLAKE3 digest, context "kvtier v1 master key id"
//!  64 128  label of the trust domain, UTF-8
//! 192 256  name of the namespace, UTF-8
//! 448  12  nonce, random
//! 460  48  data key and its tag: AES-256-GCM by the master key (BLAKE3, context "kvtier v1 master key wraps data keys");
//!          bytes 0..448 are associated data
//! 508   4  CRC32C of bytes 0..508
//! ```
//!
//! # `realizations`
//!
//! ```text
//! 0        4096      4160      4224
//! | header | record 0 | record 1 | ...
//! ```
//! A record's number is its realization's id. Records are appended and synced before an id is given to anyone. One that is
//! not whole keeps its number.
//!
//! Header (64 bytes) and record (64 bytes):
//! ```text
//!  0  8  magic "kvtier\x01Z"                       0  4  number
//!  8  4  version (1)                               4  4  reserved
//! 12  4  reserved                                  8 32  realization
//! 16 16  incarnation of the register              40 20  reserved
//! 32 28  reserved                                 60  4  CRC32C of the incarnation followed by bytes 0..60
//! 60  4  CRC32C of the incarnation followed by bytes 0..60
//! ```
//! Without this file, or with another register's, every namespace gets a new generation and key at the start: a number
//! would mean another realization than the records on NVMe mean by it.

mod anchor;
pub(crate) mod disk;
pub(crate) mod error;
mod master;
mod realizations;
mod register;
mod slot;
mod state;

#[cfg(test)]
pub(crate) mod crash_disk;

pub(crate) use anchor::{Anchor, MARKER_FILE as ANCHORED_FILE};
pub use error::{KeyError, RecordError};
pub(crate) use master::read_secret;
pub use master::{KeyId, MasterKey};
pub use realizations::{Realizations, placeholder};
pub use register::{Change, Register};
pub use slot::Label;
pub use state::{Rotation, StateFiles, rotate_in_use, rotate_master_key};
