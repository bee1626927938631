use super::*;

const FILE_BYTES: u64 = 1 << 20;

fn header() -> Header {
    Header {
        segment: 7,
        incarnation: [9; 32],
        bytes: FILE_BYTES,
        opened_ms: 1_700_000_000_000,
    }
}

fn entry(ordinal: u32) -> Entry {
    Entry {
        fingerprint: [ordinal.to_le_bytes()[0]; 16],
        tag: [0; 16],
        generation: 3,
        offset: HEADER_BYTES + u64::from(ordinal) * 8192,
        length: 5000 + ordinal,
        checksum: 0xDEAD_0000 + ordinal,
        namespace: 2,
    }
}

fn sealed(count: u32) -> (Vec<u8>, Seal) {
    let entries: Vec<Entry> = (0..count).map(entry).collect();
    let (tail, index_checksum) = encode_index(&entries, FILE_BYTES, &header().incarnation).expect("the index fits");
    (
        tail,
        Seal {
            segment: 7,
            incarnation: header().incarnation,
            entries: count,
            index_checksum,
            sealed_ms: 5,
        },
    )
}

#[test]
fn pages_and_entries_come_back_as_they_were_written() {
    assert_eq!(Header::decode(&header().encode()), Ok(header()));
    let (tail, seal) = sealed(65);
    assert_eq!(Seal::decode(&seal.encode(), &header()), Ok(Some(seal)));
    assert_eq!(tail.len(), 8192, "65 entries of 64 bytes take two pages");
    assert_eq!(decode_index(&tail, &header(), &seal), Ok((0..65).map(entry).collect()));
}

#[test]
fn a_seal_page_of_zeroes_is_an_open_segment() {
    assert_eq!(Seal::decode(&[0; 4096], &header()), Ok(None));
}

#[test]
fn every_flipped_bit_is_refused() {
    let page = header().encode();
    let (tail, seal) = sealed(3);
    let seal_page = seal.encode();
    let index = &tail[tail.len() - 3 * 64..];
    for bit in 0..4096 * 8 {
        let mut damaged = page;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Header::decode(&damaged).is_err(), "header bit {bit}");
        let mut damaged = seal_page;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(Seal::decode(&damaged, &header()).is_err(), "seal bit {bit}");
    }
    for bit in 0..index.len() * 8 {
        let mut damaged = index.to_vec();
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert_eq!(
            decode_index(&damaged, &header(), &seal),
            Err(FormatError::Damaged("index")),
            "index bit {bit}"
        );
    }
    let alone = entry(1).encode(&header().incarnation);
    for bit in 0..64 * 8 {
        let mut damaged = alone;
        damaged[bit / 8] ^= 1 << (bit % 8);
        assert!(
            Entry::decode(&damaged, &header().incarnation).is_err(),
            "entry bit {bit}"
        );
    }
}

#[test]
fn what_an_earlier_life_of_the_file_left_is_refused() {
    let (_, seal) = sealed(1);
    let reborn = Header {
        incarnation: [8; 32],
        ..header()
    };
    assert_eq!(Seal::decode(&seal.encode(), &reborn), Err(FormatError::Foreign("seal")));
    let stale = entry(0).encode(&header().incarnation);
    assert_eq!(
        Entry::decode(&stale, &reborn.incarnation),
        Err(FormatError::Damaged("entry"))
    );
}

#[test]
fn a_newer_version_is_named() {
    let mut page = header().encode();
    page[8] = 2;
    let sum = crc32c(&page[..4092]);
    page[4092..].copy_from_slice(&sum.to_le_bytes());
    assert_eq!(Header::decode(&page), Err(FormatError::Version(2)));
}

#[test]
fn an_index_that_lies_about_places_is_refused() {
    let cases = [
        (
            "into the header",
            vec![Entry {
                offset: 4096,
                ..entry(0)
            }],
        ),
        (
            "past the index",
            vec![Entry {
                offset: FILE_BYTES - 4096,
                length: 4096,
                ..entry(0)
            }],
        ),
        (
            "into another record",
            vec![
                entry(0),
                Entry {
                    offset: HEADER_BYTES + 4096,
                    ..entry(1)
                },
            ],
        ),
        ("nothing", vec![Entry { length: 0, ..entry(0) }]),
    ];
    for (case, entries) in cases {
        let (tail, index_checksum) = encode_index(&entries, FILE_BYTES, &header().incarnation).expect("the index fits");
        let seal = Seal {
            segment: 7,
            incarnation: header().incarnation,
            entries: u32::try_from(entries.len()).expect("few"),
            index_checksum,
            sealed_ms: 0,
        };
        assert!(
            matches!(decode_index(&tail, &header(), &seal), Err(FormatError::Misplaced(_))),
            "{case}"
        );
    }
}

#[test]
fn a_seal_that_promises_more_entries_than_the_file_has_is_refused() {
    let (tail, seal) = sealed(3);
    assert_eq!(
        decode_index(
            &tail,
            &header(),
            &Seal {
                entries: u32::MAX,
                ..seal
            }
        ),
        Err(FormatError::Short("index"))
    );
}

#[test]
fn a_16_kib_block_costs_16_kib_and_its_entry() {
    let file_bytes: u64 = 4 << 20;
    let records = (file_bytes - HEADER_BYTES) / (16_384 + ENTRY_BYTES);
    let last = HEADER_BYTES + (records - 1) * 16_384;
    assert!(is_payload_range(file_bytes, last, 16_384));
    assert!(last + 16_384 <= index_start(file_bytes, records).expect("the index fits"));
}
