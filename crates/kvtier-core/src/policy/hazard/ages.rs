//! Ages in bins: octaves up to four seconds, half octaves above, up to twenty hours.
//!
//! Time here is counted in *ticks* of 2^20 ns (about a millisecond).

use crate::Time;

/// Ticks in a second, about.
pub(super) const SECOND: f64 = 953.674_316;
/// Bins of age; the last has no end.
pub(super) const BINS: usize = 34;

/// Age at which each bin begins, ticks. The last one counts as one octave long.
pub(super) const EDGES: [u32; BINS + 1] = edges();

const fn edges() -> [u32; BINS + 1] {
    let mut edges = [0; BINS + 1];
    let mut bin = 1;
    while bin <= 4 {
        edges[bin] = 1 << (7 + bin);
        bin += 1;
    }
    while bin <= BINS {
        let half = bin - 5;
        let octave = 1 << (12 + half / 2);
        edges[bin] = if half % 2 == 0 { octave } else { octave + octave / 2 };
        bin += 1;
    }
    edges
}

/// The bin of an age.
pub(super) fn bin_of(age: u32) -> usize {
    if age < 1 << 8 {
        return 0;
    }
    let octave = 31 - age.leading_zeros() as usize;
    let bin = if octave < 12 {
        octave - 7
    } else {
        5 + 2 * (octave - 12) + (age >> (octave - 1) & 1) as usize
    };
    bin.min(BINS - 1)
}

/// Length of a bin, ticks.
pub(super) fn width(bin: usize) -> f64 {
    f64::from(EDGES[bin + 1] - EDGES[bin])
}

/// Whole ticks since the origin.
pub(super) fn ticks(now: Time) -> u64 {
    now.0 >> 20
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_age_lies_between_the_edges_of_its_bin() {
        for age in (0..5_000_000).step_by(7).chain(EDGES) {
            let bin = bin_of(age);
            assert!(EDGES[bin] <= age, "age {age}");
            assert!(bin == BINS - 1 || age < EDGES[bin + 1], "age {age}");
        }
    }

    #[test]
    fn edges_grow_to_twenty_hours() {
        assert!(EDGES.windows(2).all(|pair| pair[0] < pair[1]));
        let hours = f64::from(EDGES[BINS - 1]) / SECOND / 3600.0;
        assert!((19.0..21.0).contains(&hours), "{hours}");
    }
}
