use std::os::fd::{AsRawFd, RawFd};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use kvtier::client::blocking::{Client as Connection, Namespace};
use kvtier::client::{
    Advice, ClientError, ClientOptions, Completion, ForeignSlice, SubmissionOptions, Submissions, prefix_len,
};
use kvtier::{BlockHash, Generation, Hints, Realization};
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::argument::{hash_of, hashes_of, hints_of, lineage_of, parent_of, realization_of, scope_of, seconds};
use crate::block::Block;
use crate::buffer::Buffer;
use crate::device::{self, Device, DeviceGet, DevicePut};
use crate::error::{Closed, Internal, raised};
use crate::outcome::{Flushed, Found, Got, put_name, tier_name};

/// A namespace of a node, in one form, over one connection.
///
/// `socket` is the node's. `realization` is what must match for the bytes to be usable: a dict of strings such as model, dtype
/// and layout, digested in its order, or a digest of 32 bytes. A key is 16 bytes. One request goes at a time: a second thread
/// that calls waits for the first, without the interpreter's lock.
///
/// A connection that fails is made anew by the next call. After a fork the child must make a client of its own: the parent's
/// raises Closed there, and a view of a block that was taken before the fork must not be touched, for its memory is not mapped.
///
/// `token` names a trust domain, otherwise the user id does. `timeout` is for one request, in seconds. `threads` run what
/// `submit_get_into` begins, and at most `gets_max` of those may be uncollected.
#[pyclass(frozen, weakref, module = "kvtier")]
pub(crate) struct Client {
    socket: PathBuf,
    name: String,
    open: Mutex<Option<Arc<Open>>>,
}

pub(crate) struct Open {
    connection: Connection,
    pub(crate) namespace: Namespace,
    options: ClientOptions,
    realization: Realization,
    submitting: SubmissionOptions,
    submissions: OnceLock<Submissions<Buffer>>,
}

#[pymethods]
impl Client {
    #[new]
    #[expect(clippy::too_many_arguments, reason = "in Python they are named")]
    #[pyo3(signature = (socket, *, namespace, realization, token = None, timeout = 10.0, threads = 2, gets_max = 1024))]
    fn new(
        py: Python<'_>,
        socket: PathBuf,
        namespace: String,
        realization: &Bound<'_, PyAny>,
        token: Option<Vec<u8>>,
        timeout: f64,
        threads: usize,
        gets_max: usize,
    ) -> PyResult<Client> {
        let realization = realization_of(realization)?;
        let options = ClientOptions::new(&socket).with_timeout(seconds("timeout", timeout)?);
        let options = ClientOptions { token, ..options };
        let open = py.detach(|| {
            let connection = Connection::connect(options.clone())?;
            let opened = connection.namespace(&namespace, realization)?;
            Ok(Open {
                connection,
                namespace: opened,
                options,
                realization,
                submitting: SubmissionOptions { threads, gets_max },
                submissions: OnceLock::new(),
            })
        });
        Ok(Client {
            socket,
            name: namespace,
            open: Mutex::new(Some(Arc::new(open.map_err(raised)?))),
        })
    }

    /// Path of the node's socket.
    #[getter]
    fn socket(&self) -> &PathBuf {
        &self.socket
    }

    /// Name of the namespace.
    #[getter]
    fn namespace(&self) -> &str {
        &self.name
    }

    /// Whether `close` was called.
    #[getter]
    fn closed(&self) -> bool {
        self.state().is_none()
    }

