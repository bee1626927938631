//! The register's pages, pure: bytes in, checked types out. Drawn in the documentation of [`super`].

use kvtier_core::Generation;
use kvtier_storage::nvme::DataKey;
use kvtier_transfer::crc32c;

use super::master::{KeyId, MasterKey, NONCE_BYTES, WRAPPED_BYTES, Wrapped};

/// The version written and understood.
pub(super) const VERSION: u32 = 1;
pub(super) const PAGE_BYTES: usize = 4096;
/// What of a page is used: one sector of any device, so that half of it is rarely written.
pub(super) const SECTOR_BYTES: usize = 512;
/// Longest label of a trust domain.
pub(super) const DOMAIN_BYTES_MAX: usize = 128;
/// Longest name of a namespace.
pub(super) const NAME_BYTES_MAX: usize = 256;

pub(super) type Page = [u8; PAGE_BYTES];
pub(super) type Sector = [u8; SECTOR_BYTES];
/// Drawn when a register is made; binds its halves to it.
pub(super) type Incarnation = [u8; 16];

const HEADER_MAGIC: [u8; 8] = *b"kvtier\x01R";
const HALF_MAGIC: [u8; 4] = *b"kv\x01S";
const CHECKSUM_AT: usize = SECTOR_BYTES - 4;
const NONCE_AT: usize = CHECKSUM_AT - WRAPPED_BYTES - NONCE_BYTES;
const NAME_AT: usize = NONCE_AT - NAME_BYTES_MAX;
const DOMAIN_AT: usize = NAME_AT - DOMAIN_BYTES_MAX;
const LIVE: u16 = 1;
const LOST: u16 = 2;

/// A namespace's name and whose it is.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Label {
    /// Label of its trust domain.
    pub domain: String,
    /// Its name there.
    pub name: String,
}

impl Label {
    pub(super) fn fits(&self) -> bool {
        self.domain.len() <= DOMAIN_BYTES_MAX && (1..=NAME_BYTES_MAX).contains(&self.name.len())
    }
}

/// One half of a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Half {
    pub(super) slot: u32,
    /// The half with the higher one counts.
    pub(super) sequence: u64,
    pub(super) generation: Generation,
    pub(super) wrapped_by: KeyId,
    /// `None`: a slot whose content was lost, kept so that its number is never used again.
    pub(super) label: Option<Label>,
    wrapped: Wrapped,
}

/// What a sector is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Read<T> {
    /// Never written.
    Blank,
    /// Not what was written, or of another register or slot.
    Damaged,
    /// Of a later version.
    Newer(u32),
    /// Whole.
    Whole(T),
}

impl Half {
    /// A half that says this and wraps `key`.
    pub(super) fn seal(
        master: &MasterKey,
        incarnation: &Incarnation,
        (slot, sequence): (u32, u64),
        (label, generation): (&Label, Generation),
        key: &DataKey,
    ) -> std::io::Result<Half> {
        let mut half = Half {
            slot,
            sequence,
            generation,
            wrapped_by: master.id(),
            label: Some(label.clone()),
            wrapped: Wrapped {
                nonce: [0; NONCE_BYTES],
                bytes: [0; WRAPPED_BYTES],
            },
        };
        half.wrapped = master.wrap(&half.sector(incarnation)[..NONCE_AT], key)?;
        Ok(half)
    }

    /// A half that says that its slot's content was lost.
    pub(super) fn lost(master: &MasterKey, slot: u32, sequence: u64) -> Half {
        Half {
            slot,
            sequence,
            generation: Generation(0),
            wrapped_by: master.id(),
            label: None,
            wrapped: Wrapped {
                nonce: [0; NONCE_BYTES],
                bytes: [0; WRAPPED_BYTES],
            },
        }
    }

    /// The data key inside; `None` where anything that it is bound to is not what it was.
    pub(super) fn open(&self, master: &MasterKey, incarnation: &Incarnation) -> Option<DataKey> {
        master.unwrap(&self.sector(incarnation)[..NONCE_AT], &self.wrapped)
    }

    pub(super) fn page(&self, incarnation: &Incarnation) -> Page {
        let mut page = [0; PAGE_BYTES];
        page[..SECTOR_BYTES].copy_from_slice(&self.sector(incarnation));
        page
    }

