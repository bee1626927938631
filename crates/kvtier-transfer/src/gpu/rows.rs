use super::driver::Address;
use super::stream::{Copy, Place};

/// Most bytes between rows that every device takes (`CU_DEVICE_ATTRIBUTE_MAX_PITCH` is 2^31 - 1 on all of them).
const PITCH_MAX: usize = (1 << 31) - 1;

/// Copies of one length that lie at equal distances on either side: rows of a matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Rows {
    pub(super) count: usize,
    /// Bytes from one row to the next.
    pub(super) source_pitch: usize,
    pub(super) target_pitch: usize,
}

/// How many of the first copies are rows; at least one.
pub(super) fn of(copies: &[Copy]) -> Rows {
    let mut rows = Rows {
        count: 1,
        source_pitch: 0,
        target_pitch: 0,
    };
    for pair in copies.windows(2) {
        let (before, after) = (&pair[0], &pair[1]);
        let length = before.source.len();
        let pitch = |before: Address, after: Address| {
            let pitch = usize::try_from(after.checked_sub(before)?).ok()?;
            (length..=PITCH_MAX).contains(&pitch).then_some(pitch)
        };
        let source = pitch(before.source_address(), after.source_address());
        let target = pitch(before.target_address(), after.target_address());
        let (Some(source), Some(target)) = (source, target) else {
            break;
        };
        let same = after.source.len() == length
            && is_same_memory(&before.source, &after.source)
            && is_same_memory(&before.target, &after.target);
        let fits = rows.count == 1 || (source, target) == (rows.source_pitch, rows.target_pitch);
        if !same || !fits {
            break;
        }
        rows = Rows {
            count: rows.count + 1,
            source_pitch: source,
            target_pitch: target,
        };
    }
    rows
}

/// Whether two places lie in one region.
fn is_same_memory(one: &Place, other: &Place) -> bool {
    match (one, other) {
        (Place::Host(one), Place::Host(other)) => std::sync::Arc::ptr_eq(one.region(), other.region()),
        (Place::Device(one), Place::Device(other)) => std::sync::Arc::ptr_eq(one.region(), other.region()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::MemoryRegion;

    #[test]
    fn copies_at_equal_distances_are_rows_and_the_first_that_is_not_ends_them() {
        let region = MemoryRegion::anonymous(64 << 10).expect("memory");
        let other = MemoryRegion::anonymous(4096).expect("memory");
        let at = |offset: usize, length: usize| Place::Host(region.slice(offset, length).expect("inside"));
        let copy = |source: usize, target: usize, length: usize| Copy {
            source: at(source, length),
            target: at(target, length),
        };
        let rows = |copies: &[Copy]| (of(copies).count, of(copies).source_pitch, of(copies).target_pitch);
        let three = [copy(0, 8192, 64), copy(256, 8256, 64), copy(512, 8320, 64)];
        assert_eq!(rows(&three), (3, 256, 64));
        assert_eq!(rows(&three[..1]).0, 1);
        // Another distance, another length, backwards, rows that overlap, another region.
        for odd in [
            copy(1024, 8384, 64),
            copy(768, 8384, 32),
            copy(0, 8384, 64),
            copy(768, 8350, 64),
            Copy {
                source: at(768, 64),
                target: Place::Host(other.slice(0, 64).expect("inside")),
            },
        ] {
            let mut copies = three.to_vec();
            copies.push(odd);
            assert_eq!(rows(&copies), (3, 256, 64));
        }
        assert_eq!(rows(&[copy(0, 8192, 64), copy(32, 8256, 64)]).0, 1);
    }
}
