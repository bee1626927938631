//! Lookups and fetches: here first, then at peers.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_core::{Advice, Answer, FetchScope, Fetched, Hints, LeaseId, NamespaceId, RealizationId};

use super::{Handle, Refused, Session};
use crate::error::ErrorKind;
use crate::node::driver::Waiter;
use crate::node::peers::{FetchJob, LookupJob, Scope};
use crate::node::traffic::Kind;
use crate::wire::{ADVICE_MS_MAX, AdviceKind, Extensions, Keys, Reply};

impl Session {
    pub(super) fn lookup(&mut self, request: u64, keys: &Keys<'_>, extensions: &Extensions<'_>) -> Result<(), Refused> {
        let hints = extensions.hints;
        let (_, namespace, realization) = self.handle(keys.handle)?;
        keys.hashes.copy_to(&mut self.hashes);
        self.see_asked(Kind::Lookup, keys, (namespace, realization), hints);
        let (client, hashes) = (self.client, &self.hashes);
        let (tiers, generation) = self.shared.driver.with(|decider, now| {
            let asked = kvtier_core::Request {
                client,
                namespace,
                realization,
                hashes,
                hints,
                deadline: now,
            };
            (
                decider.manager.lookup(&asked, now),
                decider.manager.generation(namespace),
            )
        });
        let mut tiers = tiers?;
        if let Some(peers) = self.shared.driver.peers() {
            if !peers.is_serving() {
                tiers.fill(None);
            } else if tiers.contains(&None) && peers.may_help(self.identity().domain) {
                let job = LookupJob {
                    scope: self.scope(namespace, realization),
                    hashes: self.hashes.clone(),
                    hints,
                    raw: extensions.raw,
                    outbox: Arc::clone(&self.outbox),
                    request,
                };
                // With too many before it the answer is what is here.
                if peers.look_at_peers(job) {
                    self.waiting.insert(request, None);
                    return Ok(());
                }
            }
        }
        if self.is_looked_up_elsewhere(request, namespace, realization, hints, extensions.raw, &tiers) {
            return Ok(());
        }
        self.reply(
            request,
            &Reply::Found {
                generation,
                tiers: (&tiers).into(),
            },
        );
        Ok(())
    }

    /// Whether the remote tier is asked for what a lookup does not find here.
    fn is_looked_up_elsewhere(
        &mut self,
        request: u64,
        namespace: NamespaceId,
        realization: RealizationId,
        hints: Hints,
        raw: bool,
        tiers: &[Option<kvtier_core::Tier>],
    ) -> bool {
        let Some(remote) = self.shared.driver.remote() else {
            return false;
        };
        let is_serving = self.shared.driver.peers().is_none_or(|peers| peers.is_serving());
        if !is_serving || !tiers.contains(&None) || !remote.may_help(self.identity().domain) {
            return false;
        }
        let taken = remote.look_here(LookupJob {
            scope: self.scope(namespace, realization),
            hashes: self.hashes.clone(),
            hints,
            raw,
            outbox: Arc::clone(&self.outbox),
            request,
        });
        if taken {
            self.waiting.insert(request, None);
        }
        taken
    }

    /// What would be decided about the keys' blocks: by a reading thread, as it has to ask peers what they have.
    pub(super) fn explain(&mut self, request: u64, keys: &Keys<'_>, hints: Hints) -> Result<(), Refused> {
        let (_, namespace, realization) = self.handle(keys.handle)?;
        keys.hashes.copy_to(&mut self.hashes);
        let unavailable = |words: String| Refused(ErrorKind::Unavailable, words);
        let (peers, remote) = (self.shared.driver.peers(), self.shared.driver.remote());
        let domain = self.identity().domain;
        match (&peers, &remote) {
            (Some(peers), _) => peers.can_explain(domain).map_err(unavailable)?,
            (None, Some(remote)) => remote.can_explain(domain).map_err(unavailable)?,
            (None, None) => {
                let words = "there is no backend to weigh: this node has neither peers nor a remote tier; set peer_listen and peers, or remote_redis or remote_s3";
                return Err(unavailable(words.into()));
            }
        }
        let job = LookupJob {
            scope: self.scope(namespace, realization),
            hashes: self.hashes.clone(),
            hints,
            raw: true,
            outbox: Arc::clone(&self.outbox),
            request,
        };
        let taken = match (peers, remote) {
            (Some(peers), _) => peers.explain_to(job),
            (None, remote) => remote.is_some_and(|remote| remote.explain_here(job)),
        };
        if !taken {
            let words = "too many lookups and fetches wait: ask again";
            return Err(Refused(ErrorKind::Busy, words.into()));
        }
        self.waiting.insert(request, None);
        Ok(())
    }

    /// What becomes of a session, for the policy.
    pub(super) fn advise(
        &mut self,
        request: u64,
        advice: AdviceKind,
        amount: u32,
        keys: &Keys<'_>,
    ) -> Result<(), Refused> {
        let (_, namespace, realization) = self.handle(keys.handle)?;
        let is_answered = advice == AdviceKind::Answered;
        if !is_answered && amount > ADVICE_MS_MAX {
            let words = format!("advice counts for at most {ADVICE_MS_MAX} ms: give it again later");
            return Err(Refused(ErrorKind::Invalid, words));
        }
        keys.hashes.copy_to(&mut self.hashes);
        let (client, hashes) = (self.client, &self.hashes);
        let advised = self.shared.driver.with(|decider, now| {
            let asked = kvtier_core::Request {
                client,
                namespace,
                realization,
                hashes,
                hints: Hints::default(),
                deadline: now,
            };
            let until = now.after(Duration::from_millis(amount.into()));
            let advice = match advice {
                AdviceKind::Closed => Advice::Closed,
                AdviceKind::Pinned => Advice::PinnedUntil(until),
                AdviceKind::Expected => Advice::ExpectedBy(until),
                AdviceKind::Answered => Advice::Answered(amount),
            };
            decider.manager.advise(&asked, advice, now)
        })?;
        if is_answered {
            self.see_answered(amount, (namespace, realization));
        }
        let blocks = u32::try_from(advised).unwrap_or(u32::MAX);
        self.reply(request, &Reply::Advised { blocks });
        Ok(())
    }

