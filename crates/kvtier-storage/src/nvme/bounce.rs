use std::sync::Arc;

use kvtier_transfer::memory::{HUGE_PAGE_BYTES, MemoryError, MemoryRegion, MemorySlice};
use parking_lot::Mutex;

use super::engine::Priority;

const SMALLEST_BYTES: usize = 64 << 10;

/// Buffers that are lent whatever their size, to all together and to the background.
const ALWAYS: [usize; 2] = [3, 2];

/// Memory for what the device reads or writes in place of the callers': sealed payloads, copies between segments,
/// payloads whose own memory is not aligned. Bounded, kept warm, on huge pages where the system gives them: a device
/// moves bytes to and from those at up to twice the rate.
pub(super) struct BouncePool {
    budget_bytes: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    free: Vec<Buffer>,
    free_bytes: usize,
    /// By priority: foreground, background.
    lent_bytes: [usize; 2],
}

/// A piece of a region of at least one huge page: a power of two, [`SMALLEST_BYTES`] or more.
struct Buffer {
    region: Arc<MemoryRegion>,
    offset: usize,
    bytes: usize,
    /// Lent since it was last zero.
    is_used: bool,
}

/// Memory lent by the pool; dropping gives it back.
pub(super) struct Bounce {
    pool: Arc<BouncePool>,
    priority: Priority,
    buffer: Option<Buffer>,
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

    /// `length` bytes, page-aligned; `None` while the budget is lent out, of which the background gets at most three
    /// quarters. Whatever their size, the background may have two and all together three: one is filled while the device
    /// works on another.
    pub(super) fn take(self: &Arc<Self>, length: usize, priority: Priority) -> Result<Option<Bounce>, MemoryError> {
        let bytes = length.max(SMALLEST_BYTES).next_power_of_two();
        let mut state = self.state.lock();
        let [foreground, background] = state.lent_bytes;
        let lent = foreground + background;
        let (used, most) = match priority {
            Priority::Foreground => (lent, self.budget_bytes),
            Priority::Background => (background, self.budget_bytes / 4 * 3),
        };
        let fits = |used: usize, most: usize, always: usize| {
            used.saturating_add(bytes) <= most.max(bytes.saturating_mul(always))
        };
        if !fits(used, most, ALWAYS[priority as usize]) || !fits(lent, self.budget_bytes, ALWAYS[0]) {
            return Ok(None);
        }
        // The one given back last is the warmest.
        let warm = state.free.iter().rposition(|buffer| buffer.bytes == bytes);
        let buffer = match warm {
            Some(position) => {
                state.free_bytes -= bytes;
                state.free.remove(position)
            }
            None => state.carve(bytes)?,
        };
        state.lent_bytes[priority as usize] += bytes;
        drop(state);
        let slice = buffer
            .region
            .slice(buffer.offset, length)
            .expect("buffers are at least as long as asked for");
        Ok(Some(Bounce {
            pool: Arc::clone(self),
            priority,
            buffer: Some(buffer),
            slice,
        }))
    }

    /// Zeroes free buffers that were used, one at a time: whoever reads meanwhile finds the others, and warm.
    pub(super) fn clear(&self) {
        let mut rest = self.state.lock().free.len();
        while rest > 0 {
            rest -= 1;
            let used = {
                let mut state = self.state.lock();
                let position = state.free.iter().position(|buffer| buffer.is_used);
                position.map(|position| {
                    let buffer = state.free.remove(position);
                    state.free_bytes -= buffer.bytes;
                    buffer
                })
            };
            let Some(mut buffer) = used else { return };
            if let Ok(slice) = buffer.region.slice(buffer.offset, buffer.bytes) {
                slice.zero();
                buffer.is_used = false;
            }
            let mut state = self.state.lock();
            state.free_bytes += buffer.bytes;
            state.free.push(buffer);
        }
    }
}

