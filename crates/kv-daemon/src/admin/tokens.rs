//! The register of bearer tokens: what each may do, kept by its hash.
//!
//! A token is `kvt_` and 64 hexadecimal digits of a random 256-bit number: as it has its full entropy, a plain SHA-256 of it
//! cannot be reversed, and no slow hash is needed. `tokens.json` in the state directory, mode 0600, replaced whole:
//!
//! ```json
//! {"version": 1, "tokens": [{"id": "tok_0011223344556677", "sha256": "64 hexadecimal digits", "role": "purge",
//!   "namespaces": ["DOMAIN/NAME"], "label": "", "created_at": "RFC 3339", "expires_at": null}]}
//! ```

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use aws_lc_rs::digest::{SHA256, digest};
use serde::{Deserialize, Serialize};
use subtle::{Choice, ConditionallySelectable, ConstantTimeEq};

use super::access::{Caller, Role};
use crate::{rfc3339, state_file};

/// Where they are kept, in the state directory.
pub const TOKENS_FILE: &str = "tokens.json";

/// Id of the token of `admin.token`. It is in no register: whoever may change that file changes the token.
pub const FILE_TOKEN_ID: &str = "tok_admin";

/// Tokens at once. Each shown token is compared with every kept one.
pub const TOKENS_MAX: usize = 1024;

/// Names that one token may be bound to.
pub const NAMESPACES_MAX: usize = 64;

/// Bytes of a name or a label.
const TEXT_BYTES_MAX: usize = 256;

/// Longer ones are wrong without being looked at.
const SHOWN_BYTES_MAX: usize = 512;

const FILE_BYTES_MAX: u64 = 64 << 20;
const VERSION: u32 = 1;

/// What a new token shall be. As JSON it is the body of `POST /v1/tokens`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewToken {
    /// What it is for.
    pub role: Role,
    /// Names that it is bound to, `DOMAIN/NAME` or `NAME` of any domain, 1 to 64; left out: to none, it sees all.
    #[serde(default)]
    pub namespaces: Option<Vec<String>>,
    /// Words of the administrator's own, at most 256 bytes.
    #[serde(default)]
    pub label: String,
    /// When it stops to be good, RFC 3339; left out: never.
    #[serde(default)]
    pub expires_at: Option<String>,
}

/// A token as it is listed: everything but itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenStatus {
    /// `tok_` and 16 hexadecimal digits, or `tok_admin` for the one of `admin.token`.
    pub id: String,
    /// What it is for.
    pub role: Role,
    /// Names that it is bound to; `None`: it sees all.
    pub namespaces: Option<Vec<String>>,
    /// Words of the administrator's own.
    pub label: String,
    /// RFC 3339, UTC; `None` for the one of `admin.token`.
    pub created_at: Option<String>,
    /// RFC 3339; `None`: never.
    pub expires_at: Option<String>,
}

/// Why the register was not changed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It cannot be.
    #[error("{0}")]
    Invalid(String),
    /// There is none of that id.
    #[error("no token {0:?}")]
    Unknown(String),
    /// It is the one of `admin.token`.
    #[error(
        "{FILE_TOKEN_ID} is the token of the file admin.token: to change it, remove the file and start the daemon again"
    )]
    OfTheFile,
    /// There are as many as there may be.
    #[error("there are {TOKENS_MAX} tokens: revoke one")]
    Full,
    /// It could not be made durable.
    #[error("{0}")]
    Unavailable(String),
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    id: String,
    sha256: String,
    role: Role,
    namespaces: Option<Vec<String>>,
    label: String,
    created_at: String,
    expires_at: Option<String>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    version: u32,
    tokens: Vec<Record>,
}

struct Kept {
    digest: [u8; 32],
    expires: Option<SystemTime>,
    record: Record,
}

/// Every token that is good.
pub struct TokenRegister {
    path: PathBuf,
    of_the_file: [u8; 32],
    kept: Mutex<Vec<Kept>>,
}

impl std::fmt::Debug for TokenRegister {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter
            .debug_struct("TokenRegister")
            .field("tokens", &self.lock().len())
            .finish_non_exhaustive()
    }
}

