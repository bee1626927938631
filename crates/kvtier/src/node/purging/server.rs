//! The part of a purge that the remote tier's server has in it: its objects of the namespace are deleted, and looked for once more.

use std::time::{Duration, Instant, SystemTime};

use kvtier_core::NamespaceId;

use super::Purging;
use super::cluster::UNCONFIRMED_TIMEOUT;
use super::record::Record;
use crate::purge::{
    Evidence, Guarantee, Method, ProcessorReport, PurgeMode, PurgeReach, PurgeScope, Standing, rfc3339,
};

/// How long one attempt may take. A server that is known to be away is not waited for.
const PATIENCE: Duration = Duration::from_secs(30);

/// What a job knows of the server, in this run.
pub(super) struct ServerPart {
    since: Instant,
    /// Once nothing is left there.
    confirmed: Option<ProcessorReport>,
    deleted: u64,
}

impl Purging {
    /// What became of a job's objects on the server: deletes them where that was not done yet. `None`: none can be there.
    pub(super) fn server_report(&self, record: &Record) -> Option<ProcessorReport> {
        let remote = self.driver.remote()?;
        let number = record.number;
        let known = self
            .server_parts
            .lock()
            .get(&number)
            .and_then(|part| part.confirmed.clone());
        if known.is_some() {
            return known;
        }
        let started = SystemTime::now();
        let outcome = remote.erase(NamespaceId(record.slot), Instant::now() + PATIENCE)?;
        let mut report = ProcessorReport {
            processor: format!("{} {}", remote.kind(), remote.address()),
            kind: "remote_store".into(),
            status: Standing::Unconfirmed,
            guarantee: Guarantee::Unconfirmed,
            reason: String::new(),
            evidence: Vec::new(),
        };
        let mut parts = self.server_parts.lock();
        let part = parts.entry(number).or_insert_with(|| ServerPart {
            since: Instant::now(),
            confirmed: None,
            deleted: 0,
        });
        match outcome {
            Ok(erased) => {
                part.deleted += erased.deleted;
                report.evidence.push(Evidence {
                    tier: "remote".into(),
                    action: "the namespace's objects deleted, and the server's keys listed once more".into(),
                    objects: part.deleted,
                    bytes: 0,
                    method: Method::Deleted,
                    started_at: rfc3339(started),
                    completed_at: rfc3339(SystemTime::now()),
                    residual_window_s: 0,
                    verified: erased.left == 0 && !erased.may_arrive,
                });
                if erased.left == 0 && erased.may_arrive {
                    report.reason = "a write that was given up may still arrive there: it is looked again".into();
                } else if erased.left == 0 {
                    report.status = Standing::Confirmed;
                    (report.guarantee, report.reason) = claim(record, remote.shares_groups());
                    part.confirmed = Some(report.clone());
                } else {
                    report.reason = format!("{} objects are listed still: it is tried again", erased.left);
                }
            }
            Err(why) => {
                report.reason =
                    format!("what lies there is not found by anyone any more, but is not deleted yet: {why}")
            }
        }
        Some(report)
    }

    /// Whether the server of a job's objects was waited for long enough.
    pub(super) fn is_given_up(&self, number: u64) -> bool {
        let parts = self.server_parts.lock();
        parts
            .get(&number)
            .is_some_and(|part| part.since.elapsed() > UNCONFIRMED_TIMEOUT)
    }
}

/// What deleted objects amount to: a server may have written them to a disk of its own. With a key that was another member's, or that
/// another member was handed, only all of them together destroy it.
fn claim(record: &Record, is_shared: bool) -> (Guarantee, String) {
    let request = &record.job.request;
    match (request.mode, &request.scope) {
        (PurgeMode::Physical, PurgeScope::All) if is_shared && request.reach == Some(PurgeReach::Node) => (
            Guarantee::VerifiedNamespaceInvalidation,
            "members of the cluster share the keys of objects there: a purge that reaches the cluster destroys them".into(),
        ),
        (PurgeMode::Physical, PurgeScope::All) if is_shared => (
            Guarantee::VerifiedPhysicalPurge,
            "what the server may have kept elsewhere is under keys of the cluster's members, and each destroys its own: one that has left the list is not among them".into(),
        ),
        (PurgeMode::Physical, PurgeScope::All) => (
            Guarantee::VerifiedPhysicalPurge,
            "what the server may have kept elsewhere is under a key that is destroyed".into(),
        ),
        (PurgeMode::Physical, _) => (
            Guarantee::VerifiedNamespaceInvalidation,
            "the namespace's key stays in force: what the server may have written to a disk of its own, this node cannot overwrite".into(),
        ),
        (PurgeMode::Invalidate, _) => (Guarantee::VerifiedNamespaceInvalidation, String::new()),
    }
}
