use std::collections::BTreeMap;

use serde::Serialize;
use serde_json::Value;

use super::document::DOCUMENTS;
use super::evidence::{Guarantee, ProcessorReport, Standing, weakest};
use super::receipt::{VERSION, canonical, digest_of, named_digest, signed_bytes};
use super::signing::{Jwk, KeySet};

/// Longest line that is looked at, bytes.
const LINE_BYTES_MAX: usize = 4 << 20;

/// A place in the chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) sequence: u64,
    pub(super) digest: String,
}

/// One entry that is what its signer wrote.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) id: String,
    pub(super) object: String,
    pub(super) link: Link,
    pub(super) previous: Option<String>,
    pub(super) job: Option<String>,
    key_id: String,
    /// Of a receipt.
    node: Option<String>,
    new_key: Option<Jwk>,
    /// Why it claims more than it shows, if it does.
    overclaims: Option<String>,
}

/// What somebody with a key of `keys` signed.
struct Signed {
    entry: Value,
    object: String,
    digest: String,
    key_id: String,
}

fn text_of(entry: &Value, name: &str) -> Result<String, String> {
    let text = entry[name].as_str();
    text.map(str::to_owned).ok_or_else(|| format!("has no {name}"))
}

/// Canonical bytes, digest, signature by a key of `keys`. Only canonical bytes are accepted, so that any changed byte is found, one that
/// leaves the meaning alone included.
fn authenticate(line: &[u8], keys: &KeySet, objects: &[&str]) -> Result<Signed, String> {
    if line.len() > LINE_BYTES_MAX {
        return Err(format!("longer than {LINE_BYTES_MAX} bytes"));
    }
    let entry: Value = serde_json::from_slice(line).map_err(|error| format!("no JSON: {error}"))?;
    let same = canonical(&entry).map_err(|error| error.to_string())?;
    if same.as_bytes() != line {
        return Err("not the canonical JSON (RFC 8785) that was signed: it was altered".into());
    }
    let text = |name: &str| text_of(&entry, name);
    let object = text("object")?;
    if !objects.contains(&object.as_str()) {
        return Err(format!("is a {object:?}, not a {}", objects[0]));
    }
    if entry["version"].as_u64().ok_or("has no version")? != VERSION {
        return Err(format!(
            "has version {}, this program knows {VERSION}",
            entry["version"]
        ));
    }
    let bare = digest_of(&entry).map_err(|error| error.to_string())?;
    let digest = named_digest(&bare);
    if text("digest")? != digest {
        return Err("its digest is not that of its content: it was altered".into());
    }
    let key_id = text("key_id")?;
    let key = keys
        .find(&key_id)
        .ok_or_else(|| format!("is signed by key {key_id}, which is not among the keys given"))?;
    if !key.verifies(&signed_bytes(&bare), &text("signature")?) {
        return Err(format!("its signature is not that of key {key_id}"));
    }
    Ok(Signed {
        entry,
        object,
        digest,
        key_id,
    })
}

/// Checks documents that a node's key signed beside its chain of receipts, such as reports of `kvctl replay-gate`: each by itself. A receipt is
/// none, and a document is no receipt for [`verify`].
#[must_use]
pub fn verify_documents(lines: &[(String, Vec<u8>)], keys: &KeySet) -> VerifyReport {
    let check = |(place, line): &(String, Vec<u8>)| {
        let signed = authenticate(line, keys, &DOCUMENTS);
        let object = signed.as_ref().ok().map(|signed| signed.object.clone());
        CheckedLine {
            place: place.clone(),
            id: None,
            object,
            sequence: None,
            problem: signed.err(),
        }
    };
    let lines: Vec<CheckedLine> = lines.iter().map(check).collect();
    VerifyReport {
        verified: !lines.is_empty() && lines.iter().all(|line| line.problem.is_none()),
        lines,
        ..VerifyReport::default()
    }
}

/// Reads a line of a chain.
fn read(line: &[u8], keys: &KeySet) -> Result<Entry, String> {
    let Signed {
        entry,
        object,
        digest,
        key_id,
    } = authenticate(line, keys, &["purge_receipt", "key_rotation"])?;
    let text = |name: &str| text_of(&entry, name);
    let number = |name: &str| entry[name].as_u64().ok_or_else(|| format!("has no {name}"));
    let previous = match &entry["previous_digest"] {
        Value::Null => None,
        Value::String(digest) => Some(digest.clone()),
        _ => return Err("its previous_digest is neither a digest nor null".into()),
    };
    let sequence = number("sequence")?;
    if (sequence == 1) != previous.is_none() || sequence == 0 {
        return Err(format!(
            "number {sequence} of the chain, and previous_digest does not fit that"
        ));
    }
    let new_key = match object.as_str() {
        "key_rotation" => Some(
            serde_json::from_value::<Jwk>(entry["new_key"].clone())
                .ok()
                .filter(|key| key.public().is_some())
                .ok_or("names no new key")?,
        ),
        _ => None,
    };
    Ok(Entry {
        id: text("id")?,
        object,
        link: Link { sequence, digest },
        previous,
        job: entry["purge"].as_str().map(str::to_owned),
        key_id,
        node: entry["node"].as_str().map(str::to_owned),
        new_key,
        overclaims: overclaims(&entry),
    })
}

