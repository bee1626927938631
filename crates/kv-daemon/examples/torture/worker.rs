//! A client that puts, gets and deletes until the daemon is gone.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU8, AtomicUsize, Ordering};
use std::time::Duration;

use kv_daemon::content::Content;
use kvtier::ErrorKind;
use kvtier::client::blocking::{BlockWriter, Client, Namespace};
use kvtier::client::{ClientError, FetchScope, Lineage, PutOutcome, Writing};
use kvtier_sim::Random;

use crate::key::{Key, LENGTH_MAX, NAMESPACES, WORKERS, form};
use crate::ledger::{Ledger, State};
use crate::reader::{Comparison, Reader};

/// Tokens in a block; the daemon only passes them on.
const TOKENS: u32 = 512;

/// Blocks in one put or get.
const BATCH_MAX: u64 = 8;

/// Bytes in one put or get: an eighth of the smaller host tier.
pub(crate) const BATCH_BYTES_MAX: usize = 2 << 20;

/// Keys of a lane that are read more often than the rest.
const RECENT: u32 = 48;

/// What workers do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Phase {
    /// Everything.
    Mixed,
    /// Only gets.
    Gets,
    /// Nothing.
    Rest,
}

/// What the threads of one round share.
pub(crate) struct Arena<'a> {
    pub(crate) ledger: &'a Ledger,
    pub(crate) content: &'a Content,
    phase: AtomicU8,
    /// The daemon is about to go: calls may fail.
    pub(crate) ending: AtomicBool,
    /// Workers that do nothing but get.
    pub(crate) resting: AtomicUsize,
    /// Bytes that may still be put.
    pub(crate) put_bytes: AtomicI64,
}

/// What one worker did.
#[derive(Clone, Debug, Default)]
pub(crate) struct Work {
    pub(crate) comparison: Comparison,
    pub(crate) puts: u64,
    pub(crate) put_bytes: u64,
    pub(crate) deletes: u64,
    pub(crate) busy: u64,
}

impl Work {
    pub(crate) fn add(&mut self, other: Work) {
        self.comparison.add(other.comparison);
        self.puts += other.puts;
        self.put_bytes += other.put_bytes;
        self.deletes += other.deletes;
        self.busy += other.busy;
    }
}

impl<'a> Arena<'a> {
    pub(crate) fn new(ledger: &'a Ledger, content: &'a Content, put_bytes: u64) -> Arena<'a> {
        Arena {
            ledger,
            content,
            phase: AtomicU8::new(Phase::Mixed as u8),
            ending: AtomicBool::new(false),
            resting: AtomicUsize::new(0),
            put_bytes: AtomicI64::new(i64::try_from(put_bytes).unwrap_or(i64::MAX)),
        }
    }

    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::SeqCst);
    }

    fn only_gets(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == Phase::Gets as u8
    }

    fn rests(&self) -> bool {
        self.phase.load(Ordering::SeqCst) == Phase::Rest as u8
    }

    /// Whether a failed call is only the end of the round.
    pub(crate) fn excuses(&self, error: &ClientError) -> bool {
        self.ending.load(Ordering::SeqCst) && matches!(error.kind, ErrorKind::Unavailable | ErrorKind::Closed)
    }
}

/// One client thread.
pub(crate) struct Worker<'a> {
    arena: &'a Arena<'a>,
    index: usize,
    random: Random,
    namespaces: Vec<Namespace>,
    reader: Reader<'a>,
    buffers: Vec<Vec<u8>>,
    work: Work,
}

