//! The client protocol: what goes over the Unix socket between a client and a node. Pure: no I/O, and no panic, no
//! over-read and no allocation that depends on a count in the input.
//!
//! Read first: [`FrameStream`] (bytes in, frames out), [`Request`] and [`Reply`] (what a frame says), [`Array`] (thousands
//! of keys without an allocation).
//!
//! # Frame
//!
//! Little-endian, fixed width. A stream socket carries frames back to back; file descriptors ride beside the frames
//! that need them ([`Reply::SegmentAdded`], one each, in order).
//!
//! ```text
//!  0       4     6     8         16            24          32          36          40
//!  +-------+-----+-----+---------+-------------+-----------+-----------+-----------+----------------------
//!  |length |kind |flags|request  |deadline_us  |clock_ns   |releases   |reserved   | lease u64 x releases,
//!  |u32    |u16  |u16=0|u64      |u64          |u64        |u32        |u32 = 0    | then the body
//!  +-------+-----+-----+---------+-------------+-----------+-----------+-----------+----------------------
//! ```
//!
//! * `length`: bytes after the header, leases included; at most [`FRAME_BYTES_MAX`].
//! * `kind`: a request is below 0x4000, a notice of the node's own 0x4000 and up, a reply its request's kind + 0x8000,
//!   an error 0xffff.
//! * `request`: chosen by the client, echoed in the reply; 0 in notices.
//! * `deadline_us`: how long the client will wait, relative; 0 lets the node choose. 0 in replies.
//! * `clock_ns`: the client's virtual time; 0 unless the node said [`Welcome::client_clock`]. 0 in replies.
//! * `releases`: leases that the client gives back before the request itself is looked at, at most [`KEYS_MAX`]. 0 in replies.
//!
//! # Body
//!
//! Fixed part, then arrays, then extensions up to the end. `array(T)` is a u32 count and that many records; `bytes` is a
//! u32 length and that many bytes. An extension is `tag u16, length u16, bytes`, tags strictly rising; a reader keeps
//! what it does not know and skips it.
//!
//! ```text
//!  kind   request         body                                                                     reply
//!  0x0001 Hello           version_min u16, version_max u16, token bytes(<=256)                     Welcome
//!  0x0002 OpenNamespace   realization [32], name bytes(1..=256, UTF-8)                             NamespaceOpened
//!  0x0003 Lookup          keys                                                                     Found
//!  0x0004 Fetch           keys, preceded by scope u32 (0 prefix, 1 each)                           Fetched
//!  0x0005 Reserve         keys, then length u32 x the same count                                   Reserved
//!  0x0006 Seal            handle u32, ahead_length u32, ahead_count u32, zero u32, generation u64, array(item)  Sealed
//!  0x0007 Grant           length u32, count u32                                                    Granted
//!  0x0008 Release         (the leases in front are all of it)                                      none
//!  0x0009 Abandon         array(reservation u64)                                                   none
//!  0x000a Delete          keys                                                                     Deleted
//!  0x000b Invalidate      name bytes(1..=256, UTF-8)                                               Invalidated
//!  0x000c Flush           -                                                                        Flushed
//!  0x000d Status          -                                                                        Status
//!  0x000e Goodbye         -                                                                        Farewell
//!  0x000f Watch           since u64, wait_ms u32, zero u32                                         Watched
//!  0x0010 Confirm         generation u64, name bytes(1..=256, UTF-8), processor bytes(1..=256, UTF-8)  Confirmed
//!  0x0011 Explain         keys                                                                     Explained
//!  0x0012 Computed        tokens u32, before_tokens u32, took_us u64                               Counted
//!  0x0013 Advise          keys, preceded by advice u32 (0 closed, 1 pinned, 2 expected: then for ms u32; 3 answered: tokens u32)   Advised
//!
//!  keys  = handle u32, lineage u32 (0 chain after unknown, 1 chain after root, 2 chain after `parent`, 3 independent),
//!          parent [16] (zero unless lineage is 2), array(hash [16])
//!  item  = reservation u64, hash [16], parent [16], parent_kind u32 (0 unknown, 1 root, 2 block), length u32, tokens u32, zero u32
//!          (56 bytes)
//!  extensions of requests (hints): 1 prompt_tokens u32, 2 local_prefix_tokens u32, 3 queue_wait_us u64, 4 can_split (empty),
//!          5 label u64 (of a put: `Label::of` its name), 6 session u64
//!  with can_split a lookup, and a fetch of each, may leave out the first keys that are elsewhere: their caller computes them meanwhile
//!  further extensions: 7 raw (empty; of a lookup: what exists, not what is worth fetching; a node that does not know it weighs),
//!          8 device [16] (UUID; of a fetch: who asks can read that device's memory, so blocks may be leased there)
//!
//!  kind   reply           body
//!  0x8001 Welcome         version u16, client_clock u16 (0, 1), batch_keys_max u32, block_bytes_max u32, zero u32, client u64,
//!                         lease_ttl_ms u64, reservation_ttl_ms u64
//!  0x8002 NamespaceOpened handle u32, zero u32, generation u64
//!  0x8003 Found           generation u64, array(tier u8: 0 absent, 1 host, 2 NVMe, 3 another node, 4 device)
//!  0x8004 Fetched         generation u64, array(fetched, 32 bytes)
//!  0x8005 Reserved        generation u64, array(reserved, 32 bytes)
//!  0x8006 Sealed          generation u64, array(outcome u8: 0 published, 1 present, 2 stale, 3 busy, 4 invalid), array(slot)
//!  0x8007 Granted         array(slot)
//!  0x800a Deleted         generation u64, array(u8: 0 was absent, 1 deleted)
//!  0x800b Invalidated     generation u64
//!  0x800c Flushed         written u64, left_out u64
//!  0x800d Status          json bytes(UTF-8)
//!  0x800e Farewell        -
//!  0x800f Watched         sequence u64, json bytes(UTF-8)
//!  0x8010 Confirmed       generation u64
//!  0x8011 Explained       json bytes(UTF-8)
//!  0x8012 Counted         -
//!  0x8013 Advised         blocks u32, zero u32
//!  0xffff Error           kind u32 (`ErrorKind::code`), message bytes(UTF-8, <=1024)
//!  0x4001 SegmentAdded    segment u32, zero u32, bytes u64; one descriptor beside it; before the first reply that names it;
//!                         above 0x7fffffff it is memory of the device that a fetch named: CUDA's shareable handle
//!  0x4002 SegmentRemoved  segment u32
//!
//!  extent   = segment u32, length u32, offset u64
//!  slot     = reservation u64, extent (24 bytes)
//!  fetched  = outcome u8 (0 miss, 1 busy, 2 leased), tier u8 (1, 2, 3), checked u8 (0, 1), zero u8, checksum u32, lease u64, extent;
//!             all zero behind an outcome of 0 or 1; checksum zero unless checked
//!  reserved = outcome u8 (0 present, 1 busy, 2 granted), zero [7], reservation u64, extent; all zero behind an outcome of 0 or 1
//! ```
//!
//! Each message has exactly one encoding: what decodes, encodes to the same bytes.
//!
//! # Versions
//!
//! Header, `Hello`, `Welcome` and `Error` never change. `Hello` offers a range, `Welcome` chooses; without overlap the
//! node answers `Error` and closes. Within a version, messages grow by extensions only.

