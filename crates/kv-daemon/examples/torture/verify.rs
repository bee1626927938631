//! After a restart: every key ever put is read, and every byte compared.

use std::time::Duration;

use kv_daemon::content::Content;
use kv_daemon::exit::{ExitCode, Failure};
use kvtier::Tier;
use kvtier::client::blocking::{Client, Namespace};
use kvtier::client::{ClientError, FetchScope};
use kvtier_sim::Random;

use crate::daemon::{Daemon, status};
use crate::key::{Key, NAMESPACES, form};
use crate::ledger::Ledger;
use crate::reader::{Comparison, Found, Reader};
use crate::worker::BATCH_BYTES_MAX;

/// Keys asked for in one message.
const KEYS_MAX: usize = 1024;

/// Blocks read in one call.
const BLOCKS_MAX: usize = 32;

/// How often a busy daemon is asked again.
const ATTEMPTS: u32 = 1000;

/// What was there.
#[derive(Debug, Default)]
pub(crate) struct Check {
    pub(crate) comparison: Comparison,
    /// Blocks that are there though a delete was acknowledged; no flush came after it.
    pub(crate) undeleted: u64,
    /// The same though one did.
    pub(crate) deletes_undone: u64,
    /// The first of these, in words.
    pub(crate) first_undone: Option<String>,
    pub(crate) generations_undone: u64,
    /// Blocks that a lookup found and a get did not.
    pub(crate) vanished: u64,
    /// What failed its check, as the daemon counts, before anything was read.
    pub(crate) corrupt_at_start: u64,
    /// And afterwards.
    pub(crate) corrupt: u64,
}

/// Reads everything and notes in the ledger which keys are present.
pub(crate) fn read_everything(
    daemon: &Daemon,
    ledger: &Ledger,
    content: &Content,
    random: &mut Random,
) -> Result<Check, Failure> {
    let client = daemon.connect()?;
    let namespaces = open(&client, random).map_err(|error| daemon.failure(&format!("opens no namespace: {error}")))?;
    let mut check = Check {
        corrupt_at_start: status(&client)?.counters.corrupt,
        ..Check::default()
    };
    let mut reader = Reader::new(content);
    for (namespace, open) in namespaces.iter().enumerate() {
        let failed = |error: ClientError| daemon.failure(&format!("answers with an error: {error}"));
        let generation = open.generation().map_err(failed)?.0;
        if !ledger.acknowledge(namespace, generation) {
            check.generations_undone += 1;
        }
        let keys = ledger.keys().into_iter().map(|(key, _)| key);
        let keys: Vec<Key> = keys.filter(|key| key.namespace == namespace).collect();
        for keys in keys.chunks(KEYS_MAX) {
            check.vanished += read(open, ledger, keys, &mut reader).map_err(failed)?;
        }
    }
    for (key, state) in ledger.keys() {
        if state.present && state.is_deleted() {
            if ledger.is_flushed(state.deleted_at) {
                check.deletes_undone += 1;
                let words = || format!("{}, {state:?}", crate::key::describe(key.id(0)));
                check.first_undone.get_or_insert_with(words);
            } else {
                check.undeleted += 1;
            }
            // From here on it is a block like any other.
            ledger.change(key, |state| state.deleted_at = 0);
        }
    }
    check.comparison = reader.comparison;
    check.corrupt = status(&client)?.counters.corrupt;
    Ok(check)
}

/// Opens the namespaces, each time in another order: what they are to the daemon must not depend on it.
pub(crate) fn open(client: &Client, random: &mut Random) -> Result<Vec<Namespace>, ClientError> {
    let mut order: Vec<usize> = (0..NAMESPACES.len()).collect();
    if random.chance(500) {
        order.reverse();
    }
    let mut opened: Vec<(usize, Namespace)> = Vec::new();
    for namespace in order {
        opened.push((namespace, client.namespace(NAMESPACES[namespace], form(namespace))?));
    }
    opened.sort_by_key(|(namespace, _)| *namespace);
    Ok(opened.into_iter().map(|(_, namespace)| namespace).collect())
}

/// Reads these keys; answers how many were found and then not read.
fn read(namespace: &Namespace, ledger: &Ledger, keys: &[Key], reader: &mut Reader<'_>) -> Result<u64, ClientError> {
    let hashes: Vec<_> = keys.iter().map(|key| key.hash()).collect();
    let tiers = namespace.lookup(&hashes)?;
    let (mut here, mut absent) = (Vec::new(), Vec::new());
    for (key, tier) in keys.iter().zip(tiers) {
        ledger.change(*key, |state| state.present = false);
        if tier.is_some() { &mut here } else { &mut absent }.push(*key);
    }
    // What a lookup does not find must not be found by a get either; if it is, it is compared.
    let hashes: Vec<_> = absent.iter().map(|key| key.hash()).collect();
    let found = namespace.get(&hashes, FetchScope::Each)?;
    here.extend(
        absent
            .iter()
            .zip(&found)
            .filter(|(_, handle)| handle.is_some())
            .map(|(key, _)| *key),
    );
    drop(found);
    let mut vanished = 0;
    let mut rest = here.as_slice();
    while !rest.is_empty() {
        let mut bytes = 0;
        let fits = |key: &&Key| {
            bytes += key.length();
            bytes <= BATCH_BYTES_MAX
        };
        let count = rest.iter().take(BLOCKS_MAX).take_while(fits).count().max(1);
        let (batch, later) = rest.split_at(count);
        rest = later;
        vanished += read_batch(namespace, ledger, batch, reader)?;
    }
    Ok(vanished)
}

fn read_batch(
    namespace: &Namespace,
    ledger: &Ledger,
    batch: &[Key],
    reader: &mut Reader<'_>,
) -> Result<u64, ClientError> {
    let mut vanished = 0;
    let mut batch = batch.to_vec();
    for _ in 0..ATTEMPTS {
        let generation = ledger.generation(batch[0].namespace);
        let found = match reader.read(namespace, &batch, FetchScope::Each, &(generation..=generation)) {
            Err(error) if error.kind == kvtier::ErrorKind::Busy => vec![Found::Busy; batch.len()],
            found => found?,
        };
        let mut again = Vec::new();
        for (key, found) in batch.into_iter().zip(found) {
            match found {
                Found::Hit => ledger.change(key, |state| state.present = true),
                Found::Miss => vanished += 1,
                Found::Busy => again.push(key),
            }
        }
        if again.is_empty() {
            return Ok(vanished);
        }
        batch = again;
        std::thread::sleep(Duration::from_millis(2));
    }
    // What stays busy for seconds with a single client is lost to it.
    Ok(vanished + batch.len() as u64)
}

/// Where a lookup finds each of these keys.
pub(crate) fn lookup(daemon: &Daemon, keys: &[Key]) -> Result<Vec<Option<Tier>>, Failure> {
    let client = daemon.connect()?;
    let mut found = vec![None; keys.len()];
    for (namespace, name) in NAMESPACES.iter().enumerate() {
        let failed = |error: ClientError| Failure::new(ExitCode::No, format!("a lookup failed: {error}"));
        let open = client.namespace(name, form(namespace)).map_err(failed)?;
        let places: Vec<usize> = (0..keys.len())
            .filter(|place| keys[*place].namespace == namespace)
            .collect();
        for places in places.chunks(KEYS_MAX) {
            let hashes: Vec<_> = places.iter().map(|place| keys[*place].hash()).collect();
            for (place, tier) in places.iter().zip(open.lookup(&hashes).map_err(failed)?) {
                found[*place] = tier;
            }
        }
    }
    Ok(found)
}
