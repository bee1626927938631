use std::ffi::c_int;
use std::fmt;
use std::ptr::{NonNull, null, null_mut};
use std::sync::Once;

use aws_lc_sys::{
    CRYPTO_library_init, EVP_AEAD_CTX, EVP_AEAD_CTX_free, EVP_AEAD_CTX_new, EVP_AEAD_CTX_seal_scatter, EVP_CIPHER_CTX,
    EVP_CIPHER_CTX_copy, EVP_CIPHER_CTX_ctrl, EVP_CIPHER_CTX_free, EVP_CIPHER_CTX_new, EVP_CTRL_AEAD_SET_TAG,
    EVP_DecryptFinal_ex, EVP_DecryptInit_ex, EVP_DecryptUpdate, EVP_aead_aes_256_gcm, EVP_aes_256_gcm,
};

use super::MemorySlice;

/// Bytes of a key.
pub const CIPHER_KEY_BYTES: usize = 32;
/// Bytes of a nonce. Under one key each may be used for one message only, for ever.
pub const CIPHER_NONCE_BYTES: usize = 12;
/// Bytes of an authentication tag.
pub const CIPHER_TAG_BYTES: usize = 16;

/// AES-256-GCM over memory regions: one pass from source to target, no copy beside it.
///
/// It works through pointers, as all access to regions does; its inputs and outputs may not overlap unless they are the
/// same range. Only ciphertext of regions that nobody else writes is safe to open: bytes that change meanwhile fail or, at
/// worst, yield other plaintext than was authenticated.
pub struct Cipher {
    context: NonNull<EVP_AEAD_CTX>,
    /// Has the key and no nonce: each opening begins as a copy of it.
    opener: Decryption,
}

// SAFETY: the context belongs to no thread, and is freed once, by drop.
unsafe impl Send for Cipher {}
// SAFETY: after they were made the contexts are only read: `seal_scatter` and `CTX_copy` take them as const, and the library
// documents that several threads may use one at the same time.
unsafe impl Sync for Cipher {}

/// What was opened is not what was sealed with this key, nonce and associated data. The target holds zeroes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the seal does not fit")]
pub struct SealBroken;

impl Cipher {
    /// Of a key. The key schedule is computed once, here.
    ///
    /// # Panics
    /// When the allocator gives no memory.
    #[must_use]
    pub fn new(key: &[u8; CIPHER_KEY_BYTES]) -> Cipher {
        static INITIALISED: Once = Once::new();
        INITIALISED.call_once(|| {
            // SAFETY: takes no arguments and may be called at any time.
            unsafe { CRYPTO_library_init() }
        });
        // SAFETY: returns a pointer to a constant.
        let algorithm = unsafe { EVP_aead_aes_256_gcm() };
        // SAFETY: the key has the length that is passed and outlives the call, which copies it.
        let context = unsafe { EVP_AEAD_CTX_new(algorithm, key.as_ptr(), key.len(), CIPHER_TAG_BYTES) };
        Cipher {
            context: NonNull::new(context).expect("memory for a key schedule"),
            opener: Decryption::of(key),
        }
    }

    /// Encrypts `source` to `target`, which is as long, and returns the tag.
    ///
    /// # Panics
    /// When the lengths differ, the target is read-only, or a message is longer than GCM allows (64 GiB).
    #[must_use]
    pub fn seal(
        &self,
        nonce: &[u8; CIPHER_NONCE_BYTES],
        associated: &[u8],
        source: &MemorySlice,
        target: &MemorySlice,
    ) -> [u8; CIPHER_TAG_BYTES] {
        check_ranges(source, target);
        // SAFETY: source and target are mappings of `len` bytes that the slices keep alive, identical or disjoint (checked).
        unsafe { self.seal_at(nonce, associated, source.as_ptr(), target.as_mut_ptr(), source.len()) }
    }

    /// As [`Cipher::seal`], to a buffer of this process.
    ///
    /// # Panics
    /// When the lengths differ, or a message is longer than GCM allows (64 GiB).
    #[must_use]
    pub fn seal_to_slice(
        &self,
        nonce: &[u8; CIPHER_NONCE_BYTES],
        associated: &[u8],
        source: &MemorySlice,
        target: &mut [u8],
    ) -> [u8; CIPHER_TAG_BYTES] {
        assert_eq!(source.len(), target.len(), "plaintext and ciphertext are equally long");
        // SAFETY: both have `len` bytes, the source in a mapping that its slice keeps alive; a `&mut [u8]` never lies in a region.
        unsafe { self.seal_at(nonce, associated, source.as_ptr(), target.as_mut_ptr(), source.len()) }
    }

