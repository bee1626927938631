//! Whether and how blocks are compressed before they are sealed: a sample of each is tried, and the cost model says whether fewer bytes on
//! the way are worth what it costs a reader to decompress them.

use std::time::Instant;

use kvtier_storage::compression::{Compressor, Decompressor, Element};
use kvtier_transfer::memory::MemorySlice;
use parking_lot::Mutex;
use zeroize::Zeroize;

use crate::settings::RemoteCompression;

/// What of a block is tried: from its middle, for its beginning may be unlike the rest.
const SAMPLE_BYTES: usize = 64 << 10;
/// A sample must shrink to this share of itself.
const WORTH: f64 = 0.97;
/// Weight of one sample in what decompressing takes: a thread may be held up in the middle of one.
const WEIGHT: f64 = 1.0 / 8.0;

/// See the module.
pub(super) struct Compressing {
    setting: RemoteCompression,
    state: Mutex<Option<State>>,
}

struct State {
    compressor: Compressor,
    decompressor: Decompressor,
    sample: Vec<u8>,
    frame: Vec<u8>,
    /// Seconds that a byte of a block takes to come out of its frame; 0 before the first.
    s_per_byte: f64,
}

impl Compressing {
    pub(super) fn new(setting: RemoteCompression) -> Compressing {
        Compressing {
            setting,
            state: Mutex::default(),
        }
    }

    /// As what to compress a block, if at all. `pays` is asked with the share that is left of it and the bytes a second at which it comes
    /// out again; `None`: nobody knows, and `auto` leaves it as it is.
    pub(super) fn choose(&self, block: &MemorySlice, pays: Option<&dyn Fn(f64, f64) -> bool>) -> Option<Element> {
        let fixed = match self.setting {
            RemoteCompression::Off => return None,
            RemoteCompression::Bf16 => Some(Element::Bf16),
            RemoteCompression::Fp16 => Some(Element::Fp16),
            RemoteCompression::Bytes => Some(Element::Bytes),
            RemoteCompression::Auto => None,
        };
        if fixed.is_some() {
            return fixed;
        }
        let pays = pays?;
        let mut state = self.state.lock();
        if state.is_none() {
            *state = State::new();
        }
        let state = state.as_mut()?;
        let tried = state.try_sample(block);
        // Neither a part of a block nor a frame of it outlives this: a purge would not find them here.
        state.sample.zeroize();
        state.frame.zeroize();
        let (element, ratio) = tried?;
        (ratio <= WORTH && pays(ratio, 1.0 / state.s_per_byte)).then_some(element)
    }
}

impl State {
    fn new() -> Option<State> {
        Some(State {
            compressor: Compressor::new().ok()?,
            decompressor: Decompressor::new().ok()?,
            sample: Vec::new(),
            frame: Vec::new(),
            s_per_byte: 0.0,
        })
    }

    /// What shrinks a part of the block most, and to what share.
    fn try_sample(&mut self, block: &MemorySlice) -> Option<(Element, f64)> {
        let length = block.len().min(SAMPLE_BYTES);
        // Even: elements have two bytes.
        let offset = ((block.len() - length) / 2) & !1;
        self.sample.resize(length, 0);
        block
            .subslice(offset, length)
            .ok()?
            .copy_to_slice(&mut self.sample)
            .ok()?;
        let mut best: Option<(Element, f64)> = None;
        for element in [Element::Bf16, Element::Fp16, Element::Bytes] {
            self.frame.clear();
            self.compressor.compress(element, &self.sample, &mut self.frame).ok()?;
            let ratio = self.frame.len() as f64 / length.max(1) as f64;
            if best.is_none_or(|(_, least)| ratio < least) {
                best = Some((element, ratio));
            }
        }
        let (element, ratio) = best?;
        if ratio <= WORTH {
            self.frame.clear();
            self.compressor.compress(element, &self.sample, &mut self.frame).ok()?;
            let begun = Instant::now();
            self.decompressor.decompress(&self.frame, &mut self.sample).ok()?;
            let took = begun.elapsed().as_secs_f64().max(1e-9) / length as f64;
            self.s_per_byte = if self.s_per_byte == 0.0 {
                took
            } else {
                self.s_per_byte + WEIGHT * (took - self.s_per_byte)
            };
        }
        Some((element, ratio))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use kvtier_transfer::memory::MemoryRegion;

    use super::*;

    const BYTES: usize = 256 << 10;

    fn block(fill: impl Fn(u64) -> u16) -> MemorySlice {
        let region = MemoryRegion::anonymous(BYTES).expect("memory");
        let slice = region.slice(0, BYTES).expect("inside");
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let bytes: Vec<u8> = (0..BYTES / 2)
            .flat_map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                fill(state >> 16).to_le_bytes()
            })
            .collect();
        slice.copy_from_slice(&bytes).expect("writable");
        slice
    }

    /// Sixteen exponents, anything else.
    fn brain_floats() -> MemorySlice {
        block(|random| ((random & 0x807f) | ((118 + (random >> 20) % 16) << 7)) as u16)
    }

    #[test]
    fn the_sample_tells_what_a_block_is_made_of() {
        let auto = Compressing::new(RemoteCompression::Auto);
        let always: &dyn Fn(f64, f64) -> bool = &|ratio, rate| ratio < 0.9 && rate > 0.0 && rate.is_finite();
        assert_eq!(auto.choose(&brain_floats(), Some(always)), Some(Element::Bf16));
        assert_eq!(auto.choose(&block(|random| random as u16), Some(always)), None);
        let text = block(|random| if random.is_multiple_of(5) { 0x2020 } else { 0x6574 });
        assert!(auto.choose(&text, Some(always)).is_some());
    }

    #[test]
    fn the_model_has_the_last_word_only_where_nobody_else_has() {
        let asked = Cell::new(0);
        let never: &dyn Fn(f64, f64) -> bool = &|_, _| {
            asked.set(asked.get() + 1);
            false
        };
        let floats = brain_floats();
        assert_eq!(
            Compressing::new(RemoteCompression::Auto).choose(&floats, Some(never)),
            None
        );
        assert_eq!(asked.get(), 1);
        assert_eq!(Compressing::new(RemoteCompression::Auto).choose(&floats, None), None);
        assert_eq!(
            Compressing::new(RemoteCompression::Off).choose(&floats, Some(never)),
            None
        );
        let fixed = Compressing::new(RemoteCompression::Bf16);
        assert_eq!(fixed.choose(&floats, Some(never)), Some(Element::Bf16));
        assert_eq!(asked.get(), 1);
    }
}
