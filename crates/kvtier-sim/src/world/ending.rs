//! How a world ends: the faults stop, everything begun is answered, everybody leaves, and nothing may be left over.

use std::time::Duration;

use kvtier_core::{ClientId, Departure, Eviction, FetchScope, TrustDomain};

use super::World;
use crate::memory::PAGE_BYTES;
use crate::oracle::{Check, Finding, Key, found};

/// More actions than this, long after anybody asked for anything, are a loop that only power cuts end.
const RESTLESS_ACTIONS: u64 = 200;
/// Puts of one block until one has to be found.
const TRIES: u32 = 3;

impl World {
    /// Lives the whole life of the world.
    pub(crate) fn live(&mut self) -> Check {
        while self.steps_left > 0 {
            if !self.happen(kvtier_core::Time(u64::MAX))? {
                return found("nothing happens any more".to_owned());
            }
        }
        self.faults_on = false;
        self.note(|| "the faults stop".to_owned());
        self.advance_refused()?;
        self.settle("the faults stopped")?;
        self.wake_everybody()?;
        if !self.draining {
            for domain in 0..self.plan.domains {
                self.check_progress(TrustDomain(domain))?;
                // What is being written for one cannot make room for the next.
                self.settle("a block was put and read back")?;
            }
        }
        self.flush(None)?;
        self.settle("the last flush")?;
        if !self.draining && self.random.chance(250) {
            self.begin_drain()?;
        }
        if self.draining {
            self.check_draining()?;
        }
        self.everybody_leaves()?;
        self.check_nothing_held()?;
        self.audit()?;
        self.check_emptied()?;
        if !self.draining {
            self.check_refill()?;
        }
        self.check_idle()
    }

    /// Lets time pass until everything begun has had its time, and checks that it ended.
    fn settle(&mut self, since: &str) -> Check {
        let patience = self.patience();
        self.run_until(self.now.after(patience))?;
        let actions = self.actions;
        self.run_until(self.now.after(patience / 4))?;
        // A segment that was given up on may be tried again, now and then.
        let more = self.actions - actions;
        if more > RESTLESS_ACTIONS {
            return found(format!(
                "no rest after {since}: {more} actions although nobody asks for anything"
            ));
        }
        if let Some((operation, wait)) = self.waits.first_key_value() {
            return found(format!(
                "no progress after {since}: {operation:?} still waits: {wait:?}"
            ));
        }
        if let Some((operation, errand)) = self.errands.first_key_value() {
            return found(format!(
                "no progress after {since}: {operation:?} is not acknowledged: {errand:?}"
            ));
        }
        if let Some((operation, flight)) = self.flights.first_key_value() {
            return found(format!(
                "no progress after {since}: {operation:?} is still in flight: {flight:?}"
            ));
        }
        if self.plan.settings.nvme_bytes > 0 && self.manager.statistics().nvme_in_service != 1 {
            return found(format!("no progress after {since}: NVMe is still out of service"));
        }
        self.audit()
    }

    /// Those that stood still read and write on as if no time had passed.
    fn wake_everybody(&mut self) -> Check {
        for client in self.clients.keys().copied().collect::<Vec<_>>() {
            self.read_in_place(client)?;
            if self.clients[&client].lost {
                self.depart(client, Departure::Gone)?;
                continue;
            }
            self.finish_puts(client)?;
            if self.random.chance(500) {
                self.let_go(client)?;
            } else {
                let departure = self.random.pick(&[Departure::Clean, Departure::Gone]);
                self.depart(client, departure)?;
            }
        }
        self.settle("everybody woke up")
    }

    /// With no faults and nobody holding anything, a block can be put and read back.
    fn check_progress(&mut self, domain: TrustDomain) -> Check {
        let Some(client) = self.arrive_in(domain)? else {
            return Ok(());
        };
        let Some(space) = (0..self.spaces.len() as u32).find(|space| self.spaces[*space as usize].domain == domain)
        else {
            return Ok(());
        };
        let node = self.random.index(self.plan.lengths.len()) as u32;
        let key = Key {
            space,
            realization: 0,
            node,
        };
        // What was put may make room at once for something begun before; not every time.
        for _ in 0..TRIES {
            self.put_and_lease(client, key)?;
            if self.holdings(client).0 == 1 {
                return self.let_go(client);
            }
            self.settle("a block was put and not found")?;
        }
        let tier = self.tier_of(key)?;
        if tier.is_none() && self.plan.settings.eviction == Eviction::Hazard {
            // Of all there is it may be what will be used least: it was published, and gone when room was made ahead.
            return self.let_go(client);
        }
        found(format!(
            "no progress: {key:?} was put a moment ago and is not leased; it is listed in {tier:?}"
        ))
    }

