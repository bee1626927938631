use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use kvtier_core::{Completion, Failure, SegmentId};

use super::segment::Segment;
use super::tier::{Inner, Ticket};

/// What is done to whole files, one after another on a thread of its own, for any of it may wait for the disk.
pub(super) enum Chore {
    Open {
        ticket: Ticket,
        segment: SegmentId,
        bytes: u64,
    },
    Close {
        ticket: Ticket,
        segment: SegmentId,
    },
    Seal {
        ticket: Ticket,
        segment: Arc<Segment>,
    },
    Sync {
        ticket: Ticket,
    },
    /// A record was deleted in the index of this segment.
    WriteIndex {
        segment: Arc<Segment>,
    },
    /// Something was written since everything was last synced.
    SyncLater,
    Stop,
}

pub(super) type Chores = Sender<Chore>;

pub(super) fn run(inner: &Arc<Inner>, chores: &Receiver<Chore>) {
    let mut sync_at: Option<Instant> = None;
    loop {
        let chore = match sync_at {
            None => chores.recv().ok(),
            Some(at) => match chores.recv_deadline(at) {
                Ok(chore) => Some(chore),
                Err(RecvTimeoutError::Timeout) => {
                    sync_at = None;
                    if let Err(error) = inner.sync_unasked() {
                        inner.complain("sync segment files", &error.into());
                        sync_at = Some(Instant::now() + inner.flush_interval());
                    }
                    continue;
                }
                Err(RecvTimeoutError::Disconnected) => None,
            },
        };
        match chore {
            None | Some(Chore::Stop) => return,
            Some(Chore::SyncLater) => {
                sync_at.get_or_insert_with(|| Instant::now() + inner.flush_interval());
            }
            Some(chore) => carry_out(inner, chore),
        }
    }
}

fn carry_out(inner: &Arc<Inner>, chore: Chore) {
    match chore {
        Chore::Open { ticket, .. } | Chore::Seal { ticket, .. } | Chore::Sync { ticket } if ticket.is_cancelled() => {
            ticket.answer(Err(Failure::Deadline));
        }
        Chore::Open { ticket, segment, bytes } => open(inner, ticket, segment, bytes),
        // Also when cancelled: nobody will ask for this segment again, and its file would stay.
        Chore::Close { ticket, segment } => close(inner, ticket, segment),
        Chore::Seal { ticket, segment } => match segment.write_seal() {
            Ok(bytes) => {
                inner.count_device_write(bytes);
                inner.written();
                ticket.answer(Ok(Completion::Done));
            }
            Err(error) => inner.fail(ticket, "write the index of a segment", error),
        },
        Chore::Sync { ticket } => match inner.sync() {
            Ok(()) => ticket.answer(Ok(Completion::Done)),
            Err(error) => inner.fail(ticket, "sync segment files", error),
        },
        Chore::WriteIndex { segment } => match segment.write_out() {
            Ok(bytes) => {
                inner.count_device_write(bytes);
                inner.written();
            }
            Err(error) => inner.complain("write the index of a segment", &error.into()),
        },
        Chore::SyncLater | Chore::Stop => unreachable!("the loop's own"),
    }
}

fn open(inner: &Arc<Inner>, ticket: Ticket, segment: SegmentId, bytes: u64) {
    match Segment::create(&inner.volume, segment, bytes, inner.encryption()) {
        Ok(opened) => {
            inner.count_device_write(super::format::ALIGNMENT);
            inner.add_segment(opened);
            ticket.answer(Ok(Completion::Done));
        }
        Err(error) => inner.fail(ticket, "make a segment file", error),
    }
}

/// What was copied out of a segment must be as safe as it was there before its file goes.
fn close(inner: &Arc<Inner>, ticket: Ticket, segment: SegmentId) {
    if inner.has_relocated()
        && let Err(error) = inner.sync()
    {
        return inner.fail(ticket, "sync segment files", error);
    }
    if inner.remove_segment(segment).is_some() {
        inner.volume.remove(segment);
    }
    // A segment that is said to be closed must not come back with records that were deleted since.
    if let Err(error) = inner.volume.sync() {
        return inner.fail(ticket, "make it durable that a segment is gone", error);
    }
    ticket.answer(Ok(Completion::Done));
}