    /// Copies `data` (any contiguous buffer) and publishes it as the block `key`.
    ///
    /// Returns "published", "present" (it was cached already), "stale" (the namespace was invalidated meanwhile), "busy" (no
    /// room: skip it) or "invalid" (empty, or over the node's limit). `parent` is the key of the block before in its prefix,
    /// "root" or "unknown" (the default); `tokens` is how many the block holds. `label` is what it is part of: `kvctl purge --label`
    /// takes what was put under it. A block that is cached under other labels is put again, under both.
    #[pyo3(signature = (key, data, *, parent = None, tokens = 0, label = None))]
    fn put(
        &self,
        py: Python<'_>,
        key: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        tokens: u32,
        label: Option<&str>,
    ) -> PyResult<&'static str> {
        let parent = parent.map(parent_of).transpose()?.unwrap_or_default();
        let (hash, source) = (hash_of(key)?, Buffer::readable(data)?);
        let blocks = [(hash, source.as_ref().clone())];
        let hints = hints_of(label);
        let outcomes = self.call(py, |open| {
            let namespace = open.namespace.with_hints(hints);
            namespace.put_from_foreign(parent, &blocks, tokens)
        })?;
        one(outcomes).map(put_name)
    }

    /// As `put` for many blocks, in prefix order: each is the parent of the next. `parent` is of the first block;
    /// "independent" says that they do not follow one another. `label` is of all of them.
    #[pyo3(signature = (keys, data, *, parent = None, tokens = 0, label = None))]
    fn put_batch(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        data: &Bound<'_, PyAny>,
        parent: Option<&Bound<'_, PyAny>>,
        tokens: u32,
        label: Option<&str>,
    ) -> PyResult<Vec<&'static str>> {
        let lineage = parent.map(lineage_of).transpose()?.unwrap_or_default();
        let (hashes, sources) = (hashes_of(keys)?, buffers(data, Buffer::readable)?);
        same_length(hashes.len(), sources.len(), "buffers")?;
        let blocks: Vec<(BlockHash, ForeignSlice)> = hashes.into_iter().zip(slices(&sources)).collect();
        let hints = hints_of(label);
        let outcomes = self.call(py, |open| {
            let namespace = open.namespace.with_hints(hints);
            namespace.put_from_foreign(lineage, &blocks, tokens)
        })?;
        Ok(outcomes.into_iter().map(put_name).collect())
    }

    /// Copies the block into the front of `target`, a writable contiguous buffer, and says what became of it: a `Got`, true
    /// if it is a hit. A target that is too small is not touched.
    fn get_into(&self, py: Python<'_>, key: &Bound<'_, PyAny>, target: &Bound<'_, PyAny>) -> PyResult<Got> {
        let (hashes, target) = ([hash_of(key)?], Buffer::writable(target)?);
        let targets = [target.as_ref().clone()];
        let outcomes = self.call(py, |open| {
            open.namespace.get_into_foreign(&hashes, &targets, scope_of(false))
        })?;
        one(outcomes).map(Got::from)
    }

    /// As `get_into` for many keys in one trip, one target for each. With `prefix` nothing behind the first miss is read.
    /// `prompt_tokens`, `local_prefix_tokens`, `queue_wait_us` and `can_split` as for `lookup`.
    ///
    /// Targets may be written on an error.
    #[pyo3(signature = (keys, targets, *, prefix = false, prompt_tokens = None, local_prefix_tokens = None, queue_wait_us = None, can_split = false))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's")]
    fn get_into_batch(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        targets: &Bound<'_, PyAny>,
        prefix: bool,
        prompt_tokens: Option<u32>,
        local_prefix_tokens: Option<u32>,
        queue_wait_us: Option<u64>,
        can_split: bool,
    ) -> PyResult<Vec<Got>> {
        let hints = request_hints(prompt_tokens, local_prefix_tokens, queue_wait_us, can_split);
        let (hashes, buffers) = (hashes_of(keys)?, buffers(targets, Buffer::writable)?);
        let targets: Vec<ForeignSlice> = slices(&buffers).collect();
        let scope = scope_of(prefix);
        let outcomes = self.call(py, |open| {
            let namespace = open.namespace.with_hints(hints);
            namespace.get_into_foreign(&hashes, &targets, scope)
        })?;
        Ok(outcomes.into_iter().map(Got::from).collect())
    }

    /// As `put_batch` from memory of a GPU: arrays of a block each that have `__cuda_array_interface__` or DLPack and are contiguous.
    ///
    /// Begins when what `stream` was given before is done: the engine's, by its number (`CUstream`,
    /// `torch.cuda.Stream.cuda_stream`; 0 is the default stream). Waits until the blocks are published.
    #[pyo3(signature = (keys, arrays, *, device, parent = None, tokens = 0, label = None, stream = 0))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's")]
    fn put_from_device(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        arrays: &Bound<'_, PyAny>,
        device: &Bound<'_, Device>,
        parent: Option<&Bound<'_, PyAny>>,
        tokens: u32,
        label: Option<&str>,
        stream: u64,
    ) -> PyResult<Vec<&'static str>> {
        device::begin_put(py, self, keys, arrays, device, parent, (tokens, label, stream))?.finish(py)
    }

    /// Begins a `put_from_device`, and returns when the device has been told: a `DevicePut`.
    #[pyo3(signature = (keys, arrays, *, device, parent = None, tokens = 0, label = None, stream = 0))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's")]
    fn begin_put_from_device(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        arrays: &Bound<'_, PyAny>,
        device: &Bound<'_, Device>,
        parent: Option<&Bound<'_, PyAny>>,
        tokens: u32,
        label: Option<&str>,
        stream: u64,
    ) -> PyResult<DevicePut> {
        device::begin_put(py, self, keys, arrays, device, parent, (tokens, label, stream))
    }

    /// As `get_into_batch` into memory of a GPU, as for `put_from_device`. Waits for the device. A block that lies in memory of the same
    /// GPU already is copied from there.
    #[pyo3(signature = (keys, arrays, *, device, prefix = false, stream = 0))]
    fn get_into_device(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        arrays: &Bound<'_, PyAny>,
        device: &Bound<'_, Device>,
        prefix: bool,
        stream: u64,
    ) -> PyResult<Vec<Got>> {
        device::begin_get(py, self, keys, arrays, device, (prefix, stream))?.finish(py)
    }

    /// Begins a `get_into_device`, and returns when the device has been told: a `DeviceGet`.
    #[pyo3(signature = (keys, arrays, *, device, prefix = false, stream = 0))]
    fn begin_get_into_device(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        arrays: &Bound<'_, PyAny>,
        device: &Bound<'_, Device>,
        prefix: bool,
        stream: u64,
    ) -> PyResult<DeviceGet> {
        device::begin_get(py, self, keys, arrays, device, (prefix, stream))
    }

    /// Leases the block and returns it in place, read-only: a `Block`, or None for a miss. The lease goes with the object;
    /// hold it briefly, or copy.
    fn get(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<Option<Block>> {
        let hashes = [hash_of(key)?];
        let handles = self.call(py, |open| open.namespace.get(&hashes, scope_of(false)))?;
        Ok(one(handles)?.map(Block::new))
    }

    /// As `get` for many keys. With `prefix` nothing behind the first miss is leased.
    #[pyo3(signature = (keys, *, prefix = false))]
    fn get_batch(&self, py: Python<'_>, keys: &Bound<'_, PyAny>, prefix: bool) -> PyResult<Vec<Option<Block>>> {
        let hashes = hashes_of(keys)?;
        let handles = self.call(py, |open| open.namespace.get(&hashes, scope_of(prefix)))?;
        Ok(handles.into_iter().map(|handle| handle.map(Block::new)).collect())
    }

    /// Whether the block is cached.
    fn exists(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        let hash = hash_of(key)?;
        self.call(py, |open| open.namespace.exists(hash))
    }

    /// Which blocks are cached.
    fn exists_batch(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<Vec<bool>> {
        let hashes = hashes_of(keys)?;
        let tiers = self.call(py, |open| open.namespace.lookup(&hashes))?;
        Ok(tiers.iter().map(Option::is_some).collect())
    }

    /// How many of the first keys are cached, and which tier each is in: a `Found`. Leases nothing, moves no bytes. Of what
    /// lies elsewhere only what is worth fetching is found; with `raw` all that exists is.
    ///
    /// What the node reckons with: `prompt_tokens` of the whole prompt, `local_prefix_tokens` that the engine has already, and
    /// `queue_wait_us`, how long the request waits for a GPU anyway. With `can_split` the engine can compute the front while the
    /// rest is fetched: where that is fastest the first keys are not found, and those behind them are. Fetch them together,
    /// without `prefix` and with the same hints.
    #[pyo3(signature = (keys, *, raw = false, prompt_tokens = None, local_prefix_tokens = None, queue_wait_us = None, can_split = false))]
    #[expect(clippy::too_many_arguments, reason = "keywords of Python's")]
    fn lookup(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        raw: bool,
        prompt_tokens: Option<u32>,
        local_prefix_tokens: Option<u32>,
        queue_wait_us: Option<u64>,
        can_split: bool,
    ) -> PyResult<Found> {
        let hashes = hashes_of(keys)?;
        let hints = request_hints(prompt_tokens, local_prefix_tokens, queue_wait_us, can_split);
        let tiers = self.call(py, |open| {
            let namespace = open.namespace.with_hints(hints);
            if raw {
                namespace.lookup_raw(&hashes)
            } else {
                namespace.lookup(&hashes)
            }
        })?;
        Ok(Found {
            prefix: prefix_len(&tiers),
            tiers: tiers.into_iter().map(|tier| tier.map(tier_name)).collect(),
        })
    }

    /// What the node would decide about fetching these keys from elsewhere, and why: a dictionary with the plan (`fetch`,
    /// `recompute` or `split`), the five terms of a fetch and what recomputing takes, in seconds. Hints as for `lookup`.
    /// Decides and counts nothing. Raises `Unavailable` where there is nothing to weigh.
    #[pyo3(signature = (keys, *, prompt_tokens = None, local_prefix_tokens = None, queue_wait_us = None, can_split = false))]
    fn explain<'py>(
        &self,
        py: Python<'py>,
        keys: &Bound<'_, PyAny>,
        prompt_tokens: Option<u32>,
        local_prefix_tokens: Option<u32>,
        queue_wait_us: Option<u64>,
        can_split: bool,
    ) -> PyResult<Bound<'py, PyAny>> {
        let hashes = hashes_of(keys)?;
        let hints = request_hints(prompt_tokens, local_prefix_tokens, queue_wait_us, can_split);
        let json = self.call(py, |open| open.namespace.with_hints(hints).explain(&hashes))?;
        py.import("json")?.call_method1("loads", (json,))
    }

    /// Says what becomes of the session that these keys, in prefix order, are the prompt of: it is over (`closed`), its blocks are
    /// to stay for `seconds` (`pinned`), an agent will ask again within `seconds` (`expected`), or the prompt has been answered, with so many
    /// `tokens` (`answered`). Zero seconds take back what was said; an hour is the most. Answers how many of the blocks the node has.
    #[pyo3(signature = (keys, advice, seconds = 0.0, *, tokens = None))]
    fn advise(
        &self,
        py: Python<'_>,
        keys: &Bound<'_, PyAny>,
        advice: &str,
        seconds: f64,
        tokens: Option<i64>,
    ) -> PyResult<u32> {
        let hashes = hashes_of(keys)?;
        let invalid = |words: String| crate::error::Invalid::new_err(words);
        let within = Duration::try_from_secs_f64(seconds).map_err(|error| invalid(format!("seconds: {error}")))?;
        let advice = match advice {
            "answered" if within.is_zero() => {
                let tokens = tokens.ok_or_else(|| invalid("tokens: how long was the answer?".into()))?;
                Advice::Answered(u32::try_from(tokens).map_err(|error| invalid(format!("tokens: {error}")))?)
            }
            "answered" => return Err(invalid("seconds: what is answered has no time".into())),
            _ if tokens.is_some() => return Err(invalid(format!("tokens: {advice:?} has none"))),
            "closed" if within.is_zero() => Advice::Closed,
            "closed" => return Err(invalid("seconds: what is closed has no time".into())),
            "pinned" => Advice::Pinned(within),
            "expected" => Advice::Expected(within),
            other => {
                return Err(invalid(format!(
                    "advice {other:?}: one of closed, pinned, expected, answered"
                )));
            }
        };
        self.call(py, |open| open.namespace.advise(&hashes, advice))
    }

    /// Forgets the block; whether it was there. Whoever holds a lease keeps its bytes until it lets go.
    fn delete(&self, py: Python<'_>, key: &Bound<'_, PyAny>) -> PyResult<bool> {
        let hashes = [hash_of(key)?];
        one(self.call(py, |open| open.namespace.delete(&hashes))?)
    }

    /// As `delete` for many keys.
    fn delete_batch(&self, py: Python<'_>, keys: &Bound<'_, PyAny>) -> PyResult<Vec<bool>> {
        let hashes = hashes_of(keys)?;
        self.call(py, |open| open.namespace.delete(&hashes))
    }

    /// Raises the generation of the namespace: every block in it is hidden at once, in every realization. Returns once that
    /// is durable, with the generation now in force.
    fn invalidate(&self, py: Python<'_>) -> PyResult<u64> {
        let generation = self.call(py, |open| open.connection.invalidate(&self.name))?;
        Ok(generation.0)
    }

    /// The generation in force, as of the latest answer.
    fn generation(&self, py: Python<'_>) -> PyResult<u64> {
        let generation = self.call(py, |open| open.namespace.generation())?;
        Ok(generation.0)
    }

    /// Says that an engine computed `tokens` of a prompt in `seconds` on its GPU, waiting not counted, behind `before_tokens` whose keys
    /// and values it had: the node learns from it what recomputing takes.
    #[pyo3(signature = (tokens, seconds, *, before_tokens = 0))]
    fn report_computed(&self, py: Python<'_>, tokens: u32, seconds: f64, before_tokens: u32) -> PyResult<()> {
        let took = Duration::try_from_secs_f64(seconds)
            .map_err(|error| crate::error::Invalid::new_err(format!("seconds: {error}")))?;
        self.call(py, |open| open.connection.report_computed(tokens, before_tokens, took))
    }

    /// The node's status as this client's trust domain may see it: a dict.
    fn status<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyAny>> {
        let json = self.call(py, |open| open.connection.status())?;
        py.import("json")?.call_method1("loads", (json,))
    }

    /// Writes every block that was sealed before this call to the NVMe tier, and waits until it would survive a power cut.
    fn flush(&self, py: Python<'_>) -> PyResult<Flushed> {
        let flushed = self.call(py, |open| open.connection.flush())?;
        Ok(Flushed {
            written: flushed.written,
            left_out: flushed.left_out,
        })
    }

    /// The node's sequence of invalidations, and the generation of each namespace of the trust domain that was ever
    /// invalidated. Waits for up to `wait` seconds while the sequence is still `since`; other calls of this client wait as long.
    #[pyo3(signature = (since = 0, wait = 0.0))]
    fn watch<'py>(&self, py: Python<'py>, since: u64, wait: f64) -> PyResult<(u64, Bound<'py, PyDict>)> {
        let wait = seconds("wait", wait)?;
        let watched = self.call(py, |open| open.connection.watch(since, wait))?;
        let generations = PyDict::new(py);
        for (name, generation) in watched.namespaces {
            generations.set_item(name, generation.0)?;
        }
        Ok((watched.sequence, generations))
    }

    /// Says that the cache named `processor` holds nothing of this namespace older than `generation`. Returns the generation
    /// in force.
    fn confirm(&self, py: Python<'_>, generation: u64, processor: &str) -> PyResult<u64> {
        let generation = Generation(generation);
        let confirmed = self.call(py, |open| open.connection.confirm(&self.name, generation, processor))?;
        Ok(confirmed.0)
    }

    /// An eventfd that is readable while `completed` has something to return. Do not read or close it.
    fn event_fd(&self) -> PyResult<RawFd> {
        let open = self.open()?;
        Ok(open.submissions(&self.name)?.event().as_raw_fd())
    }

    /// Begins a `get_into_batch` on another thread and returns a ticket. The targets are kept, and not to be touched until
    /// `completed` names the ticket. Raises Busy when too many are uncollected.
    #[pyo3(signature = (keys, targets, *, prefix = false))]
    fn submit_get_into(&self, keys: &Bound<'_, PyAny>, targets: &Bound<'_, PyAny>, prefix: bool) -> PyResult<u64> {
        let (hashes, targets) = (hashes_of(keys)?, buffers(targets, Buffer::writable)?);
        let open = self.open()?;
        let ticket = open.submissions(&self.name)?.submit(hashes, targets, scope_of(prefix));
        ticket.map_err(raised)
    }

    /// What has ended since the last call: (ticket, list of `Got`, or the error) of each.
    fn completed<'py>(&self, py: Python<'py>) -> PyResult<Vec<(u64, Bound<'py, PyAny>)>> {
        let open = self.open()?;
        let completed = open.submissions(&self.name)?.completed().map_err(raised)?;
        completed
            .into_iter()
            .map(|completion| completed_of(py, completion))
            .collect()
    }

    /// Cancels what was submitted and closes the connection once no `Block` is left. Calls raise Closed from here on.
    fn close(&self, py: Python<'_>) {
        let open = self.state().take();
        py.detach(|| drop(open));
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_exception))]
    fn __exit__(&self, py: Python<'_>, _exception: &Bound<'_, PyAny>) {
        self.close(py);
    }

    fn __repr__(&self) -> String {
        let state = if self.closed() { ", closed" } else { "" };
        format!("<kvtier.Client of {:?} at {}{state}>", self.name, self.socket.display())
    }
}

