//! What clients read: fetches, the bytes they read in place, lookups.

use std::time::Duration;

use kvtier_core::{Advice, Answer, ClientId, FetchScope, Fetched, LeaseId, OperationId, Tier, Time};

use super::World;
use super::clients::{Asked, Held, Wait};
use crate::oracle::{Check, Finding, Key, found};
use crate::random::mix;

impl World {
    pub(super) fn fetch(&mut self, client: ClientId) -> Check {
        let keys = self.draw_keys(client);
        let scope = if self.random.chance(700) {
            FetchScope::Prefix
        } else {
            FetchScope::Each
        };
        let deadline = self.draw_deadline();
        self.fetch_keys(client, keys, scope, deadline)
    }

    pub(super) fn fetch_keys(&mut self, client: ClientId, keys: Vec<Key>, scope: FetchScope, deadline: Time) -> Check {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, deadline);
        self.step += 1;
        let start = self.step;
        let answer = self.manager.fetch(&request, scope, self.now);
        self.note(|| {
            format!(
                "{client:?} fetch {scope:?} {}/{} {nodes:?} by {deadline:?}: {answer:?}",
                keys[0].space, keys[0].realization
            )
        });
        match answer {
            Ok(Answer::Ready(results)) => self.fetched(client, start, &keys, scope, &results)?,
            Ok(Answer::Pending(operation)) => {
                self.tally.answer("fetch_waited");
                self.wait(
                    operation,
                    Wait {
                        client,
                        deadline,
                        start,
                        keys,
                        asked: Asked::Fetch { scope },
                    },
                )?;
            }
            Err(refusal) => self.refused(refusal)?,
        }
        self.pump()
    }

    pub(super) fn fetch_done(&mut self, operation: OperationId, client: ClientId, results: &[Fetched]) -> Check {
        match self.waits.remove(&operation) {
            Some(Wait {
                client: asker,
                start,
                keys,
                asked: Asked::Fetch { scope },
                ..
            }) if asker == client => self.fetched(client, start, &keys, scope, results),
            _ => found(format!(
                "{client:?} is told of the fetch {operation:?}, for which nobody waits"
            )),
        }
    }

    pub(super) fn fetched(
        &mut self,
        client: ClientId,
        start: u64,
        keys: &[Key],
        scope: FetchScope,
        results: &[Fetched],
    ) -> Check {
        if results.len() != keys.len() {
            return found(format!("{} results for {} keys", results.len(), keys.len()));
        }
        let mut ended = false;
        for (key, result) in keys.iter().zip(results) {
            match *result {
                Fetched::Miss | Fetched::Busy => {
                    ended = true;
                    self.tally.answer(if matches!(result, Fetched::Miss) {
                        "fetched_miss"
                    } else {
                        "fetched_busy"
                    });
                }
                Fetched::Leased {
                    lease,
                    extent,
                    tier,
                    checksum,
                } => {
                    if ended && scope == FetchScope::Prefix {
                        return found(format!("a prefix fetch leases {key:?} after a miss"));
                    }
                    self.tally.answer(match tier {
                        Tier::Hbm => "fetched_from_hbm",
                        Tier::Host => "fetched_from_host",
                        Tier::Nvme | Tier::Remote => "fetched_from_nvme",
                    });
                    let lies_in = if tier == Tier::Hbm { Tier::Hbm } else { Tier::Host };
                    let state = &self.clients[&client];
                    if lies_in == Tier::Hbm && !state.device {
                        return found(format!(
                            "{client:?} cannot read device memory, and is given {extent:?} of it"
                        ));
                    }
                    let domain = state.domain;
                    let memory = self.memory(lies_in);
                    if memory.domain(&extent) != Some(domain) {
                        return found(format!(
                            "{client:?} of {domain:?} is given {extent:?} of {:?}",
                            memory.domain(&extent)
                        ));
                    }
                    memory.begin_read(&extent)?;
                    let (content, sum) = (memory.content(&extent), memory.checksum(&extent));
                    let tag = self.ledger.check_seen(*key, content, extent.length, start)?;
                    // One that was asked for before might see it; yet all are looked at once more when they are answered.
                    let written = self.ledger.written(tag).map(|written| written.generation);
                    let current = self.generation(key.space)?;
                    if self.ledger.live(*key) != Some(tag) || written != Some(current) {
                        return found(format!(
                            "purged: the lease of {key:?} shows write {tag} of {written:?}, deleted or invalidated before it was answered; {current:?} is in force"
                        ));
                    }
                    if checksum.is_some_and(|checksum| checksum != sum) {
                        return found(format!(
                            "the lease of {key:?} carries a checksum that its bytes do not have"
                        ));
                    }
                    if tier != Tier::Host && checksum.is_none() {
                        return found(format!("{key:?} crossed a device, but its lease carries no checksum"));
                    }
                    if self
                        .clients
                        .values()
                        .any(|other| other.held.iter().any(|held| held.lease == lease))
                    {
                        return found(format!("{lease:?} is given out twice"));
                    }
                    let memory = lies_in;
                    self.client(client).held.push(Held {
                        lease,
                        memory,
                        extent,
                        tag,
                    });
                }
            }
        }
        let held = self.clients[&client].held.len();
        if held > self.plan.settings.leases_per_client_max {
            return found(format!(
                "{client:?} holds {held} leases, the bound is {}",
                self.plan.settings.leases_per_client_max
            ));
        }
        Ok(())
    }

    /// Every lease still shows what it showed when it was given.
    pub(super) fn read_in_place(&self, client: ClientId) -> Check {
        for held in &self.clients[&client].held {
            let memory = if held.memory == Tier::Hbm {
                &self.hbm
            } else {
                &self.host
            };
            let content = memory.content(&held.extent);
            if content != Some(held.tag) {
                return found(format!(
                    "{client:?} holds {:?} of write {}, but {:?} shows {content:?}",
                    held.lease, held.tag, held.extent
                ));
            }
        }
        Ok(())
    }

    pub(super) fn release_some(&mut self, client: ClientId) -> Check {
        let count = self.random.between(1, 8) as usize;
        let oldest = self.random.chance(700);
        let state = self.client(client);
        let count = count.min(state.held.len());
        let from = if oldest { 0 } else { state.held.len() - count };
        let held: Vec<Held> = state.held.drain(from..from + count).collect();
        self.release(client, held)
    }

    pub(super) fn release(&mut self, client: ClientId, held: Vec<Held>) -> Check {
        for held in &held {
            self.memory(held.memory).end_read(&held.extent);
        }
        let leases: Vec<LeaseId> = held.iter().map(|held| held.lease).collect();
        self.step += 1;
        let unknown = self.manager.release(client, &leases, self.now);
        self.note(|| format!("{client:?} release {leases:?}: {unknown} unknown"));
        if unknown != 0 {
            return found(format!(
                "{client:?} releases {leases:?}, which it holds, but {unknown} are unknown"
            ));
        }
        self.pump()
    }

    pub(super) fn lookup(&mut self, client: ClientId) -> Check {
        let keys = self.draw_keys(client);
        self.check_lookup(client, &keys)?;
        self.advise(client, &keys)
    }

    /// Sometimes says something of the session that the keys are the prompt of: whatever is said, nothing but the order changes.
    fn advise(&mut self, client: ClientId, keys: &[Key]) -> Check {
        let draw = mix(self.now.0);
        let until = self.now.after(Duration::from_nanos(draw >> 30));
        let advice = match draw % 12 {
            0 => Advice::Closed,
            1 => Advice::PinnedUntil(until),
            2 => Advice::ExpectedBy(until),
            3..=6 => Advice::Answered((draw >> 54) as u32),
            _ => return Ok(()),
        };
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, self.now);
        match self.manager.advise(&request, advice, self.now) {
            Ok(cached) if cached <= keys.len() => Ok(()),
            other => found(format!("sound advice is answered {other:?}")),
        }
    }

    /// Looks keys of one namespace and realization up; only what may be seen may be there.
    pub(super) fn check_lookup(&mut self, client: ClientId, keys: &[Key]) -> Result<Vec<Option<Tier>>, Finding> {
        let nodes: Vec<u32> = keys.iter().map(|key| key.node).collect();
        let hashes = Self::hashes(&nodes);
        let request = self.request(client, keys[0].space, keys[0].realization, &hashes, self.now);
        match self.manager.lookup(&request, self.now) {
            Ok(tiers) if tiers.len() == keys.len() => {
                for (key, tier) in keys.iter().zip(&tiers) {
                    if tier.is_some() && self.ledger.live(*key).is_none() {
                        return found(format!(
                            "{key:?} is listed in {tier:?} but nothing that may be seen was published for it"
                        ));
                    }
                }
                Ok(tiers)
            }
            other => found(format!("a sound lookup is answered {other:?}")),
        }
    }
}
