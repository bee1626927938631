use std::fmt;
use std::path::Path;

use aws_lc_rs::digest::{SHA256, digest};
use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::receipt::hex;
use crate::keys::{KeyError, disk};

const SEED_BYTES: usize = 32;

/// A public key as RFC 8037 writes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Jwk {
    /// `OKP`.
    pub kty: String,
    /// `Ed25519`.
    pub crv: String,
    /// The key, base64url without padding.
    pub x: String,
    /// 32 hexadecimal digits: the front of the key's SHA-256.
    pub kid: String,
    /// `EdDSA`.
    pub alg: String,
    /// `sig`.
    #[serde(rename = "use")]
    pub usage: String,
}

/// Public keys by id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeySet {
    /// In the order in which they came into use.
    pub keys: Vec<Jwk>,
}

impl Jwk {
    pub(super) fn of(public: &[u8]) -> Jwk {
        Jwk {
            kty: "OKP".into(),
            crv: "Ed25519".into(),
            x: URL_SAFE_NO_PAD.encode(public),
            kid: key_id(public),
            alg: "EdDSA".into(),
            usage: "sig".into(),
        }
    }

    /// The key itself; `None` where this is no Ed25519 key, or its id is not its own.
    pub(super) fn public(&self) -> Option<Vec<u8>> {
        let public = URL_SAFE_NO_PAD.decode(&self.x).ok()?;
        let fits = self.kty == "OKP" && self.crv == "Ed25519" && public.len() == 32 && self.kid == key_id(&public);
        fits.then_some(public)
    }

    pub(super) fn verifies(&self, message: &[u8], signature: &str) -> bool {
        let (Some(public), Ok(signature)) = (self.public(), URL_SAFE_NO_PAD.decode(signature)) else {
            return false;
        };
        UnparsedPublicKey::new(&ED25519, public)
            .verify(message, &signature)
            .is_ok()
    }
}

impl KeySet {
    /// The key of this id.
    #[must_use]
    pub fn find(&self, kid: &str) -> Option<&Jwk> {
        self.keys.iter().find(|key| key.kid == kid)
    }
}

fn key_id(public: &[u8]) -> String {
    hex(&digest(&SHA256, public).as_ref()[..16])
}

/// The key that signs. Never shown; its file is its owner's only.
pub(super) struct SigningKey {
    pair: Ed25519KeyPair,
    pub(super) jwk: Jwk,
}

impl fmt::Debug for SigningKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "SigningKey({}, ..)", self.jwk.kid)
    }
}

impl SigningKey {
    fn of(seed: &[u8], path: &Path) -> Result<SigningKey, KeyError> {
        let bad = |_| KeyError::BadKeyFile { path: path.to_owned() };
        let pair = Ed25519KeyPair::from_seed_unchecked(seed).map_err(bad)?;
        let jwk = Jwk::of(pair.public_key().as_ref());
        Ok(SigningKey { pair, jwk })
    }

    /// Reads the key, 64 hexadecimal digits; `None` where there is none.
    pub(super) fn read(path: &Path) -> Result<Option<SigningKey>, KeyError> {
        crate::keys::read_secret(path)?
            .map(|seed| SigningKey::of(&seed[..], path))
            .transpose()
    }

    /// Draws a key and makes its file, durably.
    pub(super) fn make(path: &Path) -> Result<SigningKey, KeyError> {
        let mut seed = Zeroizing::new([0; SEED_BYTES]);
        getrandom::fill(&mut seed[..])
            .map_err(|error| KeyError::Randomness(std::io::Error::other(error.to_string())))?;
        disk::write_whole(path, Zeroizing::new(hex(&seed[..])).as_bytes())?;
        SigningKey::of(&seed[..], path)
    }

    pub(super) fn sign(&self, message: &[u8]) -> String {
        URL_SAFE_NO_PAD.encode(self.pair.sign(message))
    }
}