    fn sector(&self, incarnation: &Incarnation) -> Sector {
        let mut sector = [0; SECTOR_BYTES];
        let state = if self.label.is_some() { LIVE } else { LOST };
        let (domain, name) = match &self.label {
            Some(label) => (label.domain.as_bytes(), label.name.as_bytes()),
            None => (&[][..], &[][..]),
        };
        let length = |bytes: &[u8]| u16::try_from(bytes.len()).expect("labels that do not fit are refused");
        sector[..4].copy_from_slice(&HALF_MAGIC);
        sector[4..6].copy_from_slice(&u16::try_from(VERSION).expect("a small number").to_le_bytes());
        sector[6..8].copy_from_slice(&state.to_le_bytes());
        sector[8..24].copy_from_slice(incarnation);
        sector[24..28].copy_from_slice(&self.slot.to_le_bytes());
        sector[28..30].copy_from_slice(&length(domain).to_le_bytes());
        sector[30..32].copy_from_slice(&length(name).to_le_bytes());
        sector[32..40].copy_from_slice(&self.sequence.to_le_bytes());
        sector[40..48].copy_from_slice(&self.generation.0.to_le_bytes());
        sector[48..64].copy_from_slice(&self.wrapped_by.0);
        sector[DOMAIN_AT..DOMAIN_AT + domain.len()].copy_from_slice(domain);
        sector[NAME_AT..NAME_AT + name.len()].copy_from_slice(name);
        sector[NONCE_AT..NONCE_AT + NONCE_BYTES].copy_from_slice(&self.wrapped.nonce);
        sector[NONCE_AT + NONCE_BYTES..CHECKSUM_AT].copy_from_slice(&self.wrapped.bytes);
        close(&mut sector);
        sector
    }

    /// Reads a sector back. `incarnation`: whose it must be; `None` takes any, and says which.
    pub(super) fn decode(sector: &Sector, slot: u32, incarnation: Option<&Incarnation>) -> Read<(Half, Incarnation)> {
        if sector.iter().all(|byte| *byte == 0) {
            return Read::Blank;
        }
        if sector[..4] != HALF_MAGIC || !is_closed(sector) {
            return Read::Damaged;
        }
        let version = u32::from(u16_at(sector, 4));
        if version > VERSION {
            return Read::Newer(version);
        }
        match Half::parse(sector) {
            Some(half) if version == VERSION && half.slot == slot => {
                let found: Incarnation = bytes_at(sector, 8);
                if incarnation.is_some_and(|own| *own != found) {
                    return Read::Damaged;
                }
                Read::Whole((half, found))
            }
            _ => Read::Damaged,
        }
    }

    fn parse(sector: &Sector) -> Option<Half> {
        let text = |at: usize, length: u16, room: usize| {
            let length = usize::from(length);
            let bytes = &sector[at..at + room];
            let (used, unused) = bytes.split_at_checked(length)?;
            let clean = unused.iter().all(|byte| *byte == 0);
            clean.then(|| String::from_utf8(used.to_vec()).ok()).flatten()
        };
        let domain = text(DOMAIN_AT, u16_at(sector, 28), DOMAIN_BYTES_MAX)?;
        let name = text(NAME_AT, u16_at(sector, 30), NAME_BYTES_MAX)?;
        let label = match u16_at(sector, 6) {
            LIVE if !name.is_empty() => Some(Label { domain, name }),
            LOST if domain.is_empty() && name.is_empty() => None,
            _ => return None,
        };
        Some(Half {
            slot: u32::from_le_bytes(bytes_at(sector, 24)),
            sequence: u64::from_le_bytes(bytes_at(sector, 32)),
            generation: Generation(u64::from_le_bytes(bytes_at(sector, 40))),
            wrapped_by: KeyId(bytes_at(sector, 48)),
            label,
            wrapped: Wrapped {
                nonce: bytes_at(sector, NONCE_AT),
                bytes: bytes_at(sector, NONCE_AT + NONCE_BYTES),
            },
        })
    }
}

/// The header page of a register.
pub(super) fn header(incarnation: &Incarnation) -> Page {
    let mut sector = [0; SECTOR_BYTES];
    sector[..8].copy_from_slice(&HEADER_MAGIC);
    sector[8..12].copy_from_slice(&VERSION.to_le_bytes());
    sector[12..16].copy_from_slice(&u32::try_from(PAGE_BYTES).expect("a small number").to_le_bytes());
    sector[16..32].copy_from_slice(incarnation);
    close(&mut sector);
    let mut page = [0; PAGE_BYTES];
    page[..SECTOR_BYTES].copy_from_slice(&sector);
    page
}

