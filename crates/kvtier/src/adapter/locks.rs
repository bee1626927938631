use std::collections::HashMap;
use std::time::{Duration, Instant};

use crate::client::BlockHandle;

use super::key::ObjectKey;

/// Locks at once: a bound for callers who never unlock.
const LOCKS_MAX: usize = 1 << 20;

/// Objects that lookups found and nobody has unlocked yet. The leases keep their blocks in host memory until the load.
///
/// A load never reads through these leases: it asks the node anew, so that an invalidation in between is seen.
#[derive(Default)]
pub(super) struct Locks {
    keys: HashMap<ObjectKey, Lock>,
    leased_bytes: u64,
}

struct Lock {
    count: u32,
    since: Instant,
    lease: Option<(BlockHandle, Instant)>,
}

impl Locks {
    pub(super) fn lock(&mut self, key: &ObjectKey, now: Instant) {
        if self.keys.len() >= LOCKS_MAX && !self.keys.contains_key(key) {
            return;
        }
        let lock = self.keys.entry(key.clone()).or_insert(Lock {
            count: 0,
            since: now,
            lease: None,
        });
        lock.count = lock.count.saturating_add(1);
        lock.since = now;
    }

    /// Gives one lock back. What was leased goes with the last.
    pub(super) fn unlock(&mut self, key: &ObjectKey) {
        let Some(lock) = self.keys.get_mut(key) else { return };
        lock.count = lock.count.saturating_sub(1);
        if lock.count == 0 {
            self.forget(key);
        }
    }

    pub(super) fn forget(&mut self, key: &ObjectKey) {
        if let Some(Lock {
            lease: Some((handle, _)),
            ..
        }) = self.keys.remove(key)
        {
            self.leased_bytes -= handle.len() as u64;
        }
    }

    /// Whether a lease for this lock is wanted.
    pub(super) fn wants_lease(&self, key: &ObjectKey) -> bool {
        self.keys.get(key).is_some_and(|lock| lock.lease.is_none())
    }

    /// Keeps a lease as long as the lock; one that is wanted no more is given back.
    pub(super) fn keep(&mut self, key: &ObjectKey, handle: BlockHandle, now: Instant) {
        let Some(lock) = self.keys.get_mut(key) else { return };
        self.leased_bytes += handle.len() as u64;
        if let Some((before, _)) = lock.lease.replace((handle, now)) {
            self.leased_bytes -= before.len() as u64;
        }
    }

    /// Gives back leases that are older than `lease_age` and returns their keys, to lease them anew; and forgets locks
    /// older than `lock_age`.
    pub(super) fn expire(&mut self, now: Instant, lease_age: Duration, lock_age: Duration) -> Vec<ObjectKey> {
        let mut again = Vec::new();
        let mut given_back = 0;
        self.keys.retain(|key, lock| {
            let old = now.duration_since(lock.since) >= lock_age;
            if let Some((handle, since)) = &lock.lease
                && (old || now.duration_since(*since) >= lease_age)
            {
                given_back += handle.len() as u64;
                lock.lease = None;
                if !old {
                    again.push(key.clone());
                }
            }
            !old
        });
        self.leased_bytes -= given_back;
        again
    }

    /// Lets all leases go: they belong to a connection that is gone, or nobody will load any more.
    pub(super) fn clear(&mut self) {
        self.keys.clear();
        self.leased_bytes = 0;
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }

    pub(super) fn leased_bytes(&self) -> u64 {
        self.leased_bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8) -> ObjectKey {
        ObjectKey {
            salt: "".into(),
            model: "m".into(),
            group: 0,
            rank: 0,
            chunk_hash: Box::new([number]),
        }
    }

    #[test]
    fn locks_are_counted() {
        let mut locks = Locks::default();
        let now = Instant::now();
        locks.lock(&key(1), now);
        locks.lock(&key(1), now);
        locks.unlock(&key(1));
        assert!(locks.wants_lease(&key(1)));
        locks.unlock(&key(1));
        assert!(!locks.wants_lease(&key(1)));
        locks.unlock(&key(1));
        assert_eq!(locks.len(), 0);
    }

    #[test]
    fn a_lock_that_nobody_gives_back_is_forgotten() {
        let mut locks = Locks::default();
        let now = Instant::now();
        locks.lock(&key(1), now);
        let age = Duration::from_secs(60);
        assert!(locks.expire(now + age / 2, age, age).is_empty());
        assert_eq!(locks.len(), 1);
        locks.expire(now + age, age, age);
        assert_eq!(locks.len(), 0);
    }
}
