//! The memory of a world: segments of pages that say whose content they hold and who may touch them.

use std::collections::BTreeMap;

use kvtier_core::{Extent, OperationId, RecordLabel, SegmentId, Time, TrustDomain};

use crate::oracle::{Check, found};
use crate::random::{Random, mix};

/// Bytes of a page.
pub(crate) const PAGE_BYTES: u64 = 4096;

/// Names one write of one block: its content, which no other write has. 0 is zeroed memory.
pub(crate) type Tag = u64;

/// Names one that may write: a client's slot or an operation in flight. 0 is nobody.
pub(crate) type Holder = u64;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Page {
    tag: Tag,
    /// Which page of the content.
    part: u32,
    /// A bit of it flipped.
    flipped: bool,
    readers: u32,
    writer: Holder,
}

impl Page {
    fn wipe(&mut self) {
        self.tag = 0;
        self.part = 0;
        self.flipped = false;
    }
}

/// How far something written got, and so what it survives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Reach {
    /// In the process: nothing.
    Process,
    /// In the system: the death of the process.
    System,
    /// On the device: a power cut.
    Device,
}

/// A payload on NVMe and what the index of its segment says of it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record {
    pub(crate) label: RecordLabel,
    pub(crate) length: u32,
    pub(crate) checksum: u32,
    /// A fault of the world's own making hit it: its check may fail.
    pub(crate) damaged: bool,
    pub(crate) tag: Tag,
    /// The write that made it.
    pub(crate) operation: OperationId,
    pub(crate) at: Time,
    pub(crate) payload: Reach,
    /// Its entry in the index.
    pub(crate) entry: Reach,
    /// It was forgotten, when, and how far that got.
    pub(crate) forgotten: Option<(Time, Reach)>,
    /// It was forgotten, but that was lost.
    pub(crate) was_forgotten: bool,
}

impl Record {
    fn pages(&self) -> usize {
        u64::from(self.length).div_ceil(PAGE_BYTES) as usize
    }

    /// Survives a power cut.
    pub(crate) fn is_synced(&self) -> bool {
        self.payload == Reach::Device && self.entry == Reach::Device
    }

    /// A sync covers it.
    pub(crate) fn sync(&mut self) {
        self.payload = Reach::Device;
        self.entry = Reach::Device;
        if let Some((_, reach)) = &mut self.forgotten {
            *reach = Reach::Device;
        }
    }
}

/// An overwriting that ended half-way.
pub(crate) struct CutShort<'a> {
    pub(crate) random: &'a mut Random,
    /// Bytes may be gone of which the index says on the device that they are there.
    pub(crate) index_may_lag: bool,
}

impl CutShort<'_> {
    /// Whether the index still has a record whose bytes are gone.
    fn lags(&mut self) -> bool {
        self.index_may_lag && self.random.chance(250)
    }

    fn reaches_page(&mut self) -> bool {
        self.random.chance(500)
    }
}

#[derive(Clone, Debug)]
pub(crate) struct Segment {
    pub(crate) bytes: u64,
    pub(crate) domain: Option<TrustDomain>,
    /// Opened and not yet asked to close.
    pub(crate) open: bool,
    pub(crate) closing: bool,
    /// No more writes.
    pub(crate) sealed: bool,
    /// By byte offset; NVMe only.
    pub(crate) records: BTreeMap<u64, Record>,
    pages: Vec<Page>,
}

/// The segments of one tier.
#[derive(Clone, Debug)]
pub(crate) struct Memory {
    name: &'static str,
    pub(crate) segments: BTreeMap<SegmentId, Segment>,
    /// Ids are never used twice.
    highest: Option<SegmentId>,
}

fn pages_of(extent: &Extent) -> std::ops::Range<usize> {
    let first = (extent.offset / PAGE_BYTES) as usize;
    first..first + u64::from(extent.length).div_ceil(PAGE_BYTES) as usize
}

impl Memory {
    pub(crate) fn new(name: &'static str) -> Memory {
        Memory {
            name,
            segments: BTreeMap::new(),
            highest: None,
        }
    }

    /// Bytes of all segments, those opening and closing included.
    pub(crate) fn bytes(&self) -> u64 {
        self.segments.values().map(|segment| segment.bytes).sum()
    }

    pub(crate) fn begin_open(&mut self, id: SegmentId, bytes: u64, domain: Option<TrustDomain>) -> Check {
        if self.segments.contains_key(&id) || self.highest.is_some_and(|highest| id <= highest) {
            return found(format!("{} segment {id:?} is used a second time", self.name));
        }
        if bytes == 0 || !bytes.is_multiple_of(PAGE_BYTES) {
            return found(format!("{} segment {id:?} of {bytes} bytes", self.name));
        }
        self.highest = Some(id);
        let pages = vec![Page::default(); (bytes / PAGE_BYTES) as usize];
        self.segments.insert(
            id,
            Segment {
                bytes,
                domain,
                open: false,
                closing: false,
                sealed: false,
                records: BTreeMap::new(),
                pages,
            },
        );
        Ok(())
    }

