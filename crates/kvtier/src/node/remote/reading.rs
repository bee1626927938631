//! Reads blocks from the server: reserve a slot, open the object into it, seal. What does not open is a miss.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender};
use kvtier_core::{
    Answer, BlockHash, ClientId, Copied, Extent, FetchScope, Generation, Hints, Parent, Request, ReservationId,
    Reserved, SealItem, SealRequest, Sealed, Tier, TrustDomain,
};

use super::writing::{is_compressed, reach};
use super::{Place, Remote};
use crate::node::attempt::Attempt;
use crate::node::driver::Waiter;
use crate::node::outbox::Notice;
use crate::node::peers::weighing::{Asked, Chosen, Fetching};
use crate::node::peers::{ExplainedPeer, Explanation, FetchJob, LookupJob, Scope, request};

/// Jobs that wait for a thread, for each of them.
const WAITING_A_THREAD: usize = 64;
/// Blocks that are published together.
const SEALED_TOGETHER: usize = 64;

pub(super) enum Job {
    Fetch(FetchJob),
    Lookup(LookupJob),
    /// A lookup that has its answer.
    Weigh(LookupJob),
    Explain(LookupJob),
    Stop,
}

/// The queue of the reading threads.
pub(super) struct Reading {
    jobs: Sender<Job>,
    threads: usize,
}

impl Reading {
    pub(super) fn new(threads: usize) -> (Reading, Receiver<Job>) {
        let (jobs, work) = crossbeam_channel::bounded(threads * WAITING_A_THREAD);
        (Reading { jobs, threads }, work)
    }

    pub(super) fn stop(&self) {
        for _ in 0..self.threads {
            let _ = self.jobs.send_timeout(Job::Stop, Duration::from_secs(1));
        }
    }
}

/// What a request lacks here, and where it would lie on the server.
struct Wanted {
    /// Places among the keys asked for.
    missing: Vec<usize>,
    local: usize,
    generation: Generation,
    /// The first is where this node writes.
    places: Vec<Place>,
}

/// For each key that is missing, in which of the places its object is.
type There = Vec<Option<usize>>;

impl Remote {
    /// Takes a fetch over; false when too many wait.
    pub(crate) fn fetch_here(&self, job: FetchJob) -> bool {
        self.reading.jobs.try_send(Job::Fetch(job)).is_ok()
    }

    /// Takes a lookup over; false when too many wait, or nobody should wait for the server. What it has still counts for its gate.
    pub(crate) fn look_here(&self, job: LookupJob) -> bool {
        let jobs = &self.reading.jobs;
        if job.raw || self.is_open() {
            return jobs.try_send(Job::Lookup(job)).is_ok();
        }
        self.weigh_later(job);
        false
    }

    /// A fetch that nobody waits for: what the server has of it still counts for its gate.
    pub(crate) fn weigh_behind(&self, job: &FetchJob) {
        self.weigh_later(LookupJob {
            scope: job.scope,
            hashes: job.hashes.clone(),
            hints: job.hints,
            raw: false,
            outbox: Arc::clone(&job.outbox),
            request: job.request,
        });
    }

    /// Some of them are enough.
    fn weigh_later(&self, job: LookupJob) {
        let jobs = &self.reading.jobs;
        if jobs.len() < self.reading.threads {
            let _ = jobs.try_send(Job::Weigh(job));
        }
    }

    /// Has a lookup explained; false when too many wait.
    pub(crate) fn explain_here(&self, job: LookupJob) -> bool {
        self.reading.jobs.try_send(Job::Explain(job)).is_ok()
    }

    /// Whether there is something to explain to clients of a domain; else why not, in words.
    pub(crate) fn can_explain(&self, domain: TrustDomain) -> Result<(), String> {
        let why = if self.weighing.is_none() {
            "there is no cost model: the remote tier is read from unasked; set cost_model"
        } else if !self.domains.is_shared(domain) {
            "there is no backend to weigh: blocks of this trust domain do not leave the node; name it under [[domains]]"
        } else if self.is_away() {
            "there is no backend to weigh: the remote tier is away; see kvctl remote"
        } else {
            return Ok(());
        };
        Err(why.to_owned())
    }

