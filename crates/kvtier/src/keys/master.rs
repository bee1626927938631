use std::fmt;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use aws_lc_rs::aead::{AES_256_GCM, Aad, Nonce, RandomizedNonceKey};
use kvtier_storage::nvme::DataKey;
use zeroize::{Zeroize, Zeroizing};

use super::{KeyError, disk};

/// Bytes of a wrapped data key: the key and its tag.
pub(super) const WRAPPED_BYTES: usize = 48;
pub(super) const NONCE_BYTES: usize = 12;

const KEY_BYTES: usize = 32;
/// Hex digits, and some white space around them.
const FILE_BYTES_MAX: u64 = 256;

/// Which master key: 16 bytes of a digest of it. Says nothing about the key and may be shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyId(pub [u8; 16]);

impl fmt::Display for KeyId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(formatter, "{byte:02x}"))
    }
}

/// The key that wraps data keys. Never shown; zeroed when dropped.
pub struct MasterKey {
    id: KeyId,
    wrapping: RandomizedNonceKey,
}

/// A data key that only the master key opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wrapped {
    pub(super) nonce: [u8; NONCE_BYTES],
    pub(super) bytes: [u8; WRAPPED_BYTES],
}

impl fmt::Debug for MasterKey {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "MasterKey({}, ..)", self.id)
    }
}

impl MasterKey {
    /// Of these bytes, which are random.
    ///
    /// # Panics
    /// Never: the cipher takes every key of this length.
    #[must_use]
    pub fn new(bytes: &[u8; KEY_BYTES]) -> MasterKey {
        let digest = blake3::derive_key("kvtier v1 master key id", bytes);
        let mut id = KeyId::default();
        id.0.copy_from_slice(&digest[..16]);
        // What wraps is derived, so that a later use of the same file can never meet these ciphertexts.
        let wrapping = Zeroizing::new(blake3::derive_key("kvtier v1 master key wraps data keys", bytes));
        let wrapping = RandomizedNonceKey::new(&AES_256_GCM, &wrapping[..]).expect("AES-256 takes any 32 bytes");
        MasterKey { id, wrapping }
    }

    /// Its name.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Reads a key file: 64 hexadecimal digits, for its owner's eyes only. `None` where there is no such file.
    ///
    /// # Errors
    /// When it cannot be read, others may read it, or it holds no key.
    pub fn read(path: &Path) -> Result<Option<MasterKey>, KeyError> {
        Ok(read_secret(path)?.map(|bytes| MasterKey::new(&bytes)))
    }

    /// Draws a key and writes its file, durable before this returns. Nothing may be there yet.
    pub(super) fn make(path: &Path) -> Result<MasterKey, KeyError> {
        let mut bytes = Zeroizing::new([0; KEY_BYTES]);
        fill_random(&mut bytes[..]).map_err(KeyError::Randomness)?;
        disk::write_whole(path, &to_hex(&bytes)[..])?;
        Ok(MasterKey::new(&bytes))
    }

    /// Wraps a data key. `bound` must be shown again to open it.
    pub(super) fn wrap(&self, bound: &[u8], key: &DataKey) -> io::Result<Wrapped> {
        let mut inside = Zeroizing::new(*key.bytes());
        let (nonce, tag) = self
            .wrapping
            .seal_in_place_separate_tag(Aad::from(bound), &mut inside[..])
            .map_err(|_| io::Error::other("the cipher refused to wrap a key"))?;
        let mut bytes = [0; WRAPPED_BYTES];
        bytes[..KEY_BYTES].copy_from_slice(&inside[..]);
        bytes[KEY_BYTES..].copy_from_slice(tag.as_ref());
        Ok(Wrapped {
            nonce: *nonce.as_ref(),
            bytes,
        })
    }

    /// The data key inside; `None` where a bit of it or of `bound` is not what it was.
    pub(super) fn unwrap(&self, bound: &[u8], wrapped: &Wrapped) -> Option<DataKey> {
        let mut inside = Zeroizing::new(wrapped.bytes);
        let nonce = Nonce::assume_unique_for_key(wrapped.nonce);
        let opened = self
            .wrapping
            .open_in_place(nonce, Aad::from(bound), &mut inside[..])
            .ok()?;
        let mut key: [u8; KEY_BYTES] = (&*opened).try_into().ok()?;
        let data_key = DataKey::new(key);
        key.zeroize();
        Some(data_key)
    }
}

