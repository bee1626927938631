use super::*;

const FILE_BYTES: u64 = 1 << 20;

fn header() -> Header {
    Header {
        version: VERSION,
        segment: 7,
        incarnation: [9; 32],
        bytes: FILE_BYTES,
        opened_ms: 1_700_000_000_000,
        encryption: Encryption::Aes256Gcm,
    }
}

fn entry(ordinal: u32) -> Entry {
    Entry {
        version: VERSION,
        tag: [3; 16],
        generation: 3,
        namespace: 2,
        offset: HEADER_BYTES + u64::from(ordinal) * 8192,
        length: 5000 + ordinal,
        name: [ordinal.to_le_bytes()[0] | 1; NAME_BYTES],
        name_tag: [5; 16],
    }
}

fn index(count: u32) -> Vec<u8> {
    let mut bytes = vec![0; count as usize * ENTRY];
    for (ordinal, place) in (0..).zip(bytes.rchunks_exact_mut(ENTRY)) {
        place.copy_from_slice(&entry(ordinal).encode(&header().incarnation));
    }
    bytes
}

fn seal(entries: u32) -> Seal {
    Seal {
        version: VERSION,
        segment: 7,
        incarnation: header().incarnation,
        entries,
        sealed_ms: 5,
    }
}

#[test]
fn pages_entries_and_names_come_back_as_they_were_written() {
    for encryption in [Encryption::None, Encryption::Aes256Gcm] {
        let header = Header { encryption, ..header() };
        assert_eq!(Header::decode(&header.encode()), Ok(header));
    }
    assert_eq!(Seal::decode(&seal(65).encode(), &header()), Ok(Some(seal(65))));
    let expected: Vec<(u32, Entry)> = (0..65).map(|ordinal| (ordinal, entry(ordinal))).collect();
    assert_eq!(decode_index(&index(65), &header(), 65), (expected, 0));
    let (one, two) = (Label(9), Label(u64::MAX));
    let parents = [Parent::Unknown, Parent::Root, Parent::Block(BlockHash([8; 16]))];
    let labels = [Labels::None, Labels::One(two), Labels::Two(one, two), Labels::Any];
    for (parent, labels) in parents
        .into_iter()
        .flat_map(|parent| labels.map(|labels| (parent, labels)))
    {
        let name = Name {
            hash: BlockHash([1; 16]),
            parent,
            realization: 3,
            tokens: 512,
            checksum: 0xdead_beef,
            labels,
        };
        assert_eq!(Name::decode(&name.encode()), Ok(name));
    }
}

#[test]
fn names_have_one_spelling() {
    let name = Name {
        hash: BlockHash([1; 16]),
        parent: Parent::Root,
        realization: 3,
        tokens: 512,
        checksum: 5,
        labels: Labels::Two(Label(1), Label(2)),
    };
    let refused = |change: &dyn Fn(&mut [u8; NAME_BYTES])| {
        let mut bytes = name.encode();
        change(&mut bytes);
        Name::decode(&bytes)
    };
    for code in [0, 1, 3, 4, 255] {
        assert_eq!(
            refused(&|bytes| bytes[45] = code),
            Err(FormatError::Damaged("name")),
            "{code}"
        );
    }
    assert_eq!(
        refused(&|bytes| bytes[48] = 2),
        Err(FormatError::Damaged("name")),
        "twice the same"
    );
    assert_eq!(refused(&|bytes| bytes[46] = 1), Err(FormatError::Damaged("name")));
}

#[test]
fn a_file_of_version_2_is_read_as_it_was_written() {
    let old = Header { version: 2, ..header() };
    assert_eq!(Header::decode(&old.encode()), Ok(old));
    let sealed = Seal { version: 2, ..seal(3) };
    assert_eq!(Seal::decode(&sealed.encode(), &old), Ok(Some(sealed)));
    assert_eq!(Seal::decode(&seal(3).encode(), &old), Err(FormatError::Foreign("seal")));
    let mut name = [0; NAME_BYTES];
    name[..48].fill(7);
    let entry = Entry {
        version: 2,
        name,
        ..entry(0)
    };
    let bytes = entry.encode(&old.incarnation);
    assert_eq!((&bytes[88..104], &bytes[104..124]), (&[5; 16][..], &[0; 20][..]));
    assert_eq!(Entry::decode(&bytes, &old), Ok(Some(entry)));
}

#[test]
fn a_seal_page_of_zeroes_is_an_open_segment_and_an_entry_of_zeroes_no_record() {
    assert_eq!(Seal::decode(&[0; 4096], &header()), Ok(None));
    assert_eq!(Entry::decode(&[0; 128], &header()), Ok(None));
}

