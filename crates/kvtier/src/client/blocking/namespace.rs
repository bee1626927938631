use std::sync::Arc;

use kvtier_core::{BlockHash, FetchScope, Generation, Hints, Parent, SealItem, Tier};
use kvtier_transfer::gpu::DeviceUuid;
use kvtier_transfer::memory::ForeignSlice;

use super::Shared;
use super::writer::BlockWriter;
use crate::client::batch::{
    Opening, absorb_sealed, check_count, check_lengths, check_one_message, check_targets, chunks, copy_out, leases_of,
    unexpected,
};
use crate::client::foreign::{Source, Target};
use crate::client::handle::{BlockHandle, LeaseGuard, LeasedBlock};
use crate::client::put::{Part, Put};
use crate::client::returns::Home;
use crate::client::session::Got;
use crate::client::{Advice, ClientError, GetOutcome, Lineage, PutOutcome, Writing};
use crate::wire::{Ahead, Array, Extensions, Keys, Reply, Request};

/// A namespace in one form, over a [`super::Client`]'s connection. Cloning it is cheap.
#[derive(Clone)]
pub struct Namespace {
    shared: Arc<Shared>,
    index: usize,
    hints: Hints,
}

impl Namespace {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Namespace {
        Namespace {
            shared,
            index,
            hints: Hints::default(),
        }
    }

    pub(super) fn is(&self, shared: &Arc<Shared>, index: usize) -> bool {
        Arc::ptr_eq(&self.shared, shared) && self.index == index
    }

    /// The same namespace, whose requests carry these hints.
    #[must_use]
    pub fn with_hints(&self, hints: Hints) -> Namespace {
        Namespace { hints, ..self.clone() }
    }

    /// The generation in force, as of the latest answer.
    ///
    /// # Errors
    /// As any call: it connects again when the connection was lost.
    pub fn generation(&self) -> Result<Generation, ClientError> {
        Ok(self.shared.line()?.opened(&self.shared, self.index)?.1.generation)
    }

    /// Leases blocks, keys in prefix order. One entry per key; `None` is a miss (or no room for another lease).
    ///
    /// # Errors
    /// As any call: `Unavailable` when the node is gone or late.
    pub fn get(&self, hashes: &[BlockHash], scope: FetchScope) -> Result<Vec<Option<BlockHandle>>, ClientError> {
        let (got, epoch) = self.fetch(hashes, scope, None)?;
        let home: Arc<dyn Home> = self.shared.clone();
        let entries = got.into_iter().map(|got| match got {
            Got::Leased(leased) => BlockHandle::of(leased, epoch, &home),
            Got::Miss | Got::Busy => None,
        });
        Ok(entries.collect())
    }

    /// As [`Namespace::get`], by who can read the memory of a device: where each block lies, where it was found, and what keeps it
    /// there.
    pub(in crate::client) fn get_from(
        &self,
        hashes: &[BlockHash],
        scope: FetchScope,
        device: Option<DeviceUuid>,
    ) -> Result<Vec<Option<LeasedBlock>>, ClientError> {
        let (got, epoch) = self.fetch(hashes, scope, device)?;
        let home: Arc<dyn Home> = self.shared.clone();
        let entries = got.into_iter().map(|got| match got {
            Got::Leased(leased) => {
                let guard = LeaseGuard::new(leased.lease, epoch, Arc::clone(&home));
                Some(LeasedBlock {
                    place: leased.place,
                    tier: leased.tier,
                    guard,
                })
            }
            Got::Miss | Got::Busy => None,
        });
        Ok(entries.collect())
    }

    /// Copies blocks into the caller's buffers, one per key, each at least as long as its block. One trip.
    ///
    /// # Errors
    /// `Invalid` unless there are as many targets as keys; otherwise as any call. Targets may be written on an error.
    pub fn get_into(&self, hashes: &[BlockHash], targets: &mut [&mut [u8]]) -> Result<Vec<GetOutcome>, ClientError> {
        self.get_into_scoped(hashes, targets, FetchScope::Each)
    }