    fn explain(&self, job: &LookupJob) {
        let explained = self.explanation(job).ok_or_else(|| "there is no cost model".to_owned());
        let json =
            explained.and_then(|explanation| serde_json::to_string(&explanation).map_err(|error| error.to_string()));
        job.outbox.push(Notice::Explained {
            request: job.request,
            json,
        });
    }

    fn explanation(&self, job: &LookupJob) -> Option<Explanation> {
        let weighing = self.weighing.as_ref()?;
        let (tiers, generation) = self.look(job.scope, &job.hashes);
        let mut all: Vec<bool> = tiers.iter().map(Option::is_some).collect();
        let local = all.iter().position(|there| !there).unwrap_or(all.len());
        let mut theirs = None;
        if let Some(wanted) = self.wanted(job.scope, &tiers, generation) {
            theirs = self.there(&wanted, &job.hashes, Instant::now() + self.query_timeout);
            for (&position, there) in wanted.missing.iter().zip(theirs.iter().flatten()) {
                all[position] = there.is_some();
            }
        }
        let reached = all.iter().position(|there| !there).unwrap_or(all.len());
        let asked = Asked {
            blocks: tiers.len(),
            local,
            hints: job.hints,
        };
        let now = self.driver.clock.now();
        let (question, decision, backend) = weighing.explain(now, &asked, &[(self.name, reached)]);
        let gate = weighing.gate(now, self.name).unwrap_or_default();
        let server = ExplainedPeer {
            address: self.name.into(),
            answered: theirs.is_some(),
            blocks: theirs.iter().flatten().filter(|there| there.is_some()).count() as u64,
            prefix: reached as u64,
            gate_open: gate.open,
            gate_reason: gate.reason,
            gate_value: gate.value,
            bytes_per_second: gate.bytes_per_second,
            lookup_us: gate.lookup_us,
        };
        let explanation = Explanation::of(&tiers, &question, &decision, backend, vec![server]);
        Some(Explanation {
            recompute_measured: weighing.measured(),
            ..explanation
        })
    }

    /// A reading thread.
    pub(super) fn read(&self, work: &Receiver<Job>) {
        while let Ok(job) = work.recv() {
            match job {
                Job::Stop => return,
                Job::Fetch(job) => self.serve_fetch(job),
                Job::Lookup(job) => self.serve_lookup(&job),
                Job::Weigh(job) => {
                    let (mut tiers, _) = self.look(job.scope, &job.hashes);
                    self.add_found(&job, &mut tiers);
                }
                Job::Explain(job) => self.explain(&job),
            }
        }
    }

    fn serve_fetch(&self, job: FetchJob) {
        let attempt = Attempt::new(job);
        self.copy(&attempt, true);
        attempt.answer(&self.driver);
    }

    fn serve_lookup(&self, job: &LookupJob) {
        let (mut tiers, generation) = self.look(job.scope, &job.hashes);
        self.add_found(job, &mut tiers);
        job.outbox.push(Notice::Found {
            request: job.request,
            generation,
            tiers,
        });
    }

    /// Marks what the server has of the blocks that were found nowhere, where it is worth fetching or the lookup is raw.
    pub(crate) fn add_found(&self, job: &LookupJob, tiers: &mut [Option<Tier>]) {
        let LookupJob {
            scope, hashes, hints, ..
        } = job;
        let (scope, mut hints) = (*scope, *hints);
        // What peers are to give lies in front: a gap behind it is none that an engine could compute meanwhile.
        hints.can_split &= !tiers.contains(&Some(Tier::Remote));
        if let Some(wait_us) = hints.queue_wait_us {
            self.writing.told_wait(wait_us);
        }
        self.meet(scope.namespace);
        let generation = self.driver.look(|manager| manager.generation(scope.namespace));
        let Some(wanted) = self.wanted(scope, tiers, generation) else {
            return;
        };
        let until = Instant::now() + self.query_timeout;
        let Some(there) = self.there(&wanted, hashes, until) else {
            return;
        };
        let mut first = 0;
        if self.weighing.is_some() && !job.raw {
            let Some(chosen) = self.weigh(&wanted, &there, tiers, hints) else {
                return;
            };
            first = chosen.first_block;
        }
        for (&position, there) in wanted.missing.iter().zip(there) {
            if there.is_some() && position >= first {
                tiers[position] = Some(Tier::Remote);
            }
        }
    }

