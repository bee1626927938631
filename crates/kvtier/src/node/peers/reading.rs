//! Reads blocks from peers: lease, one-sided read into a reserved slot, check, seal, release.
//!
//! A client's fetch that misses here is taken over by one of a few threads. What it finds with peers becomes a block of this node,
//! and then the fetch is answered as any other. Whatever goes wrong on the way is a miss, after the time that the settings grant at the latest.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{
    Answer, BlockHash, ClientId, Copied, Extent, FetchScope, Fetched, Generation, Hints, NamespaceId, Parent,
    Realization, RealizationId, Request, ReservationId, Reserved, SealItem, SealRequest, Sealed, Tier, TrustDomain,
};
use kvtier_transfer::{Cause, Direction, Piece, RemoteRegion, Transfer};
use parking_lot::Mutex;

use super::Shared;
use super::link::{Link, Live, Unanswered};
use super::message::{Acquired, Held, Keys, Message, Versions};
use super::regions::Way;
use super::serving::request;
use super::weighing::{Asked, Chosen, Fetching, Weighing};
use crate::node::attempt::Attempt;
use crate::node::driver::{Driver, Waiter};
use crate::node::outbox::{Notice, Outbox};

/// Fetches that wait for a thread, for each of them.
const WAITING_A_THREAD: usize = 64;
/// Bytes that are asked for at a time: what was read is compared while it is in the cache.
const PART_BYTES: u64 = 1 << 20;
/// Parts that are on their way while this thread is at another.
const RUNNING_MAX: usize = 1;

/// Blocks of one namespace and realization, as a session names them.
#[derive(Clone, Copy)]
pub(crate) struct Scope {
    pub(crate) client: ClientId,
    pub(crate) domain: TrustDomain,
    pub(crate) namespace: NamespaceId,
    pub(crate) realization: RealizationId,
}

/// A client's fetch.
pub(crate) struct FetchJob {
    pub(crate) scope: Scope,
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) which: FetchScope,
    pub(crate) hints: Hints,
    pub(crate) deadline: Instant,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) request: u64,
}

/// A client's lookup.
pub(crate) struct LookupJob {
    pub(crate) scope: Scope,
    pub(crate) hashes: Vec<BlockHash>,
    pub(crate) hints: Hints,
    /// What exists is asked, not what is worth fetching.
    pub(crate) raw: bool,
    pub(crate) outbox: Arc<Outbox>,
    pub(crate) request: u64,
}

pub(super) enum Job {
    Fetch(FetchJob),
    Lookup(LookupJob),
    Explain(LookupJob),
    Stop,
}

/// The queue of the reading threads.
pub(super) struct Reading {
    jobs: Sender<Job>,
    threads: usize,
    clients: Mutex<HashMap<TrustDomain, ClientId>>,
}

/// What was tried to be had from peers.
enum Copying {
    Nothing,
    /// All that is missing and that they have.
    All,
    /// What lies behind a front that the engine computes.
    Back,
}

/// A block that a peer holds for us.
struct Found {
    /// Place among the keys asked for.
    position: usize,
    link: Arc<Link>,
    live: Arc<Live>,
    region: Arc<RemoteRegion>,
    held: Held,
}

/// A peer, and what it has of the blocks asked for.
pub(super) type Located = (Arc<Link>, Arc<Live>, Vec<Option<Tier>>);
/// A peer, and the places of what it is to be asked for.
type Assigned = (Arc<Link>, Arc<Live>, Vec<usize>);

/// A block that was read and is what it should be: its place among the keys asked for, and where it lies.
type Right = (usize, Found, ReservationId, Extent);

/// Blocks that were asked for together.
struct Part {
    link: Arc<Link>,
    live: Arc<Live>,
    /// Their places among the keys asked for.
    places: Vec<usize>,
    answer: Result<Receiver<Message>, Unanswered>,
}

/// A part that is being read.
struct Running {
    own: ClientId,
    begun: Instant,
    blocks: Vec<(Found, ReservationId, Extent)>,
    transfer: Option<Transfer>,
}

impl FetchJob {
    /// A prefix with a gap at its front is none: who asks for one gets no split.
    pub(in crate::node) fn hints_of_scope(&self) -> Hints {
        Hints {
            can_split: self.hints.can_split && self.which == FetchScope::Each,
            ..self.hints
        }
    }