    /// Nobody may hold anything of a segment that is to be closed.
    pub(crate) fn begin_close(&mut self, id: SegmentId) -> Check {
        let Some(segment) = self.segments.get_mut(&id) else {
            return Ok(());
        };
        if let Some(page) = segment
            .pages
            .iter()
            .position(|page| page.readers > 0 || page.writer != 0)
        {
            let page_of = segment.pages[page];
            return found(format!(
                "{} segment {id:?} is closed under a holder at offset {} ({} readers, writer {})",
                self.name,
                page as u64 * PAGE_BYTES,
                page_of.readers,
                page_of.writer
            ));
        }
        segment.closing = true;
        Ok(())
    }

    fn segment(&mut self, extent: &Extent) -> Result<&mut Segment, crate::oracle::Finding> {
        let name = self.name;
        match self.segments.get_mut(&extent.segment) {
            Some(segment)
                if segment.open
                    && !segment.closing
                    && extent.length > 0
                    && extent.offset.is_multiple_of(PAGE_BYTES)
                    && extent.offset + u64::from(extent.length).next_multiple_of(PAGE_BYTES) <= segment.bytes =>
            {
                Ok(segment)
            }
            Some(segment) if segment.open && !segment.closing => Err(crate::oracle::Finding(format!(
                "{name} {extent:?} is not inside its segment of {} bytes",
                segment.bytes
            ))),
            _ => Err(crate::oracle::Finding(format!(
                "{name} {extent:?} lies in a segment that is not open"
            ))),
        }
    }

    pub(crate) fn domain(&self, extent: &Extent) -> Option<TrustDomain> {
        self.segments.get(&extent.segment).and_then(|segment| segment.domain)
    }

    /// From here on somebody reads `extent`: nobody may write it.
    pub(crate) fn begin_read(&mut self, extent: &Extent) -> Check {
        let name = self.name;
        let segment = self.segment(extent)?;
        for page in &mut segment.pages[pages_of(extent)] {
            if page.writer != 0 {
                return found(format!(
                    "{name} {extent:?} is given to a reader while holder {} may write it",
                    page.writer
                ));
            }
            page.readers += 1;
        }
        Ok(())
    }

    pub(crate) fn end_read(&mut self, extent: &Extent) {
        let Some(segment) = self.segments.get_mut(&extent.segment) else {
            return;
        };
        for page in &mut segment.pages[pages_of(extent)] {
            page.readers -= 1;
        }
    }

    /// From here on `holder` may write `extent`: nobody else may touch it.
    pub(crate) fn begin_write(&mut self, extent: &Extent, holder: Holder) -> Check {
        let name = self.name;
        let segment = self.segment(extent)?;
        if segment.sealed {
            return found(format!("{name} {extent:?} is written although its segment was sealed"));
        }
        for page in &mut segment.pages[pages_of(extent)] {
            if page.writer != 0 || page.readers > 0 {
                return found(format!(
                    "{name} {extent:?} is reused under a live holder ({} readers, writer {})",
                    page.readers, page.writer
                ));
            }
            page.writer = holder;
        }
        Ok(())
    }

    pub(crate) fn end_write(&mut self, extent: &Extent) {
        let Some(segment) = self.segments.get_mut(&extent.segment) else {
            return;
        };
        for page in &mut segment.pages[pages_of(extent)] {
            page.writer = 0;
        }
    }

    /// `holder` writes the pages `parts` of content `tag`; tag 0 zeroes.
    pub(crate) fn write(&mut self, extent: &Extent, holder: Holder, tag: Tag, parts: std::ops::Range<usize>) -> Check {
        let name = self.name;
        let segment = self.segment(extent)?;
        for (part, page) in segment.pages[pages_of(extent)].iter_mut().enumerate() {
            if page.writer != holder {
                return found(format!(
                    "holder {holder} writes {name} {extent:?}, which holder {} may write",
                    page.writer
                ));
            }
            if parts.contains(&part) {
                *page = Page {
                    tag,
                    part: if tag == 0 { 0 } else { part as u32 },
                    flipped: false,
                    ..*page
                };
            }
        }
        Ok(())
    }