impl State {
    /// A buffer of a new region; what is left of it becomes buffers of the same size.
    fn carve(&mut self, bytes: usize) -> Result<Buffer, MemoryError> {
        let region = MemoryRegion::anonymous(bytes.max(HUGE_PAGE_BYTES))?;
        for offset in (bytes..region.bytes()).step_by(bytes) {
            self.free_bytes += bytes;
            self.free.push(Buffer {
                region: Arc::clone(&region),
                offset,
                bytes,
                is_used: false,
            });
        }
        Ok(Buffer {
            region,
            offset: 0,
            bytes,
            is_used: false,
        })
    }
}

impl Bounce {
    pub(super) fn slice(&self) -> &MemorySlice {
        &self.slice
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        let Some(mut buffer) = self.buffer.take() else { return };
        buffer.is_used = true;
        let budget_bytes = self.pool.budget_bytes;
        let mut state = self.pool.state.lock();
        state.lent_bytes[self.priority as usize] -= buffer.bytes;
        let warm_bytes = budget_bytes.max(buffer.bytes.saturating_mul(ALWAYS[0]));
        state.free_bytes += buffer.bytes;
        state.free.push(buffer);
        // The sizes in use stay warm, at the cost of those that are not.
        while state.free_bytes > warm_bytes {
            let cold = state.free.remove(0);
            state.free_bytes -= cold.bytes;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn take(pool: &Arc<BouncePool>, length: usize, priority: Priority) -> Option<Bounce> {
        pool.take(length, priority).expect("memory")
    }

    #[test]
    fn the_budget_bounds_what_is_lent_and_what_stays_warm() {
        let pool = BouncePool::new(256 << 10);
        let held: Vec<_> = (0..4)
            .map(|_| take(&pool, 50_000, Priority::Foreground).expect("within the budget"))
            .collect();
        assert!(take(&pool, 1, Priority::Foreground).is_none(), "the budget is lent out");
        drop(held);
        let held: Vec<_> = (0..3)
            .map(|_| take(&pool, 10 << 20, Priority::Foreground).expect("three of any size"))
            .collect();
        assert!(take(&pool, 10 << 20, Priority::Foreground).is_none());
        assert!(
            take(&pool, 1, Priority::Foreground).is_none(),
            "nothing small beside them"
        );
        drop(held);
        assert!(pool.state.lock().free_bytes <= 3 * (16 << 20), "they stay warm");
        drop(take(&pool, 200_000, Priority::Foreground).expect("within the budget"));
        assert!(
            pool.state.lock().free_bytes <= 3 * (256 << 10),
            "until another size is in use"
        );
    }

    #[test]
    fn the_background_fills_a_large_one_while_another_is_written_and_the_foreground_still_gets_one() {
        let pool = BouncePool::new(256 << 10);
        let background: Vec<_> = (0..3)
            .filter_map(|_| take(&pool, 10 << 20, Priority::Background))
            .collect();
        assert_eq!(background.len(), 2);
        assert!(take(&pool, 10 << 20, Priority::Foreground).is_some());
    }

    #[test]
    fn what_is_cleared_is_zero_and_can_be_lent_again() {
        let pool = BouncePool::new(256 << 10);
        let lent = take(&pool, 60_000, Priority::Foreground).expect("within the budget");
        let freed = take(&pool, 60_000, Priority::Foreground).expect("within the budget");
        freed.slice().copy_from_slice(&[7; 60_000]).expect("as long");
        lent.slice().copy_from_slice(&[9; 60_000]).expect("as long");
        let seen = freed.slice().clone();
        drop(freed);
        pool.clear();
        assert!(seen.to_vec().iter().all(|&byte| byte == 0));
        assert!(
            lent.slice().to_vec().iter().all(|&byte| byte == 9),
            "what is lent stays"
        );
        let kept = pool.state.lock().free_bytes;
        assert!(kept >= 64 << 10, "and what was zeroed stays warm");
        drop(lent);
        assert!(take(&pool, 60_000, Priority::Background).is_some());
    }

    #[test]
    fn the_background_leaves_a_quarter_to_the_foreground() {
        let pool = BouncePool::new(256 << 10);
        let background: Vec<_> = (0..4)
            .filter_map(|_| take(&pool, 60_000, Priority::Background))
            .collect();
        assert_eq!(background.len(), 3);
        assert!(take(&pool, 60_000, Priority::Foreground).is_some());
    }
}