/// Reads the header's sector back.
pub(super) fn decode_header(sector: &Sector) -> Read<Incarnation> {
    if sector.iter().all(|byte| *byte == 0) {
        return Read::Blank;
    }
    let version = u32::from_le_bytes(bytes_at(sector, 8));
    // A later version may close its pages otherwise: its word for itself is enough to stay away.
    if sector[..8] == HEADER_MAGIC && version > VERSION {
        return Read::Newer(version);
    }
    let page_bytes = u32::from_le_bytes(bytes_at(sector, 12));
    let ours = sector[..8] == HEADER_MAGIC && version == VERSION && page_bytes as usize == PAGE_BYTES;
    if ours && is_closed(sector) {
        Read::Whole(bytes_at(sector, 16))
    } else {
        Read::Damaged
    }
}

/// Whether a header that is not whole can be one of ours whose first write was cut short.
pub(super) fn is_torn_header(sector: &Sector) -> bool {
    let version_and_page = [VERSION.to_le_bytes(), (PAGE_BYTES as u32).to_le_bytes()].concat();
    let expected = HEADER_MAGIC.iter().chain(&version_and_page);
    sector
        .iter()
        .zip(expected)
        .all(|(found, written)| *found == 0 || found == written)
}

/// Where a half lies: its slot's two pages follow each other.
pub(super) fn place(slot: u32, half: usize) -> u64 {
    (PAGE_BYTES as u64) * (1 + 2 * u64::from(slot) + half as u64)
}

/// How many slots a register of this length may have.
pub(super) fn slots_in(bytes: u64) -> u64 {
    bytes.saturating_sub(PAGE_BYTES as u64).div_ceil(2 * PAGE_BYTES as u64)
}

fn close(sector: &mut Sector) {
    let sum = crc32c(&sector[..CHECKSUM_AT]);
    sector[CHECKSUM_AT..].copy_from_slice(&sum.to_le_bytes());
}

fn is_closed(sector: &Sector) -> bool {
    crc32c(&sector[..CHECKSUM_AT]) == u32::from_le_bytes(bytes_at(sector, CHECKSUM_AT))
}

fn u16_at(sector: &Sector, at: usize) -> u16 {
    u16::from_le_bytes(bytes_at(sector, at))
}

