use kvtier_core::{
    BlockHash, ClientId, Extent, FetchScope, Fetched, Generation, Hints, Label, LeaseId, Parent, Realization,
    ReservationId, Reserved, SealItem, Sealed, SegmentId, Tier,
};

use crate::ErrorKind;
use crate::wire::{
    AdviceKind, Ahead, Envelope, Extensions, KEYS_MAX, Keys, Kind, Lineage, Reply, Request, Slot, Welcome,
};

/// A small generator of our own (splitmix64), so that a seed means the same everywhere.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is at least 1.
    pub(super) fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound as u64)).unwrap_or(0)
    }

    fn u32(&mut self) -> u32 {
        self.next().to_le_bytes()[..4].try_into().map_or(0, u32::from_le_bytes)
    }

    /// Numbers at which counts and lengths go wrong.
    pub(super) fn interesting(&mut self) -> u32 {
        let numbers = [
            0,
            1,
            3,
            39,
            40,
            255,
            4095,
            4096,
            4097,
            65_535,
            1 << 20,
            (1 << 20) + 1,
            u32::MAX / 16,
            u32::MAX,
        ];
        let number = numbers[self.below(numbers.len())];
        if self.below(4) == 0 { self.u32() } else { number }
    }

    fn hash(&mut self) -> BlockHash {
        let mut hash = [0; 16];
        hash[..8].copy_from_slice(&self.next().to_le_bytes());
        hash[8..].copy_from_slice(&self.next().to_le_bytes());
        BlockHash(hash)
    }

    /// Mostly few; sometimes as many as a message takes.
    fn count(&mut self) -> usize {
        match self.below(200) {
            0 => KEYS_MAX,
            1 => 256,
            _ => self.below(6),
        }
    }

    fn many<T>(&mut self, mut one: impl FnMut(&mut Random) -> T) -> Vec<T> {
        let count = self.count();
        (0..count).map(|_| one(self)).collect()
    }

    fn maybe<T>(&mut self, value: impl FnOnce(&mut Random) -> T) -> Option<T> {
        if self.below(2) == 0 { Some(value(self)) } else { None }
    }

    fn parent(&mut self) -> Parent {
        match self.below(3) {
            0 => Parent::Unknown,
            1 => Parent::Root,
            _ => Parent::Block(self.hash()),
        }
    }

    fn extent(&mut self) -> Extent {
        Extent {
            segment: SegmentId(self.u32()),
            offset: self.next(),
            length: self.u32(),
        }
    }

    fn slot(&mut self) -> Slot {
        Slot {
            reservation: ReservationId(self.next()),
            extent: self.extent(),
        }
    }

    fn tier(&mut self) -> Tier {
        match self.below(3) {
            0 => Tier::Hbm,
            1 => Tier::Host,
            _ => Tier::Nvme,
        }
    }

    fn fetched(&mut self) -> Fetched {
        match self.below(4) {
            0 => Fetched::Miss,
            1 => Fetched::Busy,
            _ => Fetched::Leased {
                lease: LeaseId(self.next()),
                extent: self.extent(),
                tier: self.tier(),
                checksum: self.maybe(Random::u32),
            },
        }
    }

    fn reserved(&mut self) -> Reserved {
        match self.below(3) {
            0 => Reserved::Present,
            1 => Reserved::Busy,
            _ => Reserved::Granted {
                reservation: ReservationId(self.next()),
                extent: self.extent(),
            },
        }
    }

    fn sealed(&mut self) -> Sealed {
        let all = [
            Sealed::Published,
            Sealed::Present,
            Sealed::Stale,
            Sealed::Busy,
            Sealed::Invalid,
        ];
        all[self.below(all.len())]
    }

    fn item(&mut self) -> SealItem {
        SealItem {
            reservation: ReservationId(self.next()),
            hash: self.hash(),
            parent: self.parent(),
            length: self.u32(),
            tokens: self.u32(),
        }
    }

    fn hints(&mut self) -> Hints {
        if self.below(3) > 0 {
            return Hints::default();
        }
        Hints {
            prompt_tokens: self.maybe(Random::u32),
            local_prefix_tokens: self.maybe(Random::u32),
            queue_wait_us: self.maybe(Random::next),
            can_split: self.below(2) == 0,
            label: self.maybe(|random| Label(random.next())),
            session: self.maybe(Random::next),
            device: false,
        }
    }

    fn extensions(&mut self) -> Extensions<'static> {
        let hints = self.hints();
        match self.below(4) {
            0 => Extensions::raw(hints),
            1 => Extensions::on_device(hints, self.hash().0),
            _ => Extensions::from(hints),
        }
    }

    fn text(&mut self, min: usize, max: usize) -> String {
        let length = min + self.below((max - min).min(24) + 1);
        (0..length)
            .map(|_| char::from(b'a' + u8::try_from(self.below(26)).unwrap_or(0)))
            .collect()
    }
}

/// Appends one valid message of a random kind.
pub(super) fn message(random: &mut Random, target: &mut Vec<u8>) {
    let kind = Kind::ALL[random.below(Kind::ALL.len())];
    if kind.is_request() {
        request(random, kind, target)
    } else {
        reply(random, kind, target)
    }
}

