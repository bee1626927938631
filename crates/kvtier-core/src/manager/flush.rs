use super::demote::Demotion;
use super::nvme::Placement;
use super::operation::{Operation, Purpose};
use super::{TierManager, mutant_is};
use crate::index::flag;
use crate::{Action, OperationId, Tier, Time, TrustDomain};

/// Failed writes and syncs that one flush puts up with.
const FAILURES_MAX: u32 = 16;

/// A flush that is waiting, writing or syncing.
#[derive(Debug)]
pub(super) struct Flush {
    operation: OperationId,
    domain: Option<TrustDomain>,
    started: bool,
    /// Next place in the index to look at.
    cursor: u32,
    /// Blocks that came later lie behind this, or were put into a place before it and are written too.
    end: u32,
    again: Vec<u32>,
    in_flight: u32,
    written: u64,
    written_cost: u64,
    left_out: u64,
    failures: u32,
    /// How many writes its sync has to cover, while it waits for one.
    needs_synced: Option<u64>,
}

impl TierManager {
    /// Writes every block of the domain (`None`: of all) that is cached only in host memory, as far as NVMe has room, and
    /// makes what was written survive a power cut. `Flushed` follows. Flushes run one after another.
    pub fn flush(&mut self, domain: Option<TrustDomain>, now: Time) -> OperationId {
        self.advance(now);
        let operation = self.take_operation_id();
        self.flushes.push_back(Flush {
            operation,
            domain,
            started: false,
            cursor: 0,
            end: 0,
            again: Vec::new(),
            in_flight: 0,
            written: 0,
            written_cost: 0,
            left_out: 0,
            failures: 0,
            needs_synced: None,
        });
        match &mut self.nvme {
            Some(nvme) => nvme.attention = true,
            None => self.abort_flush(),
        }
        if !self.nvme_in_service() {
            self.abort_flush();
        }
        self.pump();
        operation
    }

    /// Issues writes for the flush at the front, then its sync, then says so.
    pub(super) fn pump_flush(&mut self) {
        let Some(flush) = self.flushes.front_mut() else { return };
        if !flush.started {
            flush.started = true;
            flush.end = self.index.places();
        }
        loop {
            let flush = self.flushes.front_mut().expect("the flush in progress");
            let block = match flush.again.pop() {
                Some(block) => block,
                None if flush.cursor < flush.end => {
                    flush.cursor += 1;
                    flush.cursor - 1
                }
                None => break,
            };
            if !self.flush_block(block) {
                self.flushes
                    .front_mut()
                    .expect("the flush in progress")
                    .again
                    .push(block);
                return;
            }
        }
        let flush = self.flushes.front().expect("the flush in progress");
        if flush.in_flight > 0 || flush.needs_synced.is_some() || !self.nvme_accepts() {
            return;
        }
        let needs = self.nvme_ref().written;
        self.flushes.front_mut().expect("the flush in progress").needs_synced = Some(needs);
        self.sync();
        if mutant_is!(self, FlushBeforeSync) {
            self.finish_flush(true);
        }
    }

    /// Asks for a sync, unless one is under way.
    pub(super) fn sync(&mut self) {
        if !self.nvme_accepts() || self.nvme_ref().syncing.is_some() {
            return;
        }
        let operation = self.issue(Operation::Sync);
        self.actions.push_back(Action::SyncTier {
            operation,
            tier: Tier::Nvme,
        });
        for forget in &mut self.forgets {
            forget.is_covered = true;
        }
        let nvme = self.nvme_mut();
        nvme.syncing = Some(nvme.written);
    }

    fn is_in_flush(&self, block: u32) -> bool {
        let entry = self.index.entry(block);
        let domain = self.flushes.front().and_then(|flush| flush.domain);
        entry.is(flag::LIVE)
            && entry.in_host()
            && !entry.on_nvme()
            && self.is_current(entry)
            && domain.is_none_or(|domain| self.namespaces.at(entry.namespace).domain == domain)
    }

