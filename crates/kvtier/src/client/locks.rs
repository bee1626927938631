//! Locks that a fork leaves sound: all of their state is their own.
//!
//! A child that makes a client of its own may have been forked while a thread of its parent was about to sleep on a lock. Locks of
//! `parking_lot` share a table of the process for that, which such a child inherits locked for good; those of the standard library
//! share nothing. A thread that panics with a lock held leaves what it guards as it is, as there.

use std::ops::{Deref, DerefMut};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

#[derive(Debug, Default)]
pub(super) struct Mutex<T>(std::sync::Mutex<T>);

/// The lock is held until it is dropped.
pub(super) struct MutexGuard<'a, T>(Option<std::sync::MutexGuard<'a, T>>);

impl<T> Mutex<T> {
    pub(super) fn new(value: T) -> Mutex<T> {
        Mutex(std::sync::Mutex::new(value))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap_or_else(PoisonError::into_inner)))
    }

    pub(super) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        let guard = match self.0.try_lock() {
            Ok(guard) => guard,
            Err(std::sync::TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(std::sync::TryLockError::WouldBlock) => return None,
        };
        Some(MutexGuard(Some(guard)))
    }

    pub(super) fn get_mut(&mut self) -> &mut T {
        self.0.get_mut().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.0.as_ref().expect("held but while it waits")
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().expect("held but while it waits")
    }
}

#[derive(Debug, Default)]
pub(super) struct Condvar(std::sync::Condvar);

impl Condvar {
    pub(super) fn new() -> Condvar {
        Condvar::default()
    }

    pub(super) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(super) fn notify_all(&self) {
        self.0.notify_all();
    }

    /// May wake without reason.
    pub(super) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        let held = guard.0.take().expect("held by the caller");
        guard.0 = Some(self.0.wait(held).unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn wait_while<T>(&self, guard: &mut MutexGuard<'_, T>, condition: impl Fn(&mut T) -> bool) {
        while condition(&mut **guard) {
            self.wait(guard);
        }
    }

    /// At most so long.
    pub(super) fn wait_while_for<T>(
        &self,
        guard: &mut MutexGuard<'_, T>,
        condition: impl Fn(&mut T) -> bool,
        longest: Duration,
    ) {
        let begun = Instant::now();
        while condition(&mut **guard) {
            let Some(left) = longest.checked_sub(begun.elapsed()) else {
                return;
            };
            let held = guard.0.take().expect("held by the caller");
            let (held, _) = self.0.wait_timeout(held, left).unwrap_or_else(PoisonError::into_inner);
            guard.0 = Some(held);
        }
    }
}
