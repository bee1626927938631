use std::collections::HashSet;

use kvtier_transfer::crc32c;
use kvtier_transfer::memory::MemoryRegion;
use proptest::prelude::*;

use super::*;

const HASH: BlockHash = BlockHash([3; 16]);

fn key(number: u8) -> ObjectKey {
    ObjectKey::new(&[number; 32])
}

fn memory(bytes: &[u8]) -> MemorySlice {
    let region = MemoryRegion::anonymous(bytes.len().next_multiple_of(4096).max(4096)).expect("memory");
    let slice = region.slice(0, bytes.len()).expect("inside");
    slice.copy_from_slice(bytes).expect("as long");
    slice
}

/// A target that holds something else.
fn used(bytes: usize) -> MemorySlice {
    memory(&vec![0xee; bytes])
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut digest = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut digest);
    digest
}

/// Halves between one and two: their exponents are alike.
fn halves(bytes: usize) -> Vec<u8> {
    let mut block = noise(bytes);
    block
        .iter_mut()
        .skip(1)
        .step_by(2)
        .for_each(|byte| *byte = 0x3c | (*byte & 3));
    block
}

fn contents(block: &[u8]) -> Contents {
    Contents {
        length: u32::try_from(block.len()).expect("small"),
        tokens: 16,
        parent: Parent::Block(BlockHash([4; 16])),
        labels: Labels::Two(Label(7), Label(9)),
        checksum: crc32c(block),
    }
}

fn refused(key: &ObjectKey, name: ObjectName, object: &[u8], room: usize) -> ObjectError {
    let target = used(room);
    let error = key.open(name, object, &target).expect_err("it must not open");
    assert!(
        target.to_vec().iter().all(|byte| *byte == 0),
        "{error}: the target holds zeroes"
    );
    error
}

#[test]
fn a_block_comes_back_as_it_was_compressed_or_not() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    for (block, element) in [
        (noise(70_001), None),
        (halves(65_536), None),
        (halves(65_536), Some(Element::Fp16)),
        (halves(65_536), Some(Element::Bytes)),
        (noise(65_536), Some(Element::Bf16)),
        (vec![0; 4096], Some(Element::Bytes)),
        (noise(1), Some(Element::Bf16)),
        (Vec::new(), None),
        (Vec::new(), Some(Element::Bytes)),
    ] {
        let told = contents(&block);
        let object = key.seal(name, &told, &memory(&block), element);
        assert!(object.len() <= block.len() + OBJECT_OVERHEAD_BYTES);
        assert_eq!(key.contents(name, &object), Ok(told));
        let target = used(block.len());
        assert_eq!(
            key.open(name, &object, &target),
            Ok(told),
            "{} bytes, {element:?}",
            block.len()
        );
        assert_eq!(target.to_vec(), block);
    }
}

#[test]
fn compression_saves_bytes_where_exponents_are_alike_and_is_left_out_where_they_are_not() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let bytes = |block: Vec<u8>, element| key.seal(name, &contents(&block), &memory(&block), element).len();
    assert!(bytes(halves(65_536), Some(Element::Fp16)) < 65_536 * 7 / 10);
    assert_eq!(
        bytes(noise(65_536), Some(Element::Fp16)),
        65_536 + OBJECT_OVERHEAD_BYTES
    );
    assert_eq!(bytes(halves(65_536), None), 65_536 + OBJECT_OVERHEAD_BYTES);
}

#[test]
fn every_parent_and_every_set_of_labels_comes_back() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let block = noise(64);
    for parent in [
        Parent::Unknown,
        Parent::Root,
        Parent::Block(BlockHash([0; 16])),
        Parent::Block(HASH),
    ] {
        for labels in [
            Labels::None,
            Labels::One(Label(0)),
            Labels::One(Label(u64::MAX)),
            Labels::Two(Label(0), Label(1)),
            Labels::Any,
        ] {
            let told = Contents {
                parent,
                labels,
                ..contents(&block)
            };
            let object = key.seal(name, &told, &memory(&block), None);
            assert_eq!(key.open(name, &object, &used(64)), Ok(told));
        }
    }
}

