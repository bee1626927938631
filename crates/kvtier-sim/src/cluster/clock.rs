use kvtier_core::Time;

/// A member's clock: it starts anywhere and runs a little fast.
#[derive(Clone, Copy, Debug)]
pub(super) struct Clock {
    pub(super) offset_ns: u64,
    /// How much faster than the slowest clock that may be, millionths.
    pub(super) fast_ppm: u64,
}

impl Clock {
    /// What it shows at a real time.
    pub(super) fn read(self, real: Time) -> Time {
        let gained = u128::from(real.0) * u128::from(self.fast_ppm) / 1_000_000;
        Time(self.offset_ns + real.0 + gained as u64)
    }

    /// The first real time at which it shows this.
    pub(super) fn when(self, shown: Time) -> Time {
        let elapsed = u128::from(shown.0.saturating_sub(self.offset_ns));
        let mut real = Time((elapsed * 1_000_000 / u128::from(1_000_000 + self.fast_ppm)) as u64);
        while self.read(real) < shown {
            real.0 += 1;
        }
        real
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_shows_a_time_first_when_it_says_it_does() {
        for fast_ppm in [0, 1, 10_000, 200_000] {
            let clock = Clock {
                offset_ns: 17,
                fast_ppm,
            };
            for shown in [18, 1000, 123_456_789, 10_000_000_019] {
                let real = clock.when(Time(shown));
                assert!(clock.read(real) >= Time(shown));
                assert!(clock.read(Time(real.0 - 1)) < Time(shown));
            }
        }
    }
}
