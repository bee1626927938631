use proptest::prelude::*;

use super::{CompressionError, Compressor, Decompressor, Element, HEADER_BYTES, OVERHEAD_BYTES};

const ELEMENTS: [Element; 3] = [Element::Bf16, Element::Fp16, Element::Bytes];

fn compress(element: Element, block: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    Compressor::new().unwrap().compress(element, block, &mut frame).unwrap();
    frame
}

fn decompress(frame: &[u8], bytes: usize) -> Result<Vec<u8>, CompressionError> {
    let mut block = vec![0xa5; bytes];
    let read = Decompressor::new().unwrap().decompress(frame, &mut block);
    assert!(
        read.is_ok() || block.iter().all(|byte| *byte == 0),
        "an error leaves zeros"
    );
    read.map(|()| block)
}

/// Numbers of a normal distribution whose scale differs from channel to channel, as keys and values have them.
fn normals(count: usize) -> impl Iterator<Item = f32> {
    let mut state = 7u64;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((state >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    };
    (0..count).map(move |index| {
        let scale = 1.0 + ((index % 128) as f64 / 16.0).floor() / 4.0;
        (scale * (-2.0 * uniform().ln()).sqrt() * (std::f64::consts::TAU * uniform()).cos()) as f32
    })
}

fn bf16_block(bytes: usize) -> Vec<u8> {
    normals(bytes / 2)
        .flat_map(|number| ((number.to_bits() >> 16) as u16).to_le_bytes())
        .collect()
}

/// As `bf16_block`, in half precision; rounded towards zero, which is as good for a test.
fn fp16_block(bytes: usize) -> Vec<u8> {
    let half = |number: f32| {
        let bits = number.to_bits();
        let exponent = ((bits >> 23) & 0xff) as i32 - 127 + 15;
        let sign = ((bits >> 16) & 0x8000) as u16;
        if exponent <= 0 {
            sign
        } else {
            sign | ((exponent as u16) << 10) | ((bits >> 13) & 0x3ff) as u16
        }
    };
    normals(bytes / 2)
        .flat_map(|number| half(number).to_le_bytes())
        .collect()
}

#[test]
fn bf16_shrinks_by_a_third_and_fp16_by_a_tenth() {
    for (element, block, least) in [
        (Element::Bf16, bf16_block(1 << 20), 1.4),
        (Element::Fp16, fp16_block(1 << 20), 1.1),
    ] {
        let frame = compress(element, &block);
        let ratio = block.len() as f64 / frame.len() as f64;
        assert!(ratio > least, "{element:?}: {ratio}");
        assert!(
            compress(Element::Bytes, &block).len() > frame.len(),
            "{element:?}: zstd alone does no better"
        );
        assert_eq!(decompress(&frame, block.len()), Ok(block));
    }
}

#[test]
fn a_block_that_does_not_shrink_is_kept_plain() {
    let mut state = 1u64;
    let noise: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    })
    .take(100_001)
    .collect();
    for element in ELEMENTS {
        let frame = compress(element, &noise);
        assert_eq!(frame.len(), noise.len() + OVERHEAD_BYTES);
        assert_eq!(decompress(&frame, noise.len()).as_deref(), Ok(&noise[..]));
    }
}

#[test]
fn frames_are_appended_and_one_compressor_serves_blocks_of_all_lengths() {
    let (mut compressor, mut decompressor) = (Compressor::new().unwrap(), Decompressor::new().unwrap());
    let mut frames = b"before".to_vec();
    for bytes in [4096, 0, 1, 2, 3, 65_536, 130] {
        let mut block = bf16_block(bytes + 1);
        block.resize(bytes, 9);
        let start = frames.len();
        compressor.compress(Element::Bf16, &block, &mut frames).unwrap();
        let mut read = vec![1; bytes];
        decompressor.decompress(&frames[start..], &mut read).unwrap();
        assert_eq!(read, block);
    }
    assert!(frames.starts_with(b"before"));
}