    /// # Safety
    /// `source` is readable and `target` writable for `length` bytes; the two are identical or disjoint.
    unsafe fn seal_at(
        &self,
        nonce: &[u8; CIPHER_NONCE_BYTES],
        associated: &[u8],
        source: *const u8,
        target: *mut u8,
        length: usize,
    ) -> [u8; CIPHER_TAG_BYTES] {
        let mut tag = [0; CIPHER_TAG_BYTES];
        let mut tag_bytes = 0;
        // SAFETY: source and target are as the caller promises; nonce, tag and associated data have the lengths that are
        // passed and outlive the call.
        let sealed = unsafe {
            EVP_AEAD_CTX_seal_scatter(
                self.context.as_ptr(),
                target,
                tag.as_mut_ptr(),
                &raw mut tag_bytes,
                tag.len(),
                nonce.as_ptr(),
                nonce.len(),
                source,
                length,
                std::ptr::null(),
                0,
                associated.as_ptr(),
                associated.len(),
            )
        };
        assert!(
            sealed == 1 && tag_bytes == tag.len(),
            "sealing has no other way to fail"
        );
        tag
    }

    /// Decrypts `source` to `target`, which is as long. A seal that does not fit leaves zeroes in the target.
    ///
    /// # Errors
    /// [`SealBroken`].
    ///
    /// # Panics
    /// When the lengths differ or the target is read-only.
    pub fn open(
        &self,
        nonce: &[u8; CIPHER_NONCE_BYTES],
        associated: &[u8],
        source: &MemorySlice,
        tag: &[u8; CIPHER_TAG_BYTES],
        target: &MemorySlice,
    ) -> Result<(), SealBroken> {
        let mut opening = self.opening(nonce, associated);
        opening.decrypt(source, target);
        opening.finish(tag).inspect_err(|SealBroken| target.zero())
    }

    /// Begins to decrypt a message that arrives from the front, piece by piece.
    #[must_use]
    pub fn opening(&self, nonce: &[u8; CIPHER_NONCE_BYTES], associated: &[u8]) -> Opening {
        let decryption = self.opener.copy();
        decryption.begin(nonce);
        decryption.associate(associated);
        Opening { decryption }
    }
}

/// A message that is being opened. What it decrypts is worth nothing before [`Opening::finish`] says so: keep it from
/// everybody until then, and zero it if the seal is broken.
pub struct Opening {
    decryption: Decryption,
}

impl Opening {
    /// Decrypts the next piece, from `source` to `target`, which is as long.
    ///
    /// # Panics
    /// When the lengths differ, the target is read-only, or the piece has 2 GiB or more.
    pub fn decrypt(&mut self, source: &MemorySlice, target: &MemorySlice) {
        check_ranges(source, target);
        // SAFETY: source and target are mappings of `len` bytes that the slices keep alive, identical or disjoint (checked).
        unsafe { self.decrypt_at(source.as_ptr(), target.as_mut_ptr(), source.len()) }
    }

    /// As [`Opening::decrypt`], from a buffer of this process.
    ///
    /// # Panics
    /// As [`Opening::decrypt`].
    pub fn decrypt_from_slice(&mut self, source: &[u8], target: &MemorySlice) {
        assert_eq!(source.len(), target.len(), "plaintext and ciphertext are equally long");
        // SAFETY: both have `len` bytes, the target in a mapping that its slice keeps alive; a `&[u8]` never lies in a region.
        unsafe { self.decrypt_at(source.as_ptr(), target.as_mut_ptr(), source.len()) }
    }

    /// # Safety
    /// `source` is readable and `target` writable for `length` bytes; the two are identical or disjoint.
    unsafe fn decrypt_at(&mut self, source: *const u8, target: *mut u8, length: usize) {
        let length = c_int::try_from(length).expect("a piece is shorter than 2 GiB");
        let mut decrypted = 0;
        // SAFETY: source and target are as the caller promises; in this mode as many bytes come out as go in.
        let outcome =
            unsafe { EVP_DecryptUpdate(self.decryption.as_ptr(), target, &raw mut decrypted, source, length) };
        assert!(
            outcome == 1 && decrypted == length,
            "decrypting has no other way to fail"
        );
    }

