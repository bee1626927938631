use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::Receiver;
use kvtier_core::{Completion, Failure, NamespaceId};
use kvtier_transfer::memory::MemorySlice;

mod pace;

use self::pace::Pace;
use super::format::{ALIGNMENT, HEADER_BYTES};
use super::segment::{Segment, aligned};
use super::tier::{Inner, Ticket};

/// What is overwritten in one write: whoever reads waits behind one of them at most.
const PIECE_BYTES: u64 = 128 << 10;
/// Between two pages that are read back, besides the first and the last of a range.
const SAMPLE_BYTES: u64 = 1 << 20;
/// Decoding an index is a millisecond's work: whoever reads goes first.
const NICENESS: i32 = 10;

/// What is to be overwritten in one segment. See [`kvtier_core::Action::EraseRecords`].
pub(super) struct Erasure {
    pub(super) ticket: Ticket,
    pub(super) segment: Arc<Segment>,
    pub(super) pages: Range<u32>,
    pub(super) namespace: NamespaceId,
    pub(super) keep: Vec<Range<u32>>,
}

/// The erasing thread: one part after another, and pauses in between: see [`Pace`].
pub(super) fn run(inner: &Arc<Inner>, erasures: &Receiver<Option<Erasure>>) {
    // Where it may not be had, readers wait for a processor a little more often.
    let _ = rustix::process::setpriority_process(Some(rustix::thread::gettid()), NICENESS);
    let pace = Pace::default();
    while let Ok(Some(erasure)) = erasures.recv() {
        pace.resume();
        let Erasure {
            ticket,
            segment,
            pages,
            namespace,
            keep,
        } = erasure;
        match erase(inner, &pace, &ticket, &segment, pages, namespace, &keep) {
            Ok(Some((records, bytes))) => ticket.answer(Ok(Completion::Erased { records, bytes })),
            Ok(None) => ticket.answer(Err(Failure::Deadline)),
            Err(error) => inner.fail(ticket, "overwrite records", error),
        }
    }
}

/// How many records and bytes; `None` where a reset came in between.
fn erase(
    inner: &Inner,
    pace: &Pace,
    ticket: &Ticket,
    segment: &Segment,
    pages: Range<u32>,
    namespace: NamespaceId,
    keep: &[Range<u32>],
) -> io::Result<Option<(u32, u64)>> {
    inner.clear_traces();
    let is_kept = |place: u32| keep.binary_search_by_key(&place, |kept| kept.start).is_ok();
    let mut survivors: Vec<Range<u32>> = keep.to_vec();
    // First the index: what is overwritten is no record any more, should this be cut short.
    let named = segment.forget_chosen(
        |entry| {
            let place = entry.place();
            let is_target = entry.namespace == namespace.0 && !is_kept(place);
            if !is_target {
                let count = u64::from(entry.length).div_ceil(ALIGNMENT);
                survivors.push(place..place.saturating_add(u32::try_from(count).unwrap_or(u32::MAX)));
            }
            is_target && pages.contains(&place)
        },
        &|took| pace.pause(took),
    )?;
    inner.count_device_write(named.bytes);
    let payloads = page(HEADER_BYTES)..page(named.index_starts_at);
    let within = pages.start.max(payloads.start)..pages.end.min(payloads.end);
    let gaps = gaps(within, survivors);
    let zeroes = aligned(usize::try_from(PIECE_BYTES).map_err(io::Error::other)?)?;
    let mut bytes = 0;
    for gap in &gaps {
        if !overwrite(pace, ticket, segment, gap, &zeroes)? {
            return Ok(None);
        }
        bytes += gap.end - gap.start;
    }
    inner.count_device_write(bytes);
    let begun = Instant::now();
    segment.sync_payloads()?;
    pace.pause_after_flush(begun.elapsed());
    for gap in &gaps {
        verify(segment, gap)?;
    }
    Ok(Some((named.forgotten, bytes)))
}

fn page(offset: u64) -> u32 {
    u32::try_from(offset / ALIGNMENT).unwrap_or(u32::MAX)
}

/// What of `within` no survivor covers, as byte ranges, ascending.
fn gaps(within: Range<u32>, mut survivors: Vec<Range<u32>>) -> Vec<Range<u64>> {
    survivors.sort_unstable_by_key(|survivor| survivor.start);
    let mut gaps = Vec::new();
    let mut from = within.start;
    let ends = std::iter::once(within.end..within.end);
    for survivor in survivors.into_iter().chain(ends) {
        let until = survivor.start.min(within.end);
        if until > from {
            gaps.push(u64::from(from) * ALIGNMENT..u64::from(until) * ALIGNMENT);
        }
        from = from.max(survivor.end);
    }
    gaps
}

/// False where a reset came in between.
fn overwrite(
    pace: &Pace,
    ticket: &Ticket,
    segment: &Segment,
    gap: &Range<u64>,
    zeroes: &MemorySlice,
) -> io::Result<bool> {
    let mut offset = gap.start;
    while offset < gap.end {
        if ticket.is_cancelled() {
            return Ok(false);
        }
        let begun = Instant::now();
        let length = PIECE_BYTES.min(gap.end - offset);
        segment.overwrite(offset, length, zeroes)?;
        offset += length;
        pace.wrote(length);
        pace.pause(begun.elapsed());
    }
    Ok(true)
}

/// Reads a sample back: the first page, the last, and one in each MiB between.
fn verify(segment: &Segment, gap: &Range<u64>) -> io::Result<()> {
    let step = usize::try_from(SAMPLE_BYTES).map_err(io::Error::other)?;
    for offset in (gap.start..gap.end).step_by(step).chain([gap.end - ALIGNMENT]) {
        if !segment.is_zero_at(offset)? {
            return Err(io::Error::other("what was overwritten reads back as something else"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pages(range: std::ops::Range<u64>) -> std::ops::Range<u64> {
        range.start * 4096..range.end * 4096
    }

    #[test]
    fn what_nothing_covers_is_between_and_around_what_does() {
        assert_eq!(
            gaps(2..20, vec![10..12, 4..6, 5..8]),
            [pages(2..4), pages(8..10), pages(12..20)]
        );
        assert_eq!(gaps(2..20, vec![]), [pages(2..20)]);
        assert_eq!(gaps(2..20, vec![0..1, 1..30]), []);
        assert_eq!(gaps(10..20, vec![0..12, 19..40]), [pages(12..19)]);
        assert_eq!(gaps(20..20, vec![]), []);
    }
}
