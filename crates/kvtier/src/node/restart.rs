//! What a start takes over from earlier runs, before any client comes.

use std::time::Instant;

use kvtier_core::{Generation, RealizationId, Refusal, TrustDomain};
use kvtier_storage::nvme::Found;

use super::domains::Domains;
use super::driver::Driver;
use super::status::Durability;
use super::{StartError, StartProgress};
use crate::keys;

/// The domain of slots whose names are lost: nobody's.
const NOBODY: TrustDomain = TrustDomain(u32::MAX);

const ELSEWHERE: &str = "choose another state directory";

/// Gives the manager every namespace and realization of the register, under the numbers that records on NVMe carry.
pub(super) fn restore_names(driver: &Driver, domains: &Domains) -> Result<(), StartError> {
    let namespaces = driver.recorder.register.namespaces();
    let too_many = |count, what, remedy| StartError::Names { count, what, remedy };
    for (slot, named) in (0u32..).zip(&namespaces) {
        let (domain, name, generation) = match named {
            Some((label, generation)) => {
                let domain = domains.intern(&label.domain);
                let domain = domain.ok_or_else(|| too_many(namespaces.len(), "trust domains", ELSEWHERE))?;
                (domain, label.name.clone(), *generation)
            }
            // No client can name it: a name has no '/'.
            None => (NOBODY, format!("/slot {slot}"), Generation(1)),
        };
        let restored = driver.with(|decider, _| decider.manager.restore_namespace(domain, &name, generation));
        match restored {
            Ok(namespace) => assert_eq!(namespace.0, slot, "a namespace's id is its slot"),
            Err(Refusal::Busy) => return Err(too_many(namespaces.len(), "namespaces", "raise namespaces_max")),
            Err(refusal) => unreachable!("the register has each name once: {refusal}"),
        }
        if let (Some(versions), Some((label, generation))) = (&driver.versions, named)
            && domains.is_shared(domain)
        {
            let name = format!("{}/{}", label.domain, label.name);
            versions.reconcile(&name, *generation, Generation(1))?;
        }
    }
    let realizations = driver.recorder.realizations.entries();
    for (position, realization) in realizations.iter().enumerate() {
        let realization = realization.unwrap_or_else(|| keys::placeholder(position));
        match driver.with(|decider, _| decider.manager.open_realization(realization)) {
            Ok(RealizationId(id)) => assert_eq!(id as usize, position, "a realization's id is its position"),
            Err(_) => return Err(too_many(realizations.len(), "realizations", ELSEWHERE)),
        }
    }
    Ok(())
}

/// Gives the manager what the NVMe tier found, and says what came of it. `begun`: when the tier was opened.
pub(super) fn restore_segments(driver: &Driver, found: Found, begun: Instant, observer: &dyn Fn(StartProgress)) {
    let Found {
        segments,
        read_bytes,
        damaged,
        sealed_off,
    } = found;
    if segments.is_empty() && damaged == 0 {
        return;
    }
    let restored = driver.with(|decider, now| decider.manager.restore(segments, now));
    let durability = Durability {
        restored_blocks: restored.blocks,
        restored_bytes: restored.bytes,
        restored_left_out: restored.left_out + sealed_off,
        restored_damaged: damaged,
        ..Durability::default()
    };
    observer(StartProgress::Note(format!(
        "restored {} blocks ({} bytes) from NVMe in {:.2} s by reading {read_bytes} bytes; {} records left out, {damaged} damaged",
        durability.restored_blocks,
        durability.restored_bytes,
        begun.elapsed().as_secs_f64(),
        durability.restored_left_out,
    )));
    // Once a run.
    let _ = driver.restored.set(durability);
}
