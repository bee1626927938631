use super::*;
use kvtier_core::{BlockHash, Hints, Label, Parent, Realization};

fn encode(request: &Request<'_>, hints: Hints) -> Vec<u8> {
    let mut bytes = Vec::new();
    let envelope = Envelope {
        request: 7,
        extensions: hints.into(),
        ..Envelope::default()
    };
    request.encode(&envelope, &mut bytes).expect("within the limits");
    bytes
}

fn decode(bytes: &[u8]) -> Result<(Request<'_>, Extensions<'_>), DecodeError> {
    let frame = Frame::decode(bytes)?.expect("a whole frame");
    Request::decode(&frame.header, frame.body)
}

/// `length` bytes more behind the body.
fn grown(mut bytes: Vec<u8>, more: &[u8]) -> Vec<u8> {
    bytes.extend_from_slice(more);
    let length = u32::try_from(bytes.len() - HEADER_BYTES).expect("short");
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes
}

#[test]
fn a_frame_lies_as_it_is_drawn() {
    let hashes = [BlockHash([0xab; 16])];
    let keys = Keys {
        handle: 3,
        lineage: Lineage::Chain(Parent::Root),
        hashes: hashes.as_slice().into(),
    };
    let bytes = encode(
        &Request::Lookup(keys),
        Hints {
            can_split: true,
            ..Hints::default()
        },
    );
    let mut drawn = vec![48, 0, 0, 0, 3, 0, 0, 0, 7, 0, 0, 0, 0, 0, 0, 0];
    drawn.extend_from_slice(&[0; 24]);
    drawn.extend_from_slice(&[3, 0, 0, 0, 1, 0, 0, 0]);
    drawn.extend_from_slice(&[0; 16]);
    drawn.extend_from_slice(&[1, 0, 0, 0]);
    drawn.extend_from_slice(&[0xab; 16]);
    drawn.extend_from_slice(&[4, 0, 0, 0]);
    assert_eq!(bytes, drawn);
}

#[test]
fn an_extension_of_a_later_version_is_kept_and_skipped() {
    let hints = Hints {
        label: Some(Label(5)),
        ..Hints::default()
    };
    let bytes = grown(encode(&Request::Flush, hints), &[99, 0, 2, 0, 1, 2, 100, 0, 0, 0]);
    let (request, extensions) = decode(&bytes).expect("valid");
    assert_eq!((request, extensions.hints), (Request::Flush, hints));
    assert_eq!(extensions.unknown(), [99, 0, 2, 0, 1, 2, 100, 0, 0, 0]);
    let mut again = Vec::new();
    request
        .encode(
            &Envelope {
                request: 7,
                extensions,
                ..Envelope::default()
            },
            &mut again,
        )
        .expect("short");
    assert_eq!(again, bytes);
}

#[test]
fn a_raw_lookup_differs_by_an_extension_that_an_older_node_skips() {
    let keys = Keys {
        handle: 3,
        lineage: Lineage::Chain(Parent::Root),
        hashes: Array::default(),
    };
    let hints = Hints {
        session: Some(9),
        ..Hints::default()
    };
    let mut raw = Vec::new();
    let envelope = Envelope {
        request: 7,
        extensions: Extensions::raw(hints),
        ..Envelope::default()
    };
    Request::Lookup(keys).encode(&envelope, &mut raw).expect("short");
    // Behind every tag that version 1 began with: what is unknown must be a tail.
    assert_eq!(raw, grown(encode(&Request::Lookup(keys), hints), &[7, 0, 0, 0]));
    let (request, extensions) = decode(&raw).expect("valid");
    assert_eq!(request, Request::Lookup(keys));
    assert_eq!((extensions.raw, extensions.hints), (true, hints));
    let wrong = grown(encode(&Request::Lookup(keys), hints), &[7, 0, 1, 0, 1]);
    assert_eq!(
        decode(&wrong).expect_err("refused"),
        DecodeError::BadExtension { tag: 7 }
    );
}

#[test]
fn a_fetch_by_who_reads_a_device_names_it_and_an_older_node_skips_that() {
    let keys = Keys {
        handle: 3,
        lineage: Lineage::Chain(Parent::Root),
        hashes: Array::default(),
    };
    let scope = kvtier_core::FetchScope::Prefix;
    let fetch = Request::Fetch { scope, keys };
    let mut bytes = Vec::new();
    let envelope = Envelope {
        request: 7,
        extensions: Extensions::on_device(Hints::default(), [9; 16]),
        ..Envelope::default()
    };
    fetch.encode(&envelope, &mut bytes).expect("short");
    let mut extension = vec![8, 0, 16, 0];
    extension.extend_from_slice(&[9; 16]);
    assert_eq!(bytes, grown(encode(&fetch, Hints::default()), &extension));
    let (_, extensions) = decode(&bytes).expect("valid");
    assert_eq!(extensions.device, Some([9; 16]));
    assert!(!extensions.hints.device, "which device that is, the node knows");
    let short = grown(encode(&fetch, Hints::default()), &[8, 0, 1, 0, 1]);
    assert_eq!(
        decode(&short).expect_err("refused"),
        DecodeError::BadExtension { tag: 8 }
    );
}