    fn put_and_lease(&mut self, client: ClientId, key: Key) -> Check {
        let length = self.plan.lengths[key.node as usize];
        self.delete_keys(client, &[key])?;
        let deadline = self.now.after(self.patience());
        self.reserve_keys(client, vec![key], vec![length], deadline)?;
        self.until_answered()?;
        if self.holdings(client).1 != 1 {
            return found(format!(
                "no progress: nobody holds anything, but {key:?} of {length} bytes is not granted a slot"
            ));
        }
        self.finish_puts(client)?;
        if self.ledger.live(key).is_none() {
            return found(format!(
                "no progress: nobody holds anything, but {key:?} is not published"
            ));
        }
        let deadline = self.now.after(self.patience());
        self.fetch_keys(client, vec![key], FetchScope::Each, deadline)?;
        self.until_answered()
    }

    fn until_answered(&mut self) -> Check {
        let end = self.now.after(self.patience());
        while !self.waits.is_empty() {
            if !self.happen(end)? {
                return found(format!("no progress: {:?} still waits", self.waits.first_key_value()));
            }
        }
        Ok(())
    }

    /// A new client in this domain; `None` where the draw keeps giving others.
    fn arrive_in(&mut self, domain: TrustDomain) -> Result<Option<ClientId>, Finding> {
        for _ in 0..40 {
            let client = self.arrive()?;
            match self.clients.get(&client) {
                Some(state) if state.domain == domain => return Ok(Some(client)),
                Some(_) => self.depart(client, Departure::Clean)?,
                None => return found("no progress: a client is refused although nearly all have left".to_owned()),
            }
        }
        Ok(None)
    }

    /// While draining nothing new is given out, and what was begun is answered.
    fn check_draining(&mut self) -> Check {
        let Some(client) = self
            .clients
            .iter()
            .find(|(_, client)| !client.lost)
            .map(|(client, _)| *client)
        else {
            return Ok(());
        };
        let domain = self.clients[&client].domain;
        let Some(space) = (0..self.spaces.len() as u32).find(|space| self.spaces[*space as usize].domain == domain)
        else {
            return Ok(());
        };
        let hashes = Self::hashes(&[0]);
        let request = self.request(client, space, 0, &hashes, self.now);
        let fetch = self.manager.fetch(&request, FetchScope::Each, self.now).err();
        let reserve = self.manager.reserve(&request, &[self.plan.lengths[0]], self.now).err();
        if !self.manager.grant(client, self.plan.lengths[0], 1, self.now).is_empty() {
            return found("a slot is granted ahead while draining".to_owned());
        }
        self.expect_draining(fetch)?;
        self.expect_draining(reserve)?;
        self.pump()
    }

    fn everybody_leaves(&mut self) -> Check {
        for client in self.clients.keys().copied().collect::<Vec<_>>() {
            if self.random.chance(300) && !self.clients[&client].lost {
                self.finish_puts(client)?;
            }
            let departure = self.random.pick(&[Departure::Clean, Departure::Gone]);
            self.depart(client, departure)?;
        }
        self.settle("everybody left")
    }

    fn check_nothing_held(&self) -> Check {
        let statistics = self.manager.statistics();
        for (name, value) in [
            ("leases", statistics.leases),
            ("leases_expired", statistics.leases_expired),
            ("reservations", statistics.reservations),
            ("quarantined_slots", statistics.quarantined_slots),
            ("quarantined_bytes", statistics.quarantined_bytes),
            ("waiting", statistics.waiting),
            ("operations_in_flight", statistics.operations_in_flight),
        ] {
            if value != 0 {
                return found(format!("leaked: everybody left, but {name} is {value}"));
            }
        }
        for domain in 0..self.plan.domains {
            let statistics = self.manager.domain_statistics(TrustDomain(domain));
            let held = statistics.leases
                + statistics.reservations
                + statistics.quarantined_slots
                + statistics.quarantined_bytes;
            if held != 0 {
                return found(format!(
                    "leaked: everybody left, but domain {domain} has {statistics:?}"
                ));
            }
        }
        Ok(())
    }

