//! The part of a purge that other members have in it: they learn of it, and a physical one is carried out by each.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use kvtier_core::OperationId;
use kvtier_core::cluster::Reach;
use serde_json::{Value, json};

use super::record::Record;
use super::{Purging, late};
use crate::keys::KeyError;
use crate::node::peers;
use crate::purge::{
    Guarantee, ProcessorReport, PurgeError, PurgeJob, PurgeMode, PurgeReach, PurgeRequest, PurgeState, ReceiptBody,
    Standing, rfc3339, weakest,
};

/// How long a majority may take to have an invalidation before whoever asked is told that it has not.
const MAJORITY_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a member's own physical purge is waited for.
const MEMBER_TIMEOUT: Duration = Duration::from_secs(120);
/// Between two questions how far it is.
const MEMBER_PAUSE: Duration = Duration::from_millis(50);
/// How long members that have not confirmed are waited for, once there is a receipt that says so.
pub(super) const UNCONFIRMED_TIMEOUT: Duration = Duration::from_secs(86_400);

/// What a job knows of its members, in this run.
pub(super) struct ClusterPart {
    operation: OperationId,
    since: Instant,
}

impl Purging {
    /// The peers, for a job that is to reach them.
    fn peers_of(&self, record: &Record) -> Option<Arc<peers::Shared>> {
        let is_of_cluster = record.job.request.reach == Some(PurgeReach::Cluster);
        is_of_cluster.then(|| self.driver.peers()).flatten()
    }

    /// Whether a request can reach the cluster.
    pub(super) fn check_reach(
        &self,
        request: &PurgeRequest,
        domain: kvtier_core::TrustDomain,
    ) -> Result<(), PurgeError> {
        if request.reach != Some(PurgeReach::Cluster) {
            return Ok(());
        }
        if self.driver.peers().is_none() {
            return Err(PurgeError::Invalid(
                "reach: this node has no peers; give \"node\", or leave it out".into(),
            ));
        }
        if !self.domains.is_shared(domain) {
            return Err(PurgeError::Invalid(
                "reach: the trust domain of a user is a node's own; peers have only those in common that the settings name"
                    .into(),
            ));
        }
        Ok(())
    }

    /// What a narrow purge is about to delete here must not be read from a peer again.
    pub(super) fn set_apart(&self, record: &Record) -> Result<(), PurgeError> {
        let namespace = kvtier_core::NamespaceId(record.slot);
        if let Some(remote) = self.driver.remote() {
            let apart = remote.set_apart(namespace);
            return apart.map_err(|error| PurgeError::Unavailable(error.to_string()));
        }
        let Some(peers) = self.driver.peers() else {
            return Ok(());
        };
        if !self
            .domains
            .is_shared(self.driver.look(|manager| manager.domain_of(namespace)))
        {
            return Ok(());
        }
        peers
            .set_apart(namespace, &record.job.request.namespace)
            .map_err(|error| PurgeError::Unavailable(error.to_string()))
    }

    /// Carries what is in force here to every member, as far as the job wants it. Done again, it goes on.
    pub(super) fn reach_cluster(&self, number: u64, until: Option<Instant>) -> Result<(), PurgeError> {
        let Some(record) = self.record(number) else {
            return Ok(());
        };
        let Some(peers) = self.peers_of(&record) else {
            return Ok(());
        };
        let operation = self
            .operation_of(number, &record, &peers)
            .ok_or_else(|| PurgeError::Unavailable("too many purges wait for members: ask again".into()))?;
        let until = until.unwrap_or_else(|| Instant::now() + Duration::from_secs(1));
        match peers.await_reached(operation, until).and_then(|progress| progress.reach) {
            Some(Reach::Fenced { .. } | Reach::Unfenced { .. }) => Ok(()),
            Some(Reach::NotStored { .. }) => Err(PurgeError::Unavailable(
                "the purge is in force on this node, but a majority of the members cannot be reached: it goes on, ask again".into(),
            )),
            None => Err(late()),
        }
    }