#[test]
fn every_flipped_bit_is_refused() {
    let page = header().encode();
    let seal_page = seal(3).encode();
    for bit in 0..4096 * 8 {
        let mut damaged = page;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&damaged).is_err(), "header bit {bit}");
        let mut damaged = seal_page;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Seal::decode(&damaged, &header()).is_err(), "seal bit {bit}");
    }
    let alone = entry(1).encode(&header().incarnation);
    for bit in 0..ENTRY * 8 {
        let mut damaged = alone;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Entry::decode(&damaged, &header()).is_err(), "entry bit {bit}");
    }
}

#[test]
fn a_damaged_entry_costs_itself_and_no_other() {
    let mut bytes = index(9);
    let length = bytes.len();
    bytes[length - 5 * ENTRY + 3] ^= 1;
    let (found, damaged) = decode_index(&bytes, &header(), 9);
    assert_eq!(damaged, 1);
    let ordinals: Vec<u32> = found.iter().map(|(ordinal, _)| *ordinal).collect();
    assert_eq!(ordinals, [0, 1, 2, 3, 5, 6, 7, 8]);
}

#[test]
fn damage_to_an_index_without_a_seal_is_counted_and_payloads_beside_it_are_not() {
    // Two pages of entries, then payloads.
    let of = |entries: usize, flips: &[usize]| {
        let mut bytes: Vec<u8> = (0..2 * PAGE).map(|at| (at % 251) as u8 | 1).collect();
        bytes.extend(vec![0; (entries * ENTRY).next_multiple_of(PAGE) - entries * ENTRY]);
        bytes.extend(index(u32::try_from(entries).expect("few")));
        let length = bytes.len();
        for ordinal in flips {
            bytes[length - ordinal * ENTRY - 20] ^= 0x40;
        }
        damaged_in_open_index(&bytes, &header())
    };
    assert_eq!(of(40, &[]), 0);
    assert_eq!(of(40, &[0, 7, 33]), 3);
    assert_eq!(of(33, &[32]), 1, "the only entry of the last page");
    assert_eq!(of(1, &[0]), 1, "the only entry of all");
    assert_eq!(of(0, &[]), 0);
}

#[test]
fn what_belongs_to_another_life_of_the_file_is_refused() {
    let other = Header {
        incarnation: [8; 32],
        ..header()
    };
    assert_eq!(
        Seal::decode(&seal(3).encode(), &other),
        Err(FormatError::Foreign("seal"))
    );
    let bytes = entry(0).encode(&header().incarnation);
    assert_eq!(Entry::decode(&bytes, &other), Err(FormatError::Damaged("entry")));
}

#[test]
fn another_version_is_named() {
    let mut page = header().encode();
    page[8] = 9;
    let sum = crc32c(&page[..PAGE - 4]);
    page[PAGE - 4..].copy_from_slice(&sum.to_le_bytes());
    assert_eq!(Header::decode(&page), Err(FormatError::Version(9)));
}

#[test]
fn a_footer_that_lies_about_its_length_is_refused() {
    let lie = seal(entries_max(FILE_BYTES) + 1);
    assert_eq!(
        Seal::decode(&lie.encode(), &header()),
        Err(FormatError::Damaged("seal"))
    );
}

#[test]
fn an_entry_outside_the_payloads_is_refused() {
    for (offset, length) in [
        (0, 4096),
        (4096, 4096),
        (FILE_BYTES - 4096, 4096),
        (FILE_BYTES, 1),
        (HEADER_BYTES, 0),
        (HEADER_BYTES, u32::MAX),
    ] {
        let lie = Entry {
            offset,
            length,
            ..entry(0)
        };
        let bytes = lie.encode(&header().incarnation);
        assert_eq!(
            Entry::decode(&bytes, &header()),
            Err(FormatError::Misplaced),
            "{offset} {length}"
        );
    }
}

#[test]
fn an_index_grows_downwards_page_by_page() {
    assert_eq!(index_page(FILE_BYTES, 0), FILE_BYTES - 4096);
    assert_eq!(index_page(FILE_BYTES, 31), FILE_BYTES - 4096);
    assert_eq!(index_page(FILE_BYTES, 32), FILE_BYTES - 8192);
}

#[test]
fn arbitrary_bytes_decode_to_nothing_and_never_panic() {
    let mut state = 1u64;
    for length in (0..PAGE + 200).step_by(41) {
        let bytes: Vec<u8> = (0..length)
            .map(|_| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                state.to_le_bytes()[7]
            })
            .collect();
        assert!(Header::decode(&bytes).is_err());
        assert!(Seal::decode(&bytes, &header()).is_err());
        assert!(decode_index(&bytes, &header(), usize::MAX).0.is_empty());
    }
}