    /// Whether the pieces were the whole message as it was sealed.
    ///
    /// # Errors
    /// [`SealBroken`]. The targets are not zeroed.
    pub fn finish(self, tag: &[u8; CIPHER_TAG_BYTES]) -> Result<(), SealBroken> {
        let mut expected = *tag;
        // SAFETY: the library copies as many bytes as the tag has.
        let given = unsafe {
            EVP_CIPHER_CTX_ctrl(
                self.decryption.as_ptr(),
                EVP_CTRL_AEAD_SET_TAG,
                CIPHER_TAG_BYTES as c_int,
                expected.as_mut_ptr().cast(),
            )
        };
        assert!(given == 1, "a tag of 16 bytes is a tag");
        let (mut nothing, mut length) = ([0u8; 16], 0);
        // SAFETY: `nothing` has room for a block, though this mode adds no bytes.
        let genuine = unsafe { EVP_DecryptFinal_ex(self.decryption.as_ptr(), nothing.as_mut_ptr(), &raw mut length) };
        if genuine == 1 { Ok(()) } else { Err(SealBroken) }
    }
}

/// A context of the library's that decrypts.
struct Decryption(NonNull<EVP_CIPHER_CTX>);

// SAFETY: the context belongs to no thread, and is freed once, by drop.
unsafe impl Send for Decryption {}

impl Decryption {
    fn new() -> Decryption {
        // SAFETY: takes no arguments.
        let context = unsafe { EVP_CIPHER_CTX_new() };
        Decryption(NonNull::new(context).expect("memory for a cipher"))
    }

    fn of(key: &[u8; CIPHER_KEY_BYTES]) -> Decryption {
        let made = Decryption::new();
        // SAFETY: returns a pointer to a constant.
        let algorithm = unsafe { EVP_aes_256_gcm() };
        // SAFETY: the key has the algorithm's length and outlives the call, which copies it; no nonce is given yet.
        let keyed = unsafe { EVP_DecryptInit_ex(made.as_ptr(), algorithm, null_mut(), key.as_ptr(), null()) };
        assert!(keyed == 1, "32 bytes are a key");
        made
    }

    fn copy(&self) -> Decryption {
        let made = Decryption::new();
        // SAFETY: both contexts are alive, and the one copied from is only read.
        let copied = unsafe { EVP_CIPHER_CTX_copy(made.as_ptr(), self.as_ptr()) };
        assert!(copied == 1, "memory for a cipher");
        made
    }

    fn begin(&self, nonce: &[u8; CIPHER_NONCE_BYTES]) {
        // SAFETY: the nonce has the algorithm's length and is copied; algorithm and key stay.
        let begun = unsafe { EVP_DecryptInit_ex(self.as_ptr(), null(), null_mut(), null(), nonce.as_ptr()) };
        assert!(begun == 1, "12 bytes are a nonce");
    }

    fn associate(&self, bytes: &[u8]) {
        let length = c_int::try_from(bytes.len()).expect("associated data is short");
        let mut taken = 0;
        // SAFETY: `bytes` is valid for its length; no output is asked for, which makes it associated data.
        let associated =
            unsafe { EVP_DecryptUpdate(self.as_ptr(), null_mut(), &raw mut taken, bytes.as_ptr(), length) };
        assert!(associated == 1, "associated data comes first");
    }

    fn as_ptr(&self) -> *mut EVP_CIPHER_CTX {
        self.0.as_ptr()
    }
}

impl Drop for Decryption {
    fn drop(&mut self) {
        // SAFETY: made by `EVP_CIPHER_CTX_new` and freed only here, which also wipes the key schedule.
        unsafe { EVP_CIPHER_CTX_free(self.as_ptr()) }
    }
}

impl fmt::Debug for Opening {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Opening(..)")
    }
}

impl Drop for Cipher {
    fn drop(&mut self) {
        // SAFETY: made by `EVP_AEAD_CTX_new` and freed only here, which also wipes the key schedule.
        unsafe { EVP_AEAD_CTX_free(self.context.as_ptr()) }
    }
}

impl fmt::Debug for Cipher {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Cipher(..)")
    }
}