impl TokenRegister {
    /// Reads the register of a state directory, empty when there is none, beside the token of `admin.token`.
    ///
    /// # Errors
    /// In words, when the file is there and cannot be used: nobody is let in by guessing what it meant.
    pub fn open(state_dir: &Path, admin_token: &str) -> Result<TokenRegister, String> {
        let path = state_dir.join(TOKENS_FILE);
        let cannot = |what: String| {
            format!(
                "token register {}: {what}; put it right, or remove it and create the tokens anew",
                path.display()
            )
        };
        let mut kept = Vec::new();
        if let Some(text) =
            state_file::read_private(&path, FILE_BYTES_MAX).map_err(|error| cannot(error.to_string()))?
        {
            let document: Document = serde_json::from_str(&text).map_err(|error| cannot(error.to_string()))?;
            if document.version != VERSION {
                return Err(cannot(format!(
                    "its version is {}, this program writes {VERSION}",
                    document.version
                )));
            }
            for record in document.tokens {
                let id = record.id.clone();
                kept.push(
                    Kept::of(record).ok_or_else(|| cannot(format!("{id} has no hash or time that can be read")))?,
                );
            }
        }
        Ok(TokenRegister {
            of_the_file: hash(admin_token),
            kept: Mutex::new(kept),
            path,
        })
    }

    /// Whose token this is. Every kept hash is compared, in a time that does not tell which or how far.
    #[must_use]
    pub fn authenticate(&self, shown: &str, now: SystemTime) -> Option<Caller> {
        if shown.is_empty() || shown.len() > SHOWN_BYTES_MAX {
            return None;
        }
        let digest = hash(shown);
        let kept = self.lock();
        let mut place = u64::MAX;
        let candidates = std::iter::once(&self.of_the_file).chain(kept.iter().map(|one| &one.digest));
        for (index, candidate) in (0_u64..).zip(candidates) {
            let same: Choice = candidate.ct_eq(&digest);
            place.conditional_assign(&index, same);
        }
        match usize::try_from(place).ok()? {
            0 => Some(Caller {
                token: FILE_TOKEN_ID.to_string(),
                role: Role::Admin,
                namespaces: None,
            }),
            place => {
                let found = kept.get(place - 1)?;
                found.is_good(now).then(|| found.caller())
            }
        }
    }

    /// Whether the token of this id is still good.
    #[must_use]
    pub fn is_good(&self, id: &str, now: SystemTime) -> bool {
        id == FILE_TOKEN_ID || self.lock().iter().any(|one| one.record.id == id && one.is_good(now))
    }

    /// Draws a token and keeps its hash. The token is in the answer and nowhere else.
    ///
    /// # Errors
    /// Nothing was kept.
    pub fn create(&self, new: NewToken, now: SystemTime) -> Result<(TokenStatus, String), TokenError> {
        check(&new, now)?;
        let secret = format!("kvt_{}", random_hex::<32>()?);
        let record = Record {
            id: format!("tok_{}", random_hex::<8>()?),
            sha256: hex(&hash(&secret)),
            role: new.role,
            namespaces: new.namespaces,
            label: new.label,
            created_at: rfc3339::format(now),
            expires_at: new.expires_at,
        };
        let status = record.status();
        let one = Kept::of(record).ok_or_else(|| TokenError::Invalid("expires_at is no RFC 3339 time".into()))?;
        let mut kept = self.lock();
        if kept.len() >= TOKENS_MAX {
            return Err(TokenError::Full);
        }
        kept.push(one);
        if let Err(error) = self.write(&kept) {
            kept.pop();
            return Err(error);
        }
        Ok((status, secret))
    }

    /// Every token, the one of `admin.token` first, expired ones included.
    #[must_use]
    pub fn list(&self) -> Vec<TokenStatus> {
        let of_the_file = TokenStatus {
            id: FILE_TOKEN_ID.to_string(),
            role: Role::Admin,
            namespaces: None,
            label: "admin.token".to_string(),
            created_at: None,
            expires_at: None,
        };
        std::iter::once(of_the_file)
            .chain(self.lock().iter().map(|one| one.record.status()))
            .collect()
    }

