//! Objects in a bucket of S3, or of what speaks as it does.
//!
//! # Keys
//!
//! ```text
//! [PREFIX/]kvtier/1/NAMESPACE/GENERATION/EXPIRES-RANDOM
//! ```
//!
//! The 1 is the version of this layout. Namespace and generation are fingerprints that the caller makes, 32 hexadecimal digits each; the rest is
//! when the pack is over, seconds since 1970, ten digits, and a random number, sixteen. What lies there is a pack (`s3/pack.rs` draws it): the
//! objects of one put, some MiB together, because a request costs the server, and who pays for it, as much for a small object as for a large one. Names of objects are keyed digests, contents are sealed: the server can tell which packs
//! belong together, and nothing of whose they are or what they hold.
//!
//! # Where an object is
//!
//! Is known from memory: what was put from here, and the fronts of the packs that a listing of the group found. A group is listed when it is first
//! asked for, for new packs again when it is asked for and the last look is over two seconds old, and as a whole every five minutes. So a
//! question costs no trip, what another node has put is found within some seconds, and what is gone is a miss when it is fetched. The index
//! has as many objects as the settings allow; beyond that the groups that were not used for the longest time are forgotten, and found again when
//! they are asked for.
//!
//! # Behaviour
//!
//! A call blocks its thread, and ends at its deadline; requests of a call run beside each other. The SDK tries three times what failed in passing.
//! A pack is put under a random key on the condition that nothing is there, so that a second try that finds the first one's is done. Objects
//! of one put are read together: neighbours with one request, large ones in ranges beside each other.
//!
//! S3 has no time to live of its own for an object: a pack's name says when it is over. Nobody reads it from then on, and it is deleted by whoever
//! of the nodes that keep objects under this prefix looks next.
//!
//! Deleting one object deletes every pack that has it, and those that cannot be read; where not all of the group was looked through it is an
//! error. An erasure deletes all versions that a server keeps, and what was begun and never completed, and lists
//! again. What a server keeps beside (replication, backups) is out of reach here.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque, hash_map};
use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use self::bucket::{After, Bucket};
use self::credentials::FromFile;
use self::index::{EXPIRES_NEVER, Index, Located, PackId, Rejected};
use self::pack::{ENTRIES_MAX, Entry, Front};
use super::{Erased, ObjectGroup, ObjectName, ObjectStore, StoreError};

mod bucket;
mod credentials;
mod index;
mod pack;

#[cfg(test)]
mod tests;

/// Bytes of a pack, but for one with a single larger object: some MiB of blocks, and what their seals take.
const PACK_BYTES: usize = (8 << 20) + (64 << 10);
/// What one request reads at most: smaller ones run beside each other.
const RANGE_BYTES: u64 = (4 << 20) + (64 << 10);
/// Bytes that are asked for ahead of what was given.
const WINDOW_BYTES: u64 = 64 << 20;
/// What is read of a pack to learn what it has: some 600 objects' places.
const FRONT_BYTES: u64 = 16 << 10;
/// How old the last look for new packs may be.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// How old the last listing of a whole group may be.
const LIST_AGAIN: Duration = Duration::from_secs(300);
/// How far clocks of nodes may be apart, and how long a put takes: a look for new packs begins so much before now.
const SKEW: Duration = Duration::from_secs(120);
/// How long those that ask wait for a listing that has begun.
const LISTING_PATIENCE: Duration = Duration::from_secs(1);
/// Fronts that one listing reads beside each other, at most.
const FRONTS_AT_ONCE: usize = 16;
/// How long a listing in the background may take.
const LISTING: Duration = Duration::from_secs(600);
/// Between two looks for packs that are over: a quarter of the time to live, within these.
const SWEEP: Range<Duration> = Duration::from_secs(1)..Duration::from_secs(3600);
/// How long objects wait for others.
const LINGER: Duration = Duration::from_millis(100);
/// Threads that wait for the sockets.
const THREADS: usize = 2;

