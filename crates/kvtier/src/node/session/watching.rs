use std::time::{Duration, Instant};

use kvtier_core::Generation;

use super::{Refused, Session};
use crate::error::ErrorKind;
use crate::wire::{Reply, WATCH_MS_MAX};

impl Session {
    /// One watch a connection: it is there to wait.
    pub(super) fn watch(&mut self, request: u64, since: u64, wait_ms: u32) -> Result<(), Refused> {
        if self.watch.is_some() {
            let words = "this connection watches already: wait for its answer, or open another";
            return Err(Refused(ErrorKind::Busy, words.into()));
        }
        let domain = self.identity().domain;
        let wait = Duration::from_millis(wait_ms.min(WATCH_MS_MAX).into());
        let watchers = &self.shared.driver.watchers;
        if wait.is_zero() || !watchers.wait(domain, since, &self.outbox, request) {
            self.tell_watched(request);
            return Ok(());
        }
        self.watch = Some((request, Instant::now() + wait));
        self.waiting.insert(request, None);
        Ok(())
    }

    pub(super) fn end_late_watch(&mut self) {
        if let Some((request, due)) = self.watch
            && Instant::now() >= due
        {
            let domain = self.identity().domain;
            self.shared.driver.watchers.give_up(domain, &self.outbox, request);
            self.end_watch(request);
        }
    }

    pub(super) fn end_watch(&mut self, request: u64) {
        // A change and the end of the time may come together: one answer.
        if self.watch.take_if(|(watching, _)| *watching == request).is_some() {
            self.waiting.remove(&request);
            self.tell_watched(request);
        }
    }

    fn tell_watched(&mut self, request: u64) {
        let domain = self.identity().domain;
        let driver = &self.shared.driver;
        // First: what changes after it is told again.
        let sequence = driver.watchers.sequence(domain);
        let invalidated: Vec<(String, u64)> = driver.look(|manager| {
            let namespaces = manager.namespaces_of(domain);
            namespaces
                .filter(|(_, generation)| *generation > Generation(1))
                .map(|(name, generation)| (name.to_owned(), generation.0))
                .collect()
        });
        match serde_json::to_string(&invalidated) {
            Ok(json) => self.reply(request, &Reply::Watched { sequence, json: &json }),
            Err(error) => self.refuse(request, &Refused(ErrorKind::Internal, error.to_string())),
        }
    }

    pub(super) fn confirm(
        &mut self,
        request: u64,
        name: &str,
        confirmed: Generation,
        processor: &str,
    ) -> Result<(), Refused> {
        let domain = self.identity().domain;
        let driver = &self.shared.driver;
        let found = driver.look(|manager| manager.find_namespace(domain, name));
        let invalid = |words: String| Err(Refused(ErrorKind::Invalid, words));
        let Some((_, generation)) = found else {
            return invalid(format!("no namespace {name:?}: nothing was stored under that name"));
        };
        if confirmed > generation {
            return invalid(format!(
                "generation {} is yet to come: {} is in force",
                confirmed.0, generation.0
            ));
        }
        if !driver.confirmations.note(domain, name, processor, confirmed) {
            let words = "too many caches have confirmed: use one name for each";
            return Err(Refused(ErrorKind::Busy, words.into()));
        }
        self.reply(request, &Reply::Confirmed { generation });
        Ok(())
    }
}