    /// What is forgotten takes no room.
    fn check_emptied(&mut self) -> Check {
        let cached = self.present()?.len() as u64;
        let blocks = self.manager.statistics().blocks;
        if blocks != cached {
            return found(format!(
                "{blocks} blocks are said to be cached, {cached} can be looked up"
            ));
        }
        self.delete_everything()?;
        self.settle("everything was deleted")?;
        let statistics = self.manager.statistics();
        for (name, value) in [
            ("blocks", statistics.blocks),
            ("host_blocks", statistics.host_blocks),
            ("hbm_blocks", statistics.hbm_blocks),
            ("hbm_used_bytes", statistics.hbm_used_bytes),
            ("nvme_blocks", statistics.nvme_blocks),
            ("host_used_bytes", statistics.host_used_bytes),
            ("nvme_used_bytes", statistics.nvme_used_bytes),
        ] {
            if value != 0 {
                return found(format!("leaked: everything was deleted, but {name} is {value}"));
            }
        }
        for domain in 0..self.plan.domains {
            let statistics = self.manager.domain_statistics(TrustDomain(domain));
            if statistics.used_bytes + statistics.blocks != 0 {
                return found(format!(
                    "leaked: everything was deleted, but domain {domain} has {statistics:?}"
                ));
            }
        }
        Ok(())
    }

    /// An empty host tier takes as many slots as fit into it.
    fn check_refill(&mut self) -> Check {
        let node = self.random.index(self.plan.lengths.len());
        let length = self.plan.lengths[node];
        let expected = self.slots_that_fit(length);
        let space = self.random.index(self.spaces.len()) as u32;
        let domain = self.spaces[space as usize].domain;
        self.manager.set_quota(self.spaces[space as usize].id, None);
        let mut granted = 0;
        let mut next_node = 1_000_000;
        while granted < expected {
            let Some(client) = self.arrive_in(domain)? else {
                return Ok(());
            };
            loop {
                let before = self.holdings(client).1;
                let keys: Vec<Key> = (0..3)
                    .map(|index| Key {
                        space,
                        realization: 0,
                        node: next_node + index,
                    })
                    .collect();
                next_node += 3;
                let deadline = self.now.after(self.patience());
                self.reserve_keys(client, keys, vec![length; 3], deadline)?;
                self.until_answered()?;
                if self.holdings(client).1 == before {
                    break;
                }
            }
            if self.holdings(client).1 == 0 {
                return found(format!(
                    "leaked: the host tier is empty and takes {expected} slots of {length} bytes, but only {granted} are granted"
                ));
            }
            granted += self.holdings(client).1 as u64;
        }
        for client in self.clients.keys().copied().collect::<Vec<_>>() {
            self.depart(client, Departure::Gone)?;
        }
        self.settle("the last slots were given back")?;
        self.check_nothing_held()
    }

    fn slots_that_fit(&self, length: u32) -> u64 {
        let settings = &self.plan.settings;
        let slot = u64::from(length).next_multiple_of(PAGE_BYTES);
        let segment = if slot * 4 > settings.host_segment_bytes {
            slot * (settings.host_bytes / 8 / slot).clamp(1, 8)
        } else {
            settings.host_segment_bytes
        };
        settings.host_bytes / segment * (segment / slot)
    }

    /// Left alone, the manager sleeps.
    fn check_idle(&mut self) -> Check {
        self.dismiss_auditors()?;
        if self.manager.statistics().clients != 0 {
            return found(format!(
                "leaked: everybody left, but {} clients are said to be here",
                self.manager.statistics().clients
            ));
        }
        let end = self.now.after(Duration::from_secs(10));
        let mut woken = 0;
        while self.happen(end)? {
            woken += 1;
            if woken > 100 {
                return found("left alone, the manager still wakes up often".to_owned());
            }
        }
        self.manager.check_invariants();
        Ok(())
    }
}