/// How a bucket is reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct S3Settings {
    /// Its name.
    pub bucket: String,
    /// What keys begin with: packs of nodes that share none of it are apart. Without slashes at its ends; may be empty.
    pub prefix: String,
    /// `http://` or `https://` and a host; none: Amazon's, of the region.
    pub endpoint: Option<String>,
    /// The region, which requests are signed with.
    pub region: String,
    /// Whether the bucket is named in the path, as most servers but Amazon's want it, or in the host.
    pub path_style: bool,
    /// The file with the keys, as other tools of S3 keep it. Read again every minute.
    pub credentials: PathBuf,
    /// Requests of one call at once, at least one.
    pub requests: usize,
    /// How long packs are put for, here and on the other nodes: what is put for another time is found later, and deleted later.
    pub ttl: Duration,
    /// How long the server may take to connect.
    pub timeout: Duration,
    /// Objects whose place is kept in memory, at most. Each takes some 100 bytes.
    pub index_objects: usize,
}

/// Puts, fetches and erases objects in a bucket.
pub struct S3Store {
    shared: Arc<Shared>,
    requests: usize,
    /// Ends when this is dropped, and what runs in it with it.
    runtime: Option<Runtime>,
}

struct Shared {
    bucket: Bucket,
    /// What every key of ours begins with, with a slash at its end.
    root: String,
    index: Mutex<Index>,
    /// Groups that are being listed, and since when.
    listing: Mutex<HashMap<ObjectGroup, Instant>>,
    listed: Condvar,
    /// Why the server is taken to be away: until it does anything that it is asked for.
    trouble: Mutex<Option<StoreError>>,
    /// Whether it was said that the index is full.
    has_warned: AtomicBool,
    /// For requests that read fronts, of all listings together.
    fronts: Arc<Semaphore>,
    ttl: Duration,
}

/// A group that is being listed, until this is dropped.
struct Underway {
    shared: Arc<Shared>,
    group: ObjectGroup,
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.shared.listing.lock().remove(&self.group);
        self.shared.listed.notify_all();
    }
}

/// What the front of a pack is.
enum FrontOf {
    Ours(Vec<Entry>),
    Gone,
    /// It cannot be read, or is none of ours.
    Unread,
}

/// A request of a fetch: neighbours of one pack, or a part of one object.
struct Run {
    pack: PackId,
    group: ObjectGroup,
    range: Range<u64>,
    /// The objects that end in it, by position among those that were asked for, and how many bytes of each.
    objects: Vec<(usize, u64)>,
}

impl S3Store {
    /// Checks the settings and connects to nobody: a server that is away is no error before something is asked of it.
    ///
    /// # Errors
    /// [`StoreError::Settings`].
    pub fn new(settings: &S3Settings) -> Result<S3Store, StoreError> {
        let refused = |reason: &str| StoreError::Settings {
            reason: reason.to_owned(),
        };
        if !(3..=63).contains(&settings.bucket.len()) || settings.bucket.contains(['/', ':', ' ']) {
            return Err(refused("a bucket's name has 3 to 63 letters, digits, hyphens and dots"));
        }
        if settings.prefix.starts_with('/') || settings.prefix.ends_with('/') || settings.prefix.len() > 512 {
            return Err(refused(
                "the prefix begins or ends with a slash, or is longer than 512 bytes",
            ));
        }
        if let Some(endpoint) = &settings.endpoint {
            let host = endpoint.strip_prefix("https://").or(endpoint.strip_prefix("http://"));
            if host.is_none_or(|host| host.is_empty() || host.contains(['@', '?', '#', ' '])) {
                return Err(refused(
                    "an endpoint is http:// or https:// and a host, without a user or options",
                ));
            }
        }
        // Now, so that a mistake shows at the start.
        let keys = FromFile(settings.credentials.clone()).read();
        keys.map_err(|reason| refused(&format!("{reason}; write it as `aws configure` does")))?;
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(THREADS)
            .thread_name("kvtier-s3")
            .enable_io()
            .enable_time()
            .build()
            .map_err(|error| refused(&format!("no threads for its sockets: {error}")))?;
        let prefix = Some(settings.prefix.as_str()).filter(|prefix| !prefix.is_empty());
        let shared = Arc::new(Shared {
            bucket: Bucket::new(settings),
            root: prefix.map_or_else(|| "kvtier/1/".to_owned(), |prefix| format!("{prefix}/kvtier/1/")),
            index: Mutex::new(Index::new(settings.index_objects)),
            listing: Mutex::default(),
            listed: Condvar::new(),
            trouble: Mutex::default(),
            has_warned: AtomicBool::new(false),
            fronts: Arc::new(Semaphore::new(settings.requests.max(1))),
            ttl: settings.ttl,
        });
        runtime.spawn(Arc::clone(&shared).sweep());
        Ok(S3Store {
            shared,
            requests: settings.requests.max(1),
            runtime: Some(runtime),
        })
    }

