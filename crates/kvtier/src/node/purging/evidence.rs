use std::time::SystemTime;

use kvtier_core::PurgeEvidence;

use super::record::Record;
use crate::keys::KeyId;
use crate::purge::{
    Evidence, Guarantee, MasterKeyNote, Method, ProcessorReport, PurgeMode, PurgeReach, PurgeScope, Raised,
    ReceiptBody, ReceiptScope, Standing, rfc3339, weakest,
};

/// What a job did.
#[derive(Default)]
pub(super) struct Done {
    pub(super) key: Option<KeyDone>,
    pub(super) destruction: Option<Destruction>,
}

/// The wrapped key of older generations is overwritten.
pub(super) struct KeyDone {
    pub(super) settled_at: SystemTime,
    pub(super) completed_at: SystemTime,
    /// Neither half of the slot reads as an older generation.
    pub(super) verified: bool,
    /// The master key that wraps all keys since; `None` where the one in use is out of reach.
    pub(super) rotated: Option<KeyId>,
}

/// Memory and NVMe were gone through.
pub(super) struct Destruction {
    pub(super) evidence: PurgeEvidence,
    pub(super) started: SystemTime,
    pub(super) completed: SystemTime,
}

/// What bears on what may be claimed.
pub(super) struct Found {
    /// What other members say.
    pub(super) members: Vec<ProcessorReport>,
    /// Caches that reported for the namespace, and whether they confirmed.
    pub(super) caches: Vec<(String, bool)>,
    pub(super) unsealed: bool,
    pub(super) has_nvme: bool,
    /// Copies of blocks lie in memory of a GPU.
    pub(super) has_hbm: bool,
    pub(super) is_anchored: bool,
    /// The state directory had an anchor before.
    pub(super) is_anchor_missing: bool,
    pub(super) is_key_elsewhere: bool,
    pub(super) master_key: KeyId,
    pub(super) memory_may_be_swapped: bool,
}

/// The receipt of a job, claiming no more than was done.
pub(super) fn receipt(record: &Record, node: &str, completed_at: &str, done: &Done, found: Found) -> ReceiptBody {
    let job = &record.job;
    let mut processors = vec![own_report(record, done, &found)];
    processors.extend(
        found
            .caches
            .iter()
            .map(|(name, confirmed)| cache_report(name, *confirmed)),
    );
    processors.extend(found.members.iter().cloned());
    let raised = job.generation.zip(record.from);
    // An anchor knows generations, and nothing narrower.
    let is_anchored = found.is_anchored && raised.is_some();
    ReceiptBody {
        purge: job.id.clone(),
        request_id: job.request.request_id.clone(),
        namespace: job.request.namespace.clone(),
        scope: ReceiptScope::from(&job.request.scope),
        reach: match job.request.reach {
            Some(PurgeReach::Cluster) => PurgeReach::Cluster,
            Some(PurgeReach::Node | PurgeReach::Part) | None => PurgeReach::Node,
        },
        mode: job.request.mode,
        reason: job.request.reason.clone(),
        node: node.to_owned(),
        generation: raised.map(|(to, from)| Raised { from, to }),
        requested_at: job.requested_at.clone(),
        acknowledged_at: job.acknowledged_at.clone().unwrap_or_default(),
        completed_at: completed_at.to_owned(),
        guarantee: weakest(&processors),
        processors,
        not_covered: not_covered(&job.request.scope, &found, is_anchored),
        master_key: MasterKeyNote {
            id: found.master_key.to_string(),
            location: if found.is_key_elsewhere {
                "elsewhere".into()
            } else {
                "state_directory".into()
            },
            note: if found.is_key_elsewhere {
                "the master key is a file of the operator's, out of the node's reach: it was not rotated".into()
            } else {
                String::new()
            },
        },
        rollback_protection: if is_anchored { "anchor" } else { "none" }.into(),
        resumed: u64::from(job.resumed),
        supersedes: None,
    }
}

