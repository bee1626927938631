use kvtier_core::{BlockHash, Fetched, LeaseId, ReservationId, Reserved, SealItem, Sealed, Tier};

use super::array::Record;
use super::field::{Cursor, parent_code, parent_of, put_extent, put_u32, put_u64};
use super::{DecodeError, Slot};

impl Record for BlockHash {
    const BYTES: usize = 16;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Cursor(bytes).hash("hash")
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.extend_from_slice(&self.0);
    }
}

impl Record for u32 {
    const BYTES: usize = 4;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Cursor(bytes).u32("number")
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u32(*self, target);
    }
}

impl Record for LeaseId {
    const BYTES: usize = 8;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(LeaseId(Cursor(bytes).u64("lease")?))
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u64(self.0, target);
    }
}

impl Record for ReservationId {
    const BYTES: usize = 8;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(ReservationId(Cursor(bytes).u64("reservation")?))
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u64(self.0, target);
    }
}

impl Record for bool {
    const BYTES: usize = 1;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        match Cursor(bytes).u8("flag")? {
            0 => Ok(false),
            1 => Ok(true),
            code => Err(DecodeError::UnknownCode {
                field: "flag",
                code: code.into(),
            }),
        }
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.push(u8::from(*self));
    }
}

fn tier_code(tier: Tier) -> u8 {
    match tier {
        Tier::Host => 1,
        Tier::Nvme => 2,
        Tier::Remote => 3,
        Tier::Hbm => 4,
    }
}

fn tier_of(code: u8) -> Result<Tier, DecodeError> {
    match code {
        1 => Ok(Tier::Host),
        2 => Ok(Tier::Nvme),
        3 => Ok(Tier::Remote),
        4 => Ok(Tier::Hbm),
        code => Err(DecodeError::UnknownCode {
            field: "tier",
            code: code.into(),
        }),
    }
}

impl Record for Option<Tier> {
    const BYTES: usize = 1;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        match Cursor(bytes).u8("tier")? {
            0 => Ok(None),
            code => tier_of(code).map(Some),
        }
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.push(self.map_or(0, tier_code));
    }
}

impl Record for Slot {
    const BYTES: usize = 24;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let reservation = ReservationId(cursor.u64("slot")?);
        Ok(Slot {
            reservation,
            extent: cursor.extent()?,
        })
    }
    fn write(&self, target: &mut Vec<u8>) {
        put_u64(self.reservation.0, target);
        put_extent(&self.extent, target);
    }
}

impl Record for Sealed {
    const BYTES: usize = 1;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        Ok(match Cursor(bytes).u8("outcome")? {
            0 => Sealed::Published,
            1 => Sealed::Present,
            2 => Sealed::Stale,
            3 => Sealed::Busy,
            4 => Sealed::Invalid,
            code => {
                return Err(DecodeError::UnknownCode {
                    field: "outcome of a seal",
                    code: code.into(),
                });
            }
        })
    }
    fn write(&self, target: &mut Vec<u8>) {
        target.push(match self {
            Sealed::Published => 0,
            Sealed::Present => 1,
            Sealed::Stale => 2,
            Sealed::Busy => 3,
            Sealed::Invalid => 4,
        });
    }
}

impl Record for Fetched {
    const BYTES: usize = 32;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let outcome = cursor.u8("fetched")?;
        if outcome < 2 {
            cursor.zero::<31>("what follows a miss")?;
            return Ok(if outcome == 0 { Fetched::Miss } else { Fetched::Busy });
        }
        if outcome > 2 {
            return Err(DecodeError::UnknownCode {
                field: "outcome of a fetch",
                code: outcome.into(),
            });
        }
        let tier = tier_of(cursor.u8("fetched")?)?;
        let checked = cursor.u8("fetched")?;
        cursor.zero::<1>("padding of fetched")?;
        let checksum = cursor.u32("fetched")?;
        let checksum = match (checked, checksum) {
            (0, 0) => None,
            (0, _) => {
                return Err(DecodeError::NotZero {
                    field: "checksum that is not there",
                });
            }
            (1, checksum) => Some(checksum),
            (code, _) => {
                return Err(DecodeError::UnknownCode {
                    field: "checked",
                    code: code.into(),
                });
            }
        };
        let lease = LeaseId(cursor.u64("fetched")?);
        Ok(Fetched::Leased {
            lease,
            extent: cursor.extent()?,
            tier,
            checksum,
        })
    }
    fn write(&self, target: &mut Vec<u8>) {
        match self {
            Fetched::Miss => target.extend_from_slice(&[0; 32]),
            Fetched::Busy => {
                target.push(1);
                target.extend_from_slice(&[0; 31]);
            }
            Fetched::Leased {
                lease,
                extent,
                tier,
                checksum,
            } => {
                target.extend_from_slice(&[2, tier_code(*tier), u8::from(checksum.is_some()), 0]);
                put_u32(checksum.unwrap_or(0), target);
                put_u64(lease.0, target);
                put_extent(extent, target);
            }
        }
    }
}

impl Record for Reserved {
    const BYTES: usize = 32;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let outcome = cursor.u8("reserved")?;
        cursor.zero::<7>("padding of reserved")?;
        match outcome {
            0 | 1 => {
                cursor.zero::<24>("what follows a refusal")?;
                Ok(if outcome == 0 {
                    Reserved::Present
                } else {
                    Reserved::Busy
                })
            }
            2 => {
                let reservation = ReservationId(cursor.u64("reserved")?);
                Ok(Reserved::Granted {
                    reservation,
                    extent: cursor.extent()?,
                })
            }
            code => Err(DecodeError::UnknownCode {
                field: "outcome of a reserve",
                code: code.into(),
            }),
        }
    }
    fn write(&self, target: &mut Vec<u8>) {
        let outcome = match self {
            Reserved::Present => 0,
            Reserved::Busy => 1,
            Reserved::Granted { .. } => 2,
        };
        target.extend_from_slice(&[outcome, 0, 0, 0, 0, 0, 0, 0]);
        match self {
            Reserved::Present | Reserved::Busy => target.extend_from_slice(&[0; 24]),
            Reserved::Granted { reservation, extent } => {
                put_u64(reservation.0, target);
                put_extent(extent, target);
            }
        }
    }
}

impl Record for SealItem {
    const BYTES: usize = 56;
    fn read(bytes: &[u8]) -> Result<Self, DecodeError> {
        let mut cursor = Cursor(bytes);
        let reservation = ReservationId(cursor.u64("item")?);
        let hash = cursor.hash("item")?;
        let parent = cursor.hash("item")?;
        let parent = parent_of(cursor.u32("item")?, parent)?;
        let length = cursor.u32("item")?;
        let tokens = cursor.u32("item")?;
        cursor.zero::<4>("padding of item")?;
        Ok(SealItem {
            reservation,
            hash,
            parent,
            length,
            tokens,
        })
    }
    fn write(&self, target: &mut Vec<u8>) {
        let (code, parent) = parent_code(self.parent);
        put_u64(self.reservation.0, target);
        target.extend_from_slice(&self.hash.0);
        target.extend_from_slice(&parent.0);
        put_u32(code, target);
        put_u32(self.length, target);
        put_u32(self.tokens, target);
        put_u32(0, target);
    }
}