    fn runtime(&self) -> &Runtime {
        self.runtime.as_ref().expect("it runs until this is dropped")
    }

    /// Waits for something that is asked of the server, on this thread, until then, and notes whether the server is there.
    fn within<T>(
        &self,
        until: Instant,
        command: &'static str,
        asked: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let outcome = self.wait_for(until, command, asked);
        match &outcome {
            Ok(_) => *self.shared.trouble.lock() = None,
            Err(error @ (StoreError::Unavailable { .. } | StoreError::Late { .. })) => {
                *self.shared.trouble.lock() = Some(error.clone());
            }
            Err(_) => {}
        }
        outcome
    }

    fn wait_for<T>(
        &self,
        until: Instant,
        command: &'static str,
        asked: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let late = || StoreError::Late {
            server: self.shared.bucket.name.clone(),
            command,
        };
        // What has no time left asks nobody.
        if Instant::now() >= until {
            return Err(late());
        }
        let asked = async { tokio::time::timeout_at(until.into(), asked).await };
        self.runtime().block_on(asked).unwrap_or_else(|_| Err(late()))
    }

    /// Where these are, of the packs that are known; has looked for more what is due. Waits a moment for a group that was never listed, and for
    /// word of a server that was last heard of as away: then an error is its answer.
    fn locate(
        &self,
        objects: &[(ObjectGroup, ObjectName)],
        until: Instant,
    ) -> Result<Vec<Option<Located>>, StoreError> {
        let groups: BTreeSet<ObjectGroup> = objects.iter().map(|(group, _)| *group).collect();
        let is_away = || self.shared.trouble.lock().is_some();
        for group in &groups {
            let now = Instant::now();
            let (listed, looked) = self.shared.index.lock().listings(group, now);
            let is_due = |last: Option<Instant>, pause| last.is_none_or(|last| now.duration_since(last) > pause);
            if is_due(looked, LOOK_AGAIN) || is_away() {
                self.begin_listing(*group, is_due(listed, LIST_AGAIN), now);
            }
        }
        let located = self.located(objects);
        if located.iter().all(Option::is_some) && !is_away() {
            return Ok(located);
        }
        for group in &groups {
            let mut listing = self.shared.listing.lock();
            while let Some(begun) = listing.get(group).copied()
                && (self.shared.is_new(group) || is_away())
            {
                // A long one is not waited for by everybody: what it finds is found from then on.
                let until = until.min(begun + LISTING_PATIENCE);
                if self.shared.listed.wait_until(&mut listing, until).timed_out() {
                    break;
                }
            }
        }
        match self.shared.trouble.lock().clone() {
            None => Ok(self.located(objects)),
            Some(trouble) => Err(trouble),
        }
    }

    fn begin_listing(&self, group: ObjectGroup, is_whole: bool, now: Instant) {
        match self.shared.listing.lock().entry(group) {
            hash_map::Entry::Occupied(_) => return,
            hash_map::Entry::Vacant(place) => place.insert(now),
        };
        let underway = Underway {
            shared: Arc::clone(&self.shared),
            group,
        };
        self.runtime().spawn(async move {
            let shared = &underway.shared;
            let listing = shared.list(&group, is_whole);
            let outcome = tokio::time::timeout(LISTING, listing).await.unwrap_or_else(|_| {
                Err(StoreError::Late {
                    server: shared.bucket.name.clone(),
                    command: "ListObjectsV2",
                })
            });
            if let Err(error) = outcome {
                tracing::debug!(address = shared.bucket.name, %error, "what lies in the bucket could not be listed");
                *shared.trouble.lock() = Some(error);
            }
        });
    }

    fn located(&self, objects: &[(ObjectGroup, ObjectName)]) -> Vec<Option<Located>> {
        let (index, now_s) = (self.shared.index.lock(), now_s());
        let find = |(group, name): &(ObjectGroup, ObjectName)| index.find(group, name, now_s);
        objects.iter().map(find).collect()
    }
}