    fn look(&self, scope: Scope, hashes: &[BlockHash]) -> (Vec<Option<Tier>>, Generation) {
        self.driver.with(|decider, now| {
            let asked = request(scope.client, scope.namespace, scope.realization, hashes, now);
            let tiers = decider.manager.lookup(&asked, now);
            // Together: what is written under this generation was looked for in the group that belongs to it.
            let generation = decider.manager.generation(scope.namespace);
            (tiers.unwrap_or_else(|_| vec![None; hashes.len()]), generation)
        })
    }

    fn wanted(&self, scope: Scope, tiers: &[Option<Tier>], generation: Generation) -> Option<Wanted> {
        if self.is_away() {
            return None;
        }
        let missing: Vec<usize> = (0..tiers.len()).filter(|&position| tiers[position].is_none()).collect();
        let local = *missing.first()?;
        Some(Wanted {
            missing,
            local,
            generation,
            places: self.places(scope.namespace, scope.realization, generation)?,
        })
    }

    /// Asks for all places in one trip: objects lie in more than one only since members read each other's.
    fn there(&self, wanted: &Wanted, hashes: &[BlockHash], until: Instant) -> Option<There> {
        let keys = wanted.missing.iter().flat_map(|&position| {
            let key = move |place: &Place| (place.group, place.name(hashes[position]));
            wanted.places.iter().map(key)
        });
        let keys: Vec<_> = keys.collect();
        let begun = Instant::now();
        let found = self.noted(self.store.exists(&keys, until));
        match (&self.weighing, &found) {
            (Some(_), Ok(_)) if self.store.knows_by_itself() => {}
            (Some(weighing), Ok(_)) => weighing.said(self.name, begun.elapsed()),
            (Some(weighing), Err(_)) => weighing.probed(self.driver.clock.now(), self.name, begun, None),
            (None, _) => {}
        }
        let found = found.ok().filter(|found| found.len() == keys.len())?;
        let by_key = found.chunks(wanted.places.len());
        Some(by_key.map(|places| places.iter().position(|there| *there)).collect())
    }

    /// The fetch that is decided on, if any. One of nothing is weighed as well: it tells the gate what asking costs.
    fn weigh(&self, wanted: &Wanted, there: &[Option<usize>], tiers: &[Option<Tier>], hints: Hints) -> Option<Chosen> {
        let weighing = self.weighing.as_ref()?;
        let mut all: Vec<bool> = tiers.iter().map(Option::is_some).collect();
        for (&position, there) in wanted.missing.iter().zip(there) {
            all[position] = there.is_some();
        }
        let reached = all.iter().position(|there| !there).unwrap_or(all.len());
        let asked = Asked {
            blocks: tiers.len(),
            local: wanted.local,
            hints,
        };
        weighing.decide_among(self.driver.clock.now(), &asked, &[(self.name, reached)])
    }

    /// Makes blocks of the server blocks of this node, as far as a fetch lacks them and they are worth it.
    pub(crate) fn copy(&self, attempt: &Arc<Attempt>, can_split: bool) {
        let ticket = self.copying.begin(attempt.job.scope.namespace);
        // What could not be had is not there.
        let _ = self.copy_all(attempt, can_split);
        self.copying.end(ticket);
    }