fn check_ranges(source: &MemorySlice, target: &MemorySlice) {
    assert_eq!(source.len(), target.len(), "plaintext and ciphertext are equally long");
    let (from, to) = (source.as_ptr() as usize, target.as_ptr() as usize);
    assert!(
        from == to || from + source.len() <= to || to + target.len() <= from,
        "source and target overlap"
    );
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryRegion;

    fn slices() -> (MemorySlice, MemorySlice, MemorySlice) {
        let region = MemoryRegion::anonymous(3 << 20).expect("memory");
        let slice = |at: usize| region.slice(at << 20, 70_001).expect("inside");
        slice(0)
            .copy_from_slice(&(0..70_001).map(|byte: u32| (byte % 251) as u8).collect::<Vec<u8>>())
            .expect("as long");
        (slice(0), slice(1), slice(2))
    }

    #[test]
    fn what_was_sealed_is_opened_and_looks_like_nothing_meanwhile() {
        let (plain, sealed, opened) = slices();
        let cipher = Cipher::new(&[7; 32]);
        let tag = cipher.seal(&[1; 12], b"place", &plain, &sealed);
        assert_ne!(plain.to_vec(), sealed.to_vec());
        cipher
            .open(&[1; 12], b"place", &sealed, &tag, &opened)
            .expect("sealed so");
        assert_eq!(plain.to_vec(), opened.to_vec());
    }

    #[test]
    fn another_key_nonce_place_tag_or_byte_breaks_the_seal_and_zeroes_the_target() {
        let (plain, sealed, opened) = slices();
        let cipher = Cipher::new(&[7; 32]);
        let tag = cipher.seal(&[1; 12], b"place", &plain, &sealed);
        let mut other_tag = tag;
        other_tag[15] ^= 1;
        let refuses = |cipher: &Cipher, nonce: u8, place: &[u8], tag: &[u8; 16]| {
            opened.copy_from_slice(&vec![0xee; opened.len()]).expect("as long");
            assert_eq!(cipher.open(&[nonce; 12], place, &sealed, tag, &opened), Err(SealBroken));
            assert!(opened.to_vec().iter().all(|byte| *byte == 0), "the target holds zeroes");
        };
        refuses(&Cipher::new(&[8; 32]), 1, b"place", &tag);
        refuses(&cipher, 2, b"place", &tag);
        refuses(&cipher, 1, b"elsewhere", &tag);
        refuses(&cipher, 1, b"place", &other_tag);
        let byte = sealed.subslice(69_999, 1).expect("inside");
        byte.copy_from_slice(&[byte.to_vec()[0] ^ 0x10]).expect("one byte");
        refuses(&cipher, 1, b"place", &tag);
    }

    #[test]
    fn a_message_opens_piece_by_piece_as_it_does_at_once_and_a_missing_piece_breaks_it() {
        let (plain, sealed, opened) = slices();
        let cipher = Cipher::new(&[7; 32]);
        let tag = cipher.seal(&[1; 12], b"place", &plain, &sealed);
        for cuts in [&[0, 70_001][..], &[0, 4096, 70_001], &[0, 1, 17, 5000, 65_536, 70_001]] {
            opened.zero();
            let mut opening = cipher.opening(&[1; 12], b"place");
            for cut in cuts.windows(2) {
                let piece = |of: &MemorySlice| of.subslice(cut[0], cut[1] - cut[0]).expect("inside");
                opening.decrypt(&piece(&sealed), &piece(&opened));
            }
            assert_eq!(opening.finish(&tag), Ok(()));
            assert_eq!(plain.to_vec(), opened.to_vec());
        }
        let mut opening = cipher.opening(&[1; 12], b"place");
        let front = |of: &MemorySlice| of.subslice(0, 70_000).expect("inside");
        opening.decrypt(&front(&sealed), &front(&opened));
        assert_eq!(opening.finish(&tag), Err(SealBroken));
    }

    #[test]
    fn a_buffer_of_the_process_takes_and_gives_the_same_ciphertext_as_a_region() {
        let (plain, sealed, opened) = slices();
        let cipher = Cipher::new(&[7; 32]);
        let tag = cipher.seal(&[1; 12], b"place", &plain, &sealed);
        let mut buffer = vec![0; plain.len()];
        assert_eq!(cipher.seal_to_slice(&[1; 12], b"place", &plain, &mut buffer), tag);
        assert_eq!(buffer, sealed.to_vec());
        let mut opening = cipher.opening(&[1; 12], b"place");
        opening.decrypt_from_slice(&buffer, &opened);
        assert_eq!(opening.finish(&tag), Ok(()));
        assert_eq!(plain.to_vec(), opened.to_vec());
        buffer[70_000] ^= 1;
        let mut opening = cipher.opening(&[1; 12], b"place");
        opening.decrypt_from_slice(&buffer, &opened);
        assert_eq!(opening.finish(&tag), Err(SealBroken));
    }

    /// Test case 14 of the GCM specification (McGrew, Viega): a zero key, nonce and block.
    #[test]
    fn it_is_aes_256_gcm() {
        let region = MemoryRegion::anonymous(4096).expect("memory");
        let (plain, sealed) = (
            region.slice(0, 16).expect("inside"),
            region.slice(64, 16).expect("inside"),
        );
        let tag = Cipher::new(&[0; 32]).seal(&[0; 12], b"", &plain, &sealed);
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
        assert_eq!(hex(&sealed.to_vec()), "cea7403d4d606b6e074ec5d3baf39d18");
        assert_eq!(hex(&tag), "d0d1c8a799996bf0265b98b5d48ab919");
    }
}