#[test]
fn contents_that_nobody_writes_are_refused() {
    let good = contents(&noise(64)).encode(64);
    assert!(Contents::decode(&good).is_ok());
    // Parent and labels of no code, what is reserved, labels in the wrong order, a parent where none is said.
    for (at, value) in [(32, 3), (32, 1), (33, 4), (33, 1), (34, 1), (39, 1), (48, 7), (48, 6)] {
        let mut bytes = good;
        bytes[at] = value;
        assert_eq!(
            Contents::decode(&bytes),
            Err(ObjectError::Contents),
            "byte {at}: {value}"
        );
    }
}

#[test]
fn a_byte_that_changed_anywhere_is_found_and_the_target_zeroed() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    for (block, element) in [(noise(100), None), (halves(2048), Some(Element::Fp16))] {
        let object = key.seal(name, &contents(&block), &memory(&block), element);
        assert!(
            element.is_none() || object.len() < block.len() + OBJECT_OVERHEAD_BYTES,
            "it is compressed"
        );
        for at in 0..object.len() {
            for change in [1, 0x80] {
                let mut changed = object.clone();
                changed[at] ^= change;
                refused(&key, name, &changed, block.len());
                // The payload is another seal's business.
                assert_eq!(key.contents(name, &changed).is_err(), at < PAYLOAD_AT, "byte {at}");
            }
        }
    }
}

#[test]
fn another_name_or_key_does_not_open_it() {
    let (key, other) = (key(1), key(2));
    let name = key.name(&[2; 32], HASH);
    let block = noise(100);
    let object = key.seal(name, &contents(&block), &memory(&block), None);
    for elsewhere in [
        key.name(&[2; 32], BlockHash([5; 16])),
        key.name(&[3; 32], HASH),
        ObjectName([0; 16]),
    ] {
        assert_eq!(refused(&key, elsewhere, &object, 100), ObjectError::Seal);
        assert_eq!(key.contents(elsewhere, &object), Err(ObjectError::Seal));
    }
    assert_eq!(refused(&other, name, &object, 100), ObjectError::Seal);
    assert_eq!(other.contents(name, &object), Err(ObjectError::Seal));
}

#[test]
fn a_cut_or_a_lengthened_object_does_not_open() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let block = noise(100);
    let object = key.seal(name, &contents(&block), &memory(&block), None);
    for bytes in 0..object.len() {
        refused(&key, name, &object[..bytes], 100);
        assert!(key.contents(name, &object[..bytes]).is_err(), "{bytes} bytes");
    }
    let mut longer = object;
    longer.push(0);
    refused(&key, name, &longer, 100);
}

#[test]
fn two_objects_of_one_block_cannot_be_joined() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let block = noise(100);
    let sealed = || key.seal(name, &contents(&block), &memory(&block), None);
    let (first, second) = (sealed(), sealed());
    assert_ne!(first[16..48], second[16..48], "salts are drawn anew");
    for cut in [HEADER, PAYLOAD_AT, first.len() - TAG] {
        let joined = [&first[..cut], &second[cut..]].concat();
        assert_eq!(refused(&key, name, &joined, 100), ObjectError::Seal);
    }
}

#[test]
fn a_target_that_is_too_small_is_told_so_and_a_larger_one_keeps_what_lies_behind() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let block = noise(100);
    let object = key.seal(name, &contents(&block), &memory(&block), None);
    assert_eq!(
        refused(&key, name, &object, 99),
        ObjectError::Room { length: 100, room: 99 }
    );
    let target = used(120);
    key.open(name, &object, &target).expect("room enough");
    assert_eq!(target.to_vec(), [&block[..], &[0xee; 20]].concat());
}

#[test]
fn a_block_that_was_damaged_before_it_was_sealed_is_no_block() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let mut block = halves(2048);
    let told = contents(&block);
    block[17] ^= 4;
    for element in [None, Some(Element::Fp16)] {
        let object = key.seal(name, &told, &memory(&block), element);
        assert_eq!(refused(&key, name, &object, 2048), ObjectError::Checksum);
    }
}