    /// Answers with what is here; these positions came from elsewhere.
    pub(in crate::node) fn answer(&self, driver: &Driver, copied: &[usize]) {
        // Whether or not anything came: what is here now is the answer.
        let answer = driver.with(|decider, now| {
            let left = self.deadline.saturating_duration_since(Instant::now());
            let asked = Request {
                hints: self.hints,
                deadline: now.after(left),
                ..request(
                    self.scope.client,
                    self.scope.namespace,
                    self.scope.realization,
                    &self.hashes,
                    now,
                )
            };
            let answer = decider.manager.fetch(&asked, self.which, now);
            if let Ok(Answer::Pending(operation)) = answer {
                let outbox = Arc::clone(&self.outbox);
                decider.wait(
                    operation,
                    Waiter::Session {
                        outbox,
                        request: self.request,
                    },
                );
            }
            answer
        });
        let mut results = match answer {
            Ok(Answer::Pending(_)) => return,
            Ok(Answer::Ready(results)) => results,
            Err(_) => vec![Fetched::Miss; self.hashes.len()],
        };
        for &position in copied {
            if let Some(Fetched::Leased { tier, .. }) = results.get_mut(position) {
                *tier = Tier::Remote;
            }
        }
        self.outbox.push(Notice::Fetched {
            request: self.request,
            results,
        });
    }
}

impl Reading {
    pub(super) fn new(threads: usize) -> (Reading, Receiver<Job>) {
        let (jobs, work) = crossbeam_channel::bounded(threads * WAITING_A_THREAD);
        let reading = Reading {
            jobs,
            threads,
            clients: Mutex::default(),
        };
        (reading, work)
    }

    /// False when so much waits already that peers are of no help.
    pub(super) fn submit(&self, job: Job) -> bool {
        self.jobs.try_send(job).is_ok()
    }

    pub(super) fn stop(&self) {
        for _ in 0..self.threads {
            let _ = self.jobs.send_timeout(Job::Stop, Duration::from_secs(1));
        }
    }
}

impl Shared {
    /// A reading thread.
    pub(super) fn read(self: &Arc<Self>, work: &Receiver<Job>) {
        while let Ok(job) = work.recv() {
            match job {
                Job::Stop => return,
                Job::Fetch(job) => self.fetch(job),
                Job::Lookup(job) => self.lookup(job),
                Job::Explain(job) => self.explain(&job),
            }
        }
    }

    fn fetch(&self, job: FetchJob) {
        let attempt = Attempt::new(job);
        let ticket = self.copying.begin(attempt.job.scope.namespace);
        let (is_split, has_fetched) = match self.copy_from_peers(&attempt) {
            Copying::Nothing => (false, false),
            Copying::All => (false, true),
            Copying::Back => (true, true),
        };
        self.copying.end(ticket);
        // What a split leaves out the engine computes.
        if let Some(remote) = self.driver.remote()
            && !attempt.is_answered()
            && !is_split
        {
            // Behind what peers gave no gap is left: an engine could not compute it meanwhile.
            remote.copy(&attempt, !has_fetched);
        }
        attempt.answer(&self.driver);
    }

    fn lookup(&self, job: LookupJob) {
        let LookupJob { scope, hashes, .. } = &job;
        let looked = self.driver.with(|decider, now| {
            let asked = request(scope.client, scope.namespace, scope.realization, hashes, now);
            let tiers = decider.manager.lookup(&asked, now);
            (tiers, decider.manager.generation(scope.namespace))
        });
        let (tiers, generation) = (looked.0.unwrap_or_else(|_| vec![None; hashes.len()]), looked.1);
        let missing: Vec<usize> = positions(&tiers, |tier| tier.is_none());
        let (mut tiers, mut is_split) = (tiers, false);
        if let Some((keys, versions)) = self.question(*scope, hashes, &missing) {
            let until = Instant::now() + self.query_timeout;
            let (mut found, mut first) = (self.locate(&keys, &versions, until), 0);
            if self.weighing.is_some() && !job.raw {
                let chosen = self.weigh(&tiers, &missing, job.hints, &found);
                found.retain(|(link, ..)| chosen.as_ref().is_some_and(|(_, chosen)| Arc::ptr_eq(chosen, link)));
                if let Some((chosen, _)) = chosen {
                    (is_split, first) = (chosen.is_split(), chosen.first_block);
                }
            }
            for (_, _, found) in found {
                for (&position, tier) in missing.iter().zip(found) {
                    if tier.is_some() && position >= first {
                        tiers[position] = Some(Tier::Remote);
                    }
                }
            }
        }
        if let Some(remote) = self.driver.remote()
            && remote.may_help(scope.domain)
            && !is_split
        {
            remote.add_found(&job, &mut tiers);
        }
        job.outbox.push(Notice::Found {
            request: job.request,
            generation,
            tiers,
        });
    }