/// Reads 32 secret bytes from a file of 64 hexadecimal digits, for its owner's eyes only. `None` where there is no such file.
pub(crate) fn read_secret(path: &Path) -> Result<Option<Zeroizing<[u8; KEY_BYTES]>>, KeyError> {
    // Symbolic links are followed: an orchestrator mounts secrets that way.
    let file = match OpenOptions::new()
        .read(true)
        .custom_flags(i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0))
        .open(path)
    {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(KeyError::io("open", path)(error)),
    };
    let bad = || KeyError::BadKeyFile { path: path.to_owned() };
    let metadata = file.metadata().map_err(KeyError::io("look at", path))?;
    if !metadata.is_file() {
        return Err(bad());
    }
    let owners = [rustix::process::geteuid().as_raw(), 0];
    if metadata.mode() & 0o077 != 0 || !owners.contains(&metadata.uid()) {
        return Err(KeyError::OpenKeyFile {
            path: path.to_owned(),
            mode: metadata.mode() & 0o7777,
        });
    }
    // Reserved beforehand: a buffer that grows leaves copies behind.
    let mut text = Zeroizing::new(Vec::with_capacity(FILE_BYTES_MAX as usize));
    file.take(FILE_BYTES_MAX)
        .read_to_end(&mut text)
        .map_err(KeyError::io("read", path))?;
    let bytes = from_hex(text.trim_ascii()).ok_or_else(bad)?;
    Ok(Some(bytes))
}

/// A new data key.
pub(super) fn draw_data_key() -> io::Result<DataKey> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    fill_random(&mut bytes[..])?;
    Ok(DataKey::new(*bytes))
}

pub(super) fn fill_random(target: &mut [u8]) -> io::Result<()> {
    getrandom::fill(target).map_err(|error| io::Error::other(error.to_string()))
}

fn to_hex(bytes: &[u8; KEY_BYTES]) -> Zeroizing<[u8; 2 * KEY_BYTES + 1]> {
    let mut text = Zeroizing::new([b'\n'; 2 * KEY_BYTES + 1]);
    let digit = |nibble: u8| if nibble < 10 { b'0' + nibble } else { b'a' + nibble - 10 };
    for (byte, pair) in bytes.iter().zip(text.as_chunks_mut::<2>().0) {
        *pair = [digit(byte >> 4), digit(byte & 15)];
    }
    text
}

fn from_hex(text: &[u8]) -> Option<Zeroizing<[u8; KEY_BYTES]>> {
    let mut bytes = Zeroizing::new([0; KEY_BYTES]);
    if text.len() != 2 * KEY_BYTES {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(text.as_chunks::<2>().0) {
        let nibble = |digit: u8| {
            char::from(digit)
                .to_digit(16)
                .and_then(|value| u8::try_from(value).ok())
        };
        *byte = nibble(pair[0])? << 4 | nibble(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_wrapped_key_opens_only_unchanged_and_bound_to_the_same() {
        let master = MasterKey::new(&[7; 32]);
        let key = DataKey::new([9; 32]);
        let wrapped = master.wrap(b"slot 3", &key).unwrap();
        assert_eq!(master.unwrap(b"slot 3", &wrapped).expect("opens").bytes(), key.bytes());
        assert!(master.unwrap(b"slot 4", &wrapped).is_none());
        assert!(MasterKey::new(&[8; 32]).unwrap(b"slot 3", &wrapped).is_none());
        for place in 0..WRAPPED_BYTES {
            let mut other = wrapped;
            other.bytes[place] ^= 1;
            assert!(master.unwrap(b"slot 3", &other).is_none(), "byte {place}");
        }
        let again = master.wrap(b"slot 3", &key).unwrap();
        assert_ne!(again.nonce, wrapped.nonce);
    }

    #[test]
    fn a_made_key_is_private_and_reads_back() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("master.key");
        assert!(MasterKey::read(&path).unwrap().is_none());
        let made = MasterKey::make(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(MasterKey::read(&path).unwrap().unwrap().id(), made.id());
        assert!(MasterKey::make(&path).is_err(), "an existing key is never overwritten");
        let names: Vec<_> = fs::read_dir(directory.path()).unwrap().collect();
        assert_eq!(names.len(), 1, "nothing is left beside it: {names:?}");
    }

    #[test]
    fn a_key_file_that_others_read_or_that_holds_no_key_is_refused_with_its_remedy_and_never_shown() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let digits = "ab".repeat(32);
        for (text, mode, remedy) in [
            (digits.clone(), 0o640, "chmod 0600"),
            (digits.clone(), 0o604, "chmod 0600"),
            (digits[..62].to_string(), 0o600, "openssl rand -hex 32"),
            (format!("{digits}ab"), 0o600, "openssl rand -hex 32"),
            (digits.replacen('a', "g", 1), 0o600, "openssl rand -hex 32"),
            (String::new(), 0o600, "openssl rand -hex 32"),
        ] {
            fs::write(&path, &text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let words = MasterKey::read(&path).unwrap_err().to_string();
            assert!(words.contains(remedy) && words.contains("key"), "{words}");
            assert!(!words.contains("abab"), "{words}");
        }
        fs::write(&path, format!(" {}\n", digits.to_uppercase())).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o400)).unwrap();
        let key = MasterKey::read(&path).unwrap().unwrap();
        assert_eq!(key.id(), MasterKey::new(&[0xab; 32]).id());
        assert!(!format!("{key:?}").contains("abab"));
        assert!(MasterKey::read(directory.path()).is_err(), "a directory is no key");
    }
}