    fn scope(&self, namespace: NamespaceId, realization: RealizationId) -> Scope {
        Scope {
            client: self.client,
            domain: self.identity().domain,
            namespace,
            realization,
        }
    }

    pub(super) fn fetch(
        &mut self,
        request: u64,
        scope: FetchScope,
        keys: &Keys<'_>,
        hints: Hints,
        deadline_us: u64,
    ) -> io::Result<Result<(), Refused>> {
        let (index, namespace, realization) = match self.handle(keys.handle) {
            Ok(handle) => handle,
            Err(refused) => return Ok(Err(refused)),
        };
        keys.hashes.copy_to(&mut self.hashes);
        self.see_asked(Kind::Fetch, keys, (namespace, realization), hints);
        let driver = Arc::clone(&self.shared.driver);
        if self.is_taken_over(request, index, scope, hints, deadline_us) {
            return Ok(Ok(()));
        }
        let (client, hashes, outbox) = (self.client, &self.hashes, &self.outbox);
        let answer = driver.with(|decider, now| {
            let deadline = self.deadline(now, deadline_us);
            let asked = kvtier_core::Request {
                client,
                namespace,
                realization,
                hashes,
                hints,
                deadline,
            };
            let answer = decider.manager.fetch(&asked, scope, now);
            if let Ok(Answer::Pending(operation)) = answer {
                decider.wait(
                    operation,
                    Waiter::Session {
                        outbox: Arc::clone(outbox),
                        request,
                    },
                );
            }
            answer
        });
        match answer {
            Ok(Answer::Ready(results)) => self.tell_fetched(request, index, &results)?,
            Ok(Answer::Pending(_)) => {
                self.waiting.insert(request, Some(index));
            }
            Err(refusal) => return Ok(Err(refusal.into())),
        }
        Ok(Ok(()))
    }

    /// Whether peers or the remote tier are asked for what a fetch does not find here.
    fn is_taken_over(
        &mut self,
        request: u64,
        handle: usize,
        which: FetchScope,
        hints: Hints,
        deadline_us: u64,
    ) -> bool {
        let domain = self.identity().domain;
        let peers = self.shared.driver.peers();
        if peers.as_ref().is_some_and(|peers| !peers.is_serving()) {
            return false;
        }
        let peers = peers.filter(|peers| peers.may_help(domain));
        let remote = self.shared.driver.remote().filter(|remote| remote.may_help(domain));
        if peers.is_none() && remote.is_none() {
            return false;
        }
        let Handle { namespace, realization } = self.handles[handle];
        let (client, hashes) = (self.client, &self.hashes);
        let looked = self.shared.driver.with(|decider, now| {
            let asked = kvtier_core::Request {
                client,
                namespace,
                realization,
                hashes,
                hints,
                deadline: now,
            };
            decider.manager.lookup(&asked, now)
        });
        if !looked.is_ok_and(|tiers| tiers.contains(&None)) {
            return false;
        }
        let job = FetchJob {
            scope: self.scope(namespace, realization),
            hashes: self.hashes.clone(),
            which,
            hints,
            deadline: Instant::now() + self.patience(deadline_us),
            outbox: Arc::clone(&self.outbox),
            request,
        };
        // Peers' threads go on to the remote tier.
        let taken = match (peers, remote) {
            (Some(peers), _) => peers.fetch_from_peers(job),
            // Nobody waits for a server that is not worth asking; that somebody would have counts for its gate.
            (None, Some(remote)) if !remote.is_open() => {
                remote.weigh_behind(&job);
                false
            }
            (None, Some(remote)) => remote.fetch_here(job),
            (None, None) => false,
        };
        if taken {
            self.waiting.insert(request, Some(handle));
        }
        taken
    }

    pub(super) fn tell_fetched(&mut self, request: u64, handle: usize, results: &[Fetched]) -> io::Result<()> {
        // Asked again now that the bytes are here: a member whose lease lapsed answers only misses.
        let is_serving = self.shared.driver.peers().is_none_or(|peers| peers.is_serving());
        if !is_serving {
            let leased = |result: &Fetched| match result {
                Fetched::Leased { lease, .. } => Some(*lease),
                Fetched::Miss | Fetched::Busy => None,
            };
            let leases: Vec<LeaseId> = results.iter().filter_map(leased).collect();
            let client = self.client;
            let driver = &self.shared.driver;
            driver.with(|decider, now| decider.manager.release(client, &leases, now));
        }
        let misses;
        let results = if is_serving {
            results
        } else {
            misses = vec![Fetched::Miss; results.len()];
            &misses
        };
        for result in results {
            if let Fetched::Leased { extent, .. } = result {
                self.announce(extent)?;
            }
        }
        let generation = self.generation(handle);
        self.reply(
            request,
            &Reply::Fetched {
                generation,
                outcomes: results.into(),
            },
        );
        Ok(())
    }
}