    /// As [`Namespace::get_into`]; with [`FetchScope::Prefix`] nothing behind the first miss is read.
    ///
    /// # Errors
    /// As [`Namespace::get_into`].
    pub fn get_into_scoped(
        &self,
        hashes: &[BlockHash],
        targets: &mut [&mut [u8]],
        scope: FetchScope,
    ) -> Result<Vec<GetOutcome>, ClientError> {
        self.get_into_any(hashes, targets.iter_mut(), scope)
    }

    /// As [`Namespace::get_into_scoped`], into memory that somebody else owns.
    ///
    /// # Errors
    /// As [`Namespace::get_into`].
    pub fn get_into_foreign(
        &self,
        hashes: &[BlockHash],
        targets: &[ForeignSlice],
        scope: FetchScope,
    ) -> Result<Vec<GetOutcome>, ClientError> {
        let mut targets: Vec<&ForeignSlice> = targets.iter().collect();
        self.get_into_any(hashes, targets.iter_mut(), scope)
    }

    fn get_into_any<'t, T: Target + 't>(
        &self,
        hashes: &[BlockHash],
        targets: impl ExactSizeIterator<Item = &'t mut T>,
        scope: FetchScope,
    ) -> Result<Vec<GetOutcome>, ClientError> {
        check_targets(targets.len(), hashes.len())?;
        self.fetch_with(hashes, scope, |got| {
            let copied = got.iter().zip(targets).map(|(got, target)| copy_out(got, target));
            copied.collect()
        })?
    }

    /// Fetches, then lets `copy` use what was leased, and gives it back.
    pub(in crate::client) fn fetch_with<R>(
        &self,
        hashes: &[BlockHash],
        scope: FetchScope,
        copy: impl FnOnce(&[Got]) -> R,
    ) -> Result<R, ClientError> {
        let (got, epoch) = self.fetch(hashes, scope, None)?;
        let copied = copy(&got);
        self.shared.returns.release(epoch, leases_of(&got));
        Ok(copied)
    }

    fn fetch(
        &self,
        hashes: &[BlockHash],
        scope: FetchScope,
        device: Option<DeviceUuid>,
    ) -> Result<(Vec<Got>, u64), ClientError> {
        let extensions = match device {
            Some(device) => Extensions::on_device(self.hints, device.0),
            None => Extensions::from(self.hints),
        };
        let mut line = self.shared.line()?;
        let (session, opened) = line.opened(&self.shared, self.index)?;
        let (keys_max, epoch) = (session.keys_max(), session.epoch);
        let mut got = Vec::with_capacity(hashes.len());
        for (chunk, lineage) in chunks(hashes, keys_max) {
            if scope == FetchScope::Prefix && got.last().is_some_and(|got| !matches!(got, Got::Leased(_))) {
                break;
            }
            let keys = Keys {
                handle: opened.handle,
                lineage,
                hashes: Array::from(chunk),
            };
            let request = Request::Fetch { scope, keys };
            let result = line.call(&self.shared, &request, extensions, |session, reply| match reply {
                Reply::Fetched { generation, outcomes } => {
                    session.absorb_fetched(self.index, chunk, generation, outcomes, &mut got)
                }
                _ => Err(unexpected()),
            });
            if let Err(error) = result {
                self.shared.returns.release(epoch, leases_of(&got));
                return Err(error);
            }
        }
        got.resize_with(hashes.len(), || Got::Miss);
        Ok((got, epoch))
    }

    /// Copies blocks from the caller's buffers and publishes them, keys in prefix order; each block holds `tokens`.
    ///
    /// A key that is known to be present moves no bytes. Whether another is, the node is asked before more than
    /// [`ClientOptions::ahead_bytes_max`](crate::client::ClientOptions::ahead_bytes_max) (or one block) moves.
    ///
    /// # Errors
    /// As any call. Blocks of a call that fails may or may not have been published.
    pub fn put_from(
        &self,
        lineage: impl Into<Lineage>,
        blocks: &[(BlockHash, &[u8])],
        tokens: u32,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        self.put_from_any(lineage.into(), blocks, tokens)
    }

