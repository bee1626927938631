use std::future::Future;
use std::ops::Range;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

/// Readers, and writers, each with one operation under way.
pub(crate) const READERS: usize = 16;

/// An operation under way.
pub(crate) type Pending<'a, T> = Pin<Box<dyn Future<Output = anyhow::Result<T>> + Send + 'a>>;

/// A disk cache under measurement. Key and value `index` belong together.
pub(crate) trait Cache: Send + Sync {
    /// Puts value `index`; done when its writer may put the next.
    fn put(&self, index: usize) -> Pending<'_, ()>;

    /// Done when all that was put is on the device.
    fn settle(&self) -> Pending<'_, ()>;

    /// Reads value `index`, sums it up and compares.
    fn read(&self, index: usize) -> Pending<'_, Read>;

    /// Ends it.
    fn close(&self) -> Pending<'_, ()>;
}

/// What a reader got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Read {
    /// The bytes that were put.
    Right,
    /// Others.
    Wrong,
    /// Nothing.
    Absent,
}

/// What reading every key once came to.
#[derive(Clone, Copy, Debug, Default, Deserialize, Serialize)]
pub(crate) struct Tally {
    pub(crate) right: usize,
    pub(crate) wrong: usize,
    pub(crate) absent: usize,
}

/// Puts values until all of them are on the device.
pub(crate) async fn write(cache: &Arc<dyn Cache>, values: Range<usize>) -> anyhow::Result<()> {
    let shared = Arc::clone(cache);
    let first = values.start;
    share(values.len(), move |place| {
        let (cache, index) = (Arc::clone(&shared), first + place);
        async move { cache.put(index).await.with_context(|| format!("put {index}")) }
    })
    .await?;
    cache.settle().await
}

/// Reads every key once, in the order given.
pub(crate) async fn read(cache: &Arc<dyn Cache>, order: &Arc<Vec<usize>>) -> anyhow::Result<Tally> {
    let (shared, places) = (Arc::clone(cache), Arc::clone(order));
    let found = share(order.len(), move |place| {
        let (cache, index) = (Arc::clone(&shared), places[place]);
        async move { cache.read(index).await.with_context(|| format!("read {index}")) }
    })
    .await?;
    let count = |wanted| found.iter().filter(|found| **found == wanted).count();
    Ok(Tally {
        right: count(Read::Right),
        wrong: count(Read::Wrong),
        absent: count(Read::Absent),
    })
}

/// [`READERS`] tasks take the numbers below `count` one by one.
async fn share<T, W>(count: usize, work: impl Fn(usize) -> W + Clone + Send + 'static) -> anyhow::Result<Vec<T>>
where
    T: Send + 'static,
    W: Future<Output = anyhow::Result<T>> + Send,
{
    let next = Arc::new(AtomicUsize::new(0));
    let tasks: Vec<_> = (0..READERS)
        .map(|_| {
            let (next, work) = (Arc::clone(&next), work.clone());
            tokio::spawn(async move {
                let mut done = Vec::with_capacity(count.div_ceil(READERS));
                loop {
                    let number = next.fetch_add(1, Ordering::Relaxed);
                    if number >= count {
                        return anyhow::Ok(done);
                    }
                    done.push(work(number).await?);
                }
            })
        })
        .collect();
    let mut all = Vec::with_capacity(count);
    for task in tasks {
        all.extend(task.await??);
    }
    Ok(all)
}