    fn copy_all(&self, attempt: &Arc<Attempt>, can_split: bool) -> Option<()> {
        let job = &attempt.job;
        let hard_deadline = Instant::now() + self.fetch_timeout;
        let mut until = job.deadline.min(hard_deadline);
        if let Some(wait_us) = job.hints.queue_wait_us {
            self.writing.told_wait(wait_us);
        }
        if !self.is_open() {
            self.weigh_behind(job);
            return None;
        }
        self.meet(job.scope.namespace);
        let (tiers, generation) = self.look(job.scope, &job.hashes);
        let wanted = self.wanted(job.scope, &tiers, generation)?;
        let own = self.own_client(job.scope.domain)?;
        let (mut fetching, mut first) = (None, 0);
        let objects = if self.weighing.is_none() && wanted.places.len() == 1 {
            // Nothing is decided: one trip less.
            wanted.missing.iter().map(|&position| (position, 0)).collect()
        } else {
            let there = self.there(&wanted, &job.hashes, until.min(Instant::now() + self.query_timeout))?;
            if let Some(weighing) = &self.weighing {
                let hints = Hints {
                    can_split: can_split && job.hints_of_scope().can_split,
                    ..job.hints
                };
                let chosen = self.weigh(&wanted, &there, &tiers, hints)?;
                let begun = weighing.begin(self.driver.clock.now(), &chosen.decision);
                first = chosen.first_block;
                // The client is answered before that, where its patience or the model's ends.
                until = hard_deadline;
                self.patience.watch(attempt, &self.late, &begun);
                fetching = Some(begun);
            }
            let mut objects = reach(job.which, &wanted.missing, &there);
            objects.retain(|(position, _)| *position >= first);
            objects
        };
        self.fetch_objects(attempt, &wanted, &objects, own, until, &mut fetching);
        if let (Some(weighing), Some(fetching)) = (&self.weighing, &fetching) {
            self.patience.end(attempt);
            weighing.end(self.driver.clock.now(), fetching);
        }
        Some(())
    }

    fn fetch_objects(
        &self,
        attempt: &Attempt,
        wanted: &Wanted,
        objects: &[(usize, usize)],
        own: ClientId,
        until: Instant,
        fetching: &mut Option<Fetching>,
    ) {
        let job = &attempt.job;
        let keys: Vec<_> = objects
            .iter()
            .map(|&(position, place)| {
                let place = &wanted.places[place];
                (place.group, place.name(job.hashes[position]))
            })
            .collect();
        let (mut opened, mut has_gap) = (Vec::new(), false);
        let mut since = Instant::now();
        let fetched = self.store.fetch(&keys, until, &mut |index, object| {
            let (position, place) = objects[index];
            // In a prefix nothing behind a gap is of use.
            let is_useful = job.which == FetchScope::Each || !has_gap;
            let Some(object) = object.filter(|_| is_useful) else {
                has_gap = true;
                return;
            };
            if let (Some(weighing), Some(fetching)) = (&self.weighing, &mut *fetching) {
                let now = self.driver.clock.now();
                weighing.answered(now, fetching, true);
                weighing.arrived(now, fetching, object.len() as u64, since.elapsed(), true);
                since = Instant::now();
            }
            match self.open(job, &wanted.places[place], own, position, object, until, fetching) {
                Some(block) => opened.push(block),
                None => has_gap = true,
            }
            if opened.len() >= SEALED_TOGETHER {
                let opened = std::mem::take(&mut opened);
                attempt.keep(&self.late, || self.publish(job, wanted.generation, own, opened));
            }
        });
        attempt.keep(&self.late, || self.publish(job, wanted.generation, own, opened));
        if self.noted(fetched).is_err()
            && let (Some(weighing), Some(fetching)) = (&self.weighing, fetching)
        {
            weighing.arrived(self.driver.clock.now(), fetching, 0, Duration::ZERO, false);
        }
    }