impl Drop for S3Store {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// Without keys, which are in a file.
impl fmt::Debug for S3Store {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "S3Store({})", self.shared.bucket.name)
    }
}

impl ObjectStore for S3Store {
    fn kind(&self) -> &'static str {
        "s3"
    }

    fn address(&self) -> &str {
        &self.shared.bucket.name
    }

    fn servers(&self) -> usize {
        1
    }

    fn indexed(&self) -> u64 {
        self.shared.index.lock().len() as u64
    }

    fn linger(&self) -> Duration {
        LINGER
    }

    fn knows_by_itself(&self) -> bool {
        true
    }

    fn ping(&self, until: Instant) -> Result<(), StoreError> {
        self.within(until, "HeadBucket", self.shared.bucket.ping())
    }

    fn exists(&self, objects: &[(ObjectGroup, ObjectName)], until: Instant) -> Result<Vec<bool>, StoreError> {
        let located = self.locate(objects, until)?;
        Ok(located.iter().map(Option::is_some).collect())
    }

    fn fetch(
        &self,
        objects: &[(ObjectGroup, ObjectName)],
        until: Instant,
        each: &mut dyn FnMut(usize, Option<&[u8]>),
    ) -> Result<(), StoreError> {
        let located = self.locate(objects, until)?;
        let mut runs = runs_of(objects, &located).into_iter();
        let (mut asked, mut ahead) = (VecDeque::new(), 0);
        // What came of the object that is being read.
        let (mut object, mut given, mut gone) = (Vec::new(), 0, Vec::new());
        let handle = self.runtime().handle();
        loop {
            while asked.len() < self.requests && (ahead < WINDOW_BYTES || asked.is_empty()) {
                let Some(run) = runs.next() else { break };
                ahead += run.range.end - run.range.start;
                let (shared, key) = (Arc::clone(&self.shared), self.shared.key(&run.group, run.pack));
                let range = run.range.clone();
                let got = Asked(handle.spawn(async move { shared.bucket.get(&key, range).await }));
                asked.push_back((run, got));
            }
            let Some((run, mut got)) = asked.pop_front() else { break };
            let got = self.within(until, "GetObject", async {
                let broke_off = |_| Err(self.shared.unavailable("a request broke off"));
                (&mut got.0).await.unwrap_or_else(broke_off)
            })?;
            ahead -= run.range.end - run.range.start;
            let pieces = got.unwrap_or_else(|| {
                gone.push((run.group, run.pack));
                Vec::new()
            });
            let mut pieces = Pieces::new(pieces);
            for (position, bytes) in &run.objects {
                // Those before it that are not there.
                (given..*position).for_each(|missing| each(missing, None));
                given = *position;
                let length = located[*position].map_or(0, |at| at.length as usize);
                let is_whole = object.is_empty() && *bytes == length as u64;
                match pieces.take(*bytes) {
                    // In one piece: as it lies there.
                    Some(piece) if is_whole => {
                        each(given, Some(&piece));
                        given += 1;
                        continue;
                    }
                    Some(piece) => object.extend_from_slice(&piece),
                    None if pieces.take_into(*bytes, &mut object) => {}
                    None => object.clear(),
                }
                let is_last = run.range.end >= located[*position].map_or(0, |at| at.offset + u64::from(at.length))
                    || *bytes == length as u64;
                if is_last {
                    let is_right = object.len() == length;
                    each(given, is_right.then_some(object.as_slice()));
                    object.clear();
                    given += 1;
                }
            }
        }
        (given..objects.len()).for_each(|missing| each(missing, None));
        // Once for each group, for that goes through all of it.
        gone.sort_unstable();
        for packs in gone.chunk_by(|first, second| first.0 == second.0) {
            let ids: Vec<PackId> = packs.iter().map(|(_, id)| *id).collect();
            self.shared.index.lock().drop_packs(&packs[0].0, &ids);
        }
        Ok(())
    }

    fn put(
        &self,
        group: &ObjectGroup,
        objects: &[(ObjectName, Vec<u8>)],
        ttl: Option<Duration>,
        until: Instant,
    ) -> Result<(), StoreError> {
        let now_s = now_s();
        let expires_s = ttl.map_or(EXPIRES_NEVER, |ttl| (now_s + ttl.as_secs().max(1)).min(EXPIRES_NEVER));
        let mut rest = objects;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest.iter().take(ENTRIES_MAX).take_while(|(_, object)| {
                bytes += object.len();
                bytes <= PACK_BYTES
            });
            let (now, later) = rest.split_at(fitting.count().max(1));
            let id = PackId {
                expires_s,
                random: random(),
            };
            let (pack, entries) = pack::encode(now);
            let key = self.shared.key(group, id);
            let put = async { self.shared.bucket.put(&key, Bytes::from(pack)).await };
            self.within(until, "PutObject", put)?;
            self.shared.add(group, id, entries);
            rest = later;
        }
        Ok(())
    }

    fn remove(&self, group: &ObjectGroup, names: &[ObjectName], until: Instant) -> Result<Vec<bool>, StoreError> {
        let unsure = |reason: &str| StoreError::Unsure {
            server: self.shared.bucket.name.clone(),
            reason: reason.to_owned(),
        };
        // Of packs that nobody has told of yet, too. That there are many of them is no fault of the server's.
        let listing = self.wait_for(until, "ListObjectsV2", self.shared.list(group, true));
        let listed = listing.map_err(|error| match error {
            StoreError::Late { .. } => unsure("more lies there than could be listed in time"),
            other => other,
        })?;
        let (found, packs) = {
            let (index, now_s) = (self.shared.index.lock(), now_s());
            // What cannot be read now may be another time.
            let Some(unread) = index.unread_of(group, listed.into_iter()) else {
                return Err(unsure("more lies there than the index has room for"));
            };
            let is_there = |name: &ObjectName| index.find(group, name, now_s).is_some();
            let found: Vec<bool> = names.iter().map(is_there).collect();
            let mut packs = index.packs_with(group, names);
            packs.extend(unread);
            (found, packs)
        };
        let keys: Vec<String> = packs.iter().map(|id| self.shared.key(group, *id)).collect();
        if !keys.is_empty() {
            self.within(until, "DeleteObjects", self.shared.bucket.delete(&keys))?;
        }
        self.shared.index.lock().drop_packs(group, &packs);
        Ok(found)
    }

    fn erase_namespace(&self, namespace: &[u8; 16], until: Instant) -> Result<Erased, StoreError> {
        let prefix = format!("{}{}/", self.shared.root, ObjectName(*namespace));
        let mut erased = Erased::default();
        erased.left = self.within(
            until,
            "DeleteObjects",
            self.shared.bucket.erase(&prefix, &mut erased.deleted),
        )?;
        self.shared.index.lock().forget_namespace(namespace);
        Ok(erased)
    }
}