/// What a compressed payload says of its length is not believed, even if who wrote it has the key.
#[test]
fn a_frame_of_another_length_than_the_contents_say_takes_no_memory_and_does_not_open() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let block = halves(65_536);
    let lying = Contents {
        length: 4096,
        ..contents(&block)
    };
    let mut object = compressed(Element::Fp16, &memory(&block)).expect("it shrinks");
    let header = Header {
        flags: COMPRESSED,
        salt: [8; 32],
    };
    let (keys, binding) = (Keys::derive(&key.object, &header.salt), binding(name, &header));
    keys.seal_front(&header, &lying, &binding, &mut object);
    let tag = aead(&keys.payload)
        .seal_in_place_separate_tag(
            Nonce::assume_unique_for_key(NONCE),
            Aad::from(binding),
            &mut object[PAYLOAD_AT..],
        )
        .expect("sealed");
    object.extend_from_slice(tag.as_ref());
    assert_eq!(key.contents(name, &object), Ok(lying));
    assert_eq!(refused(&key, name, &object, 65_536), ObjectError::Contents);
}

#[test]
fn a_newer_version_and_unknown_flags_are_named() {
    let key = key(1);
    let name = key.name(&[2; 32], HASH);
    let block = noise(100);
    let object = key.seal(name, &contents(&block), &memory(&block), None);
    let changed = |at: usize, value: u8| {
        let mut changed = object.clone();
        changed[at] = value;
        refused(&key, name, &changed, 100)
    };
    assert_eq!(changed(0, b'K'), ObjectError::Magic);
    assert_eq!(changed(8, 2), ObjectError::Version(2));
    assert_eq!(changed(12, 2), ObjectError::Version(1));
    assert_eq!(changed(12, 1), ObjectError::Seal);
}

#[test]
fn a_name_depends_on_the_key_the_realization_and_the_block_and_on_nothing_else() {
    let names = [
        key(1).name(&[2; 32], HASH),
        key(2).name(&[2; 32], HASH),
        key(1).name(&[3; 32], HASH),
        key(1).name(&[2; 32], BlockHash([5; 16])),
    ];
    assert_eq!(names.iter().collect::<HashSet<_>>().len(), 4);
    assert_eq!(key(1).name(&[2; 32], HASH), names[0]);
    assert_eq!(ObjectName([0xa1; 16]).to_string(), "a1".repeat(16));
    assert_eq!(
        format!("{:?} {:?}", key(1), ObjectName([1; 16])),
        format!("ObjectKey(..) {}", "01".repeat(16))
    );
}

proptest! {
    #[test]
    fn arbitrary_bytes_do_not_open(bytes in proptest::collection::vec(any::<u8>(), 0..400), has_magic: bool, flags in 0..2u8) {
        let mut bytes = bytes;
        if has_magic && bytes.len() >= HEADER {
            bytes[..16].copy_from_slice(b"kvtier\x01O\x01\0\0\0\0\0\0\0");
            bytes[12] = flags;
        }
        let key = key(1);
        let name = key.name(&[2; 32], HASH);
        prop_assert!(key.contents(name, &bytes).is_err());
        refused(&key, name, &bytes, 256);
    }

    #[test]
    fn changed_objects_do_not_open(
        length in 0..3000usize,
        is_compressed: bool,
        at: prop::sample::Index,
        change in 1..=255u8,
        cut in 0..3usize,
    ) {
        let key = key(1);
        let name = key.name(&[2; 32], HASH);
        let block = halves(length);
        let object = key.seal(name, &contents(&block), &memory(&block), is_compressed.then_some(Element::Fp16));
        let mut changed = object;
        let at = at.index(changed.len());
        changed[at] ^= change;
        changed.truncate(changed.len() - cut);
        refused(&key, name, &changed, length);
    }

    #[test]
    fn contents_come_back_or_are_refused(bytes in any::<[u8; 28]>(), codes in (0..5u8, 0..5u8), second: u64) {
        let mut encoded = [0; CONTENTS];
        encoded[..28].copy_from_slice(&bytes);
        (encoded[32], encoded[33]) = codes;
        encoded[48..].copy_from_slice(&second.to_le_bytes());
        if let Ok((contents, payload_bytes)) = Contents::decode(&encoded) {
            prop_assert_eq!(contents.encode(payload_bytes), encoded);
        }
    }
}
