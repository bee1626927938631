use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender};
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
    Stop,
}

pub(super) type Chores = Sender<Chore>;

pub(super) fn run(inner: &Arc<Inner>, chores: &Receiver<Chore>) {
    for chore in chores {
        match chore {
            Chore::Open { ticket, .. } | Chore::Seal { ticket, .. } | Chore::Sync { ticket }
                if ticket.is_cancelled() =>
            {
                ticket.answer(Err(Failure::Deadline));
            }
            Chore::Open { ticket, segment, bytes } => open(inner, ticket, segment, bytes),
            // Also when cancelled: nobody will ask for this segment again, and its file would stay.
            Chore::Close { ticket, segment } => {
                if let Some(closed) = inner.remove_segment(segment) {
                    closed.remove();
                }
                ticket.answer(Ok(Completion::Done));
            }
            Chore::Seal { ticket, segment } => match segment.write_seal() {
                Ok(bytes) => {
                    inner.count_device_write(bytes);
                    ticket.answer(Ok(Completion::Done));
                }
                Err(error) => inner.fail(ticket, "write the index of a segment", error),
            },
            Chore::Sync { ticket } => match inner.sync() {
                Ok(()) => ticket.answer(Ok(Completion::Done)),
                Err(error) => inner.fail(ticket, "sync segment files", error),
            },
            Chore::Stop => return,
        }
    }
}

fn open(inner: &Arc<Inner>, ticket: Ticket, segment: SegmentId, bytes: u64) {
    match Segment::create(&inner.directory, segment, bytes) {
        Ok(opened) => {
            inner.count_device_write(super::format::ALIGNMENT);
            inner.add_segment(opened);
            ticket.answer(Ok(Completion::Done));
        }
        Err(error) => inner.fail(ticket, "make a segment file", error),
    }
}