#[test]
fn a_frame_of_another_length_says_so_and_takes_no_memory() {
    let frame = compress(Element::Bf16, &bf16_block(1 << 20));
    assert_eq!(
        decompress(&frame, 4096),
        Err(CompressionError::Length {
            stored: 1 << 20,
            asked: 4096
        })
    );
    let mut decompressor = Decompressor::new().unwrap();
    let mut huge = frame;
    huge[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
    assert!(decompressor.decompress(&huge, &mut [0; 64]).is_err());
    assert_eq!(decompressor.exponents.capacity(), 0);
}

#[test]
fn a_zstd_frame_that_holds_more_than_its_plane_is_damage() {
    // Its own header promises 64 MiB; there is room for 512 bytes and it gets no more.
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
    for (code, rest) in [(1u8, 0usize), (2, 512), (3, 512)] {
        let mut frame = vec![1, code, 0, 0, 0, 4, 0, 0];
        frame.extend_from_slice(&(bomb.len() as u32).to_le_bytes());
        frame.extend_from_slice(&bomb);
        frame.resize(frame.len() + rest, 0);
        assert_eq!(decompress(&frame, 1024), Err(CompressionError::Damaged), "{code}");
    }
}

#[test]
fn every_prefix_of_a_frame_is_an_error() {
    for element in ELEMENTS {
        let block = bf16_block(2048);
        let frame = compress(element, &block);
        for bytes in 0..frame.len() {
            assert!(
                decompress(&frame[..bytes], block.len()).is_err(),
                "{element:?}: {bytes}"
            );
        }
        let longer: Vec<u8> = frame.iter().copied().chain([0]).collect();
        assert!(decompress(&longer, block.len()).is_err());
    }
}

fn element() -> impl Strategy<Value = Element> {
    prop_oneof![Just(Element::Bf16), Just(Element::Fp16), Just(Element::Bytes)]
}

/// Blocks that shrink, blocks that do not, and all numbers: infinities, subnormals, not-a-numbers with payloads.
fn block() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        prop::collection::vec(any::<u8>(), 0..5_000),
        prop::collection::vec(0x3eu8..0x42, 0..5_000),
        (0usize..5_000).prop_map(bf16_block),
        (any::<u16>(), 0usize..3_000).prop_map(|(first, count)| {
            (0..count)
                .flat_map(|index| first.wrapping_add(index as u16).to_le_bytes())
                .collect()
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn what_was_compressed_comes_back(element in element(), block in block()) {
        let frame = compress(element, &block);
        prop_assert!(frame.len() <= block.len() + OVERHEAD_BYTES);
        prop_assert_eq!(decompress(&frame, block.len()), Ok(block));
    }

    /// One to eight bytes of a frame are changed: an error, or a block of the length that was asked for.
    #[test]
    fn a_damaged_frame_is_an_error_or_another_block_and_never_a_panic(
        element in element(),
        block in block(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut frame = compress(element, &block);
        for (index, byte) in damage {
            let at = index.index(frame.len());
            frame[at] = byte;
        }
        let mut read = vec![0; block.len()];
        let mut decompressor = Decompressor::new().unwrap();
        let _ = decompressor.decompress(&frame, &mut read);
        prop_assert!(decompressor.exponents.capacity() <= block.len().max(64));
    }

    #[test]
    fn bytes_from_anywhere_are_an_error_or_a_block(
        header in prop::array::uniform12(any::<u8>()),
        rest in prop::collection::vec(any::<u8>(), 0..2_000),
        plausible: bool,
        asked in 0usize..4_096,
    ) {
        let mut frame: Vec<u8> = header.into_iter().chain(rest).collect();
        if plausible {
            let payload = frame.len() - HEADER_BYTES;
            frame[..4].copy_from_slice(&[1, header[1] % 4, 0, 0]);
            frame[4..8].copy_from_slice(&(asked as u32).to_le_bytes());
            frame[8..12].copy_from_slice(&(payload as u32).saturating_sub(asked as u32 / 2).to_le_bytes());
        }
        let mut read = vec![0; asked];
        let _ = Decompressor::new().unwrap().decompress(&frame, &mut read);
    }
}
