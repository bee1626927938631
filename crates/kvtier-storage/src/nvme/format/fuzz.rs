//! The mutation loop behind `cargo xtask fuzz record`: valid random pages, entries, names and indexes, mutated with
//! knowledge of the format, and the properties that every input must keep.
//!
//! * Nothing panics.
//! * What decodes, encodes to the same bytes: no byte is ignored or read twice.
//! * An entry's payload lies inside the file and before the index; an index yields no more entries than it has room for.
//! * A name opens only from the very bytes that were sealed, in the segment that they were sealed for.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::super::keys::DataKey;
use super::super::sealing::RecordCipher;
use super::{
    ALIGNMENT, ENTRY, Encryption, Entry, HEADER_BYTES, Header, NAME_BYTES, Name, PAGE, Seal, decode_index, entries_max,
    entry_checksum, is_payload_range, padded,
};
use kvtier_core::{BlockHash, Label, Labels, Parent};

#[cfg(feature = "mutants")]
pub(super) mod planted {
    //! The planted bug: what is reserved in an entry is not looked at.

    use std::cell::Cell;

    thread_local! {
        static ON: Cell<bool> = const { Cell::new(false) };
    }

    /// Whether the decoder of this thread has the bug.
    pub(in crate::nvme::format) fn is_on() -> bool {
        ON.get()
    }

    pub(super) fn plant(on: bool) {
        ON.set(on);
    }
}

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FuzzReport {
    /// Inputs tried.
    pub executions: u64,
    /// Those among them that decode.
    pub decoded: u64,
    /// The first broken property, with the input in hex.
    pub finding: Option<String>,
}

/// Runs until `seconds` are over or a property breaks. The same seed tries the same inputs. With `mutant` the decoder
/// has a planted bug, which the loop must find; that needs the feature `mutants`.
///
/// # Panics
/// With `mutant` and without that feature.
#[must_use]
pub fn run(seed: u64, seconds: f64, mutant: bool) -> FuzzReport {
    #[cfg(feature = "mutants")]
    planted::plant(mutant);
    #[cfg(not(feature = "mutants"))]
    assert!(!mutant, "the planted bug needs the feature `mutants`");
    let until = Instant::now() + Duration::try_from_secs_f64(seconds).unwrap_or(Duration::ZERO);
    let mut random = Random(seed);
    let mut report = FuzzReport::default();
    let cipher = RecordCipher::derive(&DataKey::new([3; 32]), &[9; 32]);
    while report.finding.is_none() {
        // The clock is asked once in a while: most inputs take less time than it does.
        if report.executions.is_multiple_of(64) && Instant::now() >= until {
            break;
        }
        let mut input = Input::generate(&mut random, &cipher);
        // A third stays as it is: what is only nearly valid exercises the refusals, not the readers.
        if random.below(3) > 0 {
            input.mutate(&mut random);
        }
        report.executions += 1;
        match catch_unwind(AssertUnwindSafe(|| input.check(&cipher))) {
            Ok(Ok(decoded)) => report.decoded += u64::from(decoded),
            Ok(Err(broken)) => report.finding = Some(format!("{broken}: {}", hex(&input.bytes))),
            Err(_) => report.finding = Some(format!("a panic: {}", hex(&input.bytes))),
        }
    }
    #[cfg(feature = "mutants")]
    planted::plant(false);
    report
}

#[derive(Clone, Copy)]
enum Kind {
    Header,
    Seal,
    Entry,
    Name,
    Index,
}

struct Input {
    kind: Kind,
    header: Header,
    bytes: Vec<u8>,
    /// As it was generated.
    whole: Vec<u8>,
}