    /// Opens an object into a slot of its own.
    #[expect(clippy::too_many_arguments, reason = "what a fetch has at hand")]
    fn open(
        &self,
        job: &FetchJob,
        place: &Place,
        own: ClientId,
        position: usize,
        object: &[u8],
        until: Instant,
        fetching: &mut Option<Fetching>,
    ) -> Option<(usize, Copied)> {
        let hash = job.hashes[position];
        let name = place.name(hash);
        let corrupt = |error: &dyn std::fmt::Display| {
            self.counts.corrupt.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(address = self.address, %error, "an object of the remote tier does not open: a miss");
        };
        let contents = match place.key.contents(name, object) {
            Ok(contents) => contents,
            Err(error) => {
                corrupt(&error);
                return None;
            }
        };
        let (reservation, extent) = self.reserve(own, job.scope, hash, contents.length, until)?;
        let begun = Instant::now();
        let opened = match self.driver.host.slice(&extent) {
            Ok(slice) => place.key.open(name, object, &slice).map_err(|error| corrupt(&error)),
            Err(_) => Err(()),
        };
        if opened.is_err() {
            self.driver
                .with(|decider, now| decider.manager.abandon(own, &[reservation], now));
            return None;
        }
        if let (Some(weighing), Some(fetching)) = (&self.weighing, fetching) {
            // Its seal is opened in the same breath, as that of a plain block is: what that takes is in the bandwidth already.
            let took = is_compressed(object, &contents).then(|| begun.elapsed());
            let bytes = (contents.length.into(), object.len() as u64);
            weighing.stored(self.name, fetching, bytes, took.unwrap_or_default());
        }
        self.counts.blocks.fetch_add(1, Ordering::Relaxed);
        self.counts.bytes.fetch_add(u64::from(extent.length), Ordering::Relaxed);
        let before = position.checked_sub(1).map(|before| Parent::Block(job.hashes[before]));
        let copied = Copied {
            item: SealItem {
                reservation,
                hash,
                // A fetch names a prefix in order; else what was written counts.
                parent: match (job.which, before) {
                    (FetchScope::Prefix, Some(parent)) => parent,
                    _ => contents.parent,
                },
                length: extent.length,
                tokens: contents.tokens,
            },
            labels: contents.labels,
            checksum: contents.checksum,
        };
        Some((position, copied))
    }

    fn reserve(
        &self,
        own: ClientId,
        scope: Scope,
        hash: BlockHash,
        length: u32,
        until: Instant,
    ) -> Option<(ReservationId, Extent)> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        let answer = self.driver.with(|decider, now| {
            let asked = Request {
                deadline: now.after(until.saturating_duration_since(Instant::now())),
                ..request(
                    own,
                    scope.namespace,
                    scope.realization,
                    std::slice::from_ref(&hash),
                    now,
                )
            };
            let answer = decider.manager.reserve(&asked, &[length], now);
            if let Ok(Answer::Pending(operation)) = answer {
                decider.wait(operation, Waiter::Reader(sender));
            }
            answer
        });
        let reserved = match answer {
            Ok(Answer::Ready(reserved)) => reserved,
            // The manager answers at the deadline; a little later it has failed to.
            Ok(Answer::Pending(_)) => receiver.recv_deadline(until + Duration::from_secs(5)).ok()?,
            Err(_) => return None,
        };
        match reserved.first() {
            Some(&Reserved::Granted { reservation, extent }) => Some((reservation, extent)),
            _ => None,
        }
    }

    /// Publishes what was opened. The positions among the client's keys of those that are there now.
    fn publish(
        &self,
        job: &FetchJob,
        generation: Generation,
        own: ClientId,
        opened: Vec<(usize, Copied)>,
    ) -> Vec<usize> {
        let copies: Vec<Copied> = opened.iter().map(|(_, copied)| *copied).collect();
        let sealed = self.driver.with(|decider, now| {
            let asked = SealRequest {
                client: own,
                namespace: job.scope.namespace,
                realization: job.scope.realization,
                generation,
                label: None,
                items: &[],
            };
            decider.manager.seal_copies(&asked, &copies, now)
        });
        let sealed = sealed.unwrap_or_default();
        let there = |outcome: &Sealed| matches!(outcome, Sealed::Published | Sealed::Present);
        let sealed = opened.iter().zip(&sealed).filter(|(_, outcome)| there(outcome));
        sealed.map(|((position, _), _)| *position).collect()
    }
}