    /// What to ask peers, and the list that theirs must equal; `None` where nothing is to be asked.
    pub(super) fn question(&self, scope: Scope, hashes: &[BlockHash], positions: &[usize]) -> Option<(Keys, Versions)> {
        if positions.is_empty() || !self.generations.is_serving() {
            return None;
        }
        let label = self.driver.recorder.register.label(scope.namespace)?;
        self.domains.shared(&label.domain)?;
        let namespace = format!("{}/{}", label.domain, label.name);
        let versions = self.versions.of(scope.namespace, &namespace)?;
        let realization = self.driver.recorder.realizations.entries();
        let Realization(realization) = (*realization.get(scope.realization.0 as usize)?)?;
        let keys = Keys {
            namespace,
            realization,
            hashes: positions.iter().map(|&position| hashes[position]).collect(),
        };
        Some((keys, versions))
    }

    /// Asks every peer at once what it has, and waits for all until the deadline. Those with other invalidations have nothing.
    pub(super) fn locate(&self, keys: &Keys, versions: &Versions, until: Instant) -> Vec<Located> {
        let question = Message::Locate(keys.clone());
        let asked: Vec<_> = self
            .links()
            .into_iter()
            .filter_map(|link| {
                let live = link.live()?;
                let answer = live.ask(&question);
                Some((link, live, answer))
            })
            .collect();
        let mut found = Vec::new();
        for (link, live, answer) in asked {
            match link.answer(answer, until) {
                Ok(Message::Located {
                    versions: theirs,
                    tiers,
                }) if tiers.len() == keys.hashes.len() => {
                    if theirs == *versions {
                        found.push((link, live, tiers));
                    } else if tiers.iter().any(Option::is_some) {
                        link.counts.stale.fetch_add(1, Ordering::Relaxed);
                    }
                }
                Ok(_) | Err(_) => {}
            }
        }
        found
    }

    /// Which of the missing blocks to ask which peer for: each as far as it reaches, the farthest first.
    fn assign(&self, keys: &Keys, versions: &Versions, which: FetchScope, until: Instant) -> Vec<Assigned> {
        let links = self.links();
        let mut reachable: Vec<_> = links
            .into_iter()
            .filter_map(|link| Some((Arc::clone(&link), link.live()?)))
            .collect();
        if reachable.len() <= 1 {
            // One trip less: it says itself what it does not have.
            let everything = (0..keys.hashes.len()).collect::<Vec<_>>();
            return reachable
                .drain(..)
                .map(|(link, live)| (link, live, everything.clone()))
                .collect();
        }
        let mut found = self.locate(keys, versions, until.min(Instant::now() + self.query_timeout));
        let mut assigned: Vec<Assigned> = Vec::new();
        let mut taken = vec![false; keys.hashes.len()];
        match which {
            FetchScope::Each => found.sort_by_key(|(_, _, tiers)| std::cmp::Reverse(tiers.iter().flatten().count())),
            FetchScope::Prefix => found.sort_by_key(|(_, _, tiers)| {
                std::cmp::Reverse(tiers.iter().position(Option::is_none).unwrap_or(tiers.len()))
            }),
        }
        for (link, live, tiers) in found {
            let mine: Vec<usize> = positions(&tiers, Option::is_some)
                .into_iter()
                .filter(|&place| !std::mem::replace(&mut taken[place], true))
                .collect();
            if !mine.is_empty() {
                assigned.push((link, live, mine));
            }
        }
        if which == FetchScope::Prefix {
            let gap = taken.iter().position(|taken| !taken).unwrap_or(taken.len());
            for (_, _, places) in &mut assigned {
                places.retain(|&place| place < gap);
            }
            assigned.retain(|(_, _, places)| !places.is_empty());
        }
        assigned
    }

