/// A stream of numbers that a seed fixes for ever (SplitMix64). Integers only, so that every machine draws the same.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random(mix(seed ^ 0x6b76_7469_6572_2d73))
    }

    /// The next number.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(self.next_u64()) * u128::from(bound)) >> 64) as u64
    }

    /// An index below `length`; 0 when `length` is 0.
    pub fn index(&mut self, length: usize) -> usize {
        self.below(length as u64) as usize
    }

    /// A number from `low` to `high`, both included.
    pub fn between(&mut self, low: u64, high: u64) -> u64 {
        low + self.below(high.saturating_sub(low) + 1)
    }

    /// True `permille` times in a thousand.
    pub fn chance(&mut self, permille: u64) -> bool {
        self.below(1000) < permille
    }

    /// One of `choices`, which must not be empty.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.index(choices.len())]
    }

    /// About exponential with this mean: the logarithm is taken bit by bit and straight between powers of two.
    pub fn exponential(&mut self, mean: u64) -> u64 {
        let draw = self.next_u64() | 1;
        let whole = u64::from(draw.leading_zeros());
        let fraction = ((draw << whole) >> 47) & 0xffff;
        // -log2(draw) in 1/65536, times ln 2.
        let minus_log2 = (whole << 16) + (0x1_0000 - fraction);
        let scaled = u128::from(mean) * u128::from(minus_log2) * 45_426;
        (scaled >> 32) as u64
    }
}

/// Scrambles a number so that neighbours look unrelated.
pub(crate) fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[cfg(test)]
mod tests {
    use super::Random;

    #[test]
    fn a_seed_draws_the_same_numbers_on_every_machine() {
        let mut random = Random::new(7);
        let drawn: Vec<u64> = (0..4).map(|_| random.below(1000)).collect();
        let mut again = Random::new(7);
        assert_eq!(drawn, (0..4).map(|_| again.below(1000)).collect::<Vec<_>>());
        assert_ne!(drawn, (0..4).map(|_| random.below(1000)).collect::<Vec<_>>());
    }

    #[test]
    fn exponential_draws_have_about_the_mean_asked_for() {
        let mut random = Random::new(1);
        let total: u64 = (0..20_000).map(|_| random.exponential(1000)).sum();
        let mean = total / 20_000;
        assert!((900..1100).contains(&mean), "mean {mean}");
    }
}