fn own_report(record: &Record, done: &Done, found: &Found) -> ProcessorReport {
    let job = &record.job;
    let narrow = job.request.scope != PurgeScope::All;
    let acknowledged = job.acknowledged_at.clone().unwrap_or_default();
    let mut evidence = Vec::new();
    evidence.push(Evidence {
        tier: "namespace".into(),
        action: if narrow {
            let unknown = match record.of_any_label {
                0 => String::new(),
                blocks => format!("; of {blocks} it is not known what they were put under: they went too"),
            };
            format!("blocks forgotten, with their records; writers that began before are refused{unknown}")
        } else {
            "generation raised".into()
        },
        objects: if narrow { job.blocks } else { 1 },
        bytes: 0,
        method: if narrow {
            Method::Deleted
        } else {
            Method::GenerationFence
        },
        started_at: job.requested_at.clone(),
        completed_at: acknowledged,
        residual_window_s: 0,
        verified: true,
    });
    let mut reasons = Vec::new();
    if job.request.mode == PurgeMode::Physical {
        if narrow {
            reasons.push("the namespace's key stays in force for what survives");
        }
        if let Some(key) = &done.key {
            evidence.push(Evidence {
                tier: "keys".into(),
                action: match key.rotated {
                    Some(_) => "wrapped data key overwritten in both halves of its slot; master key rotated".into(),
                    None => "wrapped data key overwritten in both halves of its slot".into(),
                },
                objects: 1,
                bytes: 48,
                method: Method::KeyDestroyed,
                started_at: rfc3339(key.settled_at),
                completed_at: rfc3339(key.completed_at),
                residual_window_s: 0,
                verified: key.verified,
            });
            if !key.verified {
                reasons.push("the register does not read back as it was written");
            }
        }
        if let Some(destruction) = &done.destruction {
            evidence.extend(tiers(destruction, found));
            if destruction.evidence.host_left > 0 {
                reasons.push("clients held memory for longer than purge_lease_grace_ms");
            }
            if destruction.evidence.hbm_left > 0 {
                reasons.push("memory of the GPU was held for longer than purge_lease_grace_ms, or could not be zeroed");
            }
            if destruction.evidence.nvme_left > 0 {
                reasons.push("parts of the NVMe tier could not be overwritten or read back");
            }
        }
        if found.unsealed && found.has_nvme {
            reasons.push("payloads were written to NVMe without encryption: the device may keep copies of its own");
        }
    }
    let physical = job.request.mode == PurgeMode::Physical && reasons.is_empty();
    ProcessorReport {
        processor: "kv-daemon".into(),
        kind: "byoc_runtime".into(),
        status: Standing::Confirmed,
        guarantee: if physical {
            Guarantee::VerifiedPhysicalPurge
        } else {
            Guarantee::VerifiedNamespaceInvalidation
        },
        reason: reasons.join("; "),
        evidence,
    }
}

fn tiers(destruction: &Destruction, found: &Found) -> Vec<Evidence> {
    let done = &destruction.evidence;
    let entry = |tier: &str, action: &str, (objects, bytes), method, left: u64| Evidence {
        tier: tier.into(),
        action: if left > 0 {
            format!("{action}; {left} left")
        } else {
            action.to_owned()
        },
        objects,
        bytes,
        method,
        started_at: rfc3339(destruction.started),
        completed_at: rfc3339(destruction.completed),
        residual_window_s: 0,
        verified: left == 0,
    };
    let mut entries = vec![entry(
        "host",
        "free memory and what lies behind blocks zeroed in every segment of the trust domain",
        (done.host_slots, done.host_bytes),
        Method::Zeroised,
        done.host_left,
    )];
    if found.has_hbm {
        entries.push(entry(
            "hbm",
            "memory of the GPU that held copies, and is free, zeroed in every segment of the trust domain",
            (done.hbm_slots, done.hbm_bytes),
            Method::Zeroised,
            done.hbm_left,
        ));
    }
    if found.has_nvme {
        entries.push(entry(
            "nvme",
            "records, and what no record names, overwritten in every segment; a sample read back",
            (done.nvme_records, done.nvme_bytes),
            Method::Overwritten,
            done.nvme_left,
        ));
    }
    entries
}

fn cache_report(name: &str, confirmed: bool) -> ProcessorReport {
    ProcessorReport {
        processor: name.to_owned(),
        kind: "cache".into(),
        status: if confirmed {
            Standing::Confirmed
        } else {
            Standing::Unconfirmed
        },
        guarantee: if confirmed {
            Guarantee::VerifiedNamespaceInvalidation
        } else {
            Guarantee::Unconfirmed
        },
        reason: if confirmed {
            "it confirmed that it holds nothing older; what it does with freed memory it does not say".into()
        } else {
            "it did not confirm within purge_confirm_wait_ms".into()
        },
        evidence: Vec::new(),
    }
}

fn not_covered(scope: &PurgeScope, found: &Found, is_anchored: bool) -> Vec<String> {
    let mut words = vec![
        "copies that clients made of what they read".to_owned(),
        "files of segments that were removed before the purge: their space was given back to the file system"
            .to_owned(),
    ];
    if matches!(scope, PurgeScope::Label(_)) {
        words.push(
            "puts that a crash took before a flush covered them: a block that was there before is back without their label"
                .into(),
        );
    }
    if !is_anchored {
        words.push("copies of the state directory: nothing outside it would notice one that is restored".into());
    }
    if found.is_anchor_missing {
        words.push("the anchor that this state directory was served with before: it was not named, and knows nothing of this purge".into());
    }
    if found.is_key_elsewhere {
        words.push("copies of the register: the master key, which is kept elsewhere, opens them".into());
    }
    if found.memory_may_be_swapped {
        words.push("swap: host memory was not locked".into());
    }
    words
}