impl Input {
    fn generate(random: &mut Random, cipher: &Arc<RecordCipher>) -> Input {
        let version = super::VERSION_MIN + u32::from(random.below(4) > 0);
        let header = Header {
            version,
            segment: random.word(),
            incarnation: [9; 32],
            bytes: HEADER_BYTES + (1 + random.next() % 4096) * ALIGNMENT,
            opened_ms: random.next(),
            encryption: if random.below(2) == 0 {
                Encryption::None
            } else {
                Encryption::Aes256Gcm
            },
        };
        // Pages are large and few of their bytes mean anything.
        let kind = match random.below(16) {
            0 => Kind::Header,
            1 => Kind::Seal,
            2..8 => Kind::Entry,
            8..14 => Kind::Name,
            _ => Kind::Index,
        };
        let bytes = match kind {
            Kind::Header => header.encode().to_vec(),
            Kind::Seal => Seal {
                version,
                segment: header.segment,
                incarnation: header.incarnation,
                entries: random.word() % (entries_max(header.bytes) + 1),
                sealed_ms: random.next(),
            }
            .encode()
            .to_vec(),
            Kind::Entry => entry(random, &header, cipher).encode(&header.incarnation).to_vec(),
            Kind::Name => name(random).encode().to_vec(),
            Kind::Index => {
                let mut index = Vec::new();
                for _ in 0..random.below(6) {
                    let bytes = match random.below(4) {
                        0 => [0; ENTRY],
                        _ => entry(random, &header, cipher).encode(&header.incarnation),
                    };
                    index.splice(..0, bytes);
                }
                index
            }
        };
        Input {
            kind,
            header,
            whole: bytes.clone(),
            bytes,
        }
    }

    fn mutate(&mut self, random: &mut Random) {
        for _ in 0..1 + random.below(3) {
            let length = self.bytes.len().max(1);
            // Most fields lie at the front.
            let near = if random.below(4) == 0 {
                length
            } else {
                length.min(ENTRY)
            };
            let at = random.below(near);
            match random.below(6) {
                0 => self.bytes.truncate(at),
                1 => self.bytes.extend((0..random.below(300)).map(|_| 0)),
                2 => {
                    let lie = random.interesting();
                    if let Some(word) = self.bytes.get_mut(at / 4 * 4..at / 4 * 4 + 4) {
                        word.copy_from_slice(&lie.to_le_bytes());
                    }
                }
                _ => {
                    if let Some(byte) = self.bytes.get_mut(at) {
                        *byte ^= 1 << random.below(8);
                    }
                }
            }
        }
        // A liar can count: with checksums that fit, what is behind them is reached.
        if random.below(3) > 0 {
            self.mend();
        }
    }

    fn mend(&mut self) {
        match self.kind {
            Kind::Header | Kind::Seal => {
                if let Some(page) = self.bytes.first_chunk_mut::<PAGE>() {
                    super::close_page(page);
                }
            }
            Kind::Entry | Kind::Index => {
                for bytes in self.bytes.rchunks_exact_mut(ENTRY) {
                    let bytes: &mut [u8; ENTRY] = bytes.try_into().expect("chunks of that size");
                    let sum = entry_checksum(bytes, &self.header.incarnation);
                    bytes[124..].copy_from_slice(&sum.to_le_bytes());
                }
            }
            Kind::Name => {}
        }
    }

    /// Whether it decodes.
    fn check(&self, cipher: &Arc<RecordCipher>) -> Result<bool, &'static str> {
        let bytes = &self.bytes[..];
        match self.kind {
            Kind::Header => match Header::decode(bytes) {
                Ok(header) if header.encode()[..] != bytes[..PAGE] => Err("a header encodes to other bytes"),
                decoded => Ok(decoded.is_ok()),
            },
            Kind::Seal => match Seal::decode(bytes, &self.header) {
                Ok(Some(seal)) if seal.encode()[..] != bytes[..PAGE] => Err("a seal encodes to other bytes"),
                Ok(Some(seal)) if seal.entries > entries_max(self.header.bytes) => Err("a seal of too many entries"),
                decoded => Ok(decoded.is_ok()),
            },
            Kind::Entry => match Entry::decode(bytes, &self.header) {
                Ok(Some(entry)) => self.check_entry(&entry, bytes, cipher).map(|()| true),
                decoded => Ok(decoded.is_ok()),
            },
            Kind::Name => match bytes.first_chunk::<NAME_BYTES>().map(Name::decode) {
                Some(Ok(name)) if name.encode()[..] != bytes[..NAME_BYTES] => Err("a name encodes to other bytes"),
                decoded => Ok(matches!(decoded, Some(Ok(_)))),
            },
            Kind::Index => self.check_index(cipher),
        }
    }

    fn check_entry(&self, entry: &Entry, bytes: &[u8], cipher: &Arc<RecordCipher>) -> Result<(), &'static str> {
        if entry.encode(&self.header.incarnation)[..] != bytes[..ENTRY] {
            return Err("an entry encodes to other bytes");
        }
        let end = entry.offset + padded(u64::from(entry.length));
        if !is_payload_range(self.header.bytes, entry.offset, entry.length) || end > self.header.bytes {
            return Err("an entry outside the payloads");
        }
        let opened = cipher.open_name(entry, self.header.segment);
        let is_known = self.whole.rchunks_exact(ENTRY).any(|known| *known == bytes[..ENTRY]);
        match opened {
            Ok(_) if !is_known => Err("a name opens that was not sealed so"),
            Err(_) if is_known => Err("a name that was sealed does not open"),
            _ if cipher.open_name(entry, !self.header.segment).is_ok() => Err("a name opens in another segment"),
            _ => Ok(()),
        }
    }

    fn check_index(&self, cipher: &Arc<RecordCipher>) -> Result<bool, &'static str> {
        let room = self.bytes.len() / ENTRY;
        let (found, damaged) = decode_index(&self.bytes, &self.header, usize::MAX);
        if found.len() + damaged as usize > room {
            return Err("an index of more entries than it has room for");
        }
        let mut before = None;
        for (ordinal, entry) in &found {
            if before >= Some(*ordinal) {
                return Err("entries out of order");
            }
            before = Some(*ordinal);
            let end = self.bytes.len() - *ordinal as usize * ENTRY;
            self.check_entry(entry, &self.bytes[end - ENTRY..end], cipher)?;
        }
        Ok(damaged == 0)
    }
}

