//! Documents that a node's key signs beside its chain of receipts: what was found, by whom, at no place among others.

use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde_json::{Map, Value, json};

use super::chain::{KEY_FILE, NEXT_KEY_FILE};
use super::receipt::{VERSION, canonical, digest_of, named_digest, signed_bytes};
use super::signing::SigningKey;
use super::{RECEIPTS_DIRECTORY, rfc3339};
use crate::keys::KeyError;

/// A report of `kvctl replay-gate`.
pub const REPLAY_GATE_REPORT: &str = "replay_gate_report";

/// What may be signed so.
pub(super) const DOCUMENTS: [&str; 1] = [REPLAY_GATE_REPORT];

/// The key that signs the receipts of a state directory, for documents. A daemon may be using it, too.
#[derive(Debug)]
pub struct DocumentKey {
    key: SigningKey,
    path: PathBuf,
}

impl DocumentKey {
    /// The key of this state directory.
    ///
    /// # Errors
    /// Where there is none, where it cannot be read, or where a rotation was cut short, which the daemon's next start finishes.
    pub fn open(state_directory: &Path) -> Result<DocumentKey, KeyError> {
        let directory = state_directory.join(RECEIPTS_DIRECTORY);
        let (path, next) = (directory.join(KEY_FILE), directory.join(NEXT_KEY_FILE));
        match SigningKey::read(&path)? {
            Some(key) if !next.exists() => Ok(DocumentKey { key, path }),
            _ => Err(KeyError::NoSigningKey { path }),
        }
    }

    /// Signs `fields` as a receipt is signed: one line of canonical JSON (RFC 8785) with its SHA-256 and an Ed25519 signature.
    ///
    /// # Errors
    /// Where `fields` hold what canonical JSON has no words for: an integer from 2^53 on.
    pub fn sign(
        &self,
        object: &'static str,
        mut fields: Map<String, Value>,
        now: SystemTime,
    ) -> Result<String, KeyError> {
        if fields.values().any(is_beyond_doubles) {
            let words = "an integer is beyond what canonical JSON keeps";
            return Err(KeyError::io("sign with", &self.path)(io::Error::other(words)));
        }
        let broken = |error: serde_json::Error| KeyError::io("sign with", &self.path)(error.into());
        fields.insert("object".into(), json!(object));
        fields.insert("version".into(), json!(VERSION));
        fields.insert("signed_at".into(), json!(rfc3339(now)));
        fields.insert("key_id".into(), json!(self.key.jwk.kid));
        let mut document = Value::Object(fields);
        let bare = digest_of(&document).map_err(broken)?;
        document["digest"] = json!(named_digest(&bare));
        document["signature"] = json!(self.key.sign(&signed_bytes(&bare)));
        canonical(&document).map_err(broken)
    }
}

/// RFC 8785 spells every number as a 64-bit float.
fn is_beyond_doubles(value: &Value) -> bool {
    match value {
        Value::Number(number) => {
            let magnitude = number.as_u64().or_else(|| number.as_i64().map(i64::unsigned_abs));
            magnitude.is_some_and(|magnitude| magnitude > 1 << 53)
        }
        Value::Array(values) => values.iter().any(is_beyond_doubles),
        Value::Object(fields) => fields.values().any(is_beyond_doubles),
        Value::Null | Value::Bool(_) | Value::String(_) => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::purge::{KeySet, ReceiptLog, verify, verify_documents};

    fn signed(directory: &Path) -> (Vec<u8>, KeySet) {
        let log = ReceiptLog::open(&directory.join(RECEIPTS_DIRECTORY), &mut Vec::new()).unwrap();
        let fields = json!({"verdict": "worth_enabling", "saving": 0.125, "inputs": [{"sha256": "00"}]});
        let Value::Object(fields) = fields else { unreachable!() };
        let key = DocumentKey::open(directory).unwrap();
        let line = key.sign(REPLAY_GATE_REPORT, fields, SystemTime::UNIX_EPOCH).unwrap();
        (line.into_bytes(), log.keys())
    }

    #[test]
    fn a_signed_document_verifies_and_no_altered_byte_of_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let (line, keys) = signed(directory.path());
        let check = |line: Vec<u8>| verify_documents(&[("f:1".to_string(), line)], &keys);
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
        assert!(!verify_documents(&[("f:1".to_string(), line)], &strangers).verified);
    }

    #[test]
    fn a_directory_without_a_key_signs_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let error = DocumentKey::open(directory.path()).expect_err("no key").to_string();
        assert!(error.contains("start a daemon on it once"), "{error}");
        assert_eq!(
            std::fs::read_dir(directory.path()).unwrap().count(),
            0,
            "and none is made"
        );
    }

    #[test]
    fn a_document_is_no_receipt_and_a_receipt_no_document() {
        let directory = tempfile::tempdir().unwrap();
        let (line, keys) = signed(directory.path());
        let lines = [("f:1".to_string(), line)];
        let as_receipt = verify(&lines, &keys);
        assert!(!as_receipt.verified);
        assert_eq!(
            as_receipt.lines[0].problem.as_deref(),
            Some("is a \"replay_gate_report\", not a purge_receipt")
        );
        let log = ReceiptLog::open(&directory.path().join(RECEIPTS_DIRECTORY), &mut Vec::new()).unwrap();
        log.rotate(SystemTime::UNIX_EPOCH).unwrap();
        let chain = std::fs::read(directory.path().join(RECEIPTS_DIRECTORY).join("chain.jsonl")).unwrap();
        let entry = [("c:1".to_string(), chain.trim_ascii_end().to_vec())];
        assert!(verify(&entry, &keys).verified);
        assert!(!verify_documents(&entry, &keys).verified);
        assert!(!verify_documents(&[], &keys).verified);
    }

    #[test]
    fn what_canonical_json_would_round_is_not_signed() {
        let directory = tempfile::tempdir().unwrap();
        signed(directory.path());
        let key = DocumentKey::open(directory.path()).unwrap();
        let Value::Object(fields) = json!({"inside": [{"number": (1_u64 << 53) + 1}]}) else {
            unreachable!()
        };
        assert!(key.sign(REPLAY_GATE_REPORT, fields, SystemTime::UNIX_EPOCH).is_err());
    }

    #[test]
    fn a_rotation_that_was_cut_short_is_finished_before_anything_is_signed() {
        let directory = tempfile::tempdir().unwrap();
        signed(directory.path());
        std::fs::write(directory.path().join(RECEIPTS_DIRECTORY).join(NEXT_KEY_FILE), "00").unwrap();
        assert!(DocumentKey::open(directory.path()).is_err());
    }
}