    /// Makes blocks of peers blocks of this node.
    ///
    /// Blocks are asked for in parts, all at once: while this thread reads one part and compares its checksums, with the bytes in
    /// the cache, the holder takes those of the next.
    ///
    /// What was tried.
    fn copy_from_peers(&self, attempt: &Arc<Attempt>) -> Copying {
        let hard_deadline = Instant::now() + self.fetch_timeout;
        let job = &attempt.job;
        let scope = job.scope;
        let mut until = job.deadline.min(hard_deadline);
        let looked = self.driver.with(|decider, now| {
            let asked = request(scope.client, scope.namespace, scope.realization, &job.hashes, now);
            // Together: what is written under this generation was looked for by the list that belongs to it.
            let generation = decider.manager.generation(scope.namespace);
            (decider.manager.lookup(&asked, now), generation)
        });
        let (Ok(tiers), generation) = looked else {
            return Copying::Nothing;
        };
        let missing = positions(&tiers, |tier| tier.is_none());
        let Some((keys, versions)) = self.question(scope, &job.hashes, &missing) else {
            return Copying::Nothing;
        };
        let Some(own) = self.own_client(scope.domain) else {
            return Copying::Nothing;
        };
        let mut copying = Copying::All;
        let (assigned, mut fetching) = match &self.weighing {
            None => (self.assign(&keys, &versions, job.which, until), None),
            Some(weighing) => {
                let found = self.locate(&keys, &versions, until.min(Instant::now() + self.query_timeout));
                let Some((chosen, from)) = self.weigh(&tiers, &missing, job.hints_of_scope(), &found) else {
                    return Copying::Nothing;
                };
                if chosen.is_split() {
                    copying = Copying::Back;
                }
                let is_wanted = |place: &usize| missing[*place] >= chosen.first_block;
                let assigned = found.into_iter().filter(|(link, ..)| Arc::ptr_eq(link, &from));
                let assigned = assigned.map(|(link, live, tiers)| {
                    let end = match job.which {
                        FetchScope::Each => tiers.len(),
                        FetchScope::Prefix => tiers.iter().position(Option::is_none).unwrap_or(tiers.len()),
                    };
                    let mut places = positions(&tiers[..end], Option::is_some);
                    places.retain(is_wanted);
                    (link, live, places)
                });
                let fetching = weighing.begin(self.driver.clock.now(), &chosen.decision);
                // The client is answered before that, where its patience or the model's ends.
                until = hard_deadline;
                self.patience.watch(attempt, &from.late, &fetching);
                (assigned.collect(), Some((weighing, fetching)))
            }
        };
        let mut parts = self.ask_for_parts(&keys, assigned, until);
        let mut running: VecDeque<Running> = VecDeque::new();
        let mut reached = 0;
        while let Some(part) = parts.pop_front() {
            let found = self.leased(part, &versions, until);
            if let Some((weighing, fetching)) = &mut fetching {
                weighing.answered(self.driver.clock.now(), fetching, found.is_some());
            }
            let found = found.unwrap_or_default();
            // In a prefix nothing behind a gap is of use.
            let (useful, useless): (Vec<Found>, Vec<Found>) = found.into_iter().partition(|block| {
                let follows = job.which == FetchScope::Each || block.position == reached;
                reached += usize::from(follows);
                follows
            });
            give_back(&useless);
            if useful.is_empty() {
                continue;
            }
            if let Some(begun) = self.begin(own, job, &missing, useful, until) {
                running.push_back(begun);
            }
            while running.len() > RUNNING_MAX
                && let Some(part) = running.pop_front()
            {
                let right = self.finish_weighed(part, &mut fetching);
                self.keep(own, attempt, generation, &missing, right);
            }
        }
        for part in running {
            let right = self.finish_weighed(part, &mut fetching);
            self.keep(own, attempt, generation, &missing, right);
        }
        if let Some((weighing, fetching)) = &fetching {
            self.patience.end(attempt);
            weighing.end(self.driver.clock.now(), fetching);
        }
        copying
    }

    /// Publishes what was read, under the generation that was in force when the fetch began, also where its client was answered.
    fn keep(&self, own: ClientId, attempt: &Attempt, generation: Generation, missing: &[usize], right: Vec<Right>) {
        if let Some((_, block, ..)) = right.first() {
            let link = Arc::clone(&block.link);
            attempt.keep(&link.late, || self.seal(own, &attempt.job, generation, missing, right));
        }
    }