    /// False where the block has to wait.
    fn flush_block(&mut self, block: u32) -> bool {
        if !self.is_in_flush(block) {
            return true;
        }
        let entry = self.index.entry(block);
        let length = entry.length;
        if entry.is(flag::DEMOTING) {
            let operation = self.flushes.front().expect("the flush in progress").operation;
            if self.join_demotion(block, operation) {
                self.flushes.front_mut().expect("the flush in progress").in_flight += 1;
            }
            return true;
        }
        let cost = self.nvme_ref().cost(length);
        let fits = cost <= self.nvme_ref().room();
        let live_max = self.nvme_ref().live_max;
        let flush = self.flushes.front_mut().expect("the flush in progress");
        let operation = flush.operation;
        // Beyond this, what is written would push out what was written before.
        if !fits || flush.written_cost + cost > live_max {
            flush.left_out += 1;
            return true;
        }
        if !self.may_write() || self.awaits_record(block) {
            return false;
        }
        match self.start_demotion(block, Purpose::Flush(operation)) {
            Placement::Placed => {
                let flush = self.flushes.front_mut().expect("the flush in progress");
                flush.in_flight += 1;
                flush.written_cost += cost;
                true
            }
            // What is in flight, or what was just begun, makes room.
            Placement::Wait if self.nvme_ref().operations > 0 || self.nvme_ref().attention => false,
            Placement::Wait | Placement::Full => {
                self.flushes.front_mut().expect("the flush in progress").left_out += 1;
                true
            }
        }
    }

    /// A write that the flush waits for was answered.
    pub(super) fn flush_answered(&mut self, demotion: &Demotion, written: bool) {
        // An aborted flush may have left writes behind that the next one does not count.
        let Some(flush) = self
            .flushes
            .front_mut()
            .filter(|flush| demotion.flush == Some(flush.operation))
        else {
            return;
        };
        flush.in_flight -= 1;
        if written {
            flush.written += 1;
        } else if demotion.block != crate::index::NONE {
            flush.failures += 1;
            if flush.failures <= FAILURES_MAX {
                flush.again.push(demotion.block);
            } else {
                flush.left_out += 1;
            }
        }
    }

    pub(super) fn sync_answered(&mut self, synced: bool) {
        let nvme = self.nvme_mut();
        let covers = nvme.syncing.take().expect("one sync at a time");
        if synced {
            nvme.synced = covers;
        }
        self.forgets_synced(synced);
        let Some(flush) = self.flushes.front_mut() else { return };
        let Some(needs) = flush.needs_synced else { return };
        flush.needs_synced = None;
        if synced && covers < needs {
            // It was under way when the flush came to need one: once more.
            return;
        }
        flush.failures += 1;
        // A copy that went meanwhile is written, and synced, once more.
        let done = synced && flush.in_flight == 0 && flush.again.is_empty();
        if !done && flush.failures <= FAILURES_MAX {
            return;
        }
        self.finish_flush(synced);
    }

    /// An NVMe copy that the flush counts on made room for another one: the block has to be looked at again.
    pub(super) fn flush_again(&mut self, block: u32) {
        if let Some(flush) = self.flushes.front_mut().filter(|flush| block < flush.cursor) {
            flush.again.push(block);
        }
    }

    fn finish_flush(&mut self, synced: bool) {
        let Some(flush) = self.flushes.front() else { return };
        // Their copies went while the last sync was under way.
        let gone =
            u64::from(flush.in_flight) + flush.again.iter().filter(|&&block| self.is_in_flush(block)).count() as u64;
        let Some(flush) = self.flushes.pop_front() else { return };
        let (written, lost) = if synced {
            (flush.written.saturating_sub(gone), gone)
        } else {
            (0, flush.written)
        };
        let left_out = flush.left_out + lost;
        self.actions.push_back(Action::Flushed {
            operation: flush.operation,
            written,
            left_out,
        });
        if let Some(nvme) = &mut self.nvme {
            nvme.attention = true;
        }
    }

    /// The tier went out of service: what a flush has not written stays unwritten.
    pub(super) fn abort_flush(&mut self) {
        while let Some(flush) = self.flushes.front_mut() {
            flush.started = true;
            flush.left_out = 0;
            let unsynced = self.nvme.as_ref().map_or(0, |nvme| nvme.written - nvme.synced);
            let mut unwritten = unsynced.min(self.counters.nvme_blocks);
            for block in 0..self.index.places() {
                unwritten += u64::from(self.is_in_flush(block));
            }
            let flush = self.flushes.front_mut().expect("found above");
            // What was written and not synced may not survive, whoever wrote it.
            flush.left_out = unwritten;
            flush.written = 0;
            self.finish_flush(false);
        }
    }
}