    /// The write whose content fills `extent`, from its first page to its last; `None` where it is torn, flipped or zero.
    pub(crate) fn content(&self, extent: &Extent) -> Option<Tag> {
        let pages = self.segments.get(&extent.segment)?.pages.get(pages_of(extent))?;
        let tag = pages.first()?.tag;
        let whole = pages
            .iter()
            .enumerate()
            .all(|(part, page)| page.tag == tag && page.part == part as u32 && !page.flipped);
        (whole && tag != 0).then_some(tag)
    }

    /// What a checksum over `extent` comes to.
    pub(crate) fn checksum(&self, extent: &Extent) -> u32 {
        let Some(pages) = self
            .segments
            .get(&extent.segment)
            .and_then(|segment| segment.pages.get(pages_of(extent)))
        else {
            return 0;
        };
        let sum = pages.iter().fold(u64::from(extent.length), |sum, page| {
            mix(sum ^ mix(page.tag) ^ (u64::from(page.part) << 1) ^ u64::from(page.flipped))
        });
        sum as u32
    }

    /// Copies the first `pages` pages of `source` in `from` to `target`.
    pub(crate) fn copy_from(
        &mut self,
        target: &Extent,
        holder: Holder,
        from: &[(Tag, u32, bool)],
        pages: usize,
    ) -> Check {
        let name = self.name;
        let segment = self.segment(target)?;
        for (page, (tag, part, flipped)) in segment.pages[pages_of(target)].iter_mut().zip(from).take(pages) {
            if page.writer != holder {
                return found(format!(
                    "operation {holder} writes {name} {target:?}, which holder {} may write",
                    page.writer
                ));
            }
            *page = Page {
                tag: *tag,
                part: *part,
                flipped: *flipped,
                ..*page
            };
        }
        Ok(())
    }

    /// The pages of `extent`, to copy.
    pub(crate) fn image(&mut self, extent: &Extent) -> Result<Vec<(Tag, u32, bool)>, crate::oracle::Finding> {
        let segment = self.segment(extent)?;
        Ok(segment.pages[pages_of(extent)]
            .iter()
            .map(|page| (page.tag, page.part, page.flipped))
            .collect())
    }

    /// Whole pages of a byte range.
    fn pages_within(range: &std::ops::Range<u64>) -> std::ops::Range<usize> {
        range.start.div_ceil(PAGE_BYTES) as usize..(range.end / PAGE_BYTES) as usize
    }

    /// Nobody may read or write what is to be zeroed.
    pub(crate) fn check_unheld(&self, id: SegmentId, range: std::ops::Range<u64>) -> Check {
        let Some(segment) = self.segments.get(&id).filter(|segment| segment.open) else {
            return found(format!("{} segment {id:?} is zeroed, which is not open", self.name));
        };
        let pages = Memory::pages_within(&range);
        match segment.pages.get(pages) {
            Some(pages) if pages.iter().all(|page| page.readers == 0 && page.writer == 0) => Ok(()),
            _ => found(format!(
                "{} {range:?} of {id:?} is zeroed under a holder, or lies outside",
                self.name
            )),
        }
    }

    pub(crate) fn zero(&mut self, id: SegmentId, range: std::ops::Range<u64>) {
        if let Some(segment) = self.segments.get_mut(&id) {
            for page in &mut segment.pages[Memory::pages_within(&range)] {
                page.wipe();
            }
        }
    }

    /// Overwrites the records of a namespace that begin within `pages` and do not lie at `keep`, and what no record names.
    pub(crate) fn erase(
        &mut self,
        id: SegmentId,
        pages: std::ops::Range<u32>,
        namespace: kvtier_core::NamespaceId,
        keep: &[std::ops::Range<u32>],
        mut cut_short: Option<CutShort<'_>>,
    ) -> Result<(u32, u64), crate::oracle::Finding> {
        let Some(segment) = self.segments.get_mut(&id) else {
            return Ok((0, 0));
        };
        let within = |offset: u64| pages.contains(&((offset / PAGE_BYTES) as u32));
        let before = segment.records.len();
        let Segment {
            records, pages: held, ..
        } = segment;
        records.retain(|offset, record| {
            let is_kept = keep.iter().any(|kept| kept.start == (offset / PAGE_BYTES) as u32);
            let is_read = held[(offset / PAGE_BYTES) as usize].readers > 0;
            // A deleted record's entry is gone: nothing names its bytes any more. Whoever reads it meanwhile gets a miss.
            let goes = record.label.namespace == namespace || (record.forgotten.is_some() && !is_read);
            if !(within(*offset) && goes && !is_kept) {
                return true;
            }
            let Some(cut_short) = &mut cut_short else { return false };
            if cut_short.lags() {
                record.damaged = true;
                for page in &mut held[(offset / PAGE_BYTES) as usize..][..record.pages()] {
                    page.wipe();
                }
                return true;
            }
            cut_short.random.chance(300)
        });
        let named: Vec<_> = segment
            .records
            .iter()
            .map(|(offset, record)| {
                let first = offset / PAGE_BYTES;
                first..first + u64::from(record.length).div_ceil(PAGE_BYTES)
            })
            .collect();
        let mut bytes = 0;
        for (number, page) in (0..).zip(&mut segment.pages) {
            let is_named = named.iter().any(|record| record.contains(&number));
            let is_reached = cut_short.as_mut().is_none_or(CutShort::reaches_page);
            if !within(number * PAGE_BYTES) || is_named || !is_reached {
                continue;
            }
            if page.readers > 0 || page.writer != 0 {
                return Err(crate::oracle::Finding(format!(
                    "page {number} of {id:?} is overwritten under a holder"
                )));
            }
            page.wipe();
            bytes += PAGE_BYTES;
        }
        Ok(((before - segment.records.len()) as u32, bytes))
    }