    /// Asks for leases at the peers that have the blocks, in parts.
    fn ask_for_parts(&self, keys: &Keys, assigned: Vec<Assigned>, until: Instant) -> VecDeque<Part> {
        let left = until.saturating_duration_since(Instant::now());
        // Half of the time is for the bytes.
        let wait_ms = u32::try_from(left.as_millis() / 2).unwrap_or(u32::MAX);
        let mut parts = VecDeque::new();
        for (link, live, places) in assigned {
            let block_bytes = link.counts.block_bytes.load(Ordering::Relaxed).max(1);
            let blocks = usize::try_from(PART_BYTES / block_bytes).unwrap_or(1).max(1);
            for places in places.chunks(blocks) {
                let question = Message::Acquire {
                    wait_ms,
                    keys: Keys {
                        hashes: places.iter().map(|&place| keys.hashes[place]).collect(),
                        ..keys.clone()
                    },
                };
                parts.push_back(Part {
                    answer: live.ask(&question),
                    link: Arc::clone(&link),
                    live: Arc::clone(&live),
                    places: places.to_vec(),
                });
            }
        }
        parts.make_contiguous().sort_by_key(|part| part.places.first().copied());
        parts
    }

    /// Which peer the cost model would have the missing blocks fetched from.
    fn weigh(
        &self,
        tiers: &[Option<Tier>],
        missing: &[usize],
        hints: Hints,
        found: &[Located],
    ) -> Option<(Chosen, Arc<Link>)> {
        let weighing = self.weighing.as_ref()?;
        let peers: Vec<(Arc<Link>, usize)> = found
            .iter()
            .map(|(link, _, theirs)| (Arc::clone(link), reach(tiers, missing, theirs)))
            .collect();
        weighing.decide(self.driver.clock.now(), &asked(tiers, hints), &peers)
    }

    fn finish_weighed(&self, part: Running, fetching: &mut Option<(&Weighing, Fetching)>) -> Vec<Right> {
        let (begun, wanted) = (part.begun, part.blocks.len());
        let right = self.finish(part);
        if let Some((weighing, fetching)) = fetching {
            let bytes = right.iter().map(|(_, block, ..)| u64::from(block.held.length)).sum();
            let now = self.driver.clock.now();
            weighing.arrived(now, fetching, bytes, begun.elapsed(), right.len() == wanted);
        }
        right
    }

    /// What a peer leased of a part; `None`: it did not answer in time. Where it has not seen the same invalidations, nothing.
    fn leased(&self, part: Part, versions: &Versions, until: Instant) -> Option<Vec<Found>> {
        let Part {
            link,
            live,
            places,
            answer,
        } = part;
        if Instant::now() >= until {
            // The time went by with the parts before: that is no fault of this answer's. What it holds is given back.
            if let Some(Message::Leased { outcomes, .. }) = answer.ok().and_then(|answer| answer.try_recv().ok()) {
                let lease = |outcome: &Acquired| match outcome {
                    Acquired::Held(held) => Some(held.lease),
                    Acquired::Absent | Acquired::Busy => None,
                };
                live.tell(&Message::Release(outcomes.iter().filter_map(lease).collect()));
            }
            return None;
        }
        let (theirs, regions, outcomes) = match link.answer(answer, until) {
            Ok(Message::Leased {
                versions,
                regions,
                outcomes,
            }) if outcomes.len() == places.len() => (versions, regions, outcomes),
            Ok(_) | Err(Unanswered::Away | Unanswered::Late) => return None,
        };
        let regions: Vec<Option<Arc<RemoteRegion>>> = regions
            .iter()
            .map(|region| RemoteRegion::decode(region).ok().map(Arc::new))
            .collect();
        let (mut usable, mut unused) = (Vec::new(), Vec::new());
        for (&position, outcome) in places.iter().zip(&outcomes) {
            let Acquired::Held(held) = *outcome else { continue };
            let region = regions.get(held.region as usize).cloned().flatten();
            match region {
                Some(region) if theirs == *versions => usable.push(Found {
                    position,
                    link: Arc::clone(&link),
                    live: Arc::clone(&live),
                    region,
                    held,
                }),
                _ => unused.push(held.lease),
            }
        }
        if !unused.is_empty() {
            link.counts.stale.fetch_add(1, Ordering::Relaxed);
            live.tell(&Message::Release(unused));
        }
        if let Some(block) = usable.first() {
            let bytes = u64::from(block.held.length);
            link.counts.block_bytes.store(bytes, Ordering::Relaxed);
        }
        Some(usable)
    }

