//! Properties of the wire, over arbitrary bytes and arbitrary messages.

use kvtier::wire::{
    Array, DecodeError, Envelope, Extensions, Frame, FrameStream, Header, Keys, Lineage, Reply, Request,
};
use kvtier::{BlockHash, Hints, Label, Parent, Tier};
use kvtier_core::{Extent, Fetched, LeaseId, ReservationId, SealItem, SegmentId};
use proptest::collection::vec;
use proptest::option;
use proptest::prelude::*;

fn hash() -> impl Strategy<Value = BlockHash> {
    any::<[u8; 16]>().prop_map(BlockHash)
}

fn parent() -> impl Strategy<Value = Parent> {
    prop_oneof![
        Just(Parent::Unknown),
        Just(Parent::Root),
        hash().prop_map(Parent::Block)
    ]
}

fn hints() -> impl Strategy<Value = Hints> {
    let some = option::of(any::<u64>());
    (
        option::of(any::<u32>()),
        some.clone(),
        any::<bool>(),
        some.clone(),
        some,
    )
        .prop_map(|(prompt_tokens, queue_wait_us, can_split, label, session)| Hints {
            device: false,
            prompt_tokens,
            local_prefix_tokens: prompt_tokens,
            queue_wait_us,
            can_split,
            label: label.map(Label),
            session,
        })
}

fn fetched() -> impl Strategy<Value = Fetched> {
    let leased = (
        any::<u64>(),
        any::<u32>(),
        any::<u64>(),
        any::<u32>(),
        any::<bool>(),
        option::of(any::<u32>()),
    );
    prop_oneof![
        Just(Fetched::Miss),
        Just(Fetched::Busy),
        leased.prop_map(|(lease, segment, offset, length, host, checksum)| Fetched::Leased {
            lease: LeaseId(lease),
            extent: Extent {
                segment: SegmentId(segment),
                offset,
                length
            },
            tier: if host { Tier::Host } else { Tier::Nvme },
            checksum,
        }),
    ]
}

fn item() -> impl Strategy<Value = SealItem> {
    (any::<u64>(), hash(), parent(), any::<u32>(), any::<u32>()).prop_map(
        |(reservation, hash, parent, length, tokens)| SealItem {
            reservation: ReservationId(reservation),
            hash,
            parent,
            length,
            tokens,
        },
    )
}