impl Client {
    fn state(&self) -> MutexGuard<'_, Option<Arc<Open>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn open(&self) -> PyResult<Arc<Open>> {
        let open = self.state().as_ref().map(Arc::clone);
        let open = open.ok_or_else(|| Closed::new_err("this client is closed: make another"))?;
        open.connection.check().map_err(raised)?;
        Ok(open)
    }

    /// One call, during which other Python threads run.
    pub(crate) fn call<R: Send>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&Open) -> Result<R, ClientError> + Send,
    ) -> PyResult<R> {
        let open = self.open()?;
        py.detach(|| {
            let result = call(&open);
            // Another thread may have closed the client meanwhile: its end is not waited for with the lock held.
            drop(open);
            result
        })
        .map_err(raised)
    }
}

impl Open {
    /// Whose threads are started when they are first needed.
    fn submissions(&self, name: &str) -> PyResult<&Submissions<Buffer>> {
        if self.submissions.get().is_none() {
            let started = Submissions::start(self.options.clone(), name, self.realization, self.submitting);
            // Who loses a race drops theirs.
            let _ = self.submissions.set(started.map_err(raised)?);
        }
        self.submissions
            .get()
            .ok_or_else(|| Internal::new_err("submissions that vanished"))
    }
}

fn completed_of(py: Python<'_>, completion: Completion<Buffer>) -> PyResult<(u64, Bound<'_, PyAny>)> {
    let outcome = match completion.outcomes {
        Ok(outcomes) => {
            let outcomes: Vec<Got> = outcomes.into_iter().map(Got::from).collect();
            outcomes.into_pyobject(py)?.into_any()
        }
        Err(error) => raised(error).into_value(py).into_bound(py).into_any(),
    };
    Ok((completion.ticket, outcome))
}

fn request_hints(
    prompt_tokens: Option<u32>,
    local_prefix_tokens: Option<u32>,
    queue_wait_us: Option<u64>,
    can_split: bool,
) -> Hints {
    Hints {
        prompt_tokens,
        local_prefix_tokens,
        queue_wait_us,
        can_split,
        ..Hints::default()
    }
}

fn buffers(objects: &Bound<'_, PyAny>, take: fn(&Bound<'_, PyAny>) -> PyResult<Buffer>) -> PyResult<Vec<Buffer>> {
    objects.try_iter()?.map(|object| take(&object?)).collect()
}

fn slices(buffers: &[Buffer]) -> impl Iterator<Item = ForeignSlice> {
    buffers.iter().map(|buffer| buffer.as_ref().clone())
}

pub(crate) fn same_length(keys: usize, others: usize, what: &str) -> PyResult<()> {
    if keys == others {
        Ok(())
    } else {
        Err(crate::error::Invalid::new_err(format!(
            "{others} {what} for {keys} keys"
        )))
    }
}

fn one<T>(outcomes: Vec<T>) -> PyResult<T> {
    outcomes
        .into_iter()
        .next()
        .ok_or_else(|| Internal::new_err("no outcome for one key"))
}
