//! The device's own limit, to measure the transport against: one queue pair, one request for each range, every completion
//! polled for. No rails, no deadline, nothing goes again.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::Shared;
use super::exchange::Exchange;
use super::nic::draw_psn;
use super::verbs::{Completion, CompletionQueue, QueuePair, Status, Work};
use super::wire::{Answer, Question};
use crate::memory::MemorySlice;
use crate::remote::RemoteSlice;
use crate::transfer::Direction;

const DEPTH: usize = 16;
const PATIENCE: Duration = Duration::from_secs(30);
/// A quarter of a second.
const ACK_TIMEOUT: u8 = 16;
/// A lane that no rail has.
const LANE: u32 = u32::MAX;

/// A connection to one peer that only reads, for benchmarks.
pub struct RawReads {
    transport: Arc<Shared>,
    completions: Arc<CompletionQueue>,
    pair: Mutex<QueuePair>,
    /// Keeps the peer's side of the connection.
    _exchange: Box<dyn Exchange>,
}

impl RawReads {
    pub(super) fn connect(transport: &Arc<Shared>, exchange: Box<dyn Exchange>) -> io::Result<RawReads> {
        let nic = &transport.nics[0];
        let completions = nic.completion_queue(2 * u32::try_from(DEPTH).expect("small"))?;
        let pair = nic.queue_pair_on(&completions, u32::try_from(DEPTH).expect("small"))?;
        let psn = draw_psn();
        let question = Question::Connect {
            nic: 0,
            lane: LANE,
            end: nic.end(pair.number(), psn),
        };
        let answer = exchange.ask(&question.encode(), PATIENCE)?;
        let Some(Answer::Connected(end)) = Answer::decode(&answer) else {
            return Err(io::Error::other("the peer does not connect"));
        };
        // One request may be megabytes long: on a slow device it takes longer than a slice's patience.
        let mut settings = transport.settings.clone();
        settings.ack_timeout = settings.ack_timeout.max(ACK_TIMEOUT);
        nic.connect(&pair, psn, &end, &settings, PATIENCE)
            .map_err(io::Error::other)?;
        Ok(RawReads {
            transport: Arc::clone(transport),
            completions,
            pair: Mutex::new(pair),
            _exchange: exchange,
        })
    }

    /// Reads each range into its target, of the same length and in a registered region.
    ///
    /// # Errors
    /// The first request that is not done.
    pub fn read(&self, ranges: &[(RemoteSlice, MemorySlice)]) -> io::Result<()> {
        let pair = self.pair.lock();
        let (mut posted, mut done) = (0, 0);
        let mut arrived: Vec<Completion> = Vec::with_capacity(DEPTH);
        let begun = Instant::now();
        while done < ranges.len() {
            while posted < ranges.len() && posted - done < DEPTH {
                let (remote, local) = &ranges[posted];
                let registered = self.transport.regions.get(Arc::as_ptr(local.region()) as usize);
                let registered = registered.ok_or_else(|| io::Error::other("a target that is not registered"))?;
                let work = Work {
                    id: posted as u64,
                    local: local.clone().into(),
                    registered: Arc::clone(&registered.with[0]),
                    remote_address: remote.address(),
                    remote_key: remote.region().remote_keys[0],
                    direction: Direction::Read,
                    signalled: true,
                };
                pair.post(&[work]).map_err(|error| error.source)?;
                posted += 1;
            }
            arrived.clear();
            if self.completions.poll(DEPTH, &mut arrived)? == 0 {
                if begun.elapsed() > PATIENCE {
                    return Err(io::ErrorKind::TimedOut.into());
                }
                std::thread::yield_now();
            }
            for completion in &arrived {
                pair.complete(completion.id);
                done += 1;
                if completion.status != Status::Done {
                    return Err(io::Error::other(completion.status.words()));
                }
            }
        }
        Ok(())
    }
}