/// A signature says who claims something, and not that it can be.
fn overclaims(entry: &Value) -> Option<String> {
    if entry["object"] != "purge_receipt" {
        return None;
    }
    let claimed: Option<Guarantee> = serde_json::from_value(entry["guarantee"].clone()).ok();
    let processors: Option<Vec<ProcessorReport>> = serde_json::from_value(entry["processors"].clone()).ok();
    let (Some(claimed), Some(processors)) = (claimed, processors) else {
        return Some("names no guarantee and processors as receipts do".into());
    };
    if claimed > weakest(&processors) {
        return Some("claims more than the weakest of its processors".into());
    }
    let silent = processors
        .iter()
        .find(|one| one.status == Standing::Unconfirmed && one.guarantee != Guarantee::Unconfirmed);
    silent.map(|one| format!("lets {:?} vouch, which did not confirm", one.processor))
}

/// Checks the lines of a whole chain in order.
pub(super) struct Verifier {
    keys: KeySet,
    head: Option<Link>,
}

impl Verifier {
    pub(super) fn new(keys: KeySet) -> Verifier {
        Verifier { keys, head: None }
    }

    pub(super) fn next(&mut self, line: &[u8]) -> Result<Entry, String> {
        let entry = read(line, &self.keys)?;
        let fits = match &self.head {
            None => entry.link.sequence == 1,
            Some(head) => entry.link.sequence == head.sequence + 1 && entry.previous.as_ref() == Some(&head.digest),
        };
        if !fits {
            return Err(format!("{} does not follow the entry before it", entry.id));
        }
        self.head = Some(entry.link.clone());
        Ok(entry)
    }

    pub(super) fn into_head(self) -> Option<Link> {
        self.head
    }
}

/// What became of one line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CheckedLine {
    /// Where it stood: file and line, as the caller named them.
    pub place: String,
    /// Its id, where it has one.
    pub id: Option<String>,
    /// `purge_receipt`, `key_rotation` or `replay_gate_report`, where it is one.
    pub object: Option<String>,
    /// Its number in the chain.
    pub sequence: Option<u64>,
    /// What is wrong with it; `None`: nothing.
    pub problem: Option<String>,
}

/// What became of all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    /// Whether every line is what its signer wrote and the chain has no hole.
    pub verified: bool,
    /// Line by line.
    pub lines: Vec<CheckedLine>,
    /// What is wrong between lines.
    pub chain_problems: Vec<String>,
    /// Links that lead out of what was given, and were not checked.
    pub unchecked: Vec<String>,
}