    fn operation_of(&self, number: u64, record: &Record, peers: &peers::Shared) -> Option<OperationId> {
        let mut parts = self.cluster_parts.lock();
        if let Some(part) = parts.get(&number) {
            return Some(part.operation);
        }
        let within = if peers.is_fenced() {
            MAJORITY_TIMEOUT
        } else {
            Duration::from_millis(self.settings.purge_confirm_wait_ms)
        };
        let operation = peers.raise(&record.job.request.namespace, within)?;
        let since = Instant::now();
        parts.insert(number, ClusterPart { operation, since });
        Some(operation)
    }

    /// What the other members say of a job; whether all of them have confirmed.
    pub(super) fn member_reports(&self, record: &Record) -> (Vec<ProcessorReport>, bool) {
        let Some(peers) = self.peers_of(record) else {
            return (Vec::new(), true);
        };
        let progress = self
            .operation_of(record.number, record, &peers)
            .and_then(|operation| peers.progress(operation))
            .unwrap_or_default();
        let expired = matches!(progress.reach, Some(Reach::Fenced { .. }));
        let others: Vec<String> = peers
            .members()
            .into_iter()
            .filter(|member| member != peers.address())
            .collect();
        let mut reports = Vec::new();
        let mut all = true;
        for member in others {
            let confirmed = progress.completed || progress.confirmed.contains(&member);
            all &= confirmed;
            reports.push(if confirmed {
                self.member_report(record, &peers, &member)
            } else {
                unconfirmed(&member, expired)
            });
        }
        (reports, all)
    }

    fn member_report(&self, record: &Record, peers: &peers::Shared, member: &str) -> ProcessorReport {
        let mut report = ProcessorReport {
            processor: format!("kv-daemon {member}"),
            kind: "byoc_runtime".into(),
            status: Standing::Confirmed,
            guarantee: Guarantee::VerifiedNamespaceInvalidation,
            reason: String::new(),
            evidence: Vec::new(),
        };
        if record.job.request.mode == PurgeMode::Invalidate {
            return report;
        }
        match self.destroyed_at(record, peers, member) {
            Ok((guarantee, reason)) => {
                report.guarantee = guarantee;
                report.reason = reason;
            }
            Err(why) => report.reason = format!("its own physical purge: {why}"),
        }
        report
    }

    /// Has a member carry out a physical purge of its own, and waits for its receipt.
    fn destroyed_at(
        &self,
        record: &Record,
        peers: &peers::Shared,
        member: &str,
    ) -> Result<(Guarantee, String), String> {
        let job = &record.job;
        let until = Instant::now() + MEMBER_TIMEOUT;
        let request = PurgeRequest {
            reach: Some(PurgeReach::Part),
            request_id: format!("{}@{}", job.id, self.node),
            ..job.request.clone()
        };
        let ask = |question: Value| -> Result<Value, String> {
            let answer = peers
                .command_to(member, question.to_string(), until)
                .ok_or("it does not answer")?;
            let answer: Value = serde_json::from_str(&answer).map_err(|error| error.to_string())?;
            match answer.get("error").and_then(Value::as_str) {
                Some(error) => Err(error.to_owned()),
                None => Ok(answer),
            }
        };
        let mut answer = ask(json!({"purge": request}))?;
        loop {
            if answer.get("unknown").is_some() {
                return Ok((
                    Guarantee::VerifiedPhysicalPurge,
                    "nothing was ever stored there under that name".into(),
                ));
            }
            if answer["state"] == json!(PurgeState::Completed) {
                let guarantee =
                    serde_json::from_value(answer["guarantee"].clone()).map_err(|error| error.to_string())?;
                let receipt = answer["receipt"].as_str().unwrap_or_default();
                return Ok((guarantee, format!("its own receipt: {receipt}")));
            }
            if Instant::now() >= until || self.is_stopping() {
                return Err("it was not done in time".into());
            }
            std::thread::sleep(MEMBER_PAUSE);
            let id = answer["id"].as_str().unwrap_or_default().to_owned();
            answer = ask(json!({"job": id}))?;
        }
    }

