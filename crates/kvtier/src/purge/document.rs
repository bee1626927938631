//! Documents that a node's key signs beside its chain of receipts: what was found, by whom, at no place among others.

use std::path::Path;

use serde_json::{Map, Value, json};

use super::chain::KEY_FILE;
use super::receipt::{VERSION, canonical, digest_of, named_digest, signed_bytes};
use super::signing::SigningKey;
use super::{RECEIPTS_DIRECTORY, rfc3339};
use crate::keys::KeyError;

/// A report of `kvctl replay-gate`.
pub const REPLAY_GATE_REPORT: &str = "replay_gate_report";

/// What may be signed so.
pub(super) const DOCUMENTS: [&str; 1] = [REPLAY_GATE_REPORT];

/// Signs `fields` as a receipt is signed, with the key of the receipts in `state_directory`, which a daemon may be using: one line of
/// canonical JSON (RFC 8785), its SHA-256 and an Ed25519 signature.
///
/// # Errors
/// Where there is no key, or it cannot be read; where `fields` hold what canonical JSON has no words for.
pub fn sign_document(
    state_directory: &Path,
    object: &'static str,
    mut fields: Map<String, Value>,
    now: std::time::SystemTime,
) -> Result<String, KeyError> {
    let path = state_directory.join(RECEIPTS_DIRECTORY).join(KEY_FILE);
    let key = SigningKey::read(&path)?.ok_or_else(|| KeyError::NoSigningKey { path: path.clone() })?;
    let broken = |error: serde_json::Error| KeyError::io("sign with", &path)(error.into());
    fields.insert("object".into(), json!(object));
    fields.insert("version".into(), json!(VERSION));
    fields.insert("signed_at".into(), json!(rfc3339(now)));
    fields.insert("key_id".into(), json!(key.jwk.kid));
    let mut document = Value::Object(fields);
    let bare = digest_of(&document).map_err(broken)?;
    document["digest"] = json!(named_digest(&bare));
    document["signature"] = json!(key.sign(&signed_bytes(&bare)));
    canonical(&document).map_err(broken)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;
    use crate::purge::{KeySet, ReceiptLog, verify};

    fn signed(directory: &Path) -> (Vec<u8>, KeySet) {
        let log = ReceiptLog::open(&directory.join(RECEIPTS_DIRECTORY), &mut Vec::new()).unwrap();
        let fields = json!({"verdict": "worth_enabling", "saving": 0.125, "inputs": [{"sha256": "00"}]});
        let Value::Object(fields) = fields else { unreachable!() };
        let line = sign_document(directory, REPLAY_GATE_REPORT, fields, SystemTime::UNIX_EPOCH).unwrap();
        (line.into_bytes(), log.keys())
    }

    #[test]
    fn a_signed_document_verifies_and_no_altered_byte_of_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let (line, keys) = signed(directory.path());
        let check = |line: Vec<u8>| verify(&[("f:1".to_string(), line)], &keys);
        let report = check(line.clone());
        assert!(report.verified, "{report:?}");
        assert_eq!(report.lines[0].object.as_deref(), Some(REPLAY_GATE_REPORT));
        assert_eq!((report.lines[0].sequence, report.unchecked.len()), (None, 0));
        for position in 0..line.len() {
            let mut altered = line.clone();
            altered[position] ^= 1;
            assert!(!check(altered).verified, "byte {position}");
        }
        let other = tempfile::tempdir().unwrap();
        let (_, strangers) = signed(other.path());
        assert!(!verify(&[("f:1".to_string(), line)], &strangers).verified);
    }

    #[test]
    fn a_directory_without_a_key_signs_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let error = sign_document(directory.path(), REPLAY_GATE_REPORT, Map::new(), SystemTime::UNIX_EPOCH);
        assert!(
            error
                .expect_err("no key")
                .to_string()
                .contains("start a daemon on it once")
        );
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            0,
            "and none is made"
        );
    }

    #[test]
    fn a_document_is_no_receipt_and_breaks_no_chain() {
        let directory = tempfile::tempdir().unwrap();
        let (line, keys) = signed(directory.path());
        let lines = [("f:1".to_string(), line.clone()), ("f:2".to_string(), line)];
        assert!(verify(&lines, &keys).verified, "twice is no fork");
        assert!(!verify(&[], &keys).verified);
    }
}