fn bytes_at<const N: usize>(sector: &Sector, at: usize) -> [u8; N] {
    sector[at..at + N].try_into().expect("inside a sector")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn label(domain: &str, name: &str) -> Label {
        Label {
            domain: domain.into(),
            name: name.into(),
        }
    }

    fn sample() -> (MasterKey, Incarnation, Half, Sector) {
        let (master, incarnation) = (MasterKey::new(&[1; 32]), [2; 16]);
        let half = Half::seal(
            &master,
            &incarnation,
            (7, 41),
            (&label("uid-0", "tenant"), Generation(12)),
            &DataKey::new([3; 32]),
        )
        .unwrap();
        let sector = half.page(&incarnation)[..SECTOR_BYTES].try_into().unwrap();
        (master, incarnation, half, sector)
    }

    #[test]
    fn a_half_lies_where_the_drawing_says() {
        let (master, _, half, sector) = sample();
        assert_eq!((DOMAIN_AT, NAME_AT, NONCE_AT, CHECKSUM_AT), (64, 192, 448, 508));
        assert_eq!(&sector[..8], b"kv\x01S\x01\x00\x01\x00");
        assert_eq!(sector[8..24], [2; 16]);
        assert_eq!(sector[24..28], 7u32.to_le_bytes());
        assert_eq!((sector[28], sector[30]), (5, 6));
        assert_eq!(sector[32..40], 41u64.to_le_bytes());
        assert_eq!(sector[40..48], 12u64.to_le_bytes());
        assert_eq!(sector[48..64], master.id().0);
        assert_eq!(&sector[64..70], b"uid-0\0");
        assert_eq!(&sector[192..199], b"tenant\0");
        assert_eq!(sector[448..460], half.wrapped.nonce);
        assert_eq!(sector[460..508], half.wrapped.bytes);
        assert_eq!(place(0, 0), 4096);
        assert_eq!((place(3, 0), place(3, 1)), (4096 * 7, 4096 * 8));
        assert_eq!(
            [0, 4096, 4097, 4096 * 2, 4096 * 3, 4096 * 3 + 1].map(slots_in),
            [0, 0, 1, 1, 1, 2]
        );
    }

    #[test]
    fn a_half_reads_back_and_its_key_opens() {
        let (master, incarnation, half, sector) = sample();
        assert_eq!(
            Half::decode(&sector, 7, Some(&incarnation)),
            Read::Whole((half.clone(), incarnation))
        );
        assert_eq!(half.open(&master, &incarnation).unwrap().bytes(), &[3; 32]);
        assert!(half.open(&MasterKey::new(&[2; 32]), &incarnation).is_none());
        let lost = Half::lost(&master, 7, 3);
        let page = lost.page(&incarnation);
        let sector: Sector = page[..SECTOR_BYTES].try_into().unwrap();
        assert_eq!(Half::decode(&sector, 7, None), Read::Whole((lost, incarnation)));
    }

    #[test]
    fn a_half_of_another_slot_register_or_version_is_not_taken() {
        let (_, incarnation, _, sector) = sample();
        assert_eq!(Half::decode(&sector, 8, Some(&incarnation)), Read::Damaged);
        assert_eq!(Half::decode(&sector, 7, Some(&[9; 16])), Read::Damaged);
        let mut newer = sector;
        newer[4] = 2;
        close(&mut newer);
        assert_eq!(Half::decode(&newer, 7, Some(&incarnation)), Read::Newer(2));
        assert_eq!(Half::decode(&[0; SECTOR_BYTES], 7, None), Read::Blank);
    }

    #[test]
    fn what_a_key_is_bound_to_cannot_be_changed_with_a_fresh_checksum() {
        let (master, incarnation, _, sector) = sample();
        // Slot, sequence, generation, label: everything before the nonce, and the nonce and the key themselves.
        for place in (24..64).chain(64..70).chain(192..199).chain(448..508) {
            let mut forged = sector;
            forged[place] ^= 1;
            close(&mut forged);
            let slot = u32::from_le_bytes(bytes_at(&forged, 24));
            if let Read::Whole((half, found)) = Half::decode(&forged, slot, None) {
                assert!(half.open(&master, &found).is_none(), "byte {place}");
            }
        }
        let moved = Half::decode(&sector, 7, None);
        let Read::Whole((half, _)) = moved else {
            panic!("{moved:?}")
        };
        assert!(half.open(&master, &[9; 16]).is_none(), "another register");
        assert!(half.open(&master, &incarnation).is_some());
    }

    #[test]
    fn a_header_reads_back_and_a_torn_one_is_told_from_a_strangers_file() {
        let page = header(&[5; 16]);
        let sector: Sector = page[..SECTOR_BYTES].try_into().unwrap();
        assert_eq!(decode_header(&sector), Read::Whole([5; 16]));
        assert_eq!(decode_header(&[0; SECTOR_BYTES]), Read::Blank);
        for written in 0..SECTOR_BYTES {
            let mut torn = [0; SECTOR_BYTES];
            torn[..written].copy_from_slice(&sector[..written]);
            assert!(is_torn_header(&torn), "{written} bytes");
        }
        let mut stranger = [0; SECTOR_BYTES];
        stranger[..5].copy_from_slice(b"hello");
        assert!(decode_header(&stranger) == Read::Damaged && !is_torn_header(&stranger));
        let mut newer = sector;
        newer[8] = 2;
        assert_eq!(decode_header(&newer), Read::Newer(2));
    }

    proptest! {
        #[test]
        fn any_label_that_fits_reads_back(
            domain in "[^/]{0,30}", name in "\\PC{1,60}", generation: u64, sequence: u64, slot: u32,
        ) {
            let (master, incarnation) = (MasterKey::new(&[1; 32]), [2; 16]);
            let label = label(&domain, &name);
            let half = Half::seal(
                &master, &incarnation, (slot, sequence), (&label, Generation(generation)), &DataKey::new([3; 32]),
            ).unwrap();
            let page = half.page(&incarnation);
            let sector: Sector = page[..SECTOR_BYTES].try_into().unwrap();
            prop_assert_eq!(Half::decode(&sector, slot, Some(&incarnation)), Read::Whole((half, incarnation)));
        }

        #[test]
        fn a_flipped_bit_is_found(place in 0..SECTOR_BYTES, bit in 0..8u32) {
            let (_, incarnation, half, mut sector) = sample();
            sector[place] ^= 1 << bit;
            let found = Half::decode(&sector, 7, Some(&incarnation));
            prop_assert_ne!(found, Read::Whole((half, incarnation)));
        }

        #[test]
        fn arbitrary_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), SECTOR_BYTES), shut: bool) {
            let mut sector: Sector = bytes.try_into().unwrap();
            if shut {
                sector[..4].copy_from_slice(&HALF_MAGIC);
                sector[4..6].copy_from_slice(&1u16.to_le_bytes());
                close(&mut sector);
            }
            let _ = Half::decode(&sector, 0, None);
            let _ = decode_header(&sector);
        }
    }
}