#[test]
fn extensions_out_of_order_twice_or_of_a_wrong_length_are_refused() {
    let flush = encode(
        &Request::Flush,
        Hints {
            label: Some(Label(5)),
            ..Hints::default()
        },
    );
    for (more, tag) in [
        (vec![5, 0, 8, 0, 1, 1, 1, 1, 1, 1, 1, 1], 5),
        (vec![4, 0, 0, 0], 4),
        (vec![6, 0, 9, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], 6),
        (vec![9, 0, 0, 0, 8, 0, 0, 0], 8),
    ] {
        assert_eq!(
            decode(&grown(flush.clone(), &more)).expect_err("refused"),
            DecodeError::BadExtension { tag }
        );
    }
    let cut = grown(flush, &[7, 0, 3, 0, 1]);
    assert_eq!(
        decode(&cut).expect_err("refused"),
        DecodeError::Truncated { field: "extension" }
    );
}

#[test]
fn counts_lengths_and_codes_beyond_their_bounds_have_names() {
    let keys = Keys {
        handle: 0,
        lineage: Lineage::Independent,
        hashes: Array::default(),
    };
    let lookup = encode(&Request::Lookup(keys), Hints::default());
    let with = |at: usize, value: u32| {
        let mut bytes = lookup.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        bytes
    };
    let refused = |bytes: Vec<u8>| decode(&bytes).expect_err("refused");
    assert_eq!(
        refused(with(64, 4097)),
        DecodeError::TooMany {
            field: "hashes",
            count: 4097,
            max: KEYS_MAX
        }
    );
    assert_eq!(refused(with(64, 1)), DecodeError::Truncated { field: "hashes" });
    assert_eq!(
        refused(with(44, 4)),
        DecodeError::UnknownCode {
            field: "parent",
            code: 4
        }
    );
    assert_eq!(
        refused(with(48, 1)),
        DecodeError::NotZero {
            field: "parent that is not there"
        }
    );
    assert_eq!(refused(with(36, 1)), DecodeError::NotZero { field: "reserved" });
    assert_eq!(refused(with(4, 0x0001_0003)), DecodeError::NotZero { field: "flags" });
    assert_eq!(refused(with(4, 0x77)), DecodeError::UnknownKind { kind: 0x77 });
    assert_eq!(refused(with(4, 0x8003)), DecodeError::UnknownKind { kind: 0x8003 });
    assert_eq!(refused(with(32, 4)), DecodeError::Releases { count: 4 });
    assert!(refused(with(32, 4)).is_fatal() && !refused(with(36, 1)).is_fatal());
    assert_eq!(
        refused(with(0, (1 << 20) + 1)),
        DecodeError::FrameTooLong { length: (1 << 20) + 1 }
    );
    let open = encode(
        &Request::OpenNamespace {
            name: "n",
            realization: Realization::default(),
        },
        Hints::default(),
    );
    let renamed = |length: u32, last: u8| {
        let mut bytes = open.clone();
        bytes[72..76].copy_from_slice(&length.to_le_bytes());
        bytes[76] = last;
        bytes
    };
    assert_eq!(
        refused(renamed(0, b'n')),
        DecodeError::BadLength {
            field: "name",
            length: 0,
            max: 256
        }
    );
    assert_eq!(
        refused(renamed(257, b'n')),
        DecodeError::BadLength {
            field: "name",
            length: 257,
            max: 256
        }
    );
    assert_eq!(refused(renamed(1, 0xff)), DecodeError::NotText { field: "name" });
}

#[test]
fn what_is_over_a_limit_does_not_encode_and_leaves_the_target_alone() {
    let hashes = vec![BlockHash::default(); KEYS_MAX + 1];
    let keys = |count: usize| Keys {
        hashes: Array::from(&hashes[..count]),
        ..Keys::default()
    };
    let long = "n".repeat(257);
    let json = "j".repeat(FRAME_BYTES_MAX - 3);
    let mut target = vec![1, 2, 3];
    let mut refused = |request: Request<'_>| {
        let error = request
            .encode(&Envelope::default(), &mut target)
            .expect_err("over a limit");
        assert_eq!(target, [1, 2, 3]);
        error
    };
    assert_eq!(
        refused(Request::Lookup(keys(4097))),
        EncodeError::TooMany {
            field: "hashes",
            count: 4097
        }
    );
    let reserve = Request::Reserve {
        keys: keys(2),
        lengths: [1].as_slice().into(),
    };
    assert_eq!(refused(reserve), EncodeError::Unequal { field: "lengths" });
    let invalidate = Request::Invalidate { name: &long };
    assert_eq!(
        refused(invalidate),
        EncodeError::BadLength {
            field: "name",
            length: 257,
            max: 256
        }
    );
    let status = Reply::Status { json: &json }
        .encode(1, &mut target)
        .expect_err("over the limit");
    assert_eq!(
        (status, target.len()),
        (
            EncodeError::FrameTooLong {
                length: FRAME_BYTES_MAX + 1
            },
            3
        )
    );
}

#[test]
fn a_stream_holds_one_frame_and_shrinks_behind_a_long_one() {
    let json = "j".repeat(200_000);
    let mut bytes = Vec::new();
    Reply::Status { json: &json }.encode(1, &mut bytes).expect("short");
    Reply::Farewell.encode(2, &mut bytes).expect("short");
    let mut stream = FrameStream::new(1000);
    let (mut rest, mut seen) = (bytes.as_slice(), Vec::new());
    while !rest.is_empty() {
        let space = stream.space();
        let count = space.len().min(rest.len());
        space[..count].copy_from_slice(&rest[..count]);
        stream.advance(count);
        rest = &rest[count..];
        while let Some(frame) = stream.next().expect("valid") {
            seen.push((frame.header.request, frame.body.len()));
        }
    }
    assert_eq!(seen, [(1, 200_004), (2, 0)]);
    assert_eq!(stream.space().len(), 1000);
}
