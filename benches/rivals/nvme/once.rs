use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use crate::cache::{self, Tally};
use crate::engine::Engine;
use crate::values::{Values, shuffled};

/// Puts that are not measured, so that nobody's buffers are touched for the first time by those that are.
pub(crate) const WARM: usize = 256;

/// Between what is written and what is read, the device has this much time to itself.
const SETTLING: Duration = Duration::from_secs(1);

/// One engine in one round.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Once {
    pub(crate) write: Part,
    pub(crate) read: Part,
    /// What the readers found, each key once.
    pub(crate) tally: Tally,
    /// Wrong values of the second pass over the keys.
    pub(crate) wrong_again: usize,
}

/// How long something took.
#[derive(Clone, Copy, Debug, Deserialize, Serialize)]
pub(crate) struct Part {
    pub(crate) seconds: f64,
    /// Of this process, all its threads.
    pub(crate) cpu_seconds: f64,
}

/// Measures `engine` in a new directory in `directory`: writes, reads every key to see what is there, and reads every key
/// again on the clock.
pub(crate) fn measure(engine: Engine, directory: &Path, values: usize, seed: u32) -> anyhow::Result<Once> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let directory = tempfile::Builder::new().prefix("rivals").tempdir_in(directory)?;
    let values = Arc::new(Values::new(values, engine.is_ours())?);
    let count = values.count();
    runtime.block_on(async {
        let cache = engine.open(directory.path(), &values).await?;
        cache::write(&cache, count..count + WARM).await?;
        let (write, ()) = timed(cache::write(&cache, 0..count)).await?;
        tokio::time::sleep(SETTLING).await;
        let orders = [0, 1].map(|pass| Arc::new(shuffled(count, u64::from(seed) << 1 | pass)));
        let tally = cache::read(&cache, &orders[0]).await?;
        let (read, again) = timed(cache::read(&cache, &orders[1])).await?;
        cache.close().await?;
        Ok(Once {
            write,
            read,
            tally,
            wrong_again: again.wrong,
        })
    })
}

async fn timed<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<(Part, T)> {
    let cpu = cpu_time();
    let started = Instant::now();
    let done = work.await?;
    let part = Part {
        seconds: started.elapsed().as_secs_f64(),
        cpu_seconds: (cpu_time() - cpu).as_secs_f64(),
    };
    Ok((part, done))
}

fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(
        time.tv_sec.try_into().unwrap_or_default(),
        time.tv_nsec.try_into().unwrap_or_default(),
    )
}