fn name(random: &mut Random) -> Name {
    let hash = |random: &mut Random| {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&random.next().to_le_bytes());
        BlockHash(bytes)
    };
    Name {
        hash: hash(random),
        parent: match random.below(3) {
            0 => Parent::Unknown,
            1 => Parent::Root,
            _ => Parent::Block(hash(random)),
        },
        realization: random.word(),
        tokens: random.word(),
        checksum: random.word(),
        labels: match random.below(4) {
            0 => Labels::None,
            1 => Labels::One(Label(random.next())),
            2 => {
                let (one, other) = (random.next(), random.next());
                Labels::Two(Label(one.min(other)), Label(one.max(other).max(1)))
            }
            _ => Labels::Any,
        },
    }
}

fn entry(random: &mut Random, header: &Header, cipher: &Arc<RecordCipher>) -> Entry {
    let pages = (header.bytes - HEADER_BYTES) / ALIGNMENT;
    let first = random.next() % pages;
    // The last page of the file is the index's.
    let most = (pages - first).saturating_sub(1).clamp(1, 64) * ALIGNMENT;
    let length = u32::try_from(1 + random.next() % most).unwrap_or(1);
    let entry = Entry {
        version: header.version,
        tag: [random.word().to_le_bytes()[0]; 16],
        generation: random.next(),
        namespace: random.word(),
        offset: HEADER_BYTES + first * ALIGNMENT,
        length,
        name: [0; NAME_BYTES],
        name_tag: [0; 16],
    };
    let name = name(random);
    cipher.seal_name(entry, header.segment, &name)
}

/// A small generator of our own (splitmix64), so that a seed means the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// Below `bound`, which is at least 1.
    fn below(&mut self, bound: usize) -> usize {
        usize::try_from(self.next() % (bound as u64)).unwrap_or(0)
    }

    fn word(&mut self) -> u32 {
        self.next().to_le_bytes()[..4].try_into().map_or(0, u32::from_le_bytes)
    }

    /// Numbers at which offsets, lengths and counts go wrong.
    fn interesting(&mut self) -> u32 {
        let numbers = [
            0,
            1,
            2,
            127,
            128,
            4095,
            4096,
            4097,
            8191,
            8192,
            u32::MAX / 2,
            u32::MAX - 1,
            u32::MAX,
        ];
        numbers[self.below(numbers.len())]
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::run;

    #[test]
    fn a_third_of_the_inputs_decode_and_nothing_is_found() {
        let report = run(1, 1.0, false);
        assert_eq!(report.finding, None);
        assert!(
            report.executions > 0 && report.decoded * 3 >= report.executions,
            "{report:?}"
        );
    }

    #[cfg(feature = "mutants")]
    #[test]
    fn the_planted_bug_is_found() {
        for seed in 0..3 {
            let report = run(seed, 60.0, true);
            assert!(report.finding.is_some(), "seed {seed}: {} inputs", report.executions);
        }
    }
}