fn request(random: &mut Random, kind: Kind, target: &mut Vec<u8>) {
    let releases = if random.below(3) == 0 {
        random.many(|random| LeaseId(random.next()))
    } else {
        Vec::new()
    };
    let envelope = Envelope {
        request: random.next(),
        deadline_us: random.next(),
        clock_ns: random.next(),
        releases: (&releases).into(),
        extensions: random.extensions(),
    };
    let hashes = random.many(Random::hash);
    let lineage = if random.below(4) == 0 {
        Lineage::Independent
    } else {
        Lineage::Chain(random.parent())
    };
    let keys = Keys {
        handle: random.u32(),
        lineage,
        hashes: (&hashes).into(),
    };
    let lengths: Vec<u32> = hashes.iter().map(|_| random.u32()).collect();
    let items = if kind == Kind::Seal {
        random.many(Random::item)
    } else {
        Vec::new()
    };
    let reservations = random.many(|random| ReservationId(random.next()));
    let name = random.text(1, 256);
    let token = random.text(0, 256);
    let ahead = Ahead {
        length: random.u32(),
        count: random.u32(),
    };
    let request = match kind {
        Kind::Hello => Request::Hello {
            version_min: 1,
            version_max: 7,
            token: token.as_bytes(),
        },
        Kind::OpenNamespace => Request::OpenNamespace {
            name: &name,
            realization: Realization::digest(&[("name", &name)]),
        },
        Kind::Lookup => Request::Lookup(keys),
        Kind::Fetch => {
            let scope = if random.below(2) == 0 {
                FetchScope::Prefix
            } else {
                FetchScope::Each
            };
            Request::Fetch { scope, keys }
        }
        Kind::Reserve => Request::Reserve {
            keys,
            lengths: (&lengths).into(),
        },
        Kind::Seal => Request::Seal {
            handle: random.u32(),
            generation: Generation(random.next()),
            ahead,
            items: (&items).into(),
        },
        Kind::Grant => Request::Grant(ahead),
        Kind::Abandon => Request::Abandon {
            reservations: (&reservations).into(),
        },
        Kind::Delete => Request::Delete(keys),
        Kind::Explain => Request::Explain(keys),
        Kind::Computed => Request::Computed {
            tokens: random.u32(),
            before_tokens: random.u32(),
            took_us: random.next(),
        },
        Kind::Advise => {
            let advice = [
                AdviceKind::Closed,
                AdviceKind::Pinned,
                AdviceKind::Expected,
                AdviceKind::Answered,
            ][random.below(4)];
            let amount = if advice == AdviceKind::Closed { 0 } else { random.u32() };
            Request::Advise { advice, amount, keys }
        }
        Kind::Invalidate => Request::Invalidate { name: &name },
        Kind::Flush => Request::Flush,
        Kind::Status => Request::Status,
        Kind::Goodbye => Request::Goodbye,
        _ => Request::Release,
    };
    assert!(
        request.encode(&envelope, target).is_ok(),
        "within the limits: {request:?}"
    );
}

fn reply(random: &mut Random, kind: Kind, target: &mut Vec<u8>) {
    let generation = Generation(random.next());
    let text = random.text(0, 1024);
    let tiers = random.many(|random| random.maybe(Random::tier));
    let fetched = random.many(Random::fetched);
    let reserved = random.many(Random::reserved);
    let sealed = random.many(Random::sealed);
    let slots = random.many(Random::slot);
    let removed = random.many(|random| random.below(2) == 0);
    let segment = SegmentId(random.u32());
    let reply = match kind {
        Kind::Welcome => Reply::Welcome(Welcome {
            version: 1,
            client_clock: random.below(2) == 0,
            batch_keys_max: random.u32(),
            block_bytes_max: random.u32(),
            client: ClientId(random.next()),
            lease_ttl_ms: random.next(),
            reservation_ttl_ms: random.next(),
        }),
        Kind::NamespaceOpened => Reply::NamespaceOpened {
            handle: random.u32(),
            generation,
        },
        Kind::Found => Reply::Found {
            generation,
            tiers: (&tiers).into(),
        },
        Kind::Fetched => Reply::Fetched {
            generation,
            outcomes: (&fetched).into(),
        },
        Kind::Reserved => Reply::Reserved {
            generation,
            outcomes: (&reserved).into(),
        },
        Kind::Sealed => Reply::Sealed {
            generation,
            outcomes: (&sealed).into(),
            granted: (&slots).into(),
        },
        Kind::Granted => Reply::Granted { slots: (&slots).into() },
        Kind::Deleted => Reply::Deleted {
            generation,
            removed: (&removed).into(),
        },
        Kind::Invalidated => Reply::Invalidated { generation },
        Kind::Flushed => Reply::Flushed {
            written: random.next(),
            left_out: random.next(),
        },
        Kind::StatusReport => Reply::Status { json: &text },
        Kind::Explained => Reply::Explained { json: &text },
        Kind::Counted => Reply::Counted,
        Kind::Advised => Reply::Advised { blocks: random.u32() },
        Kind::Error => {
            let code = 1 + u8::try_from(random.below(8)).unwrap_or(0);
            Reply::Error {
                kind: ErrorKind::from_code(code).unwrap_or(ErrorKind::Internal),
                message: &text,
            }
        }
        Kind::SegmentAdded => Reply::SegmentAdded {
            segment,
            bytes: random.next(),
        },
        Kind::SegmentRemoved => Reply::SegmentRemoved { segment },
        _ => Reply::Farewell,
    };
    let extensions = random.extensions();
    assert!(
        reply.encode_with(random.next(), extensions, target).is_ok(),
        "within the limits: {reply:?}"
    );
}
