use super::*;
use crate::memory::MemoryRegion;
use crate::remote::{RegionId, RemoteRegion};
use std::time::Duration;

fn piece(length: u64, access: RemoteAccess, direction: Direction) -> Piece {
    let region = Arc::new(RemoteRegion {
        id: RegionId(1),
        address: 0,
        bytes: 8192,
        access,
        remote_keys: Vec::new(),
    });
    Piece {
        local: MemoryRegion::anonymous(8192)
            .expect("memory")
            .slice(0, 4096)
            .expect("inside")
            .into(),
        remote: region.slice(0, length).expect("inside"),
        direction,
    }
}

fn batch(pieces: Vec<Piece>, parts: usize) -> Arc<Batch> {
    Batch::new(pieces, parts, Instant::now() + Duration::from_secs(1))
}

#[test]
fn batches_that_cannot_be_right_are_refused_with_the_piece_that_is_wrong() {
    let read = |length| piece(length, RemoteAccess::Read, Direction::Read);
    assert!(check(&[read(4096)]).is_ok());
    let place = |pieces: &[Piece]| match check(pieces) {
        Err(Refusal::Invalid { piece, .. }) => Some(piece),
        _ => None,
    };
    assert_eq!(place(&[]), Some(0));
    assert_eq!(place(&[read(4096), read(4095)]), Some(1));
    let write = piece(4096, RemoteAccess::Read, Direction::Write);
    assert_eq!(place(&[write]), Some(0));
    assert_eq!(place(&vec![read(4096); PIECES_MAX + 1]), Some(PIECES_MAX));
}

#[test]
fn the_outcome_waits_for_every_part_and_names_the_first_failure() {
    let batch = batch(vec![piece(4096, RemoteAccess::Read, Direction::Read)], 3);
    batch.finish(2, Err(Cause::Deadline));
    batch.finish(1, Err(Cause::Local("later".to_owned())));
    assert_eq!(batch.outcome(), None, "one part still touches memory");
    batch.finish(0, Ok(()));
    let failed = TransferError {
        piece: 2,
        cause: Cause::Deadline,
    };
    assert_eq!(batch.outcome(), Some(Err(failed)));
}

#[test]
fn dropping_a_transfer_keeps_its_memory_until_completion() {
    let piece = piece(4096, RemoteAccess::Read, Direction::Read);
    let region = Arc::downgrade(piece.host().region());
    let batch = batch(vec![piece], 1);
    drop(Transfer::new(Arc::clone(&batch)));
    assert!(region.upgrade().is_some(), "a device may still write it");
    batch.finish(0, Ok(()));
    assert!(region.upgrade().is_none());
}

#[test]
fn a_future_is_woken_by_the_last_part() {
    struct Count(std::sync::atomic::AtomicUsize);
    impl std::task::Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let count = Arc::new(Count(0.into()));
    let waker = Waker::from(Arc::clone(&count));
    let batch = batch(vec![piece(4096, RemoteAccess::Read, Direction::Read)], 2);
    let mut transfer = Transfer::new(Arc::clone(&batch));
    let mut context = Context::from_waker(&waker);
    assert_eq!(Pin::new(&mut transfer).poll(&mut context), Poll::Pending);
    batch.finish(0, Ok(()));
    assert_eq!(count.0.load(Ordering::SeqCst), 0);
    batch.finish(0, Ok(()));
    assert_eq!(count.0.load(Ordering::SeqCst), 1);
    assert_eq!(Pin::new(&mut transfer).poll(&mut context), Poll::Ready(Ok(())));
}