    /// As [`Namespace::put_from`], from memory that somebody else owns.
    ///
    /// # Errors
    /// As [`Namespace::put_from`].
    pub fn put_from_foreign(
        &self,
        lineage: impl Into<Lineage>,
        blocks: &[(BlockHash, ForeignSlice)],
        tokens: u32,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        self.put_from_any(lineage.into(), blocks, tokens)
    }

    fn put_from_any<S: Source>(
        &self,
        lineage: Lineage,
        blocks: &[(BlockHash, S)],
        tokens: u32,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        let shared = &self.shared;
        let home: Arc<dyn Home> = shared.clone();
        let mut put = Put::new(blocks, lineage, tokens, shared.options.put_bytes_max);
        let mut line = shared.line()?;
        loop {
            let (session, mut opened) = line.opened(shared, self.index)?;
            let Some(mut round) = put.next_round(session, self.index, &home)? else {
                break;
            };
            if let Some(asking) = put.reserve(&round) {
                let hashes = Array::from(&asking.hashes);
                let keys = Keys {
                    handle: opened.handle,
                    lineage: asking.lineage,
                    hashes,
                };
                let request = Request::Reserve {
                    keys,
                    lengths: Array::from(&asking.lengths),
                };
                let number = line.send(shared, &request, self.hints, shared.options.timeout)?;
                put.copy_ahead(&round)?;
                line.receive(shared, number, |session, reply| match reply {
                    Reply::Reserved { generation, outcomes } => {
                        session.observe(self.index, generation);
                        opened.generation = generation;
                        put.absorb_reserved(&mut round, session, outcomes, &home)
                    }
                    _ => Err(unexpected()),
                })?;
            } else {
                put.copy_ahead(&round)?;
            }
            let mut ahead = put.ahead(&round, line.opened(shared, self.index)?.0);
            let (handle, generation, asked) = (opened.handle, opened.generation, ahead.count > 0);
            let mut sent = [None; Part::ALL.len()];
            for (part, number) in Part::ALL.into_iter().zip(&mut sent) {
                put.copy_granted(&round, part)?;
                let items = put.seal_items(&round, part);
                if items.is_empty() {
                    continue;
                }
                let request = Request::Seal {
                    handle,
                    generation,
                    ahead: std::mem::take(&mut ahead),
                    items: Array::from(&items),
                };
                *number = Some(line.send(shared, &request, self.hints, shared.options.timeout)?);
            }
            let mut result = Ok(());
            for (part, number) in Part::ALL.into_iter().zip(sent) {
                let Some(number) = number else { continue };
                let absorbed = line.receive(shared, number, |session, reply| match reply {
                    Reply::Sealed {
                        generation,
                        outcomes,
                        granted,
                    } => {
                        session.observe(self.index, generation);
                        put.absorb_sealed(&mut round, part, session, outcomes, granted)
                    }
                    _ => Err(unexpected()),
                });
                result = result.and(absorbed);
            }
            if asked {
                shared.returns.rouse();
            }
            result?;
            put.finish(round);
        }
        Ok(put.into_outcomes())
    }

    /// A slot of `length` bytes to write in place and seal.
    ///
    /// # Errors
    /// As any call.
    pub fn writer(
        &self,
        hash: BlockHash,
        parent: Parent,
        length: u32,
        tokens: u32,
    ) -> Result<Writing<BlockWriter>, ClientError> {
        let mut writers = self.writers(parent, &[(hash, length)], tokens)?;
        writers.pop().ok_or_else(unexpected)
    }

