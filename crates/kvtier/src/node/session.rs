//! One connection: its thread reads requests, asks the driver, and writes replies.
//!
//! A request that the tier manager decides at once is answered before the next is read. One that waits for a device or for
//! room is answered from the [`Outbox`] when it is decided, so that later requests of the connection overtake it.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::RecvTimeoutError;
use kvtier_core::{
    Answer, BlockHash, ClientId, Departure, Extent, Generation, NamespaceId, Realization, RealizationId, Refusal,
    Reserved, SealItem, Sealed, SegmentId, Time,
};
use kvtier_core::{Hints, Label, LeaseId, SealRequest};
use kvtier_transfer::socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::domains::Identity;
use super::driver::Waiter;
use super::listener::Shared;
use super::outbox::{Notice, Outbox};
use super::peers::versions::Cause;

use crate::error::ErrorKind;
use crate::settings::Clock;
use crate::wire::{Ahead, Frame, FrameStream, KEYS_MAX, Keys, Reply, Request, Slot, VERSION_MAX, VERSION_MIN, Welcome};

mod reading;
mod seeing;
mod watching;

/// How long a connection may take to say who it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a client may leave its replies unread before the connection is closed.
const SEND_TIMEOUT: Duration = Duration::from_secs(5);
/// Bytes of replies gathered before they are sent while more requests lie in the buffer.
const GATHER_BYTES: usize = 256 << 10;
/// Namespaces that one connection may open.
const HANDLES_MAX: usize = 4096;
/// Received at once.
const RECEIVE_BYTES: usize = 64 << 10;

/// See the module.
pub(crate) struct Session {
    shared: Arc<Shared>,
    stream: Arc<UnixStream>,
    process: Arc<OwnedFd>,
    client: ClientId,
    uid: u32,
    identity: Option<Identity>,
    domain_name: String,
    outbox: Arc<Outbox>,
    handles: Vec<Handle>,
    announced: HashSet<SegmentId>,
    /// A watch that waits, and until when.
    watch: Option<(u64, Instant)>,
    /// Requests that wait, and whose generation their replies carry.
    waiting: HashMap<u64, Option<usize>>,
    replies: Vec<u8>,
    hashes: Vec<BlockHash>,
    lengths: Vec<u32>,
    items: Vec<SealItem>,
    leases: Vec<LeaseId>,
    slots: Vec<Slot>,
}

#[derive(Clone, Copy)]
struct Handle {
    namespace: NamespaceId,
    realization: RealizationId,
}

/// How a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// The client promised to touch nothing any more.
    Goodbye,
    /// The connection broke, or a rule of the protocol.
    Lost,
}

/// What a refused request is told.
struct Refused(ErrorKind, String);

impl From<Refusal> for Refused {
    fn from(refusal: Refusal) -> Refused {
        let kind = match refusal {
            Refusal::Denied => ErrorKind::Denied,
            Refusal::Busy => ErrorKind::Busy,
            Refusal::Draining => ErrorKind::Unavailable,
            Refusal::Invalid(_) => ErrorKind::Invalid,
            Refusal::UnknownClient => ErrorKind::Internal,
        };
        Refused(kind, refusal.to_string())
    }
}

impl Session {
    pub(crate) fn new(
        shared: Arc<Shared>,
        client: ClientId,
        stream: Arc<UnixStream>,
        process: Arc<OwnedFd>,
        uid: u32,
    ) -> io::Result<Session> {
        stream.set_read_timeout(Some(HELLO_TIMEOUT))?;
        stream.set_write_timeout(Some(SEND_TIMEOUT))?;
        Ok(Session {
            shared,
            stream,
            process,
            client,
            uid,
            identity: None,
            domain_name: String::new(),
            outbox: Arc::new(Outbox::new()?),
            handles: Vec::new(),
            announced: HashSet::new(),
            watch: None,
            waiting: HashMap::new(),
            replies: Vec::new(),
            hashes: Vec::new(),
            lengths: Vec::new(),
            items: Vec::new(),
            leases: Vec::new(),
            slots: Vec::new(),
        })
    }

