use std::ops::Range;
use std::thread;
use std::time::{Duration, Instant};

use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{Advice, BlockHandle, FetchScope, Lineage, PutOutcome};
use kvtier::{BlockHash, ErrorKind, Tier};
use kvtier_sim::trace::{TOKENS_PER_ID, TraceAnswer, TraceAnswers, TraceRequest};

use super::Replay;
use super::report::Tally;
use crate::content::Content;
use crate::exit::{ExitCode, Failure};
use crate::kvctl::{Connection, failure};

/// The first wait after a put that found no room; it doubles up to the second.
const BUSY_WAIT: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(100));

/// One connection and what it counted.
pub(super) struct Worker<'a, 'r> {
    replay: &'a Replay<'r>,
    client: Client,
    namespace: Namespace,
    /// Room for a chunk of blocks.
    buffer: Vec<u8>,
    tally: Tally,
    answers: TraceAnswers<Vec<BlockHash>>,
    /// Keys that one message takes.
    keys_max: usize,
}

impl<'a, 'r> Worker<'a, 'r> {
    pub(super) fn new(replay: &'a Replay<'r>, connection: &Connection) -> Result<Worker<'a, 'r>, Failure> {
        let client = connection.connect()?;
        let namespace = client
            .namespace(&replay.namespace, connection.form())
            .map_err(failure)?;
        let keys_max = client.welcome().map_err(failure)?.batch_keys_max as usize;
        let buffer = vec![0; replay.chunk_blocks * replay.options.block_bytes];
        Ok(Worker {
            replay,
            client,
            namespace,
            buffer,
            tally: Tally::default(),
            answers: TraceAnswers::default(),
            keys_max,
        })
    }

    /// Nothing more is asked. The answers that are still being given end with it: the clock stays where the last request was.
    pub(super) fn end(mut self) -> Result<Tally, Failure> {
        while let Some((answer, hashes)) = self.answers.complete(u64::MAX) {
            self.say_answered(answer, &hashes)?;
        }
        Ok(self.tally)
    }

    fn set_clock(&self, at_ms: u64) {
        if self.replay.options.virtual_time {
            self.client.set_clock(at_ms.saturating_mul(1_000_000));
        }
    }

    fn say_answered(&self, answer: TraceAnswer, hashes: &[BlockHash]) -> Result<(), Failure> {
        // A prompt of more keys than one message takes: its end says which it is.
        let hashes = &hashes[hashes.len().saturating_sub(self.keys_max)..];
        let advised = self.namespace.advise(hashes, Advice::Answered(answer.tokens));
        advised.map(|_| ()).map_err(failure)
    }

    /// Reads what is cached of a request's prefix, then stores the rest.
    pub(super) fn request(&mut self, request: &TraceRequest) -> Result<(), Failure> {
        while let Some((answer, hashes)) = self.answers.complete(request.timestamp_ms) {
            self.set_clock(answer.at_ms);
            self.say_answered(answer, &hashes)?;
        }
        self.set_clock(request.timestamp_ms);
        let hashes = request.block_hashes();
        if let Some(answer) = TraceAnswer::to(request, request.timestamp_ms).filter(|_| !self.replay.options.no_answers)
        {
            self.answers.begin(answer, hashes.clone());
        }
        let found = self.read_prefix(request, &hashes)?;
        let tokens: u64 = (0..found).map(|index| u64::from(request.tokens_at(index))).sum();
        self.tally.requests += 1;
        self.tally.blocks += hashes.len() as u64;
        self.tally.input_tokens += request.input_tokens;
        self.tally.hit_tokens += tokens;
        self.tally.miss_blocks += (hashes.len() - found) as u64;
        self.put_rest(request, &hashes, found)
    }

    /// How many blocks, from the first, were found. All of them were compared.
    fn read_prefix(&mut self, request: &TraceRequest, hashes: &[BlockHash]) -> Result<usize, Failure> {
        let mut found = 0;
        while found < hashes.len() {
            let chunk = &hashes[found..hashes.len().min(found + self.replay.chunk_blocks)];
            let begun = Instant::now();
            let got = self.namespace.get(chunk, FetchScope::Prefix).map_err(failure)?;
            let answered = begun.elapsed();
            // Prefix scope answers a miss for everything behind the first.
            let handles: Vec<BlockHandle> = got.into_iter().map_while(|handle| handle).collect();
            let hits = handles.len();
            let copied = self.copy_out(&handles)?;
            let altogether = begun.elapsed();
            let bytes = (hits * self.replay.options.block_bytes) as u64;
            let nvme = handles.iter().filter(|handle| handle.tier() == Tier::Nvme).count();
            let calls = match (hits, nvme) {
                (0, _) => &mut self.tally.empty,
                (_, 0) => &mut self.tally.host,
                _ => &mut self.tally.nvme,
            };
            calls.record(answered, bytes, altogether);
            drop(handles);
            self.tally.hit_blocks_nvme += nvme as u64;
            self.tally.hit_blocks_host += (hits - nvme) as u64;
            self.verify(&request.hash_ids[found..found + hits], copied);
            let ended = hits < chunk.len();
            found += hits;
            if ended {
                break;
            }
        }
        Ok(found)
    }