impl Shared {
    fn group_prefix(&self, group: &ObjectGroup) -> String {
        format!(
            "{}{}/{}/",
            self.root,
            ObjectName(group.namespace),
            ObjectName(group.generation)
        )
    }

    fn key(&self, group: &ObjectGroup, id: PackId) -> String {
        format!("{}{id}", self.group_prefix(group))
    }

    fn is_new(&self, group: &ObjectGroup) -> bool {
        self.index.lock().listings(group, Instant::now()).1.is_none()
    }

    fn unavailable(&self, reason: &str) -> StoreError {
        StoreError::Unavailable {
            server: self.bucket.name.clone(),
            reason: reason.to_owned(),
        }
    }

    /// False where there is no room for more of this group.
    fn add(&self, group: &ObjectGroup, id: PackId, entries: Vec<Entry>) -> bool {
        let has_room = self.index.lock().add(group, id, entries, Instant::now());
        if !has_room && !self.has_warned.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                address = self.bucket.name,
                "the index of the bucket is full: what lies there and has no place in it is not found; allow more, or a shorter time to live"
            );
        }
        has_room
    }

    /// Learns what a group has: all of it, or what is new. Which packs were listed that are not over.
    async fn list(&self, group: &ObjectGroup, is_whole: bool) -> Result<Vec<PackId>, StoreError> {
        let (begun, prefix) = (Instant::now(), self.group_prefix(group));
        let mut after = None;
        if is_whole {
            self.index.lock().begin_whole(group, begun);
        } else if let (_, Some(looked)) = self.index.lock().listings(group, begun) {
            // What was put since the last look expires after what was put before it.
            let last_s = now_s().saturating_sub(begun.duration_since(looked).as_secs());
            let from = PackId {
                expires_s: (last_s + self.ttl.as_secs()).saturating_sub(SKEW.as_secs()),
                random: 0,
            };
            after = Some(After::Key(format!("{prefix}{from}")));
        }
        let mut listed = Vec::new();
        loop {
            let (page, next) = self.bucket.list(&prefix, after).await?;
            // It is there, and lets us in.
            *self.trouble.lock() = None;
            let now_s = now_s();
            let found = page.iter().filter_map(|listed| {
                let id = PackId::parse(&listed.key[prefix.len()..])?;
                (!id.is_over(now_s)).then_some((id, listed.bytes))
            });
            let found: Vec<(PackId, u64)> = found.collect();
            let unknown = self.index.lock().unknown(group, &found, Instant::now());
            let gone = self.learn(group, unknown).await?;
            listed.extend(found.into_iter().filter(|(id, _)| !gone.contains(id)));
            match next {
                None => break,
                next => after = next,
            }
        }
        let mut index = self.index.lock();
        if is_whole {
            index.listed(group, begun, &listed);
        } else {
            index.looked(group, begun);
        }
        Ok(listed.into_iter().map(|(id, _)| id).collect())
    }

    /// Reads the fronts of packs, some beside each other. Those that are gone by then are told.
    async fn learn(&self, group: &ObjectGroup, packs: Vec<(PackId, u64)>) -> Result<HashSet<PackId>, StoreError> {
        let (mut packs, mut has_room, mut has_answered) = (packs.into_iter(), true, false);
        let (mut reading, mut gone, mut failed) = (JoinSet::new(), HashSet::new(), None);
        loop {
            while reading.len() < FRONTS_AT_ONCE && has_room {
                let Some((id, bytes)) = packs.next() else { break };
                let (bucket, key, fronts) = (self.bucket.clone(), self.key(group, id), Arc::clone(&self.fronts));
                reading.spawn(async move {
                    let _turn = fronts.acquire().await;
                    (id, front_of(&bucket, &key, bytes).await)
                });
            }
            let (id, front) = match reading.join_next().await {
                None => break,
                Some(Ok(read)) => read,
                Some(Err(_)) => return Err(self.unavailable("a request broke off")),
            };
            has_answered |= front.is_ok();
            match front {
                Ok(FrontOf::Ours(entries)) => has_room &= self.add(group, id, entries),
                Ok(FrontOf::Gone) => drop(gone.insert(id)),
                // One that cannot be read keeps nobody from the others.
                Ok(FrontOf::Unread) | Err(_) => {
                    tracing::debug!(address = self.bucket.name, pack = %id, "a pack that cannot be read, or is none of ours");
                    self.index.lock().reject(group, id, Rejected::Unread);
                    failed = failed.or(front.err());
                }
            }
        }
        if let Some(error) = failed
            && !has_answered
        {
            // Nothing at all: that is the server.
            self.index.lock().begin_whole(group, Instant::now());
            return Err(error);
        }
        // Those that nobody asked for any more.
        let mut index = self.index.lock();
        packs.for_each(|(id, _)| index.reject(group, id, Rejected::NoRoom));
        Ok(gone)
    }

    /// Deletes packs that are over, whoever put them, as long as this runs.
    async fn sweep(self: Arc<Self>) {
        let pause = (self.ttl / 4).clamp(SWEEP.start, SWEEP.end);
        loop {
            tokio::time::sleep(pause).await;
            match tokio::time::timeout(LISTING, self.delete_what_is_over()).await {
                Ok(Ok(0)) => {}
                Ok(Ok(count)) => tracing::debug!(address = self.bucket.name, count, "packs that were over are deleted"),
                Ok(Err(error)) => {
                    tracing::debug!(address = self.bucket.name, %error, "packs that are over stay for now")
                }
                Err(_) => tracing::debug!(address = self.bucket.name, "packs that are over stay for now: too slow"),
            }
        }
    }

    async fn delete_what_is_over(&self) -> Result<u64, StoreError> {
        let is_over = |key: &str| {
            let id = key.rsplit('/').next().and_then(PackId::parse);
            id.is_some_and(|id| id.is_over(now_s()))
        };
        let (mut after, mut count) = (None, 0);
        loop {
            let (page, next) = self.bucket.list(&self.root, after).await?;
            let over = page.into_iter().filter(|listed| is_over(&listed.key));
            let over: Vec<String> = over.map(|listed| listed.key).collect();
            if !over.is_empty() {
                self.bucket.delete(&over).await?;
                count += over.len() as u64;
            }
            match next {
                None => break,
                next => after = next,
            }
        }
        self.bucket.abort_uploads(&self.root, &is_over, &mut count).await?;
        Ok(count)
    }
}