    /// Slots to write in place and seal, keys in prefix order, one entry per key.
    ///
    /// # Errors
    /// `Invalid` for a block that is empty or over the node's limit, or more keys than one message takes; otherwise as
    /// any call.
    pub fn writers(
        &self,
        lineage: impl Into<Lineage>,
        blocks: &[(BlockHash, u32)],
        tokens: u32,
    ) -> Result<Vec<Writing<BlockWriter>>, ClientError> {
        let lineage = lineage.into();
        let mut line = self.shared.line()?;
        let (session, opened) = line.opened(&self.shared, self.index)?;
        check_lengths(blocks, session)?;
        let (hashes, lengths): (Vec<BlockHash>, Vec<u32>) = blocks.iter().copied().unzip();
        let keys = Keys {
            handle: opened.handle,
            lineage,
            hashes: Array::from(&hashes),
        };
        let request = Request::Reserve {
            keys,
            lengths: Array::from(&lengths),
        };
        let opening = Opening {
            index: self.index,
            hashes: &hashes,
            lengths: &lengths,
            lineage,
            tokens,
        };
        let home: Arc<dyn Home> = self.shared.clone();
        let slots = line.call(&self.shared, &request, self.hints, |session, reply| {
            opening.absorb(session, reply, &home)
        })?;
        Ok(slots
            .into_iter()
            .map(|slot| slot.map(|slot| BlockWriter::new(self, slot)))
            .collect())
    }

    /// Publishes written slots of this namespace in one trip.
    ///
    /// # Errors
    /// `Invalid` for writers of another namespace; `Closed` for writers of a connection that is gone; otherwise as any call.
    pub fn seal(&self, mut writers: Vec<BlockWriter>) -> Result<Vec<PutOutcome>, ClientError> {
        if writers
            .iter()
            .any(|writer| !writer.belongs_to(&self.shared, self.index))
        {
            return Err(ClientError::invalid("writers of another namespace: seal them there"));
        }
        let mut line = self.shared.line()?;
        let mut outcomes = Vec::with_capacity(writers.len());
        let (session, opened) = line.opened(&self.shared, self.index)?;
        let most = session.keys_max();
        // One message carries one generation; writers of different ones are rare and go one after the other.
        let mut rest = writers.as_mut_slice();
        while let Some(first) = rest.first() {
            let generation = first.generation();
            let alike = rest
                .iter()
                .take(most)
                .take_while(|writer| writer.generation() == generation)
                .count();
            let (batch, later) = rest.split_at_mut(alike);
            rest = later;
            let items = batch
                .iter()
                .map(BlockWriter::checked_item)
                .collect::<Result<Vec<SealItem>, _>>()?;
            let (handle, ahead, items) = (opened.handle, Ahead::default(), Array::from(&items));
            let request = Request::Seal {
                handle,
                generation,
                ahead,
                items,
            };
            line.call(&self.shared, &request, self.hints, |session, reply| {
                let slots = batch.iter_mut().map(BlockWriter::slot);
                absorb_sealed(session, self.index, reply, slots, &mut outcomes)
            })?;
        }
        Ok(outcomes)
    }

    /// Which keys are cached, and where. Leases nothing and moves no bytes. Where the node names a cost model, what other nodes
    /// have counts only if it is worth fetching: see [`Namespace::lookup_raw`].
    ///
    /// # Errors
    /// As any call.
    pub fn lookup(&self, hashes: &[BlockHash]) -> Result<Vec<Option<Tier>>, ClientError> {
        self.look(hashes, Extensions::from(self.hints))
    }

    /// As [`Namespace::lookup`], whether or not fetching is worth it: a get may miss what this finds. A node that does not know the
    /// question answers as a lookup does.
    ///
    /// # Errors
    /// As any call.
    pub fn lookup_raw(&self, hashes: &[BlockHash]) -> Result<Vec<Option<Tier>>, ClientError> {
        self.look(hashes, Extensions::raw(self.hints))
    }

    fn look(&self, hashes: &[BlockHash], extensions: Extensions<'static>) -> Result<Vec<Option<Tier>>, ClientError> {
        let mut found = Vec::with_capacity(hashes.len());
        self.each_chunk(hashes, extensions, Request::Lookup, |chunk, reply| {
            let Reply::Found { generation, tiers } = reply else {
                return Err(unexpected());
            };
            found.extend(tiers.iter());
            check_count(tiers.len(), chunk.len()).map(|()| generation)
        })?;
        Ok(found)
    }