    /// Serves until the client leaves, then gives back what it held: at once when it said goodbye or its process is gone,
    /// else when the process goes.
    pub(crate) fn run(mut self) {
        let ended = self.converse();
        match &ended {
            Ok(end) => tracing::debug!(client = self.client.0, ?end, "a connection ended"),
            Err(error) => tracing::debug!(client = self.client.0, %error, "a connection broke"),
        }
        // Whoever still reads the other end learns now, even while this thread waits for the process to go.
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        if self.identity.is_none() {
            return;
        }
        let driver = Arc::clone(&self.shared.driver);
        driver.forget(self.client);
        self.see_end();
        if matches!(ended, Ok(End::Goodbye)) {
            self.depart(Departure::Clean);
            return;
        }
        if !socket::process_is_gone(&self.process) {
            self.depart(Departure::Alive);
            let holds = driver.look(|manager| manager.holds_anything(self.client));
            if holds && !self.wait_for_process() {
                return;
            }
        }
        self.depart(Departure::Gone);
    }

    fn depart(&self, departure: Departure) {
        self.shared
            .driver
            .with(|decider, now| decider.manager.disconnect(self.client, departure, now));
    }

    /// Whether the client's process went before the node stops.
    fn wait_for_process(&self) -> bool {
        loop {
            let mut descriptors = [
                PollFd::new(&self.shared.stop, PollFlags::IN),
                PollFd::new(&*self.process, PollFlags::IN),
            ];
            match poll(&mut descriptors, None) {
                Ok(_) if !descriptors[0].revents().is_empty() => return false,
                Ok(_) if !descriptors[1].revents().is_empty() => return true,
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }

    fn converse(&mut self) -> io::Result<End> {
        let mut stream = FrameStream::new(RECEIVE_BYTES);
        loop {
            self.send_notices()?;
            self.end_late_watch();
            while stream.is_ready() {
                let end = match stream.next() {
                    Ok(Some(frame)) => self.serve(&frame)?,
                    Ok(None) => break,
                    Err(error) => {
                        self.refuse(0, &Refused(ErrorKind::Invalid, error.to_string()));
                        Some(End::Lost)
                    }
                };
                if let Some(end) = end {
                    // A client that said goodbye need not stay for the answer; its promise holds all the same.
                    let _ = self.send();
                    return Ok(end);
                }
                if self.replies.len() > GATHER_BYTES {
                    self.send()?;
                }
            }
            self.send()?;
            if !self.waiting.is_empty() && !self.wait_for_input()? {
                continue;
            }
            match rustix::net::recv(&*self.stream, stream.space(), rustix::net::RecvFlags::empty()) {
                Ok((_, 0)) => return Ok(End::Lost),
                Ok((_, received)) => stream.advance(received),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Whether there is something to receive; `false` when a waiting request was decided first.
    fn wait_for_input(&self) -> io::Result<bool> {
        let mut descriptors = [
            PollFd::from_borrowed_fd(self.stream.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(self.outbox.wake_fd(), PollFlags::IN),
        ];
        let left = self.watch.map(|(_, due)| due.saturating_duration_since(Instant::now()));
        let left = left.map(|left| Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(0),
            tv_nsec: i64::from(left.subsec_nanos()),
        });
        match poll(&mut descriptors, left.as_ref()) {
            Ok(_) => Ok(descriptors[1].revents().is_empty() && !descriptors[0].revents().is_empty()),
            Err(rustix::io::Errno::INTR) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn send(&mut self) -> io::Result<()> {
        if !self.replies.is_empty() {
            socket::send_all_with_fds(&*self.stream, &self.replies, &[])?;
            self.replies.clear();
            // A burst of long replies does not keep its memory.
            self.replies.shrink_to(GATHER_BYTES);
        }
        Ok(())
    }

    fn reply(&mut self, request: u64, reply: &Reply<'_>) {
        if let Err(error) = reply.encode(request, &mut self.replies) {
            let refused = Refused(ErrorKind::Internal, format!("the reply does not fit a frame: {error}"));
            self.refuse(request, &refused);
        }
    }

    fn refuse(&mut self, request: u64, refused: &Refused) {
        let mut end = refused.1.len().min(crate::wire::MESSAGE_BYTES_MAX);
        while !refused.1.is_char_boundary(end) {
            end -= 1;
        }
        let error = Reply::Error {
            kind: refused.0,
            message: &refused.1[..end],
        };
        // An error of at most that length always fits.
        let _ = error.encode(request, &mut self.replies);
    }

    fn serve(&mut self, frame: &Frame<'_>) -> io::Result<Option<End>> {
        let request = frame.header.request;
        let driver = Arc::clone(&self.shared.driver);
        driver.clock.observe(frame.header.clock_ns);
        let (asked, extensions) = match Request::decode(&frame.header, frame.body) {
            Ok(decoded) => decoded,
            Err(error) => {
                self.refuse(request, &Refused(ErrorKind::Invalid, error.to_string()));
                return Ok(error.is_fatal().then_some(End::Lost));
            }
        };
        if self.identity.is_none() {
            return self.greet(request, &asked);
        }
        if !frame.releases.is_empty() {
            frame.releases.copy_to(&mut self.leases);
            let (client, leases) = (self.client, &self.leases);
            driver.with(|decider, now| decider.manager.release(client, leases, now));
        }
        let deadline_us = frame.header.deadline_us;
        let answered = match asked {
            Request::Hello { .. } => Err(Refused(ErrorKind::Invalid, "hello was said already".into())),
            Request::OpenNamespace { name, realization } => {
                self.open_namespace(request, name, realization, deadline_us)
            }
            Request::Lookup(keys) => self.lookup(request, &keys, &extensions),
            Request::Explain(keys) => self.explain(request, &keys, extensions.hints),
            Request::Fetch { scope, keys } => {
                let hints = Hints {
                    device: driver.is_device(extensions.device),
                    ..extensions.hints
                };
                self.fetch(request, scope, &keys, hints, deadline_us)?
            }
            Request::Reserve { keys, lengths } => {
                lengths.copy_to(&mut self.lengths);
                self.reserve(request, &keys, extensions.hints, deadline_us)?
            }
            Request::Seal {
                handle,
                generation,
                ahead,
                items,
            } => {
                items.copy_to(&mut self.items);
                self.seal(request, handle, generation, ahead, extensions.hints.label)?
            }
            Request::Grant(ahead) => {
                self.grant(ahead)?;
                let slots = std::mem::take(&mut self.slots);
                self.reply(request, &Reply::Granted { slots: (&slots).into() });
                self.slots = slots;
                Ok(())
            }
            Request::Release => Ok(()),
            Request::Abandon { reservations } => {
                let (client, reservations) = (self.client, reservations.to_vec());
                driver.with(|decider, now| decider.manager.abandon(client, &reservations, now));
                Ok(())
            }
            Request::Delete(keys) => self.delete(request, &keys),
            Request::Invalidate { name } => self.invalidate(request, name),
            Request::Flush => self.flush(request),
            Request::Status => self.status(request),
            Request::Watch { since, wait_ms } => self.watch(request, since, wait_ms),
            Request::Confirm {
                generation,
                name,
                processor,
            } => self.confirm(request, name, generation, processor),
            Request::Computed {
                tokens,
                before_tokens,
                took_us,
            } => {
                driver.computed(
                    self.identity().domain,
                    tokens,
                    before_tokens,
                    Duration::from_micros(took_us),
                );
                self.reply(request, &Reply::Counted);
                Ok(())
            }
            Request::Advise { advice, amount, keys } => self.advise(request, advice, amount, &keys),
            Request::Goodbye => {
                self.reply(request, &Reply::Farewell);
                return Ok(Some(End::Goodbye));
            }
        };
        if let Err(refused) = answered {
            self.refuse(request, &refused);
        }
        Ok(None)
    }

    fn greet(&mut self, request: u64, asked: &Request<'_>) -> io::Result<Option<End>> {
        let &Request::Hello {
            version_min,
            version_max,
            token,
        } = asked
        else {
            self.refuse(request, &Refused(ErrorKind::Invalid, "say hello first".into()));
            return Ok(Some(End::Lost));
        };
        let version = version_max.min(VERSION_MAX);
        if version < version_min || version < VERSION_MIN {
            let message = format!("this daemon speaks versions {VERSION_MIN} to {VERSION_MAX}: use a client that does");
            self.refuse(request, &Refused(ErrorKind::Invalid, message));
            return Ok(Some(End::Lost));
        }
        let Some(identity) = self.shared.domains.authenticate(self.uid, token) else {
            tracing::warn!(uid = self.uid, "a client showed a token that is nobody's");
            self.refuse(
                request,
                &Refused(ErrorKind::Denied, "no trust domain has this token".into()),
            );
            return Ok(Some(End::Lost));
        };
        let driver = &self.shared.driver;
        let (client, domain) = (self.client, identity.domain);
        if let Err(refusal) = driver.with(|decider, now| decider.manager.connect(client, domain, now)) {
            self.refuse(request, &refusal.into());
            return Ok(Some(End::Lost));
        }
        driver.register(client, domain, &self.outbox);
        self.domain_name = self.shared.domains.name_of(domain);
        self.identity = Some(identity);
        self.stream.set_read_timeout(None)?;
        let settings = &self.shared.settings;
        let welcome = Welcome {
            version,
            client_clock: settings.clock == Clock::Client,
            batch_keys_max: u32::try_from(KEYS_MAX).unwrap_or(u32::MAX),
            block_bytes_max: settings.block_bytes_max,
            client,
            lease_ttl_ms: settings.lease_ttl_ms,
            reservation_ttl_ms: settings.reservation_ttl_ms,
        };
        self.reply(request, &Reply::Welcome(welcome));
        Ok(None)
    }

    fn identity(&self) -> &Identity {
        self.identity.as_ref().expect("served only after hello")
    }

    fn handle(&self, handle: u32) -> Result<(usize, NamespaceId, RealizationId), Refused> {
        let index = handle as usize;
        let found = self
            .handles
            .get(index)
            .ok_or_else(|| Refused(ErrorKind::Invalid, "unknown namespace handle".into()))?;
        Ok((index, found.namespace, found.realization))
    }

    fn generation(&self, handle: usize) -> Generation {
        let namespace = self.handles[handle].namespace;
        self.shared.driver.look(|manager| manager.generation(namespace))
    }

    fn deadline(&self, now: Time, deadline_us: u64) -> Time {
        match self.shared.settings.clock {
            Clock::Client => Time(u64::MAX),
            Clock::System => now.after(self.patience(deadline_us)),
        }
    }

    /// How long a request may wait.
    fn patience(&self, deadline_us: u64) -> Duration {
        match deadline_us {
            0 => Duration::from_millis(self.shared.settings.request_deadline_ms),
            given => Duration::from_micros(given),
        }
    }

    /// Answers once the namespace and the realization are durable: their ids are part of what is written to NVMe.
    fn open_namespace(&mut self, request: u64, name: &str, form: Realization, deadline_us: u64) -> Result<(), Refused> {
        let domain = self.identity().domain;
        if name.contains('/') {
            return Err(Refused(
                ErrorKind::Invalid,
                "a namespace's name has no '/': that separates it from its domain".into(),
            ));
        }
        let driver = &self.shared.driver;
        let (namespace, realization, recording) = driver.with(|decider, _| {
            let (namespace, _) = decider.manager.open_namespace(domain, name)?;
            let realization = decider.manager.open_realization(form)?;
            let label = (self.domain_name.as_str(), name);
            let recording = driver.recorder.open(namespace, label, (realization, form));
            Ok::<_, Refusal>((namespace, realization, recording))
        })?;
        if let Some(recording) = recording {
            let unavailable = |why: String| {
                let words = format!("the namespace cannot be made durable: {why}: ask again");
                Refused(ErrorKind::Unavailable, words)
            };
            match recording.recv_timeout(self.patience(deadline_us)) {
                Ok(recorded) => recorded.map_err(|error| unavailable(error.to_string()))?,
                Err(RecvTimeoutError::Timeout) => {
                    return Err(unavailable("the state directory does not answer".into()));
                }
                Err(RecvTimeoutError::Disconnected) => return Err(unavailable("the daemon stops".into())),
            }
        }
        let generation = driver.look(|manager| manager.generation(namespace));
        if let Some(words) = driver.recorder.refusal(&self.domain_name, name, generation) {
            return Err(Refused(ErrorKind::Unavailable, words));
        }
        let known = |handle: &Handle| handle.namespace == namespace && handle.realization == realization;
        let index = match self.handles.iter().position(known) {
            Some(index) => index,
            None if self.handles.len() >= HANDLES_MAX => {
                return Err(Refused(
                    ErrorKind::Busy,
                    "too many namespaces on one connection: open another".into(),
                ));
            }
            None => {
                self.handles.push(Handle { namespace, realization });
                self.handles.len() - 1
            }
        };
        let handle = u32::try_from(index).unwrap_or(u32::MAX);
        self.reply(request, &Reply::NamespaceOpened { handle, generation });
        Ok(())
    }

    fn reserve(
        &mut self,
        request: u64,
        keys: &Keys<'_>,
        hints: Hints,
        deadline_us: u64,
    ) -> io::Result<Result<(), Refused>> {
        let (index, namespace, realization) = match self.handle(keys.handle) {
            Ok(handle) => handle,
            Err(refused) => return Ok(Err(refused)),
        };
        keys.hashes.copy_to(&mut self.hashes);
        let driver = Arc::clone(&self.shared.driver);
        let (client, hashes, lengths, outbox) = (self.client, &self.hashes, &self.lengths, &self.outbox);
        let answer = driver.with(|decider, now| {
            let deadline = self.deadline(now, deadline_us);
            let asked = kvtier_core::Request {
                client,
                namespace,
                realization,
                hashes,
                hints,
                deadline,
            };
            let answer = decider.manager.reserve(&asked, lengths, now);
            if let Ok(Answer::Pending(operation)) = answer {
                decider.wait(
                    operation,
                    Waiter::Session {
                        outbox: Arc::clone(outbox),
                        request,
                    },
                );
            }
            answer
        });
        match answer {
            Ok(Answer::Ready(results)) => self.tell_reserved(request, index, &results)?,
            Ok(Answer::Pending(_)) => {
                self.waiting.insert(request, Some(index));
            }
            Err(refusal) => return Ok(Err(refusal.into())),
        }
        Ok(Ok(()))
    }

    fn tell_reserved(&mut self, request: u64, handle: usize, results: &[Reserved]) -> io::Result<()> {
        for result in results {
            if let Reserved::Granted { extent, .. } = result {
                self.announce(extent)?;
            }
        }
        let generation = self.generation(handle);
        self.reply(
            request,
            &Reply::Reserved {
                generation,
                outcomes: results.into(),
            },
        );
        Ok(())
    }

    fn seal(
        &mut self,
        request: u64,
        handle: u32,
        generation: Generation,
        ahead: Ahead,
        label: Option<Label>,
    ) -> io::Result<Result<(), Refused>> {
        let (_, namespace, realization) = match self.handle(handle) {
            Ok(handle) => handle,
            Err(refused) => return Ok(Err(refused)),
        };
        let driver = Arc::clone(&self.shared.driver);
        let (client, items) = (self.client, &self.items);
        let (sealed, current) = driver.with(|decider, now| {
            let asked = SealRequest {
                client,
                namespace,
                realization,
                generation,
                label,
                items,
            };
            let sealed = decider.manager.seal(&asked, now);
            (sealed, decider.manager.generation(namespace))
        });
        let outcomes = match sealed {
            Ok(outcomes) => outcomes,
            Err(refusal) => return Ok(Err(refusal.into())),
        };
        self.see_put((namespace, realization), &outcomes);
        if let Some(peers) = driver.peers() {
            let published = self.items.iter().zip(&outcomes);
            let published = published.filter(|(_, outcome)| **outcome == Sealed::Published);
            let published = published.map(|(item, _)| (item.hash, item.length));
            peers.published(self.identity().domain, namespace, realization, published);
        }
        if let Some(remote) = driver.remote() {
            let published = self.items.iter().zip(&outcomes);
            let published = published.filter(|(_, outcome)| **outcome == Sealed::Published);
            let published = published.map(|(item, _)| item.hash).collect();
            remote.offer(self.identity().domain, namespace, realization, published);
        }
        self.grant(ahead)?;
        let slots = std::mem::take(&mut self.slots);
        self.reply(
            request,
            &Reply::Sealed {
                generation: current,
                outcomes: (&outcomes).into(),
                granted: (&slots).into(),
            },
        );
        self.slots = slots;
        Ok(Ok(()))
    }

    /// Leaves what was granted in `self.slots`.
    fn grant(&mut self, ahead: Ahead) -> io::Result<()> {
        self.slots.clear();
        let count = ahead.count.min(u32::try_from(KEYS_MAX).unwrap_or(u32::MAX));
        if count == 0 {
            return Ok(());
        }
        let client = self.client;
        let granted = self
            .shared
            .driver
            .with(|decider, now| decider.manager.grant(client, ahead.length, count, now));
        for (reservation, extent) in granted {
            self.announce(&extent)?;
            self.slots.push(Slot { reservation, extent });
        }
        Ok(())
    }

    fn delete(&mut self, request: u64, keys: &Keys<'_>) -> Result<(), Refused> {
        let (_, namespace, realization) = self.handle(keys.handle)?;
        keys.hashes.copy_to(&mut self.hashes);
        let (client, hashes) = (self.client, &self.hashes);
        let driver = Arc::clone(&self.shared.driver);
        let delete = || {
            driver.with(|decider, now| {
                let hints = Hints::default();
                let asked = kvtier_core::Request {
                    client,
                    namespace,
                    realization,
                    hashes,
                    hints,
                    deadline: now,
                };
                (
                    decider.manager.delete(&asked, now),
                    decider.manager.generation(namespace),
                )
            })
        };
        let (removed, generation) = delete();
        let mut removed = removed?;
        if let Some(remote) = driver.remote() {
            let forgotten = remote.forget(self.identity().domain, namespace, realization, hashes);
            let forgotten = forgotten.map_err(|error| Refused(ErrorKind::Unavailable, error.to_string()))?;
            for (removed, there) in removed.iter_mut().zip(forgotten) {
                *removed |= there;
            }
            // What was being read from there meanwhile goes too.
            delete().0?;
        }
        self.reply(
            request,
            &Reply::Deleted {
                generation,
                removed: (&removed).into(),
            },
        );
        Ok(())
    }

    fn invalidate(&mut self, request: u64, name: &str) -> Result<(), Refused> {
        let domain = self.identity().domain;
        let outbox = Arc::clone(&self.outbox);
        let driver = &self.shared.driver;
        let found = driver.with(|decider, now| {
            let (namespace, generation) = decider.manager.find_namespace(domain, name)?;
            let target = driver.recorder.above_anchor(&self.domain_name, name, generation);
            let operation = driver.raise(decider, namespace, target, Cause::Own, now);
            decider.wait(operation, Waiter::Session { outbox, request });
            Some(())
        });
        found.ok_or_else(|| {
            Refused(
                ErrorKind::Invalid,
                format!("no namespace {name:?}: nothing was stored under that name"),
            )
        })?;
        self.waiting.insert(request, None);
        Ok(())
    }

    fn flush(&mut self, request: u64) -> Result<(), Refused> {
        let identity = self.identity().clone();
        let scope = if identity.administrator {
            None
        } else {
            Some(identity.domain)
        };
        let outbox = Arc::clone(&self.outbox);
        self.shared.driver.with(|decider, now| {
            let operation = decider.manager.flush(scope, now);
            decider.wait(operation, Waiter::Session { outbox, request });
        });
        self.waiting.insert(request, None);
        Ok(())
    }

    fn status(&mut self, request: u64) -> Result<(), Refused> {
        let identity = self.identity().clone();
        let internal = |error: serde_json::Error| Refused(ErrorKind::Internal, error.to_string());
        let json = if identity.administrator {
            let mut status = super::status_of(&self.shared.driver, &self.shared.domains);
            // A frame carries some thousands of domains; the totals matter more.
            status.domains.truncate(2000);
            serde_json::to_string(&status).map_err(internal)?
        } else {
            let driver = &self.shared.driver;
            let status =
                driver.look(|manager| super::domain_status(driver, manager, identity.domain, self.domain_name.clone()));
            serde_json::to_string(&status).map_err(internal)?
        };
        self.reply(request, &Reply::Status { json: &json });
        Ok(())
    }

    /// Passes a segment's memory before the first reply that names it.
    fn announce(&mut self, extent: &Extent) -> io::Result<()> {
        if !self.announced.insert(extent.segment) {
            return Ok(());
        }
        let driver = Arc::clone(&self.shared.driver);
        let own = self.identity().domain;
        // The manager leases within a domain only; a slip there must not hand out another's memory.
        assert_eq!(
            driver.segment_domain(extent.segment),
            Some(own),
            "a segment belongs to one domain for life"
        );
        let Some((bytes, file)) = driver.segment_file(extent.segment) else {
            return Err(io::Error::other("a leased segment is closed"));
        };
        self.send()?;
        let added = Reply::SegmentAdded {
            segment: extent.segment,
            bytes,
        };
        let mut notice = Vec::new();
        added.encode(0, &mut notice).map_err(io::Error::other)?;
        socket::send_all_with_fds(&*self.stream, &notice, &[file.as_fd()])
    }

    /// Answers what was decided since the last look.
    fn send_notices(&mut self) -> io::Result<()> {
        if self.outbox.is_empty() {
            return Ok(());
        }
        for notice in self.outbox.drain() {
            match notice {
                Notice::Fetched { request, results } => {
                    if let Some(Some(handle)) = self.waiting.remove(&request) {
                        self.tell_fetched(request, handle, &results)?;
                    }
                }
                Notice::Found {
                    request,
                    generation,
                    tiers,
                } => {
                    self.waiting.remove(&request);
                    self.reply(
                        request,
                        &Reply::Found {
                            generation,
                            tiers: (&tiers).into(),
                        },
                    );
                }
                Notice::Explained { request, json } => {
                    self.waiting.remove(&request);
                    match json {
                        Ok(json) => self.reply(request, &Reply::Explained { json: &json }),
                        Err(words) => self.refuse(request, &Refused(ErrorKind::Unavailable, words)),
                    }
                }
                Notice::Reserved { request, results } => {
                    if let Some(Some(handle)) = self.waiting.remove(&request) {
                        self.tell_reserved(request, handle, &results)?;
                    }
                }
                Notice::Invalidated { request, generation } => {
                    self.waiting.remove(&request);
                    self.reply(request, &Reply::Invalidated { generation });
                }
                Notice::Flushed {
                    request,
                    written,
                    left_out,
                } => {
                    self.waiting.remove(&request);
                    self.reply(request, &Reply::Flushed { written, left_out });
                }
                Notice::Changed { request } => self.end_watch(request),
                Notice::SegmentRemoved { segment } => {
                    if self.announced.remove(&segment) {
                        self.reply(0, &Reply::SegmentRemoved { segment });
                    }
                }
            }
        }
        self.send()
    }
}