proptest! {
    #[test]
    fn arbitrary_bytes_never_panic_and_never_decode_past_their_end(bytes in vec(any::<u8>(), 0..400)) {
        if let Ok(Some(frame)) = Frame::decode(&bytes) {
            prop_assert!(frame.header.frame_bytes() <= bytes.len());
            let _ = Request::decode(&frame.header, frame.body);
            let _ = Reply::decode(&frame.header, frame.body);
        }
        // The same bytes as the body of each kind, so that the readers behind the header are reached.
        for &kind in kvtier::wire::Kind::ALL {
            let header = Header { length: u32::try_from(bytes.len()).expect("short"), kind: kind.code(), ..Header::default() };
            if let Ok((request, extensions)) = Request::decode(&header, &bytes) {
                let mut again = Vec::new();
                request.encode(&Envelope { extensions, ..Envelope::default() }, &mut again).expect("it came from a frame");
                prop_assert_eq!(&again[40..], &bytes[..]);
            }
            if let Ok((reply, extensions)) = Reply::decode(&header, &bytes) {
                let mut again = Vec::new();
                reply.encode_with(0, extensions, &mut again).expect("it came from a frame");
                prop_assert_eq!(&again[40..], &bytes[..]);
            }
        }
    }

    #[test]
    fn a_fetch_comes_back_as_it_was_sent(
        hashes in vec(hash(), 0..40), parent in parent(), hints in hints(), leases in vec(any::<u64>(), 0..20),
        deadline_us in any::<u64>(), clock_ns in any::<u64>(),
    ) {
        let leases: Vec<LeaseId> = leases.into_iter().map(LeaseId).collect();
        let keys = Keys { handle: 9, lineage: Lineage::Chain(parent), hashes: (&hashes).into() };
        let request = Request::Fetch { scope: kvtier::client::FetchScope::Each, keys };
        let releases = Array::from(&leases);
        let envelope = Envelope { request: 4, deadline_us, clock_ns, releases, extensions: hints.into() };
        let mut bytes = Vec::new();
        request.encode(&envelope, &mut bytes).expect("within the limits");
        let frame = Frame::decode(&bytes).expect("valid").expect("whole");
        prop_assert_eq!(frame.releases.to_vec(), leases.clone());
        prop_assert_eq!((frame.header.deadline_us, frame.header.clock_ns), (deadline_us, clock_ns));
        let (decoded, extensions) = Request::decode(&frame.header, frame.body).expect("valid");
        prop_assert_eq!((decoded, extensions), (request, Extensions::from(hints)));
    }

    #[test]
    fn seals_and_their_answers_come_back_as_they_were_sent(items in vec(item(), 0..20), outcomes in vec(fetched(), 0..20)) {
        let generation = kvtier::Generation(3);
        let ahead = kvtier::wire::Ahead { length: 1, count: 2 };
        let request = Request::Seal { handle: 1, generation, ahead, items: (&items).into() };
        let reply = Reply::Fetched { generation, outcomes: (&outcomes).into() };
        let mut bytes = Vec::new();
        request.encode(&Envelope::default(), &mut bytes).expect("within the limits");
        let sealed = bytes.len();
        reply.encode(8, &mut bytes).expect("within the limits");
        let first = Frame::decode(&bytes).expect("valid").expect("whole");
        prop_assert_eq!(Request::decode(&first.header, first.body).expect("valid").0, request);
        let second = Frame::decode(&bytes[sealed..]).expect("valid").expect("whole");
        prop_assert_eq!(second.header.request, 8);
        prop_assert_eq!(Reply::decode(&second.header, second.body).expect("valid").0, reply);
    }

    #[test]
    fn a_cut_message_is_never_taken_for_a_whole_one(hashes in vec(hash(), 1..20), cut in any::<prop::sample::Index>()) {
        let keys = Keys { hashes: (&hashes).into(), ..Keys::default() };
        let mut bytes = Vec::new();
        Request::Delete(keys).encode(&Envelope::default(), &mut bytes).expect("within the limits");
        let cut = cut.index(bytes.len());
        prop_assert_eq!(Frame::decode(&bytes[..cut]), Ok(None));
        if cut >= 40 {
            // A sender that says so: the body ends inside a field.
            let header = Header { length: u32::try_from(cut - 40).expect("short"), kind: 10, ..Header::default() };
            let refused = matches!(Request::decode(&header, &bytes[40..cut]), Err(DecodeError::Truncated { .. }));
            prop_assert!(refused);
        }
    }

    #[test]
    fn however_a_stream_is_cut_the_same_frames_come_out(
        counts in vec(0usize..30, 1..8), pieces in vec(1usize..200, 1..50),
    ) {
        let mut bytes = Vec::new();
        for (number, count) in counts.iter().enumerate() {
            let hashes = vec![BlockHash([7; 16]); *count];
            let keys = Keys { hashes: (&hashes).into(), ..Keys::default() };
            let envelope = Envelope { request: number as u64, ..Envelope::default() };
            Request::Lookup(keys).encode(&envelope, &mut bytes).expect("within the limits");
        }
        let (mut stream, mut seen) = (FrameStream::new(64), Vec::new());
        let (mut rest, mut pieces) = (bytes.as_slice(), pieces.iter().cycle());
        while !rest.is_empty() {
            let space = stream.space();
            let count = space.len().min(rest.len()).min(*pieces.next().expect("endless"));
            space[..count].copy_from_slice(&rest[..count]);
            stream.advance(count);
            rest = &rest[count..];
            while let Some(frame) = stream.next().expect("valid") {
                let Request::Lookup(keys) = Request::decode(&frame.header, frame.body).expect("valid").0 else {
                    panic!("a lookup was sent");
                };
                prop_assert_eq!(frame.header.request, seen.len() as u64);
                seen.push(keys.hashes.len());
            }
        }
        prop_assert_eq!(seen, counts);
    }
}