mod array;
mod error;
mod extensions;
pub(crate) mod field;
#[cfg(feature = "fuzz")]
pub mod fuzz;
mod header;
mod record;
mod reply;
mod request;
mod stream;
#[cfg(test)]
mod tests;

pub use array::{Array, ArrayIter, Record};
pub use error::{DecodeError, EncodeError};
pub use extensions::Extensions;
pub use header::{Envelope, Frame, Header, Kind};
pub use reply::{Reply, Slot, Welcome};
pub use request::{AdviceKind, Ahead, Keys, Lineage, Request};
pub use stream::FrameStream;

/// The oldest version that this crate speaks.
pub const VERSION_MIN: u16 = 1;
/// The newest version that this crate speaks.
pub const VERSION_MAX: u16 = 1;
/// Bytes of a frame's header.
pub const HEADER_BYTES: usize = 40;
/// Most bytes after a frame's header: 1 MiB.
pub const FRAME_BYTES_MAX: usize = 1 << 20;
/// Most keys, items, slots or leases in one frame.
pub const KEYS_MAX: usize = 4096;
/// Longest name of a namespace, bytes.
pub const NAME_BYTES_MAX: usize = 256;
/// Longest time for which advice counts, milliseconds: an hour.
pub const ADVICE_MS_MAX: u32 = 3_600_000;
/// Longest wait of a watch, milliseconds.
pub const WATCH_MS_MAX: u32 = 10_000;
/// Longest token, bytes.
pub const TOKEN_BYTES_MAX: usize = 256;
/// Longest message of an error, bytes.
pub const MESSAGE_BYTES_MAX: usize = 1024;