    /// Copies leased blocks into the buffer, one after the other. Bytes that were copied.
    fn copy_out(&mut self, handles: &[BlockHandle]) -> Result<usize, Failure> {
        let block_bytes = self.replay.options.block_bytes;
        for (handle, target) in handles.iter().zip(self.buffer.chunks_exact_mut(block_bytes)) {
            if handle.len() != block_bytes {
                let words = format!(
                    "namespace {:?} holds blocks of {} bytes under these keys, not {block_bytes}: name another --namespace",
                    self.replay.namespace,
                    handle.len()
                );
                return Err(Failure::new(ExitCode::DataFormat, words));
            }
            handle.copy_to(target).map_err(failure)?;
        }
        Ok(handles.len() * block_bytes)
    }

    fn verify(&mut self, ids: &[u64], copied: usize) {
        let block_bytes = self.replay.options.block_bytes;
        for (id, bytes) in ids.iter().zip(self.buffer[..copied].chunks_exact(block_bytes)) {
            let wrong = self.replay.content.wrong_bytes(*id, bytes);
            self.tally.wrong_bytes += wrong;
            self.tally.verified_bytes += block_bytes as u64 - wrong;
            if wrong > 0 && self.tally.first_wrong.is_none() {
                let claimed =
                    Content::claimed_id(bytes).map_or_else(|| "no id".to_string(), |claimed| format!("id {claimed}"));
                self.tally.first_wrong = Some(format!(
                    "{wrong} bytes of the block of id {id}, whose head says {claimed}"
                ));
            }
        }
    }

    fn put_rest(&mut self, request: &TraceRequest, hashes: &[BlockHash], found: usize) -> Result<(), Failure> {
        let mut start = found;
        while start < hashes.len() {
            // One call says one number of tokens for all its blocks, so a shorter last block goes alone.
            let tokens = request.tokens_at(start);
            let alike = (start..hashes.len())
                .take_while(|index| request.tokens_at(*index) == tokens)
                .count();
            let end = start + alike.min(self.replay.chunk_blocks);
            self.put_chunk(request, hashes, start..end, tokens.min(TOKENS_PER_ID))?;
            start = end;
        }
        Ok(())
    }

    fn put_chunk(
        &mut self,
        request: &TraceRequest,
        hashes: &[BlockHash],
        range: Range<usize>,
        tokens: u32,
    ) -> Result<(), Failure> {
        let block_bytes = self.replay.options.block_bytes;
        let ids = &request.hash_ids[range.clone()];
        for (id, target) in ids.iter().zip(self.buffer.chunks_exact_mut(block_bytes)) {
            self.replay.content.fill(*id, target);
        }
        let sources = self.buffer.chunks_exact(block_bytes);
        let mut first = range.start;
        let all: Vec<(BlockHash, &[u8])> = hashes[range.clone()].iter().copied().zip(sources).collect();
        let mut stored = vec![false; all.len()];
        let deadline = Instant::now() + Duration::from_millis(self.replay.options.busy_deadline_ms);
        let mut wait = BUSY_WAIT.0;
        loop {
            let done = first - range.start;
            let blocks = &all[done..];
            let lineage = Lineage::Chain(request.parent_at(first));
            let begun = Instant::now();
            let outcomes = match self.namespace.put_from(lineage, blocks, tokens) {
                Err(error) if error.kind == ErrorKind::Busy => vec![PutOutcome::Busy; blocks.len()],
                outcomes => outcomes.map_err(failure)?,
            };
            let elapsed = begun.elapsed();
            let published = outcomes
                .iter()
                .filter(|outcome| **outcome == PutOutcome::Published)
                .count();
            self.tally
                .puts
                .record(elapsed, (published * block_bytes) as u64, elapsed);
            self.tally.put_blocks += published as u64;
            for (outcome, stored) in outcomes.iter().zip(&mut stored[done..]) {
                self.tally.put_present += u64::from(*outcome == PutOutcome::Present && !*stored);
                *stored |= matches!(outcome, PutOutcome::Published | PutOutcome::Present);
            }
            if outcomes.contains(&PutOutcome::Invalid) {
                return Err(Failure::new(
                    ExitCode::Internal,
                    "the daemon calls a block invalid: report a bug",
                ));
            }
            // Blocks of one call are a chain, so what is tried again starts at the first that found no room.
            let Some(refused) = stored.iter().position(|stored| !stored) else {
                return Ok(());
            };
            first = range.start + refused;
            if Instant::now() >= deadline {
                self.tally.put_busy += stored.iter().filter(|stored| !**stored).count() as u64;
                return Ok(());
            }
            thread::sleep(wait);
            wait = (wait * 2).min(BUSY_WAIT.1);
        }
    }
}
