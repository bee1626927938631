//! Purges: journalled before anything is done, carried out step by step on a thread of their own, and receipted.
//!
//! A job's steps may all be done again: whatever a kill cut short, the next start goes on from what the journal says, before
//! any client is served.

mod cluster;
mod evidence;
mod namespaces;
mod record;
mod server;
mod settings_of_namespaces;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};
use kvtier_core::{BlockHash, ForgetScope, Label, NamespaceId, Realization, TrustDomain};
use parking_lot::{Condvar, Mutex};
use serde_json::json;

use self::cluster::ClusterPart;
use self::evidence::{Done, Found};
use self::record::{Record, digest_of_request};
use self::server::ServerPart;
use self::settings_of_namespaces::NamespaceFile;
use super::domains::Domains;
use super::driver::{Driver, Settled, Waiter};
use super::peers::versions::Cause;
use crate::keys::{self, KeyError, KeyId};
use crate::purge::journal::Journal;
use crate::purge::{
    KeySet, LABEL_BYTES_MAX, PurgeError, PurgeJob, PurgeMode, PurgeReach, PurgeRequest, PurgeScope, PurgeState,
    RECEIPTS_DIRECTORY, ReceiptLog, Standing, rfc3339,
};
use crate::settings::{CheckedSettings, Encryption};

const JOURNAL_FILE: &str = "purges.journal";
/// Says that payloads were written unencrypted by some run.
const UNSEALED_FILE: &str = "unsealed";

/// Jobs that are remembered once they are done.
const JOBS_KEPT: usize = 1024;
/// Jobs under way at once.
const JOBS_RUNNING_MAX: usize = 256;
/// Changes that are kept for those who follow them.
const EVENTS_KEPT: usize = 1024;
/// The journal is written anew at a start once it is larger.
const JOURNAL_BYTES_MAX: u64 = 4 << 20;
/// How long a purge may take to be acknowledged before its caller is told to ask again. It goes on.
const ACKNOWLEDGE_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest that a start waits for purges of an earlier run. They go on behind it.
const RESUME_TIMEOUT: Duration = Duration::from_secs(60);
/// Between two looks at whether caches confirmed.
const CONFIRM_PAUSE: Duration = Duration::from_millis(5);
/// Before a step that failed is tried again.
const RETRY_PAUSE: Duration = Duration::from_secs(1);

/// Where `purge_fail_point` can kill the process, in the order in which a physical purge comes by.
pub const STEPS: [&str; 8] = [
    "journalled",
    "fenced",
    "acknowledged",
    "key_settled",
    "key_destroyed",
    "destroyed",
    "receipted",
    "completed",
];

/// See the module.
pub(crate) struct Purging {
    driver: Arc<Driver>,
    domains: Arc<Domains>,
    settings: CheckedSettings,
    receipts: ReceiptLog,
    node: String,
    /// Some run wrote payloads in the clear.
    unsealed: bool,
    namespaces: NamespaceFile,
    book: Mutex<Book>,
    changed: Condvar,
    cluster_parts: Mutex<BTreeMap<u64, ClusterPart>>,
    server_parts: Mutex<BTreeMap<u64, ServerPart>>,
    work: Sender<Option<u64>>,
    stopping: AtomicBool,
}

struct Book {
    journal: Journal,
    jobs: BTreeMap<u64, Record>,
    events: VecDeque<(u64, String)>,
    next_event: u64,
}