    /// Reserves slots for a part and begins to read it. The leases of what cannot be read are given back.
    fn begin(
        &self,
        own: ClientId,
        job: &FetchJob,
        missing: &[usize],
        found: Vec<Found>,
        until: Instant,
    ) -> Option<Running> {
        let hashes: Vec<BlockHash> = found.iter().map(|block| job.hashes[missing[block.position]]).collect();
        let lengths: Vec<u32> = found.iter().map(|block| block.held.length).collect();
        let reserved = self
            .reserve(own, job.scope, &hashes, &lengths, until)
            .unwrap_or_else(|| vec![Reserved::Busy; found.len()]);
        let (mut blocks, mut pieces, mut without) = (Vec::new(), Vec::new(), Vec::new());
        for (block, reserved) in found.into_iter().zip(reserved) {
            let Reserved::Granted { reservation, extent } = reserved else {
                without.push(block);
                continue;
            };
            match self.piece(job.scope.domain, &block, &extent) {
                Some(piece) => {
                    pieces.push(piece);
                    blocks.push((block, reservation, extent));
                }
                None => {
                    self.driver
                        .with(|decider, now| decider.manager.abandon(own, &[reservation], now));
                    without.push(block);
                }
            }
        }
        give_back(&without);
        let live = Arc::clone(&blocks.first()?.0.live);
        let begun = Instant::now();
        let left = until.saturating_duration_since(Instant::now());
        let transfer = live.data.submit(pieces, left).ok();
        Some(Running {
            own,
            begun,
            blocks,
            transfer,
        })
    }

    fn piece(&self, domain: TrustDomain, block: &Found, extent: &Extent) -> Option<Piece> {
        if block.live.way == Way::Verbs {
            // The NIC must know the target, too.
            self.regions.of(extent.segment, domain, Way::Verbs).ok()?;
        }
        Some(Piece {
            local: self.driver.host.slice(extent).ok()?.into(),
            remote: block
                .region
                .slice(block.held.offset, u64::from(block.held.length))
                .ok()?,
            direction: Direction::Read,
        })
    }

    /// Waits until nothing touches a part's slots any more, and compares what is in them. Those that are right.
    fn finish(&self, part: Running) -> Vec<Right> {
        let Running {
            own, blocks, transfer, ..
        } = part;
        let outcome = transfer.map(Transfer::wait);
        let has_arrived = matches!(outcome, Some(Ok(())));
        if let (false, Some((block, ..))) = (has_arrived, blocks.first()) {
            block.link.counts.failed.fetch_add(1, Ordering::Relaxed);
            if let Some(Err(error)) = outcome
                && !matches!(error.cause, Cause::Deadline)
            {
                tracing::debug!(peer = block.link.address, %error, "a read from a peer failed");
            }
        }
        let (mut right, mut abandoned, mut leases) = (Vec::new(), Vec::new(), Vec::new());
        let live = blocks.first().map(|(block, ..)| Arc::clone(&block.live));
        for (block, reservation, extent) in blocks {
            leases.push(block.held.lease);
            if has_arrived && self.is_right(&block, &extent) {
                right.push((block.position, block, reservation, extent));
            } else {
                abandoned.push(reservation);
            }
        }
        if let Some(live) = live {
            live.tell(&Message::Release(leases));
        }
        if !abandoned.is_empty() {
            self.driver
                .with(|decider, now| decider.manager.abandon(own, &abandoned, now));
        }
        right
    }

