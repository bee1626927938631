//! Fewer bytes for slow tiers, without loss: the exponents of two-byte floating-point numbers are set apart and compressed.
//!
//! Keys and values are noise to a byte compressor, except that their exponents take few values. A block of bf16 or fp16 is cut into a
//! plane of exponents, which zstd's entropy coder halves or better, and a plane of signs and mantissas, which stays as it is.
//! On drawn normal numbers bf16 shrinks to two thirds and fp16 to six sevenths; `cargo bench -p kvtier-storage --bench compression` says how fast.
//! Whether a backend is slow enough for this to pay is the cost model's business; a block that does not shrink is kept plain.
//!
//! Read first: [`Compressor`], [`Decompressor`], [`Element`].
//!
//! # Format
//!
//! Little-endian.
//!
//! ```text
//! 0   1   version: 1
//! 1   1   coding: 0 plain, 1 zstd, 2 bf16 planes, 3 fp16 planes
//! 2   2   zero
//! 4   4   raw_bytes: length of the block
//! 8   4   zstd_bytes: length of the zstd frame; 0 with coding 0
//! 12  n   coding 0: the block
//!         coding 1: one zstd frame of the block
//!         coding 2, 3: one zstd frame of the plane of exponents (raw_bytes / 2), then the other plane (raw_bytes / 2)
//! ```
//!
//! bf16, from the highest bit: sign, 8 of exponent, 7 of mantissa. Planes: the exponent; the sign above the mantissa.
//! fp16: sign, 5 of exponent, 10 of mantissa. Planes: the upper byte, turned left so that the sign is its lowest bit; the lower.
//!
//! Nothing here is authenticated: what crosses a wire is compressed, then sealed, and opened before it comes back here. All the same
//! a damaged or hostile frame is an error, and never more memory than the block that was asked for.

use thiserror::Error;
use zstd::zstd_safe::CParameter;

mod planes;

#[cfg(test)]
mod tests;

/// Bytes before the payload.
pub const HEADER_BYTES: usize = 12;

/// What compression may add to a block at most.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES;

const VERSION: u8 = 1;

/// Entropy coding is all that exponents give: a search for repetitions only costs time, on both ways.
const LEVEL: i32 = 1;

/// A block must shrink to this share of itself, in thousandths, or it is kept plain: reading it is then a copy.
const WORTH_PERMILLE: usize = 970;

/// What a block is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// Brain floats: 8 bits of exponent.
    Bf16,
    /// Half-precision floats: 5 bits of exponent.
    Fp16,
    /// Anything else.
    Bytes,
}

/// How a frame is coded.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Coding {
    Plain,
    Zstd,
    Planes(Element),
}

impl Coding {
    fn code(self) -> u8 {
        match self {
            Coding::Plain => 0,
            Coding::Zstd | Coding::Planes(Element::Bytes) => 1,
            Coding::Planes(Element::Bf16) => 2,
            Coding::Planes(Element::Fp16) => 3,
        }
    }

    fn of(code: u8) -> Option<Coding> {
        Some(match code {
            0 => Coding::Plain,
            1 => Coding::Zstd,
            2 => Coding::Planes(Element::Bf16),
            3 => Coding::Planes(Element::Fp16),
            _ => return None,
        })
    }
}

/// A frame that cannot be read: treat it as a miss.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Error)]
pub enum CompressionError {
    /// It is not of this format, or its lengths contradict each other.
    #[error("not a compressed block of version {VERSION}")]
    Malformed,
    /// It holds another number of bytes than was asked for.
    #[error("the compressed block holds {stored} bytes, not {asked}")]
    Length {
        /// What the frame says.
        stored: usize,
        /// What the caller made room for.
        asked: usize,
    },
    /// Its zstd frame is damaged.
    #[error("the compressed block is damaged")]
    Damaged,
    /// A block of 4 GiB or more.
    #[error("a block of {bytes} bytes is too large to be compressed")]
    TooLarge {
        /// Its length.
        bytes: usize,
    },
    /// zstd found no memory.
    #[error("no memory for a compressor")]
    Memory,
}

/// Compresses blocks, one after the other, in memory that it keeps: half a block, and zstd's tables.
pub struct Compressor {
    of_planes: zstd::bulk::Compressor<'static>,
    /// Takes memory only once it is used.
    of_bytes: zstd::bulk::Compressor<'static>,
    exponents: Vec<u8>,
}

impl Compressor {
    /// A compressor.
    ///
    /// # Errors
    /// [`CompressionError::Memory`].
    pub fn new() -> Result<Compressor, CompressionError> {
        let compressor = || zstd::bulk::Compressor::new(LEVEL).map_err(|_| CompressionError::Memory);
        let (mut of_planes, of_bytes) = (compressor()?, compressor()?);
        // Repetitions in a plane of exponents are chance: naming one takes as many bits as its bytes do, and slows the reader
        // down. A table of 64 places finds those of zeros and few others.
        for parameter in [CParameter::MinMatch(7), CParameter::HashLog(6)] {
            of_planes
                .set_parameter(parameter)
                .map_err(|_| CompressionError::Memory)?;
        }
        Ok(Compressor {
            of_planes,
            of_bytes,
            exponents: Vec::new(),
        })
    }