/// Where the objects of a pack lie.
async fn front_of(bucket: &Bucket, key: &str, bytes: u64) -> Result<FrontOf, StoreError> {
    if bytes == 0 {
        return Ok(FrontOf::Unread);
    }
    let mut wanted = FRONT_BYTES.min(bytes);
    // A second time where it is longer.
    for _ in 0..2 {
        let pieces = match bucket.get(key, 0..wanted).await {
            Ok(Some(pieces)) => pieces,
            Ok(None) => return Ok(FrontOf::Gone),
            // Of this one object: others may be read all the same.
            Err(StoreError::Refused { .. } | StoreError::Garbled { .. }) => return Ok(FrontOf::Unread),
            Err(other) => return Err(other),
        };
        match pack::decode(&pieces.concat(), bytes) {
            Some(Front::Entries(entries)) => return Ok(FrontOf::Ours(entries)),
            Some(Front::Longer(length)) => wanted = length as u64,
            None => break,
        }
    }
    Ok(FrontOf::Unread)
}

/// The requests that read these objects, in their order.
fn runs_of(objects: &[(ObjectGroup, ObjectName)], located: &[Option<Located>]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (position, ((group, _), at)) in objects.iter().zip(located).enumerate() {
        let Some(at) = at else { continue };
        let (start, end) = (at.offset, at.offset + u64::from(at.length));
        if let Some(last) = runs.last_mut()
            && (last.pack, last.group, last.range.end) == (at.pack, *group, start)
            && end - last.range.start <= RANGE_BYTES
        {
            last.range.end = end;
            last.objects.push((position, end - start));
            continue;
        }
        let mut from = start;
        while from < end {
            let to = end.min(from + RANGE_BYTES);
            runs.push(Run {
                pack: at.pack,
                group: *group,
                range: from..to,
                objects: vec![(position, to - from)],
            });
            from = to;
        }
    }
    runs
}