    /// Every page's content, by place.
    pub(crate) fn tags(&self) -> impl Iterator<Item = (SegmentId, u64, Tag)> {
        self.segments.iter().flat_map(|(id, segment)| {
            let pages = (0..).zip(&segment.pages);
            pages
                .filter(|(_, page)| page.tag != 0)
                .map(|(page, content)| (*id, page * PAGE_BYTES, content.tag))
        })
    }

    /// A power cut left only the first `pages` pages of a record.
    pub(crate) fn tear(&mut self, extent: &Extent, pages: usize) {
        let Some(segment) = self.segments.get_mut(&extent.segment) else {
            return;
        };
        for page in segment.pages[pages_of(extent)].iter_mut().skip(pages) {
            *page = Page::default();
        }
        if let Some(record) = segment.records.get_mut(&extent.offset) {
            record.damaged = true;
        }
    }

    /// What a new process finds: whole segments that nobody holds and nobody appends to.
    pub(crate) fn found_again(&mut self) {
        for segment in self.segments.values_mut() {
            segment.open = true;
            segment.closing = false;
            segment.sealed = true;
            for page in &mut segment.pages {
                page.readers = 0;
                page.writer = 0;
            }
        }
        self.highest = self.segments.keys().next_back().copied();
    }

    /// Flips a bit in the first page of the record at `offset`.
    pub(crate) fn flip(&mut self, id: SegmentId, offset: u64) {
        let Some(segment) = self.segments.get_mut(&id) else {
            return;
        };
        if let Some(page) = segment.pages.get_mut((offset / PAGE_BYTES) as usize) {
            page.flipped = !page.flipped;
        }
        if let Some(record) = segment.records.get_mut(&offset) {
            record.damaged = true;
        }
    }
}

#[cfg(test)]
mod tests {
    use kvtier_core::{Extent, SegmentId};

    use super::Memory;

    fn memory() -> Memory {
        let mut memory = Memory::new("host");
        memory.begin_open(SegmentId(1), 64 << 10, None).expect("a new id");
        memory.segments.get_mut(&SegmentId(1)).expect("it was opened").open = true;
        memory
    }

    const EXTENT: Extent = Extent {
        segment: SegmentId(1),
        offset: 4096,
        length: 9000,
    };

    #[test]
    fn half_a_write_is_no_content() {
        let mut memory = memory();
        memory.begin_write(&EXTENT, 5).expect("free");
        memory.write(&EXTENT, 5, 77, 0..2).expect("its holder");
        assert_eq!(memory.content(&EXTENT), None);
        memory.write(&EXTENT, 5, 77, 2..3).expect("its holder");
        assert_eq!(memory.content(&EXTENT), Some(77));
        memory.flip(SegmentId(1), 4096);
        assert_eq!(memory.content(&EXTENT), None);
    }

    #[test]
    fn a_slot_is_not_given_away_under_its_holder() {
        let mut memory = memory();
        memory.begin_read(&EXTENT).expect("free");
        assert!(
            memory
                .begin_write(
                    &Extent {
                        offset: 12288,
                        length: 1,
                        ..EXTENT
                    },
                    1
                )
                .is_err()
        );
        assert!(memory.begin_close(SegmentId(1)).is_err());
        memory.end_read(&EXTENT);
        memory.begin_write(&EXTENT, 1).expect("free again");
        assert!(memory.begin_read(&EXTENT).is_err());
        assert!(memory.write(&EXTENT, 2, 9, 0..1).is_err());
    }

    #[test]
    fn a_segment_id_is_used_once() {
        let mut memory = memory();
        memory.segments.clear();
        assert!(memory.begin_open(SegmentId(1), 4096, None).is_err());
        assert!(memory.begin_read(&EXTENT).is_err());
    }
}