impl Purging {
    /// Opens journal and receipts. The caller starts [`Purging::run`].
    pub(super) fn open(
        driver: Arc<Driver>,
        domains: Arc<Domains>,
        settings: CheckedSettings,
        notes: &mut Vec<String>,
    ) -> Result<(Purging, Receiver<Option<u64>>), KeyError> {
        let directory = &settings.state_dir;
        let receipts = ReceiptLog::open(&directory.join(RECEIPTS_DIRECTORY), notes)?;
        let path = directory.join(JOURNAL_FILE);
        let (mut journal, entries) = Journal::open::<Record>(&path)?;
        let mut jobs: BTreeMap<u64, Record> = BTreeMap::new();
        for record in entries {
            jobs.insert(record.number, record);
        }
        forget_oldest(&mut jobs);
        if journal.bytes() > JOURNAL_BYTES_MAX {
            journal = Journal::compact(&path, jobs.values())?;
        }
        let unsealed_path = directory.join(UNSEALED_FILE);
        if settings.encryption == Encryption::None && settings.nvme_bytes > 0 && !unsealed_path.exists() {
            let words = b"Payloads on NVMe were written without encryption: no purge can claim that a destroyed key covers them.\n";
            keys::disk::write_whole(&unsealed_path, words)?;
        }
        let node = driver.recorder.register.identity();
        let namespaces = NamespaceFile::open(directory)?;
        let (work, jobs_to_do) = crossbeam_channel::unbounded();
        let purging = Purging {
            unsealed: unsealed_path.exists(),
            receipts,
            node,
            namespaces,
            book: Mutex::new(Book {
                journal,
                jobs,
                events: VecDeque::new(),
                next_event: 1,
            }),
            changed: Condvar::new(),
            cluster_parts: Mutex::default(),
            server_parts: Mutex::default(),
            work,
            stopping: AtomicBool::new(false),
            driver,
            domains,
            settings,
        };
        purging.apply_namespace_settings();
        Ok((purging, jobs_to_do))
    }

    /// Fences what was asked for and not fenced when the last run ended, then waits a while for the rest. How many there were.
    pub(super) fn resume(&self) -> usize {
        let unfinished: Vec<u64> = {
            let book = self.book.lock();
            let unfinished = book.jobs.values().filter(|record| !record.is_done());
            unfinished.map(|record| record.number).collect()
        };
        self.driver.purges.lock().purges_running = unfinished.len() as u64;
        for &number in &unfinished {
            self.update(number, |record| record.job.resumed += 1);
        }
        let deadline = Instant::now() + RESUME_TIMEOUT;
        // All of them before the first is destroyed, which may take longer than is waited for.
        for &number in &unfinished {
            if let Err(error) = self.fence(number, Some(deadline)) {
                tracing::warn!(%error, number, "a purge of an earlier run cannot be made durable yet: it is tried again");
            }
        }
        for &number in &unfinished {
            let _ = self.work.send(Some(number));
        }
        let mut book = self.book.lock();
        let done = |book: &Book| {
            let is_done = |number| book.jobs.get(number).is_none_or(Record::is_done);
            unfinished.iter().all(is_done)
        };
        while !done(&book) && !self.changed.wait_until(&mut book, deadline).timed_out() {}
        unfinished.len()
    }

    /// The purging thread.
    pub(super) fn run(&self, jobs: &Receiver<Option<u64>>) {
        // One that failed, or waits for members, lets others go first.
        let mut again: VecDeque<(Instant, u64)> = VecDeque::new();
        loop {
            let job = match again.front() {
                Some((due, _)) => jobs.recv_deadline(*due),
                None => jobs.recv().map_err(|_| RecvTimeoutError::Disconnected),
            };
            let number = match job {
                Ok(Some(number)) => number,
                Ok(None) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => match again.pop_front() {
                    Some((_, number)) => number,
                    None => continue,
                },
            };
            if self.is_stopping() {
                return;
            }
            if !self.carry_out(number) {
                again.push_back((Instant::now() + RETRY_PAUSE, number));
            }
        }
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        let _ = self.work.send(None);
    }

    fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire) || self.driver.is_stopping()
    }

    /// Begins a purge, and returns once nothing older can be read any more. The second value: whether the job is new.
    pub(super) fn purge(&self, request: PurgeRequest) -> Result<(PurgeJob, bool), PurgeError> {
        let begun = Instant::now();
        let (request, namespace) = self.check(request)?;
        let digest = digest_of_request(&request);
        let mut fence = None;
        let (number, is_new) = {
            let mut book = self.book.lock();
            let same = book
                .jobs
                .values()
                .find(|record| record.job.request.request_id == request.request_id);
            match same {
                Some(record) if record.request_digest == digest => (record.number, false),
                Some(record) => {
                    return Err(PurgeError::Conflict {
                        request_id: request.request_id,
                        id: record.job.id.clone(),
                    });
                }
                None => {
                    let (number, raising) = self.begin(&mut book, request, namespace, digest, begun)?;
                    fence = raising;
                    (number, true)
                }
            }
        };
        if is_new {
            self.reached("journalled");
            let fenced = match fence {
                Some(raising) => self.await_raised(number, &raising, Some(Instant::now() + ACKNOWLEDGE_TIMEOUT)),
                // It takes a pass over the NVMe tier, for as long as that takes.
                None => Ok(()),
            };
            // Also where it was not fenced: the journal has it, and it is tried until it is.
            let _ = self.work.send(Some(number));
            fenced?;
        }
        let job = self.await_acknowledged(number)?;
        Ok((job, is_new))
    }

    fn check(&self, request: PurgeRequest) -> Result<(PurgeRequest, NamespaceId), PurgeError> {
        let invalid = |words: &str| Err(PurgeError::Invalid(words.into()));
        let id = &request.request_id;
        if id.is_empty() || id.len() > 128 || !id.bytes().all(|byte| (0x21..0x7f).contains(&byte)) {
            return invalid("request_id: give 1 to 128 printable ASCII characters");
        }
        if request.reason.len() > 1024 {
            return invalid("reason: give at most 1,024 bytes");
        }
        match &request.scope {
            PurgeScope::All => {}
            PurgeScope::Realization(digest) if record::realization(digest).is_some() => {}
            PurgeScope::Realization(_) => return invalid("scope.realization: give 64 hexadecimal digits"),
            PurgeScope::Hashes(hashes) if hashes.is_empty() || hashes.len() > record::HASHES_MAX => {
                return invalid("scope.hashes: give 1 to 65,536 of them");
            }
            PurgeScope::Hashes(hashes) if hashes.iter().all(|hash| record::hash(hash).is_some()) => {}
            PurgeScope::Hashes(_) => return invalid("scope.hashes: give 32 hexadecimal digits each"),
            PurgeScope::Label(label) if label.is_empty() || label.len() > LABEL_BYTES_MAX => {
                return invalid("scope.label: give 1 to 1,024 bytes");
            }
            PurgeScope::Label(_) => {}
        }
        let (name, namespace, domain) = self.resolve(&request.namespace)?;
        self.check_reach(&request, domain)?;
        let is_clustered = self.driver.peers().is_some() && self.domains.is_shared(domain);
        let reach = match request.reach {
            None if is_clustered => PurgeReach::Cluster,
            None => PurgeReach::Node,
            Some(reach) => reach,
        };
        let request = PurgeRequest {
            reach: Some(reach),
            namespace: name,
            ..request
        };
        Ok((request, namespace))
    }

    /// `DOMAIN/NAME` and the namespace of a name that one domain has.
    fn resolve(&self, name: &str) -> Result<(String, NamespaceId, TrustDomain), PurgeError> {
        let (only, bare) = match name.split_once('/') {
            Some((domain, bare)) => (Some(domain), bare),
            None => (None, name),
        };
        let mut found = Vec::new();
        for (label, domain) in self.domains.all() {
            if only.is_none_or(|only| only == label)
                && let Some((namespace, _)) = self.driver.look(|manager| manager.find_namespace(domain, bare))
            {
                found.push((format!("{label}/{bare}"), namespace, domain));
            }
        }
        match found.len() {
            0 => Err(PurgeError::UnknownNamespace(name.to_owned())),
            1 => Ok(found.remove(0)),
            _ => Err(PurgeError::Invalid(format!(
                "namespace: {} trust domains have {bare:?}: give DOMAIN/NAME",
                found.len()
            ))),
        }
    }

    /// Journals a job. Of a whole namespace the generation is raised meanwhile: one sync does not wait for the other. Where only
    /// the latter survives a crash, more was forgotten than anybody was told.
    fn begin(
        &self,
        book: &mut Book,
        request: PurgeRequest,
        namespace: NamespaceId,
        request_digest: String,
        begun: Instant,
    ) -> Result<(u64, Option<Receiver<Settled>>), PurgeError> {
        if book.jobs.values().filter(|record| !record.is_done()).count() >= JOBS_RUNNING_MAX {
            return Err(PurgeError::Busy(format!(
                "{JOBS_RUNNING_MAX} purges are under way: ask again when one is done"
            )));
        }
        let mut id = [0; 16];
        getrandom::fill(&mut id).map_err(|error| PurgeError::Unavailable(error.to_string()))?;
        let number = book.jobs.last_key_value().map_or(1, |(number, _)| number + 1);
        let record = Record {
            number,
            slot: namespace.0,
            of_any_label: 0,
            from: Some(self.driver.look(|manager| manager.generation(namespace)).0),
            request_digest,
            begun: Some(begun),
            job: PurgeJob {
                id: format!("prg_{}", record::hex(&id)),
                request,
                state: PurgeState::Requested,
                requested_at: rfc3339(SystemTime::now()),
                acknowledged_at: None,
                completed_at: None,
                generation: None,
                blocks: 0,
                bytes: 0,
                resumed: 0,
                receipt: None,
            },
        };
        let raising = (record.job.request.scope == PurgeScope::All).then(|| self.raise(&record));
        book.journal
            .append(&record)
            .map_err(|error| PurgeError::Unavailable(error.to_string()))?;
        book.tell(&record.job);
        book.jobs.insert(number, record);
        forget_oldest(&mut book.jobs);
        self.driver.purges.lock().purges_running += 1;
        self.changed.notify_all();
        Ok((number, raising))
    }

    /// Raises the generation of a job's namespace; the answer comes once that is durable.
    fn raise(&self, record: &Record) -> Receiver<Settled> {
        let namespace = NamespaceId(record.slot);
        let (domain, name) = split(&record.job.request.namespace);
        self.command(|decider, now| {
            let current = decider.manager.generation(namespace);
            let target = self.driver.recorder.above_anchor(domain, name, current);
            self.driver.raise(decider, namespace, target, Cause::Own, now)
        })
    }

    fn await_raised(
        &self,
        number: u64,
        raising: &Receiver<Settled>,
        deadline: Option<Instant>,
    ) -> Result<(), PurgeError> {
        match self.await_settled(raising, deadline) {
            Some(Settled::Invalidated(raised)) => {
                self.update_quietly(number, |record| record.job.generation = Some(raised.0));
                self.reach_cluster(number, deadline)?;
                self.fenced(number);
                Ok(())
            }
            _ => Err(late()),
        }
    }

    /// Makes what the job covers unreadable, durably. Done again, it changes nothing that matters. Without a deadline it ends
    /// when the node stops.
    fn fence(&self, number: u64, deadline: Option<Instant>) -> Result<(), PurgeError> {
        let Some(record) = self.record(number) else {
            return Ok(());
        };
        if record.job.state != PurgeState::Requested {
            return Ok(());
        }
        let namespace = NamespaceId(record.slot);
        match &record.job.request.scope {
            PurgeScope::All if record.job.generation.is_some() => {}
            PurgeScope::All => return self.await_raised(number, &self.raise(&record), deadline),
            PurgeScope::Realization(_) | PurgeScope::Hashes(_) | PurgeScope::Label(_) => {
                self.set_apart(&record)?;
                let takes_descendants = !matches!(record.job.request.scope, PurgeScope::Realization(_));
                if record.job.resumed > 0 && takes_descendants {
                    // What extends a block whose deletion is durable by now is not known to extend it any more.
                    let settled = self.settle(deadline, |decider, now| {
                        decider.manager.forget_scope(namespace, &ForgetScope::Orphans, now)
                    });
                    settled.ok_or_else(late)?;
                }
                let (forgotten, of_any_label) = self
                    .forget(namespace, &record.job.request.scope, deadline)
                    .ok_or_else(late)?;
                if self.driver.remote().is_some() {
                    // What was written there between the two lies in a group that is over now.
                    self.set_apart(&record)?;
                }
                self.update(number, |record| {
                    record.job.blocks += forgotten;
                    record.of_any_label += of_any_label;
                });
                // Records that no block is cached of any more could come back with a restart: they go before the
                // acknowledgement.
                let settled = self.settle(deadline, |decider, now| {
                    decider.manager.destroy(namespace, Duration::ZERO, now)
                });
                match settled {
                    Some(Settled::Destroyed(evidence)) if evidence.nvme_left == 0 => {}
                    Some(Settled::Destroyed(_)) => {
                        let words = "records on NVMe could not be overwritten, and a restart could bring them back: it is tried again";
                        return Err(PurgeError::Unavailable(words.into()));
                    }
                    _ => return Err(late()),
                }
            }
        }
        self.reach_cluster(number, deadline)?;
        self.fenced(number);
        Ok(())
    }

    /// What a job covers is unreadable, durably.
    fn fenced(&self, number: u64) {
        let mut begun = None;
        self.update_quietly(number, |record| {
            record.job.state = PurgeState::Invalidated;
            record.job.acknowledged_at = Some(rfc3339(SystemTime::now()));
            begun = record.begun;
        });
        if let Some(begun) = begun {
            self.driver.purges.lock().purge_acknowledge.add(begun.elapsed());
        }
        self.reached("fenced");
    }

    /// How many blocks, and how many of them because it is not known what they were put under.
    fn forget(&self, namespace: NamespaceId, scope: &PurgeScope, deadline: Option<Instant>) -> Option<(u64, u64)> {
        let hashes: Vec<BlockHash>;
        let scope = match scope {
            PurgeScope::Hashes(texts) => {
                hashes = texts.iter().filter_map(|text| record::hash(text)).collect();
                ForgetScope::Hashes(&hashes)
            }
            PurgeScope::Realization(digest) => {
                let realization = Realization(record::realization(digest)?);
                // One that nobody ever opened has no blocks.
                let found = self.driver.recorder.realizations.find(realization);
                let Some(realization) = found else { return Some((0, 0)) };
                ForgetScope::Realization(realization)
            }
            PurgeScope::Label(label) => ForgetScope::Label(Label::of(label)),
            PurgeScope::All => return Some((0, 0)),
        };
        let settled = self.settle(deadline, |decider, now| {
            decider.manager.forget_scope(namespace, &scope, now)
        });
        match settled {
            Some(Settled::Forgotten { blocks, of_any_label }) => Some((blocks, of_any_label)),
            _ => None,
        }
    }

    fn await_acknowledged(&self, number: u64) -> Result<PurgeJob, PurgeError> {
        let deadline = Instant::now() + ACKNOWLEDGE_TIMEOUT;
        let mut book = self.book.lock();
        loop {
            match book.jobs.get(&number) {
                Some(record) if record.job.state != PurgeState::Requested => return Ok(record.job.clone()),
                _ if self.is_stopping() => return Err(PurgeError::Unavailable("the node stops".into())),
                _ => {}
            }
            if self.changed.wait_until(&mut book, deadline).timed_out() {
                return Err(PurgeError::Unavailable(
                    "the purge goes on, but is not durable yet: ask again".into(),
                ));
            }
        }
    }

    /// Takes a job to its end. False where a step failed: the job is tried again.
    fn carry_out(&self, number: u64) -> bool {
        let Some(record) = self.record(number) else { return true };
        if record.is_done() {
            return true;
        }
        if let Err(error) = self.fence(number, None) {
            tracing::warn!(%error, job = record.job.id, "a purge is not in force everywhere yet");
            return false;
        }
        let outcome = match &record.job.receipt {
            Some(_) => self.amend(&record),
            None => self.finish(number),
        };
        match outcome {
            Ok(is_done) => is_done,
            Err(error) => {
                tracing::warn!(%error, job = record.job.id, "a step of a purge failed: it is tried again");
                false
            }
        }
    }

    /// True when nothing is left to wait for.
    fn finish(&self, number: u64) -> Result<bool, KeyError> {
        // Durable now: what is resumed does not raise the generation once more.
        self.update(number, |_| {});
        self.reached("acknowledged");
        let Some(record) = self.record(number) else {
            return Ok(true);
        };
        let mut done = Done::default();
        if record.job.request.mode == PurgeMode::Physical {
            if record.job.request.scope == PurgeScope::All {
                done.key = Some(self.destroy_key(&record)?);
                self.reached("key_destroyed");
            }
            done.destruction = Some(self.destroy(&record)?);
            self.reached("destroyed");
        }
        let (mut members, mut all_confirmed) = self.member_reports(&record);
        if let Some(server) = self.server_report(&record) {
            all_confirmed &= server.status == Standing::Confirmed;
            members.push(server);
        }
        let found = Found {
            members,
            caches: self.await_caches(&record),
            unsealed: self.unsealed,
            has_nvme: self.driver.nvme().is_some(),
            has_hbm: self.driver.hbm.is_some(),
            is_anchored: self.driver.recorder.is_anchored(),
            is_anchor_missing: self.driver.recorder.is_anchor_missing(),
            is_key_elsewhere: self.settings.master_key_file.is_some(),
            master_key: self.driver.recorder.register.master_key(),
            memory_may_be_swapped: !self.settings.lock_memory,
        };
        let completed_at = rfc3339(SystemTime::now());
        let body = evidence::receipt(&record, &self.node, &completed_at, &done, found);
        let receipt = self.receipts.issue(&body)?;
        self.reached("receipted");
        let conclude = |record: &mut Record| {
            if all_confirmed {
                record.job.state = PurgeState::Completed;
                record.job.completed_at = Some(completed_at);
            }
            record.job.receipt = Some(receipt.id);
            if let Some(destruction) = &done.destruction {
                record.job.blocks += destruction.evidence.nvme_records;
                let evidence = &destruction.evidence;
                record.job.bytes = evidence.nvme_bytes + evidence.host_bytes + evidence.hbm_bytes;
            }
        };
        if !all_confirmed {
            self.update(number, conclude);
            return Ok(false);
        }
        self.conclude(number, conclude)?;
        self.cluster_parts.lock().remove(&number);
        self.server_parts.lock().remove(&number);
        self.count(number);
        self.reached("completed");
        Ok(true)
    }

    /// Changes a job for the last time. Where the journal named blocks it is written anew, and what it held is overwritten,
    /// before anybody sees the change.
    fn conclude(&self, number: u64, change: impl FnOnce(&mut Record)) -> Result<(), KeyError> {
        let scope = self.record(number).map(|record| record.job.request.scope);
        if !matches!(scope, Some(PurgeScope::Hashes(_))) {
            self.update(number, change);
            return Ok(());
        }
        let mut book = self.book.lock();
        let Some(mut record) = book.jobs.get(&number).cloned() else {
            return Ok(());
        };
        change(&mut record);
        record.drop_hashes();
        let path = self.settings.state_dir.join(JOURNAL_FILE);
        let entries = book.jobs.values().filter(|other| other.number != number);
        book.journal = Journal::compact(&path, entries.chain([&record]))?;
        book.tell(&record.job);
        book.jobs.insert(number, record);
        self.changed.notify_all();
        Ok(())
    }

    fn count(&self, number: u64) {
        let Some(record) = self.record(number) else { return };
        let mut purges = self.driver.purges.lock();
        purges.purges_running -= 1;
        purges.purges_completed += 1;
        purges.purged_blocks += record.job.blocks;
        purges.purged_bytes += record.job.bytes;
        let durations = match record.job.request.mode {
            PurgeMode::Invalidate => &mut purges.purge_invalidate,
            PurgeMode::Physical => &mut purges.purge_physical,
        };
        if let Some(begun) = record.begun {
            durations.add(begun.elapsed());
        }
    }

    /// Overwrites the wrapped key of older generations where it still lies, then wraps all keys by a new master key.
    fn destroy_key(&self, record: &Record) -> Result<evidence::KeyDone, KeyError> {
        let register = &self.driver.recorder.register;
        let failed = |error: crate::keys::RecordError| {
            KeyError::io("write", &self.settings.state_dir)(std::io::Error::other(error.to_string()))
        };
        register.settle().map_err(failed)?;
        let settled_at = SystemTime::now();
        if let Some(begun) = record.begun {
            self.driver.purges.lock().purge_key_destroyed.add(begun.elapsed());
        }
        self.reached("key_settled");
        let generation = record.job.generation.unwrap_or(0);
        let verified = register.holds_nothing_older(NamespaceId(record.slot), generation)?;
        let rotated: Option<KeyId> = keys::rotate_in_use(
            &self.settings.state_dir,
            register,
            self.settings.master_key_file.as_deref(),
        )?;
        Ok(evidence::KeyDone {
            settled_at,
            completed_at: SystemTime::now(),
            verified,
            rotated,
        })
    }

    fn destroy(&self, record: &Record) -> Result<evidence::Destruction, KeyError> {
        let namespace = NamespaceId(record.slot);
        let grace = Duration::from_millis(self.settings.purge_lease_grace_ms);
        let started = SystemTime::now();
        if let Some(peers) = self.driver.peers() {
            let domain = self.driver.look(|manager| manager.domain_of(namespace));
            if !peers.cut(domain, grace) {
                let words = std::io::Error::other("a peer may still reach memory of the domain");
                return Err(KeyError::io("take back", &self.settings.state_dir)(words));
            }
        }
        let settled = self.settle(None, |decider, now| decider.manager.destroy(namespace, grace, now));
        match settled {
            Some(Settled::Destroyed(evidence)) => Ok(evidence::Destruction {
                evidence,
                started,
                completed: SystemTime::now(),
            }),
            _ => {
                let stopped = std::io::Error::other("the node stops; the next start goes on");
                Err(KeyError::io("purge", &self.settings.state_dir)(stopped))
            }
        }
    }

    /// Caches that reported for the namespace, after some time to confirm.
    fn await_caches(&self, record: &Record) -> Vec<(String, bool)> {
        let Some(generation) = record.job.generation else {
            return Vec::new();
        };
        let namespace = NamespaceId(record.slot);
        let domain = self.driver.look(|manager| manager.domain_of(namespace));
        let name = record
            .job
            .request
            .namespace
            .split_once('/')
            .map_or("", |(_, name)| name);
        let deadline = Instant::now() + Duration::from_millis(self.settings.purge_confirm_wait_ms);
        loop {
            let caches: Vec<(String, bool)> = self
                .driver
                .confirmations
                .of(domain, |_, _| None)
                .into_iter()
                .filter(|cache| cache.namespace == name)
                .map(|cache| (cache.processor, cache.confirmed_generation >= generation))
                .collect();
            let all = caches.iter().all(|(_, confirmed)| *confirmed);
            if all || Instant::now() >= deadline || self.is_stopping() {
                return caches;
            }
            std::thread::sleep(CONFIRM_PAUSE);
        }
    }

    fn settle(
        &self,
        deadline: Option<Instant>,
        command: impl FnOnce(&mut super::driver::Decider, kvtier_core::Time) -> kvtier_core::OperationId,
    ) -> Option<Settled> {
        self.await_settled(&self.command(command), deadline)
    }

    fn command(
        &self,
        command: impl FnOnce(&mut super::driver::Decider, kvtier_core::Time) -> kvtier_core::OperationId,
    ) -> Receiver<Settled> {
        let (sender, receiver) = crossbeam_channel::bounded(1);
        self.driver.with(|decider, now| {
            let operation = command(decider, now);
            decider.wait(operation, Waiter::Caller(sender));
        });
        receiver
    }

    /// Without a deadline it ends when the node stops.
    fn await_settled(&self, receiver: &Receiver<Settled>, deadline: Option<Instant>) -> Option<Settled> {
        loop {
            let pause = Instant::now() + Duration::from_millis(100);
            match receiver.recv_deadline(deadline.unwrap_or(pause)) {
                Ok(settled) => return Some(settled),
                Err(crossbeam_channel::RecvTimeoutError::Timeout) if deadline.is_none() && !self.is_stopping() => {}
                Err(_) => return None,
            }
        }
    }

    fn record(&self, number: u64) -> Option<Record> {
        self.book.lock().jobs.get(&number).cloned()
    }

    /// Changes a job and journals it. A journal that cannot be written is written with the next change.
    fn update(&self, number: u64, change: impl FnOnce(&mut Record)) {
        let mut book = self.book.lock();
        let Some(record) = book.jobs.get_mut(&number) else {
            return;
        };
        let before = record.job.state;
        change(record);
        let record = record.clone();
        if let Err(error) = book.journal.append(&record) {
            tracing::error!(%error, "a purge cannot be journalled: free space in the state directory");
        }
        if record.job.state != before {
            book.tell(&record.job);
        }
        self.changed.notify_all();
    }

    /// Changes a job; the journal learns of it with the next change.
    fn update_quietly(&self, number: u64, change: impl FnOnce(&mut Record)) {
        let mut book = self.book.lock();
        let Some(record) = book.jobs.get_mut(&number) else {
            return;
        };
        change(record);
        let job = record.job.clone();
        book.tell(&job);
        self.changed.notify_all();
    }

    /// Dies here, where a test said so.
    fn reached(&self, step: &str) {
        if self.settings.purge_fail_point.as_deref() == Some(step) {
            tracing::error!(step, "purge_fail_point: the process kills itself here");
            let _ = rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL);
            std::thread::sleep(Duration::from_secs(60));
        }
    }

    pub(super) fn job(&self, id: &str) -> Option<PurgeJob> {
        let book = self.book.lock();
        let found = book.jobs.values().find(|record| record.job.id == id);
        found.map(|record| record.job.clone())
    }

    pub(super) fn jobs(&self, namespace: Option<&str>) -> Vec<PurgeJob> {
        let book = self.book.lock();
        let jobs = book.jobs.values().map(|record| &record.job);
        let chosen = jobs.filter(|job| namespace.is_none_or(|namespace| job.request.namespace == namespace));
        chosen.cloned().collect()
    }

    pub(super) fn receipt(&self, id: &str) -> Result<Option<String>, KeyError> {
        Ok(self.receipts.of_job(id)?.map(|line| line.text))
    }

    pub(super) fn keys(&self) -> KeySet {
        self.receipts.keys()
    }

    pub(super) fn events_after(&self, sequence: u64) -> Vec<(u64, String)> {
        let book = self.book.lock();
        book.events
            .iter()
            .filter(|(number, _)| *number > sequence)
            .cloned()
            .collect()
    }
}

impl Book {
    fn tell(&mut self, job: &PurgeJob) {
        let event = json!({
            "purge": job.id,
            "namespace": job.request.namespace,
            "state": job.state,
            "at": rfc3339(SystemTime::now()),
        });
        self.events.push_back((self.next_event, event.to_string()));
        self.next_event += 1;
        if self.events.len() > EVENTS_KEPT {
            self.events.pop_front();
        }
    }
}

fn late() -> PurgeError {
    PurgeError::Unavailable("the purge goes on, but is not durable yet: ask again".into())
}

/// Domain and name of `DOMAIN/NAME`.
fn split(namespace: &str) -> (&str, &str) {
    namespace.split_once('/').unwrap_or(("", namespace))
}

fn forget_oldest(jobs: &mut BTreeMap<u64, Record>) {
    while jobs.len() > JOBS_KEPT {
        let oldest = jobs
            .values()
            .find(|record| record.is_done())
            .map(|record| record.number);
        match oldest {
            Some(number) => jobs.remove(&number),
            None => return,
        };
    }
}