    /// Forgets a token: it is good no more once this returns.
    ///
    /// # Errors
    /// It is as good as before.
    pub fn revoke(&self, id: &str) -> Result<(), TokenError> {
        if id == FILE_TOKEN_ID {
            return Err(TokenError::OfTheFile);
        }
        let mut kept = self.lock();
        let place = kept
            .iter()
            .position(|one| one.record.id == id)
            .ok_or_else(|| TokenError::Unknown(id.to_string()))?;
        let one = kept.remove(place);
        if let Err(error) = self.write(&kept) {
            kept.insert(place, one);
            return Err(error);
        }
        Ok(())
    }

    fn write(&self, kept: &[Kept]) -> Result<(), TokenError> {
        let cannot = |error: &dyn std::fmt::Display| {
            TokenError::Unavailable(format!(
                "{TOKENS_FILE} cannot be written ({error}): nothing was changed"
            ))
        };
        let document = Document {
            version: VERSION,
            tokens: kept.iter().map(|one| one.record.clone()).collect(),
        };
        let text = serde_json::to_string_pretty(&document).map_err(|error| cannot(&error))?;
        state_file::replace(&self.path, 0o600, format!("{text}\n").as_bytes()).map_err(|error| cannot(&error))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Kept>> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    fn of(record: Record) -> Option<Kept> {
        let expires = match &record.expires_at {
            Some(text) => Some(rfc3339::parse(text)?),
            None => None,
        };
        Some(Kept {
            digest: unhex(&record.sha256)?,
            expires,
            record,
        })
    }

    fn is_good(&self, now: SystemTime) -> bool {
        self.expires.is_none_or(|expires| now < expires)
    }

    fn caller(&self) -> Caller {
        Caller {
            token: self.record.id.clone(),
            role: self.record.role,
            namespaces: self.record.namespaces.clone(),
        }
    }
}

impl Record {
    fn status(&self) -> TokenStatus {
        TokenStatus {
            id: self.id.clone(),
            role: self.role,
            namespaces: self.namespaces.clone(),
            label: self.label.clone(),
            created_at: Some(self.created_at.clone()),
            expires_at: self.expires_at.clone(),
        }
    }
}

fn check(new: &NewToken, now: SystemTime) -> Result<(), TokenError> {
    let invalid = |words: &str| Err(TokenError::Invalid(words.to_string()));
    if let Some(names) = &new.namespaces {
        if names.is_empty() || names.len() > NAMESPACES_MAX {
            return invalid("namespaces: name 1 to 64, or leave them out for a token that sees all");
        }
        let sound = |name: &String| {
            let parts_named = name
                .split_once('/')
                .is_none_or(|(domain, name)| !domain.is_empty() && !name.is_empty());
            !name.is_empty() && name.len() <= TEXT_BYTES_MAX && parts_named
        };
        if !names.iter().all(sound) {
            return invalid("namespaces: each is NAME or DOMAIN/NAME, at most 256 bytes");
        }
    }
    if new.label.len() > TEXT_BYTES_MAX {
        return invalid("label: at most 256 bytes");
    }
    match new.expires_at.as_deref().map(rfc3339::parse) {
        None => Ok(()),
        Some(None) => invalid("expires_at: write RFC 3339, such as 2030-01-31T00:00:00Z"),
        Some(Some(expires)) if expires <= now => invalid("expires_at: it is in the past"),
        Some(Some(_)) => Ok(()),
    }
}

fn hash(token: &str) -> [u8; 32] {
    let mut bytes = [0; 32];
    bytes.copy_from_slice(digest(&SHA256, token.as_bytes()).as_ref());
    bytes
}

fn random_hex<const N: usize>() -> Result<String, TokenError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(|error| TokenError::Unavailable(format!("no randomness: {error}")))?;
    Ok(hex(&bytes))
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    let digits = text.as_bytes();
    if digits.len() != 64 || !digits.iter().all(u8::is_ascii_hexdigit) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, pair) in bytes.iter_mut().zip(digits.as_chunks::<2>().0) {
        let digit = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
        };
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests;