/// Checks receipts without any node: `lines` with the places they stood at, `keys` from a source that is trusted (`GET
/// /v1/keys`). A rotation that a trusted key signed brings the next key with it, and ends what the older one may sign. Files may
/// come in any order and from several nodes; two entries of one chain with one number are a fork. A number that is missing between
/// others of one file is a missing link; between files it is a link that could not be checked.
#[must_use]
pub fn verify(lines: &[(String, Vec<u8>)], keys: &KeySet) -> VerifyReport {
    let mut report = VerifyReport::default();
    let mut keys = keys.clone();
    let mut entries: Vec<Option<Entry>> = vec![None; lines.len()];
    let mut problems: Vec<Option<String>> = vec![None; lines.len()];
    // A rotation found in a later file may be what makes an entry of an earlier one readable.
    loop {
        let known = keys.keys.len();
        for (number, (_, line)) in lines.iter().enumerate() {
            if entries[number].is_some() {
                continue;
            }
            match read(line, &keys) {
                Ok(entry) => {
                    if let Some(new_key) = &entry.new_key
                        && keys.find(&new_key.kid).is_none()
                    {
                        keys.keys.push(new_key.clone());
                    }
                    problems[number] = None;
                    entries[number] = Some(entry);
                }
                Err(problem) => problems[number] = Some(problem),
            }
        }
        if keys.keys.len() == known {
            break;
        }
    }
    let chains = Chains::of(entries.iter().flatten());
    let mut chain: BTreeMap<(usize, u64), Placed<'_>> = BTreeMap::new();
    let mut last_in_file: BTreeMap<(&str, usize), u64> = BTreeMap::new();
    for (entry, (place, _)) in entries.iter().zip(lines) {
        let Some(entry) = entry else { continue };
        let (number, of) = (entry.link.sequence, chains.of_key(&entry.key_id));
        let file = place.rsplit_once(':').map_or(place.as_str(), |(file, _)| file);
        if let Some(before) = last_in_file.insert((file, of), number)
            && before >= number
        {
            report.chain_problems.push(format!(
                "{place}: number {number} stands behind number {before}: reordered or repeated"
            ));
        }
        let placed = Placed { entry, file };
        if let Some(other) = chain.insert((of, number), placed)
            && other.entry.link != entry.link
        {
            report.chain_problems.push(format!(
                "{} and {} are both number {number}: the chain was forked",
                other.entry.id, entry.id
            ));
        }
    }
    let mut before: Option<(usize, &Placed<'_>)> = None;
    for ((of, number), placed) in &chain {
        let before_it = before.replace((*of, placed)).filter(|(before_of, _)| before_of == of);
        check_link(&mut report, before_it.map(|(_, before)| before), *number, placed);
    }
    check_rotations(&mut report, &chain);
    for (number, (place, _)) in lines.iter().enumerate() {
        let entry = entries[number].as_ref();
        report.lines.push(CheckedLine {
            place: place.clone(),
            id: entry.map(|entry| entry.id.clone()),
            object: entry.map(|entry| entry.object.clone()),
            sequence: entry.map(|entry| entry.link.sequence),
            problem: problems[number]
                .clone()
                .or_else(|| entry.and_then(|entry| entry.overclaims.clone())),
        });
    }
    let sound = report.lines.iter().all(|line| line.problem.is_none()) && !report.lines.is_empty();
    report.verified = sound && report.chain_problems.is_empty();
    report
}

/// An entry and the file that it stood in.
struct Placed<'a> {
    entry: &'a Entry,
    file: &'a str,
}

fn check_link(report: &mut VerifyReport, before: Option<&Placed<'_>>, number: u64, placed: &Placed<'_>) {
    let entry = placed.entry;
    let Some(previous) = &entry.previous else { return };
    match before {
        Some(before) if before.entry.link.sequence + 1 == number => {
            if *previous != before.entry.link.digest {
                report.chain_problems.push(format!(
                    "{} does not follow {}: another entry stood between or before",
                    entry.id, before.entry.id
                ));
            }
        }
        Some(before) if before.file == placed.file => report.chain_problems.push(format!(
            "missing: numbers {} to {}",
            before.entry.link.sequence + 1,
            number - 1
        )),
        _ => report
            .unchecked
            .push(format!("{}: the entry before it ({previous}) was not given", entry.id)),
    }
}

/// A key signs up to the rotation that ends it, and the next one from there on: whoever gets hold of an old key cannot go on
/// with it.
fn check_rotations(report: &mut VerifyReport, chain: &BTreeMap<(usize, u64), Placed<'_>>) {
    for ((of, rotated_at), rotation) in chain {
        let Some(new_key) = &rotation.entry.new_key else {
            continue;
        };
        let of_this = chain.iter().filter(|((other, _), _)| other == of);
        for ((_, number), Placed { entry, .. }) in of_this {
            let is_late = entry.key_id == rotation.entry.key_id && number > rotated_at;
            let is_early = entry.key_id == new_key.kid && number <= rotated_at;
            if is_late || is_early {
                report.chain_problems.push(format!(
                    "{} (number {number}) is signed by key {}, which {} at number {rotated_at}",
                    entry.id,
                    entry.key_id,
                    if is_late { "was replaced" } else { "came into use only" }
                ));
            }
        }
    }
}

/// Which keys belong to one chain: those that rotations join, and those that signed for one node.
struct Chains<'a>(BTreeMap<&'a str, usize>);

impl<'a> Chains<'a> {
    fn of(entries: impl Iterator<Item = &'a Entry>) -> Chains<'a> {
        let mut of_name: BTreeMap<&str, usize> = BTreeMap::new();
        for (next, entry) in entries.enumerate() {
            let joined = entry
                .new_key
                .as_ref()
                .map(|key| key.kid.as_str())
                .or(entry.node.as_deref());
            let names = [Some(entry.key_id.as_str()), joined];
            let known: Vec<usize> = names
                .iter()
                .flatten()
                .filter_map(|name| of_name.get(name).copied())
                .collect();
            let chain = known.first().copied().unwrap_or(next);
            of_name
                .values_mut()
                .filter(|other| known.contains(other))
                .for_each(|other| *other = chain);
            names.into_iter().flatten().for_each(|name| {
                of_name.insert(name, chain);
            });
        }
        Chains(of_name)
    }

    fn of_key(&self, key: &str) -> usize {
        self.0.get(key).copied().unwrap_or(usize::MAX)
    }
}
