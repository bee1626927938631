//! Something that purges nothing and remembers what it was asked.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use kvtier::purge::{NamespaceSettings, NamespaceStatus, PurgeError, PurgeJob, PurgeRequest, PurgeState};
use serde_json::json;

use crate::admin::purges::Purges;
use crate::rfc3339;

/// Every call that would change something, in words, and what is there.
#[derive(Debug, Default)]
pub(crate) struct Fake {
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    changes: Vec<String>,
    jobs: Vec<PurgeJob>,
    namespaces: BTreeMap<String, NamespaceStatus>,
    receipts: BTreeMap<String, String>,
    events: Vec<(u64, String)>,
    refuse: Option<PurgeError>,
    delay: Duration,
}

impl Fake {
    pub(crate) fn with(namespaces: &[&str]) -> Arc<Fake> {
        let fake = Fake::default();
        for name in namespaces {
            let status = NamespaceStatus {
                namespace: name.to_string(),
                generation: 1,
                ..NamespaceStatus::default()
            };
            fake.inner.lock().unwrap().namespaces.insert(name.to_string(), status);
        }
        Arc::new(fake)
    }

    pub(crate) fn changes(&self) -> Vec<String> {
        self.inner.lock().unwrap().changes.clone()
    }

    pub(crate) fn refuse(&self, error: Option<PurgeError>) {
        self.inner.lock().unwrap().refuse = error;
    }

    /// Lets each purge take so long.
    pub(crate) fn slow_down(&self, delay: Duration) {
        self.inner.lock().unwrap().delay = delay;
    }

    /// Ends a job with this receipt.
    pub(crate) fn complete(&self, id: &str, receipt: &str) {
        let mut inner = self.inner.lock().unwrap();
        inner.receipts.insert(id.into(), receipt.into());
        let job = inner.jobs.iter_mut().find(|job| job.id == id).expect("a job");
        job.state = PurgeState::Completed;
        job.completed_at = Some(rfc3339::format(SystemTime::now()));
        job.receipt = Some("rcp_1".into());
        let job = job.clone();
        inner.tell(&job);
    }
}

impl Inner {
    fn tell(&mut self, job: &PurgeJob) {
        let sequence = self.events.len() as u64 + 1;
        let event =
            json!({"purge": job.id, "namespace": job.request.namespace, "state": job.state, "at": job.requested_at});
        self.events.push((sequence, event.to_string()));
    }
}

impl Purges for Fake {
    fn purge(&self, request: PurgeRequest) -> Result<(PurgeJob, bool), PurgeError> {
        let delay = self.inner.lock().unwrap().delay;
        std::thread::sleep(delay);
        let mut inner = self.inner.lock().unwrap();
        if let Some(error) = &inner.refuse {
            return Err(error.clone());
        }
        if !inner.namespaces.contains_key(&request.namespace) {
            return Err(PurgeError::UnknownNamespace(request.namespace));
        }
        if let Some(job) = inner
            .jobs
            .iter()
            .find(|job| job.request.request_id == request.request_id)
        {
            return match job.request == request {
                true => Ok((job.clone(), false)),
                false => Err(PurgeError::Conflict {
                    request_id: request.request_id,
                    id: job.id.clone(),
                }),
            };
        }
        inner.changes.push(format!("purge {}", request.namespace));
        let now = rfc3339::format(SystemTime::now());
        let job = PurgeJob {
            id: format!("prg_{:032x}", inner.jobs.len() + 1),
            request,
            state: PurgeState::Invalidated,
            requested_at: now.clone(),
            acknowledged_at: Some(now),
            completed_at: None,
            generation: Some(2),
            blocks: 0,
            bytes: 0,
            resumed: 0,
            receipt: None,
        };
        inner.jobs.push(job.clone());
        inner.tell(&job);
        Ok((job, true))
    }

    fn job(&self, id: &str) -> Option<PurgeJob> {
        self.inner.lock().unwrap().jobs.iter().find(|job| job.id == id).cloned()
    }

    fn jobs(&self, namespace: Option<&str>) -> Vec<PurgeJob> {
        let mut jobs = self.inner.lock().unwrap().jobs.clone();
        jobs.retain(|job| namespace.is_none_or(|namespace| namespace == job.request.namespace));
        jobs
    }

    fn receipt(&self, id: &str) -> Option<String> {
        self.inner.lock().unwrap().receipts.get(id).cloned()
    }

    fn namespaces(&self) -> Vec<NamespaceStatus> {
        self.inner.lock().unwrap().namespaces.values().cloned().collect()
    }

    fn set_namespace(&self, namespace: &str, settings: NamespaceSettings) -> Result<NamespaceStatus, PurgeError> {
        let mut inner = self.inner.lock().unwrap();
        let Some(status) = inner.namespaces.get_mut(namespace) else {
            return Err(PurgeError::UnknownNamespace(namespace.into()));
        };
        status.quota_bytes = settings.quota_bytes;
        status.labels = settings.labels;
        let status = status.clone();
        inner.changes.push(format!("set {namespace}"));
        Ok(status)
    }

    fn advance(&self, namespace: &str) -> Result<NamespaceStatus, PurgeError> {
        let mut inner = self.inner.lock().unwrap();
        inner.changes.push(format!("advance {namespace}"));
        let status = inner.namespaces.get_mut(namespace);
        let status = status.ok_or_else(|| PurgeError::UnknownNamespace(namespace.into()))?;
        status.generation += 1;
        status.refused = None;
        Ok(status.clone())
    }

    fn keys(&self) -> String {
        r#"{"keys":[{"kty":"OKP","crv":"Ed25519","x":"AA","kid":"k"}]}"#.into()
    }

    fn events_after(&self, sequence: u64) -> Vec<(u64, String)> {
        let mut events = self.inner.lock().unwrap().events.clone();
        events.retain(|(number, _)| *number > sequence);
        events
    }
}