/// A request under way. Abandoned when dropped.
struct Asked<T>(JoinHandle<T>);

impl<T> Drop for Asked<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// What a request brought, piece by piece.
struct Pieces {
    pieces: VecDeque<Bytes>,
}

impl Pieces {
    fn new(pieces: Vec<Bytes>) -> Pieces {
        Pieces { pieces: pieces.into() }
    }

    /// The next so many bytes where they lie in one piece.
    fn take(&mut self, bytes: u64) -> Option<Bytes> {
        let bytes = usize::try_from(bytes).ok()?;
        let front = self.pieces.front_mut()?;
        if front.len() < bytes {
            return None;
        }
        let taken = front.split_to(bytes);
        if front.is_empty() {
            self.pieces.pop_front();
        }
        Some(taken)
    }

    /// The next so many bytes behind what is in `target`. False, and nothing more is there, where they are fewer.
    fn take_into(&mut self, bytes: u64, target: &mut Vec<u8>) -> bool {
        let mut left = usize::try_from(bytes).unwrap_or(usize::MAX);
        while left > 0 {
            let Some(front) = self.pieces.front_mut() else {
                return false;
            };
            let piece = front.split_to(left.min(front.len()));
            if front.is_empty() {
                self.pieces.pop_front();
            }
            left -= piece.len();
            target.extend_from_slice(&piece);
        }
        true
    }
}

fn now_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn random() -> u64 {
    let mut bytes = [0; 8];
    getrandom::fill(&mut bytes).expect("the system has random bytes");
    u64::from_le_bytes(bytes)
}