    /// Publishes what was read. The positions among the client's keys of those that are there now.
    fn seal(
        &self,
        own: ClientId,
        job: &FetchJob,
        generation: Generation,
        missing: &[usize],
        right: Vec<Right>,
    ) -> Vec<usize> {
        if right.is_empty() {
            return Vec::new();
        }
        let scope = job.scope;
        let mut right = right;
        right.sort_by_key(|(position, ..)| *position);
        let (mut copies, mut places) = (Vec::new(), Vec::new());
        for (position, block, reservation, extent) in right {
            let position = missing[position];
            let before = position.checked_sub(1).map(|before| Parent::Block(job.hashes[before]));
            copies.push(Copied {
                item: SealItem {
                    reservation,
                    hash: job.hashes[position],
                    // A fetch names a prefix in order; else the holder's word counts.
                    parent: match (job.which, before) {
                        (FetchScope::Prefix, Some(parent)) => parent,
                        _ => block.held.parent,
                    },
                    length: extent.length,
                    tokens: block.held.tokens,
                },
                labels: block.held.labels,
                checksum: block.held.checksum,
            });
            places.push(position);
        }
        let sealed = self.driver.with(|decider, now| {
            let asked = SealRequest {
                client: own,
                namespace: scope.namespace,
                realization: scope.realization,
                generation,
                label: None,
                items: &[],
            };
            decider.manager.seal_copies(&asked, &copies, now)
        });
        let Ok(sealed) = sealed else { return Vec::new() };
        let there = |outcome: &Sealed| matches!(outcome, Sealed::Published | Sealed::Present);
        let sealed = places.into_iter().zip(&sealed).filter(|(_, outcome)| there(outcome));
        sealed.map(|(place, _)| place).collect()
    }

    fn reserve(
        &self,
        own: ClientId,
        scope: Scope,
        hashes: &[BlockHash],
        lengths: &[u32],
        until: Instant,
    ) -> Option<Vec<Reserved>> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let answer = self.driver.with(|decider, now| {
            let asked = Request {
                deadline: now.after(until.saturating_duration_since(Instant::now())),
                ..request(own, scope.namespace, scope.realization, hashes, now)
            };
            let answer = decider.manager.reserve(&asked, lengths, now);
            if let Ok(Answer::Pending(operation)) = answer {
                decider.wait(operation, Waiter::Reader(sender));
            }
            answer
        });
        match answer {
            Ok(Answer::Ready(reserved)) => Some(reserved),
            // The manager answers at the deadline; a little later it has failed to.
            Ok(Answer::Pending(_)) => receiver.recv_deadline(until + Duration::from_secs(5)).ok(),
            Err(_) => None,
        }
    }

    /// Whether what arrived is what the peer said it sends. What is not is zeroed.
    fn is_right(&self, block: &Found, extent: &Extent) -> bool {
        let Ok(slice) = self.driver.host.slice(extent) else {
            return false;
        };
        if slice.crc32c() == block.held.checksum {
            block.link.counts.blocks.fetch_add(1, Ordering::Relaxed);
            block
                .link
                .counts
                .bytes
                .fetch_add(u64::from(extent.length), Ordering::Relaxed);
            return true;
        }
        slice.zero();
        block.link.counts.corrupt.fetch_add(1, Ordering::Relaxed);
        tracing::warn!(
            peer = block.link.address,
            "a peer's bytes are not what it said it sends: a miss"
        );
        false
    }

    /// This node itself as a client of a domain.
    pub(super) fn own_client(&self, domain: TrustDomain) -> Option<ClientId> {
        let mut clients = self.reading.clients.lock();
        if let Some(client) = clients.get(&domain) {
            return Some(*client);
        }
        let client = self.next_client();
        let connected = self
            .driver
            .with(|decider, now| decider.manager.connect(client, domain, now));
        connected.ok()?;
        clients.insert(domain, client);
        Some(client)
    }
}

fn give_back(blocks: &[Found]) {
    if let Some(first) = blocks.first() {
        let leases = blocks.iter().map(|block| block.held.lease).collect();
        first.live.tell(&Message::Release(leases));
    }
}

/// What is asked of the cost model about keys of which this node has these.
pub(super) fn asked(tiers: &[Option<Tier>], hints: Hints) -> Asked {
    Asked {
        blocks: tiers.len(),
        local: prefix(tiers),
        hints,
    }
}

/// How many of the first keys are cached with what a peer has of the missing ones.
pub(super) fn reach(tiers: &[Option<Tier>], missing: &[usize], theirs: &[Option<Tier>]) -> usize {
    let mut all = tiers.to_vec();
    for (&position, tier) in missing.iter().zip(theirs) {
        all[position] = *tier;
    }
    prefix(&all)
}

/// How many of the first keys are there.
pub(super) fn prefix(tiers: &[Option<Tier>]) -> usize {
    tiers.iter().position(Option::is_none).unwrap_or(tiers.len())
}

pub(super) fn positions<T>(items: &[T], wanted: impl Fn(&T) -> bool) -> Vec<usize> {
    (0..items.len()).filter(|&position| wanted(&items[position])).collect()
}