impl<'a> Worker<'a> {
    pub(crate) fn new(
        arena: &'a Arena<'a>,
        index: usize,
        client: &Client,
        seed: u64,
    ) -> Result<Worker<'a>, ClientError> {
        let namespaces =
            (0..NAMESPACES.len()).map(|namespace| client.namespace(NAMESPACES[namespace], form(namespace)));
        Ok(Worker {
            arena,
            index,
            random: Random::new(seed),
            namespaces: namespaces.collect::<Result<_, _>>()?,
            reader: Reader::new(arena.content),
            buffers: Vec::new(),
            work: Work::default(),
        })
    }

    /// Works until the daemon is gone; an error before that is the daemon's fault.
    pub(crate) fn run(mut self) -> Result<Work, ClientError> {
        let mut rests = false;
        loop {
            if !rests && self.arena.only_gets() {
                rests = true;
                self.arena.resting.fetch_add(1, Ordering::SeqCst);
            }
            if self.arena.rests() {
                if self.arena.ending.load(Ordering::SeqCst) {
                    break;
                }
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            match self.step(rests) {
                Ok(()) => {}
                Err(error) if error.kind == ErrorKind::Busy => self.pause(),
                Err(error) if self.arena.excuses(&error) => break,
                Err(error) => return Err(error),
            }
        }
        self.work.comparison = self.reader.comparison;
        Ok(self.work)
    }

    fn step(&mut self, only_get: bool) -> Result<(), ClientError> {
        let may_put = !only_get && self.arena.put_bytes.load(Ordering::Relaxed) > 0;
        match self.random.below(100) {
            0..45 if may_put => self.put(),
            45..49 if !only_get => self.delete(),
            _ => self.get(),
        }
    }

    fn pause(&mut self) {
        self.work.busy += 1;
        std::thread::sleep(Duration::from_millis(1));
    }

    fn get(&mut self) -> Result<(), ClientError> {
        let namespace = self.random.index(NAMESPACES.len());
        let worker = self.random.index(WORKERS);
        let keys = self.some_keys(namespace, worker);
        if keys.is_empty() {
            self.pause();
            return Ok(());
        }
        let scope = self.random.pick(&[FetchScope::Each, FetchScope::Prefix]);
        let generations = self.arena.ledger.generation(namespace)..=u64::MAX;
        self.reader
            .read(&self.namespaces[namespace], &keys, scope, &generations)
            .map(drop)
    }

    fn delete(&mut self) -> Result<(), ClientError> {
        let namespace = self.random.index(NAMESPACES.len());
        let mut keys = self.some_keys(namespace, self.index);
        keys.truncate(2);
        let ledger = self.arena.ledger;
        for key in &keys {
            ledger.change(*key, |state| state.doomed_at = ledger.tick());
        }
        let hashes: Vec<_> = keys.iter().map(|key| key.hash()).collect();
        let deleted = self.namespaces[namespace].delete(&hashes)?;
        for key in &keys {
            ledger.change(*key, |state| state.deleted_at = ledger.tick());
        }
        self.work.deletes += deleted.iter().filter(|deleted| **deleted).count() as u64;
        Ok(())
    }

    fn put(&mut self) -> Result<(), ClientError> {
        let namespace = self.random.index(NAMESPACES.len());
        let mut keys = Vec::new();
        if self.random.chance(300) {
            keys = self.some_keys(namespace, self.index);
        }
        if keys.is_empty() {
            keys = self.new_keys(namespace);
        }
        let ledger = self.arena.ledger;
        for key in &keys {
            ledger.change(*key, |state| state.tried_at = ledger.tick());
        }
        let bytes: usize = keys.iter().map(|key| key.length()).sum();
        let bytes = i64::try_from(bytes).unwrap_or(i64::MAX);
        self.arena.put_bytes.fetch_sub(bytes, Ordering::Relaxed);
        if self.random.chance(600) {
            self.put_from(namespace, &keys)
        } else {
            self.put_in_place(namespace, &keys)
        }
    }

    /// From buffers, which must be made before the daemon says which generation is in force.
    fn put_from(&mut self, namespace: usize, keys: &[Key]) -> Result<(), ClientError> {
        let ledger = self.arena.ledger;
        ledger.under_generation(namespace, |generation| {
            self.fill(keys, generation);
            let sources = keys.iter().zip(&self.buffers);
            let blocks: Vec<_> = sources
                .map(|(key, buffer)| (key.hash(), &buffer[..key.length()]))
                .collect();
            let lineage = Lineage::Chain(keys[0].parent());
            let outcomes = self.namespaces[namespace].put_from(lineage, &blocks, TOKENS)?;
            for (key, outcome) in keys.iter().zip(outcomes) {
                self.note(*key, outcome, generation);
            }
            Ok(())
        })
    }

    /// Into slots, whose generation is known before the bytes are made.
    fn put_in_place(&mut self, namespace: usize, keys: &[Key]) -> Result<(), ClientError> {
        let blocks: Vec<_> = keys
            .iter()
            .map(|key| (key.hash(), u32::try_from(key.length()).unwrap_or(u32::MAX)))
            .collect();
        let here = self.namespaces[namespace].clone();
        let writings = here.writers(keys[0].parent(), &blocks, TOKENS)?;
        // This connection has heard of no other generation since its slots were given.
        let generation = here.generation()?;
        self.fill(keys, generation.0);
        let mut open: Vec<(Key, BlockWriter)> = Vec::new();
        for ((key, writing), buffer) in keys.iter().zip(writings).zip(&self.buffers) {
            match writing {
                Writing::Open(mut writer) => {
                    writer.write(0, &buffer[..key.length()])?;
                    open.push((*key, writer));
                }
                Writing::Present => note(
                    &mut self.work,
                    self.arena.ledger,
                    *key,
                    PutOutcome::Present,
                    generation.0,
                ),
                Writing::Busy => self.work.busy += 1,
            }
        }
        if self.random.chance(100) {
            // Given back unsealed.
            open.pop();
        }
        let (keys, writers): (Vec<Key>, Vec<BlockWriter>) = open.into_iter().unzip();
        for (key, outcome) in keys.into_iter().zip(here.seal(writers)?) {
            self.note(key, outcome, generation.0);
        }
        Ok(())
    }

    fn fill(&mut self, keys: &[Key], generation: u64) {
        while self.buffers.len() < keys.len() {
            self.buffers.push(vec![0; LENGTH_MAX]);
        }
        for (key, buffer) in keys.iter().zip(&mut self.buffers) {
            self.arena.content.fill(key.id(generation), &mut buffer[..key.length()]);
        }
    }

    fn note(&mut self, key: Key, outcome: PutOutcome, generation: u64) {
        note(&mut self.work, self.arena.ledger, key, outcome, generation);
    }

    /// Keys that follow each other in one prefix, old or new ones, recent ones more often.
    fn some_keys(&mut self, namespace: usize, worker: usize) -> Vec<Key> {
        let count = u32::try_from(self.arena.ledger.lane(namespace, worker).len()).unwrap_or(u32::MAX);
        if count == 0 {
            return Vec::new();
        }
        let oldest = if self.random.chance(600) {
            count.saturating_sub(RECENT)
        } else {
            0
        };
        let number = oldest + u32::try_from(self.random.below(u64::from(count - oldest))).unwrap_or(0);
        let first = Key {
            namespace,
            worker,
            number,
        };
        self.chain(first, count - number)
    }

    fn new_keys(&mut self, namespace: usize) -> Vec<Key> {
        let number = self.arena.ledger.lane(namespace, self.index).len();
        let first = Key {
            namespace,
            worker: self.index,
            number: u32::try_from(number).unwrap_or(u32::MAX),
        };
        let keys = self.chain(first, u32::MAX);
        let mut lane = self.arena.ledger.lane(namespace, self.index);
        lane.resize(number + keys.len(), State::default());
        keys
    }

    fn chain(&mut self, first: Key, most: u32) -> Vec<Key> {
        let wanted = u32::try_from(self.random.between(1, BATCH_MAX)).unwrap_or(1);
        let count = wanted.min(first.rest_of_chain()).min(most);
        let mut bytes = 0;
        (first.number..first.number + count)
            .map(|number| Key { number, ..first })
            .take_while(|key| {
                let fits = bytes == 0 || bytes + key.length() <= BATCH_BYTES_MAX;
                bytes += key.length();
                fits
            })
            .collect()
    }
}

fn note(work: &mut Work, ledger: &Ledger, key: Key, outcome: PutOutcome, generation: u64) {
    match outcome {
        PutOutcome::Published => {
            work.puts += 1;
            work.put_bytes += key.length() as u64;
            let at = ledger.tick();
            ledger.change(key, |state| (state.sealed_at, state.generation) = (at, generation));
        }
        PutOutcome::Present => {
            let at = ledger.tick();
            ledger.change(key, |state| {
                if !state.is_sealed_under(generation) {
                    (state.sealed_at, state.generation) = (at, generation);
                }
            });
        }
        PutOutcome::Busy => work.busy += 1,
        PutOutcome::Stale | PutOutcome::Invalid => {}
    }
}
