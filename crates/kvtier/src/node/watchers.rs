//! Who waits for a namespace of a domain to be invalidated, and which caches said that they hold nothing older.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

use kvtier_core::{Generation, TrustDomain};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::outbox::{Notice, Outbox};

/// Confirmations that are remembered: a cache and a namespace each.
const CONFIRMATIONS_MAX: usize = 4096;

/// Watching connections, each woken by the next change in its domain and by no other domain's.
pub(crate) struct Watchers {
    /// Differs between runs, so that no sequence of an earlier one is taken for the present.
    first: u64,
    domains: Mutex<HashMap<TrustDomain, Watched>>,
}

#[derive(Default)]
struct Watched {
    changes: u64,
    waiting: Vec<(Weak<Outbox>, u64)>,
}

impl Watchers {
    pub(crate) fn new() -> Watchers {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Watchers {
            first: u64::try_from(since.as_nanos()).unwrap_or(1).max(1),
            domains: Mutex::default(),
        }
    }

    pub(crate) fn sequence(&self, domain: TrustDomain) -> u64 {
        let domains = self.domains.lock();
        self.first + domains.get(&domain).map_or(0, |watched| watched.changes)
    }

    /// Leaves a notice for the request at the next change; false when there was one since `since`.
    pub(crate) fn wait(&self, domain: TrustDomain, since: u64, outbox: &Arc<Outbox>, request: u64) -> bool {
        let mut domains = self.domains.lock();
        let watched = domains.entry(domain).or_default();
        if since != self.first + watched.changes {
            return false;
        }
        watched.waiting.retain(|(outbox, _)| outbox.strong_count() > 0);
        watched.waiting.push((Arc::downgrade(outbox), request));
        true
    }

    /// The request waits no longer.
    pub(crate) fn give_up(&self, domain: TrustDomain, outbox: &Arc<Outbox>, request: u64) {
        if let Some(watched) = self.domains.lock().get_mut(&domain) {
            let gone = |(other, number): &(Weak<Outbox>, u64)| {
                *number == request && std::ptr::eq(other.as_ptr(), Arc::as_ptr(outbox))
            };
            watched.waiting.retain(|waiting| !gone(waiting));
        }
    }

    /// A namespace of the domain has another generation.
    pub(crate) fn changed(&self, domain: TrustDomain) {
        let waiting = {
            let mut domains = self.domains.lock();
            let watched = domains.entry(domain).or_default();
            watched.changes += 1;
            std::mem::take(&mut watched.waiting)
        };
        for (outbox, request) in waiting {
            if let Some(outbox) = outbox.upgrade() {
                outbox.push(Notice::Changed { request });
            }
        }
    }
}

/// A cache beside this node that keeps blocks of a namespace: an engine's memory, LMCache's L1.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Processor {
    /// What it calls itself.
    pub processor: String,
    /// The namespace's name.
    pub namespace: String,
    /// It holds nothing older than this generation.
    pub confirmed_generation: u64,
    /// The generation in force: above the confirmed one, the cache is yet to confirm.
    pub generation: u64,
}

/// What caches confirmed, by domain, namespace and cache.
#[derive(Default)]
pub(crate) struct Confirmations {
    by_cache: Mutex<BTreeMap<(TrustDomain, String, String), Generation>>,
}

impl Confirmations {
    /// Notes it, as a maximum; false when there are too many already.
    pub(crate) fn note(&self, domain: TrustDomain, namespace: &str, processor: &str, generation: Generation) -> bool {
        let mut by_cache = self.by_cache.lock();
        let key = (domain, namespace.to_owned(), processor.to_owned());
        if by_cache.len() >= CONFIRMATIONS_MAX && !by_cache.contains_key(&key) {
            return false;
        }
        let confirmed = by_cache.entry(key).or_insert(generation);
        *confirmed = generation.max(*confirmed);
        true
    }

    /// All of a domain, with the generation in force by `current`.
    pub(crate) fn of(
        &self,
        domain: TrustDomain,
        current: impl Fn(TrustDomain, &str) -> Option<Generation>,
    ) -> Vec<Processor> {
        let by_cache = self.by_cache.lock();
        let own = by_cache.iter().filter(|((other, ..), _)| *other == domain);
        own.map(|((_, namespace, processor), confirmed)| Processor {
            processor: processor.clone(),
            namespace: namespace.clone(),
            confirmed_generation: confirmed.0,
            generation: current(domain, namespace).unwrap_or_default().0,
        })
        .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: TrustDomain = TrustDomain(1);
    const OTHERS: TrustDomain = TrustDomain(2);

    fn requests(outbox: &Outbox) -> Vec<u64> {
        let changed = |notice| match notice {
            Notice::Changed { request } => request,
            other => panic!("{other:?}"),
        };
        outbox.drain().into_iter().map(changed).collect()
    }

    #[test]
    fn a_change_wakes_who_waits_in_its_domain_once_and_nobody_else() {
        let watchers = Watchers::new();
        let (ours, others) = (
            Arc::new(Outbox::new().expect("an eventfd")),
            Arc::new(Outbox::new().expect("an eventfd")),
        );
        assert!(
            !watchers.wait(OURS, 0, &ours, 1),
            "whoever knows nothing is told at once"
        );
        let sequence = watchers.sequence(OURS);
        assert!(watchers.wait(OURS, sequence, &ours, 2));
        assert!(watchers.wait(OTHERS, watchers.sequence(OTHERS), &others, 3));
        watchers.changed(OURS);
        watchers.changed(OURS);
        assert_eq!(requests(&ours), [2]);
        assert!(requests(&others).is_empty());
        assert!(!watchers.wait(OURS, sequence, &ours, 4), "changed since");
        assert_eq!(
            watchers.sequence(OTHERS),
            watchers.first,
            "nothing is to be seen from another domain"
        );
    }

    #[test]
    fn who_gave_up_is_not_woken() {
        let watchers = Watchers::new();
        let outbox = Arc::new(Outbox::new().expect("an eventfd"));
        assert!(watchers.wait(OURS, watchers.sequence(OURS), &outbox, 1));
        watchers.give_up(OURS, &outbox, 1);
        watchers.changed(OURS);
        assert!(requests(&outbox).is_empty());
    }

    #[test]
    fn confirmations_only_rise_and_are_bounded() {
        let confirmations = Confirmations::default();
        assert!(confirmations.note(OURS, "a", "l1", Generation(3)));
        assert!(confirmations.note(OURS, "a", "l1", Generation(2)));
        let listed = confirmations.of(OURS, |_, _| Some(Generation(4)));
        assert_eq!(listed.len(), 1);
        assert_eq!((listed[0].confirmed_generation, listed[0].generation), (3, 4));
        assert!(confirmations.of(OTHERS, |_, _| None).is_empty());
        for number in 1..CONFIRMATIONS_MAX {
            assert!(confirmations.note(OURS, &number.to_string(), "l1", Generation(1)));
        }
        assert!(!confirmations.note(OURS, "one too many", "l1", Generation(1)));
        assert!(
            confirmations.note(OURS, "a", "l1", Generation(5)),
            "one that is known still rises"
        );
    }
}