    /// Appends `block` to `target` as a frame: at most [`OVERHEAD_BYTES`] more than the block.
    ///
    /// # Errors
    /// [`CompressionError::TooLarge`]; `target` is as it was.
    pub fn compress(&mut self, element: Element, block: &[u8], target: &mut Vec<u8>) -> Result<(), CompressionError> {
        let raw_bytes = u32::try_from(block.len()).map_err(|_| CompressionError::TooLarge { bytes: block.len() })?;
        let start = target.len();
        let even = block.len().is_multiple_of(2);
        let coding = match element {
            Element::Bf16 | Element::Fp16 if even => Coding::Planes(element),
            _ => Coding::Zstd,
        };
        let plane_bytes = block.len() / 2;
        target.resize(start + HEADER_BYTES, 0);
        let (source, coder) = match coding {
            Coding::Planes(element) => {
                self.exponents.resize(plane_bytes, 0);
                planes::exponents(element, block, &mut self.exponents);
                (&self.exponents[..], &mut self.of_planes)
            }
            _ => (block, &mut self.of_bytes),
        };
        let room = zstd::zstd_safe::compress_bound(source.len());
        target.resize(start + HEADER_BYTES + room, 0);
        let written = coder.compress_to_buffer(source, &mut target[start + HEADER_BYTES..]);
        // It cannot fail for want of room; where it fails otherwise, a plain block is as good.
        let zstd_bytes = written.unwrap_or(usize::MAX);
        let rest = if matches!(coding, Coding::Planes(_)) {
            plane_bytes
        } else {
            0
        };
        let pays = zstd_bytes.saturating_add(rest) <= block.len() / 1000 * WORTH_PERMILLE;
        let (coding, zstd_bytes) = if pays { (coding, zstd_bytes) } else { (Coding::Plain, 0) };
        target.truncate(start + HEADER_BYTES + zstd_bytes);
        match coding {
            Coding::Plain => target.extend_from_slice(block),
            Coding::Zstd => {}
            Coding::Planes(element) => planes::append_mantissas(element, block, target),
        }
        let header = &mut target[start..start + HEADER_BYTES];
        header[0] = VERSION;
        header[1] = coding.code();
        header[4..8].copy_from_slice(&raw_bytes.to_le_bytes());
        header[8..12].copy_from_slice(&(zstd_bytes as u32).to_le_bytes());
        Ok(())
    }
}

/// Reads frames, one after the other, in memory that it keeps: half a block, and zstd's tables.
pub struct Decompressor {
    zstd: zstd::bulk::Decompressor<'static>,
    exponents: Vec<u8>,
}

impl Decompressor {
    /// A decompressor.
    ///
    /// # Errors
    /// [`CompressionError::Memory`].
    pub fn new() -> Result<Decompressor, CompressionError> {
        Ok(Decompressor {
            zstd: zstd::bulk::Decompressor::new().map_err(|_| CompressionError::Memory)?,
            exponents: Vec::new(),
        })
    }

    /// Fills `block` from `frame`. On an error `block` holds zeros.
    ///
    /// # Errors
    /// [`CompressionError`]: the frame is not one, not of this length, or damaged.
    pub fn decompress(&mut self, frame: &[u8], block: &mut [u8]) -> Result<(), CompressionError> {
        let read = self.read(frame, block);
        if read.is_err() {
            block.fill(0);
        }
        read
    }

    fn read(&mut self, frame: &[u8], block: &mut [u8]) -> Result<(), CompressionError> {
        let (header, payload) = frame
            .split_first_chunk::<HEADER_BYTES>()
            .ok_or(CompressionError::Malformed)?;
        let [version, code, 0, 0, a, b, c, d, e, f, g, h] = *header else {
            return Err(CompressionError::Malformed);
        };
        let (raw_bytes, zstd_bytes) = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes([e, f, g, h]));
        let coding = Coding::of(code).ok_or(CompressionError::Malformed)?;
        if version != VERSION {
            return Err(CompressionError::Malformed);
        }
        if raw_bytes as usize != block.len() {
            return Err(CompressionError::Length {
                stored: raw_bytes as usize,
                asked: block.len(),
            });
        }
        let (packed, rest) = payload
            .split_at_checked(zstd_bytes as usize)
            .ok_or(CompressionError::Malformed)?;
        let rest_bytes = match coding {
            Coding::Plain => block.len(),
            Coding::Zstd => 0,
            Coding::Planes(_) => block.len() / 2,
        };
        if rest.len() != rest_bytes || (coding == Coding::Plain && zstd_bytes != 0) {
            return Err(CompressionError::Malformed);
        }
        match coding {
            Coding::Plain => block.copy_from_slice(rest),
            Coding::Zstd => unpack(&mut self.zstd, packed, block)?,
            Coding::Planes(_) if !block.len().is_multiple_of(2) => return Err(CompressionError::Malformed),
            Coding::Planes(element) => {
                self.exponents.resize(block.len() / 2, 0);
                unpack(&mut self.zstd, packed, &mut self.exponents)?;
                planes::join(element, &self.exponents, rest, block);
            }
        }
        Ok(())
    }
}

/// Fills the whole of `target` from one zstd frame. zstd writes within `target` and takes no memory that the frame asks for.
fn unpack(
    zstd: &mut zstd::bulk::Decompressor<'static>,
    packed: &[u8],
    target: &mut [u8],
) -> Result<(), CompressionError> {
    match zstd.decompress_to_buffer(packed, target) {
        Ok(bytes) if bytes == target.len() => Ok(()),
        _ => Err(CompressionError::Damaged),
    }
}