    /// What the node would decide about fetching these keys, in prefix order, from other nodes, with this namespace's hints: a
    /// `kvtier::node::Explanation` in JSON. Decides and counts nothing.
    ///
    /// # Errors
    /// `Invalid` for more keys than one message takes; `Unavailable` where the node has no cost model or nobody to fetch from;
    /// otherwise as any call.
    pub fn explain(&self, hashes: &[BlockHash]) -> Result<String, ClientError> {
        let mut line = self.shared.line()?;
        let (session, opened) = line.opened(&self.shared, self.index)?;
        check_one_message(hashes.len(), session)?;
        let keys = Keys {
            handle: opened.handle,
            lineage: Lineage::default(),
            hashes: Array::from(hashes),
        };
        line.call(
            &self.shared,
            &Request::Explain(keys),
            self.hints,
            |_, reply| match reply {
                Reply::Explained { json } => Ok(json.to_owned()),
                _ => Err(unexpected()),
            },
        )
    }

    /// Says what becomes of the session that these keys, in prefix order, are the prompt of (and, for [`Advice::Answered`], what was put of the
    /// answer); how many of their blocks the node has.
    /// What many sessions share is not over with one of them. Only `eviction_policy = "hazard"` makes use of it.
    ///
    /// # Errors
    /// `Invalid` for more keys than one message takes or a time of more than an hour; `Protocol` from a node that does not know this;
    /// otherwise as any call.
    pub fn advise(&self, hashes: &[BlockHash], advice: Advice) -> Result<u32, ClientError> {
        let mut line = self.shared.line()?;
        let (session, opened) = line.opened(&self.shared, self.index)?;
        check_one_message(hashes.len(), session)?;
        let keys = Keys {
            handle: opened.handle,
            lineage: Lineage::default(),
            hashes: Array::from(hashes),
        };
        let request = advice.request(keys);
        line.call(&self.shared, &request, self.hints, |_, reply| match reply {
            Reply::Advised { blocks } => Ok(blocks),
            _ => Err(unexpected()),
        })
    }

    /// Whether one key is cached.
    ///
    /// # Errors
    /// As any call.
    pub fn exists(&self, hash: BlockHash) -> Result<bool, ClientError> {
        Ok(self.lookup(&[hash])?.first().is_some_and(Option::is_some))
    }

    /// Forgets keys; whether each was there. Whoever holds a lease keeps its bytes until it lets go.
    ///
    /// # Errors
    /// As any call.
    pub fn delete(&self, hashes: &[BlockHash]) -> Result<Vec<bool>, ClientError> {
        let mut deleted = Vec::with_capacity(hashes.len());
        self.each_chunk(hashes, Extensions::from(self.hints), Request::Delete, |chunk, reply| {
            let Reply::Deleted { generation, removed } = reply else {
                return Err(unexpected());
            };
            deleted.extend(removed.iter());
            check_count(removed.len(), chunk.len()).map(|()| generation)
        })?;
        let mut line = self.shared.line()?;
        let (session, opened) = line.opened(&self.shared, self.index)?;
        hashes
            .iter()
            .for_each(|hash| session.known.remove(opened.handle, *hash));
        Ok(deleted)
    }

    fn each_chunk<'h>(
        &self,
        hashes: &'h [BlockHash],
        extensions: Extensions<'static>,
        request: impl Fn(Keys<'h>) -> Request<'h>,
        mut absorb: impl FnMut(&[BlockHash], Reply<'_>) -> Result<Generation, ClientError>,
    ) -> Result<(), ClientError> {
        let mut line = self.shared.line()?;
        let keys_max = line.opened(&self.shared, self.index)?.0.keys_max();
        for (chunk, lineage) in chunks(hashes, keys_max) {
            let (_, opened) = line.opened(&self.shared, self.index)?;
            let keys = Keys {
                handle: opened.handle,
                lineage,
                hashes: Array::from(chunk),
            };
            line.call(&self.shared, &request(keys), extensions, |session, reply| {
                let generation = absorb(chunk, reply)?;
                session.observe(self.index, generation);
                Ok(())
            })?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for Namespace {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("Namespace")
            .field("hints", &self.hints)
            .finish_non_exhaustive()
    }
}
