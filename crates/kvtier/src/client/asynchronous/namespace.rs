use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use kvtier_core::{BlockHash, FetchScope, Generation, Hints, Parent, SealItem, Tier};

use super::connection::{Connection, Pending};
use super::writer::BlockWriter;
use super::{Patience, Shared};
use crate::client::batch::{
    Opening, absorb_sealed, check_count, check_lengths, check_one_message, check_targets, copy_out, leases_of,
    unexpected,
};
use crate::client::handle::BlockHandle;
use crate::client::put::{Part, Put};
use crate::client::returns::Home;
use crate::client::session::{Got, Session};
use crate::client::{Advice, ClientError, GetOutcome, Lineage, PutOutcome, Writing};
use crate::wire::{Ahead, Array, Extensions, Keys, Reply, Request};

/// A namespace in one form, over a [`super::Client`]'s connection. Cloning it is cheap.
#[derive(Clone)]
pub struct Namespace {
    shared: Arc<Shared>,
    index: usize,
    hints: Hints,
    deadline: Option<Duration>,
}

impl Namespace {
    pub(super) fn new(shared: Arc<Shared>, index: usize) -> Namespace {
        Namespace {
            shared,
            index,
            hints: Hints::default(),
            deadline: None,
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

    /// The same namespace, whose requests wait at the node for as long as this; the client itself is as patient as its
    /// options say. For callers who drop a future when it is late and want the connection to live on: a late answer then
    /// gives back what it leases.
    #[must_use]
    pub fn with_deadline(&self, deadline: Duration) -> Namespace {
        Namespace {
            deadline: Some(deadline),
            ..self.clone()
        }
    }

    /// The generation in force, as of the latest answer.
    ///
    /// # Errors
    /// As any call: it connects again when the connection was lost.
    pub async fn generation(&self) -> Result<Generation, ClientError> {
        Ok(self.shared.opened(self.index).await?.1.generation)
    }

    /// Leases blocks, keys in prefix order. One entry per key; `None` is a miss (or no room for another lease).
    ///
    /// # Errors
    /// As any call: `Unavailable` when the node is gone or late.
    pub async fn get(&self, hashes: &[BlockHash], scope: FetchScope) -> Result<Vec<Option<BlockHandle>>, ClientError> {
        let home: Arc<dyn Home> = self.shared.clone();
        let mut handles = Vec::with_capacity(hashes.len());
        let (mut next, mut missed) = (0, false);
        while next < hashes.len() && !(missed && scope == FetchScope::Prefix) {
            let (got, epoch) = self.fetch(hashes, &mut next, scope).await?;
            missed = got.last().is_some_and(|got| !matches!(got, Got::Leased(_)));
            handles.extend(got.into_iter().map(|got| match got {
                Got::Leased(leased) => BlockHandle::of(leased, epoch, &home),
                Got::Miss | Got::Busy => None,
            }));
        }
        handles.resize_with(hashes.len(), || None);
        Ok(handles)
    }

    /// Copies blocks into the caller's buffers, one per key, each at least as long as its block. One trip; the copy is
    /// made on the calling task.
    ///
    /// # Errors
    /// `Invalid` unless there are as many targets as keys; otherwise as any call. Targets may be written on an error.
    pub async fn get_into(
        &self,
        hashes: &[BlockHash],
        targets: &mut [&mut [u8]],
    ) -> Result<Vec<GetOutcome>, ClientError> {
        self.get_into_scoped(hashes, targets, FetchScope::Each).await
    }

    /// As [`Namespace::get_into`]; with [`FetchScope::Prefix`] nothing behind the first miss is read.
    ///
    /// # Errors
    /// As [`Namespace::get_into`].
    pub async fn get_into_scoped(
        &self,
        hashes: &[BlockHash],
        targets: &mut [&mut [u8]],
        scope: FetchScope,
    ) -> Result<Vec<GetOutcome>, ClientError> {
        check_targets(targets.len(), hashes.len())?;
        let mut outcomes = Vec::with_capacity(hashes.len());
        let (mut next, mut missed) = (0, false);
        while next < hashes.len() && !(missed && scope == FetchScope::Prefix) {
            let first = next;
            let (got, epoch) = self.fetch(hashes, &mut next, scope).await?;
            missed = got.last().is_some_and(|got| !matches!(got, Got::Leased(_)));
            // No await between the lease and its release: dropping the future cannot lose it.
            let copied: Result<Vec<GetOutcome>, ClientError> = got
                .iter()
                .zip(&mut targets[first..next])
                .map(|(got, target)| copy_out(got, target))
                .collect();
            self.shared.returns.release(epoch, leases_of(&got));
            outcomes.extend(copied?);
        }
        outcomes.resize(hashes.len(), GetOutcome::Miss);
        Ok(outcomes)
    }

    /// Fetches the keys from `next` on that fit one message, and moves `next` behind them.
    async fn fetch(
        &self,
        hashes: &[BlockHash],
        next: &mut usize,
        scope: FetchScope,
    ) -> Result<(Vec<Got>, u64), ClientError> {
        let (connection, keys) = self.keys_from(hashes, *next).await?;
        let chunk = &hashes[*next..*next + keys.hashes.len()];
        let absorb = |session: &mut Session, reply: Reply<'_>| {
            let Reply::Fetched { generation, outcomes } = reply else {
                return Err(unexpected());
            };
            let mut got = Vec::with_capacity(chunk.len());
            session.absorb_fetched(self.index, chunk, generation, outcomes, &mut got)?;
            Ok(got)
        };
        let got = self.call(&connection, &Request::Fetch { scope, keys }, absorb).await?;
        *next += chunk.len();
        Ok((got, connection.epoch()))
    }

    /// Copies blocks from the caller's buffers and publishes them, keys in prefix order; each block holds `tokens`. The
    /// copy is made on the calling task.
    ///
    /// A key that is known to be present moves no bytes. Whether another is, the node is asked before more than
    /// [`ClientOptions::ahead_bytes_max`](crate::client::ClientOptions::ahead_bytes_max) (or one block) moves.
    ///
    /// # Errors
    /// As any call. Blocks of a call that fails, or whose future is dropped, may or may not have been published.
    pub async fn put_from(
        &self,
        lineage: impl Into<Lineage>,
        blocks: &[(BlockHash, &[u8])],
        tokens: u32,
    ) -> Result<Vec<PutOutcome>, ClientError> {
        let shared = &self.shared;
        let home: Arc<dyn Home> = shared.clone();
        let mut put = Put::new(blocks, lineage.into(), tokens, shared.options.put_bytes_max);
        loop {
            let (connection, mut opened) = shared.opened(self.index).await?;
            let round = connection.with_session(|session| put.next_round(session, self.index, &home))?;
            let Some(mut round) = round else { break };
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
                let pending = self.send(&connection, &request)?;
                put.copy_ahead(&round)?;
                let absorb = |session: &mut Session, reply: Reply<'_>| {
                    let Reply::Reserved { generation, outcomes } = reply else {
                        return Err(unexpected());
                    };
                    session.observe(self.index, generation);
                    put.absorb_reserved(&mut round, session, outcomes, &home)?;
                    Ok(generation)
                };
                opened.generation = pending.wait(absorb).await?;
            } else {
                put.copy_ahead(&round)?;
            }
            let mut ahead = connection.with_session(|session| put.ahead(&round, session));
            let (handle, generation, asked) = (opened.handle, opened.generation, ahead.count > 0);
            let mut sent = [const { None }; Part::ALL.len()];
            for (part, pending) in Part::ALL.into_iter().zip(&mut sent) {
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
                *pending = Some(self.send(&connection, &request)?);
            }
            let mut result = Ok(());
            for (part, pending) in Part::ALL.into_iter().zip(sent) {
                let Some(pending) = pending else { continue };
                let absorb = |session: &mut Session, reply: Reply<'_>| {
                    let Reply::Sealed {
                        generation,
                        outcomes,
                        granted,
                    } = reply
                    else {
                        return Err(unexpected());
                    };
                    session.observe(self.index, generation);
                    put.absorb_sealed(&mut round, part, session, outcomes, granted)
                };
                result = result.and(pending.wait(absorb).await);
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
    pub async fn writer(
        &self,
        hash: BlockHash,
        parent: Parent,
        length: u32,
        tokens: u32,
    ) -> Result<Writing<BlockWriter>, ClientError> {
        let mut writers = self.writers(parent, &[(hash, length)], tokens).await?;
        writers.pop().ok_or_else(unexpected)
    }

    /// Slots to write in place and seal, keys in prefix order, one entry per key.
    ///
    /// # Errors
    /// `Invalid` for a block that is empty or over the node's limit, or more keys than one message takes; otherwise as
    /// any call.
    pub async fn writers(
        &self,
        lineage: impl Into<Lineage>,
        blocks: &[(BlockHash, u32)],
        tokens: u32,
    ) -> Result<Vec<Writing<BlockWriter>>, ClientError> {
        let lineage = lineage.into();
        let (connection, opened) = self.shared.opened(self.index).await?;
        connection.with_session(|session| check_lengths(blocks, session))?;
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
        let absorb = |session: &mut Session, reply: Reply<'_>| opening.absorb(session, reply, &home);
        let slots = self.call(&connection, &request, absorb).await?;
        Ok(slots
            .into_iter()
            .map(|slot| slot.map(|slot| BlockWriter::new(self, slot)))
            .collect())
    }

    /// Publishes written slots of this namespace in one trip.
    ///
    /// # Errors
    /// `Invalid` for writers of another namespace; `Closed` for writers of a connection that is gone; otherwise as any call.
    pub async fn seal(&self, mut writers: Vec<BlockWriter>) -> Result<Vec<PutOutcome>, ClientError> {
        if writers
            .iter()
            .any(|writer| !writer.belongs_to(&self.shared, self.index))
        {
            return Err(ClientError::invalid("writers of another namespace: seal them there"));
        }
        let mut outcomes = Vec::with_capacity(writers.len());
        let (connection, opened) = self.shared.opened(self.index).await?;
        let most = connection.with_session(|session| session.keys_max());
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
            let absorb = |session: &mut Session, reply: Reply<'_>| {
                absorb_sealed(
                    session,
                    self.index,
                    reply,
                    batch.iter_mut().map(BlockWriter::slot),
                    &mut outcomes,
                )
            };
            self.call(&connection, &request, absorb).await?;
        }
        Ok(outcomes)
    }

    /// Which keys are cached, and where. Leases nothing and moves no bytes. Where the node names a cost model, what other nodes
    /// have counts only if it is worth fetching: see [`Namespace::lookup_raw`].
    ///
    /// # Errors
    /// As any call.
    pub async fn lookup(&self, hashes: &[BlockHash]) -> Result<Vec<Option<Tier>>, ClientError> {
        self.look(hashes, Extensions::from(self.hints)).await
    }

    /// As [`Namespace::lookup`], whether or not fetching is worth it: a get may miss what this finds. A node that does not know the
    /// question answers as a lookup does.
    ///
    /// # Errors
    /// As any call.
    pub async fn lookup_raw(&self, hashes: &[BlockHash]) -> Result<Vec<Option<Tier>>, ClientError> {
        self.look(hashes, Extensions::raw(self.hints)).await
    }

    async fn look(
        &self,
        hashes: &[BlockHash],
        extensions: Extensions<'static>,
    ) -> Result<Vec<Option<Tier>>, ClientError> {
        let mut found = Vec::with_capacity(hashes.len());
        while found.len() < hashes.len() {
            let (connection, keys) = self.keys_from(hashes, found.len()).await?;
            let absorb = |session: &mut Session, reply: Reply<'_>| {
                let Reply::Found { generation, tiers } = reply else {
                    return Err(unexpected());
                };
                session.observe(self.index, generation);
                found.extend(tiers.iter());
                check_count(tiers.len(), keys.hashes.len())
            };
            self.send_with(&connection, &Request::Lookup(keys), extensions)?
                .wait(absorb)
                .await?;
        }
        Ok(found)
    }

    /// What the node would decide about fetching these keys, in prefix order, from other nodes, with this namespace's hints: a
    /// `kvtier::node::Explanation` in JSON. Decides and counts nothing.
    ///
    /// # Errors
    /// `Invalid` for more keys than one message takes; `Unavailable` where the node has no cost model or nobody to fetch from;
    /// otherwise as any call.
    pub async fn explain(&self, hashes: &[BlockHash]) -> Result<String, ClientError> {
        let (connection, keys) = self.keys_from(hashes, 0).await?;
        connection.with_session(|session| check_one_message(hashes.len(), session))?;
        let absorb = |_: &mut Session, reply: Reply<'_>| match reply {
            Reply::Explained { json } => Ok(json.to_owned()),
            _ => Err(unexpected()),
        };
        self.call(&connection, &Request::Explain(keys), absorb).await
    }

    /// As the blocking client's: what becomes of a session.
    ///
    /// # Errors
    /// As there.
    pub async fn advise(&self, hashes: &[BlockHash], advice: Advice) -> Result<u32, ClientError> {
        let (connection, keys) = self.keys_from(hashes, 0).await?;
        connection.with_session(|session| check_one_message(hashes.len(), session))?;
        let absorb = |_: &mut Session, reply: Reply<'_>| match reply {
            Reply::Advised { blocks } => Ok(blocks),
            _ => Err(unexpected()),
        };
        self.call(&connection, &advice.request(keys), absorb).await
    }

    /// Whether one key is cached.
    ///
    /// # Errors
    /// As any call.
    pub async fn exists(&self, hash: BlockHash) -> Result<bool, ClientError> {
        Ok(self.lookup(&[hash]).await?.first().is_some_and(Option::is_some))
    }

    /// Forgets keys; whether each was there. Whoever holds a lease keeps its bytes until it lets go.
    ///
    /// # Errors
    /// As any call.
    pub async fn delete(&self, hashes: &[BlockHash]) -> Result<Vec<bool>, ClientError> {
        let mut deleted = Vec::with_capacity(hashes.len());
        while deleted.len() < hashes.len() {
            let (connection, keys) = self.keys_from(hashes, deleted.len()).await?;
            let absorb = |session: &mut Session, reply: Reply<'_>| {
                let Reply::Deleted { generation, removed } = reply else {
                    return Err(unexpected());
                };
                session.observe(self.index, generation);
                keys.hashes
                    .iter()
                    .for_each(|hash| session.known.remove(keys.handle, hash));
                deleted.extend(removed.iter());
                check_count(removed.len(), keys.hashes.len())
            };
            self.call(&connection, &Request::Delete(keys), absorb).await?;
        }
        Ok(deleted)
    }

    fn send(&self, connection: &Arc<Connection>, request: &Request<'_>) -> Result<Pending, ClientError> {
        self.send_with(connection, request, self.hints.into())
    }

    fn send_with(
        &self,
        connection: &Arc<Connection>,
        request: &Request<'_>,
        extensions: Extensions<'static>,
    ) -> Result<Pending, ClientError> {
        let answer = self.shared.options.timeout;
        let patience = Patience {
            node: self.deadline.unwrap_or(answer),
            answer,
        };
        let clock_ns = self.shared.clock_ns.load(Ordering::Relaxed);
        connection.send(request, extensions, patience, clock_ns)
    }

    async fn call<T>(
        &self,
        connection: &Arc<Connection>,
        request: &Request<'_>,
        absorb: impl FnOnce(&mut Session, Reply<'_>) -> Result<T, ClientError>,
    ) -> Result<T, ClientError> {
        self.send(connection, request)?.wait(absorb).await
    }

    /// The keys from `first` on that fit one message.
    async fn keys_from<'h>(
        &self,
        hashes: &'h [BlockHash],
        first: usize,
    ) -> Result<(Arc<Connection>, Keys<'h>), ClientError> {
        let (connection, opened) = self.shared.opened(self.index).await?;
        let keys_max = connection.with_session(|session| session.keys_max());
        let chunk = &hashes[first..hashes.len().min(first + keys_max)];
        let parent = first
            .checked_sub(1)
            .map_or(Parent::Unknown, |before| Parent::Block(hashes[before]));
        let keys = Keys {
            handle: opened.handle,
            lineage: Lineage::Chain(parent),
            hashes: Array::from(chunk),
        };
        Ok((connection, keys))
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
