use std::sync::Arc;

use kvtier_transfer::memory::{MemoryError, MemoryRegion, MemorySlice};
use parking_lot::Mutex;

const SMALLEST_BYTES: usize = 64 << 10;

/// Memory for copies between segments and for payloads whose own memory is not aligned: bounded, kept warm.
pub(super) struct BouncePool {
    budget_bytes: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Arc<MemoryRegion>>,
    free_bytes: usize,
    lent_bytes: usize,
}

/// Memory lent by the pool; dropping gives it back.
pub(super) struct Bounce {
    pool: Arc<BouncePool>,
    region: Arc<MemoryRegion>,
    slice: MemorySlice,
}

impl BouncePool {
    pub(super) fn new(budget_bytes: u64) -> Arc<BouncePool> {
        let budget_bytes = usize::try_from(budget_bytes).unwrap_or(usize::MAX);
        Arc::new(BouncePool {
            budget_bytes,
            state: Mutex::new(State::default()),
        })
    }

    /// `length` bytes, page-aligned; `None` while the budget is lent out. A length over the budget is lent alone.
    pub(super) fn take(self: &Arc<Self>, length: usize) -> Result<Option<Bounce>, MemoryError> {
        let size = length.max(SMALLEST_BYTES).next_power_of_two();
        let mut state = self.state.lock();
        if state.lent_bytes > 0 && state.lent_bytes.saturating_add(size) > self.budget_bytes {
            return Ok(None);
        }
        let warm = state.free.iter().position(|region| region.bytes() == size);
        let region = match warm {
            Some(position) => {
                state.free_bytes -= size;
                state.free.swap_remove(position)
            }
            None => MemoryRegion::anonymous(size)?,
        };
        state.lent_bytes += size;
        drop(state);
        let slice = region.slice(0, length).expect("regions are as long as asked for");
        Ok(Some(Bounce {
            pool: Arc::clone(self),
            region,
            slice,
        }))
    }
}

impl Bounce {
    pub(super) fn slice(&self) -> &MemorySlice {
        &self.slice
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        let size = self.region.bytes();
        let mut state = self.pool.state.lock();
        state.lent_bytes -= size;
        if size > self.pool.budget_bytes {
            return;
        }
        // The size in use stays warm, at the cost of those that are not.
        while state.free_bytes + size > self.pool.budget_bytes {
            let cold = state.free.remove(0);
            state.free_bytes -= cold.bytes();
        }
        state.free_bytes += size;
        state.free.push(Arc::clone(&self.region));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_budget_bounds_what_is_lent_and_what_stays_warm() {
        let pool = BouncePool::new(256 << 10);
        let held: Vec<_> = (0..4)
            .map(|_| pool.take(50_000).expect("memory").expect("within the budget"))
            .collect();
        assert!(pool.take(1).expect("memory").is_none(), "the budget is lent out");
        drop(held);
        let large = pool.take(10 << 20).expect("memory").expect("lent alone");
        assert!(
            pool.take(1).expect("memory").is_none(),
            "beside a record over the budget nothing is lent"
        );
        drop(large);
        assert!(pool.state.lock().free_bytes <= 256 << 10);
        assert!(pool.take(200_000).expect("memory").is_some());
    }
}