    /// What another member has this node do.
    pub(crate) fn command_of_peer(&self, json: &str) -> String {
        let answer = || -> Result<Value, PurgeError> {
            let invalid = |words: &str| PurgeError::Invalid(words.to_owned());
            let mut question: Value = serde_json::from_str(json).map_err(|_| invalid("no JSON"))?;
            if let Some(request) = question.get_mut("purge") {
                let request: PurgeRequest =
                    serde_json::from_value(request.take()).map_err(|error| invalid(&error.to_string()))?;
                if request.reach != Some(PurgeReach::Part) {
                    return Err(invalid("a member is asked for its own part only"));
                }
                return match self.purge(request) {
                    Ok((job, _)) => Ok(self.told(&job)),
                    Err(PurgeError::UnknownNamespace(_)) => Ok(json!({"unknown": true})),
                    Err(error) => Err(error),
                };
            }
            let id = question["job"].as_str().unwrap_or_default();
            let job = self.job(id).ok_or_else(|| invalid("no such job"))?;
            Ok(self.told(&job))
        };
        match answer() {
            Ok(answer) => answer.to_string(),
            Err(error) => json!({"error": error.to_string()}).to_string(),
        }
    }

    fn told(&self, job: &PurgeJob) -> Value {
        let receipt = self.receipt(&job.id).ok().flatten();
        let receipt: Option<Value> = receipt.and_then(|text| serde_json::from_str(&text).ok());
        json!({
            "id": job.id,
            "state": job.state,
            "receipt": job.receipt,
            "guarantee": receipt.map(|receipt| receipt["guarantee"].clone()),
        })
    }

    /// A receipt that lacks members is followed by another once they have confirmed. True when there is nothing left to wait
    /// for.
    pub(super) fn amend(&self, record: &Record) -> Result<bool, KeyError> {
        let peers = self.peers_of(record);
        if let Some(peers) = &peers {
            let operation = self.operation_of(record.number, record, peers);
            let completed = operation
                .and_then(|operation| peers.progress(operation))
                .is_some_and(|progress| progress.completed);
            let late = self
                .cluster_parts
                .lock()
                .get(&record.number)
                .is_some_and(|part| part.since.elapsed() > UNCONFIRMED_TIMEOUT);
            if !completed && !late {
                return Ok(false);
            }
        }
        let server = self.server_report(record);
        let is_left = server
            .as_ref()
            .is_some_and(|report| report.status == Standing::Unconfirmed);
        if is_left && !self.is_given_up(record.number) {
            return Ok(false);
        }
        let mut others = peers.map(|_| self.member_reports(record).0).unwrap_or_default();
        others.extend(server);
        let others = (!others.is_empty()).then_some(others);
        self.finish_amended(record, others).map(|()| true)
    }

    fn finish_amended(&self, record: &Record, members: Option<Vec<ProcessorReport>>) -> Result<(), KeyError> {
        let completed_at = rfc3339(SystemTime::now());
        let mut receipt = record.job.receipt.clone();
        if let Some(members) = members
            && let Some(line) = self.receipts.of_job(&record.job.id)?
        {
            let altered = |error: serde_json::Error| KeyError::io("read", &self.settings.state_dir)(error.into());
            let mut body = ReceiptBody::of_line(&line.text).map_err(altered)?;
            let is_member =
                |report: &ProcessorReport| members.iter().any(|member| member.processor == report.processor);
            body.processors.retain(|report| !is_member(report));
            body.processors.extend(members);
            body.guarantee = weakest(&body.processors);
            body.completed_at.clone_from(&completed_at);
            body.supersedes = Some(line.id);
            receipt = Some(self.receipts.reissue(&body)?.id);
        }
        self.conclude(record.number, |record| {
            record.job.state = PurgeState::Completed;
            record.job.completed_at = Some(completed_at);
            record.job.receipt = receipt;
        })?;
        self.cluster_parts.lock().remove(&record.number);
        self.server_parts.lock().remove(&record.number);
        self.count(record.number);
        Ok(())
    }
}

fn unconfirmed(member: &str, expired: bool) -> ProcessorReport {
    ProcessorReport {
        processor: format!("kv-daemon {member}"),
        kind: "byoc_runtime".into(),
        status: Standing::Unconfirmed,
        guarantee: Guarantee::Unconfirmed,
        reason: if expired {
            "it did not confirm; its lease is over: it serves nothing until it has learned of this purge".into()
        } else {
            "it did not confirm, and nothing keeps it from serving what it has".into()
        },
        evidence: Vec::new(),
    }
}
