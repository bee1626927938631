/// Follows one quantile of a stream: up when a value lies above it, down when not, so that in the long run the share below is
/// the one asked for, whatever the distribution and however it changes (Gibbs and Candès, "Adaptive Conformal Inference
/// Under Distribution Shift", NeurIPS 2021).
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantile {
    share: f64,
    step: f64,
    value: f64,
}

impl Quantile {
    /// Of the values, `share` shall lie at or below; starts at `value` and moves by at most `step`.
    pub(super) fn new(share: f64, step: f64, value: f64) -> Quantile {
        Quantile { share, step, value }
    }

    pub(super) fn value(&self) -> f64 {
        self.value
    }

    pub(super) fn observe(&mut self, value: f64) {
        let above = if value > self.value { 1.0 } else { 0.0 };
        self.value += self.step * (above - (1.0 - self.share));
    }
}

#[cfg(test)]
mod tests {
    use super::Quantile;

    #[test]
    fn the_share_below_is_the_one_asked_for_also_after_the_stream_has_changed() {
        for share in [0.5, 0.9, 0.99] {
            let mut quantile = Quantile::new(share, 0.05, 0.0);
            let (mut below, mut state) = (0u32, 1u64);
            for index in 0..20_000 {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1_442_695_040_888_963_407);
                let uniform = (state >> 11) as f64 / (1u64 << 53) as f64;
                let value = if index < 10_000 { uniform } else { 5.0 + 3.0 * uniform };
                below += u32::from(value <= quantile.value());
                quantile.observe(value);
            }
            let seen = f64::from(below) / 20_000.0;
            assert!((seen - share).abs() < 0.01, "{share}: {seen}");
        }
    }
}
