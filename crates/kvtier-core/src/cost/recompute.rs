#[cfg(test)]
mod tests;

/// What a prefill of `d` tokens after `x` cached ones takes: `overhead + s_per_token·d + s_per_pair·d·(x + d/2)`.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RecomputeCoefficients {
    /// Beside the tokens, seconds.
    pub overhead_s: f64,
    /// For each token, seconds: the matrices.
    pub s_per_token: f64,
    /// For each pair of a token and one before it, seconds: attention.
    pub s_per_pair: f64,
}

impl RecomputeCoefficients {
    /// Seconds for `tokens` after `before_tokens`; zero for no token.
    #[must_use]
    pub fn seconds(&self, tokens: u32, before_tokens: u32) -> f64 {
        if tokens == 0 {
            return 0.0;
        }
        let tokens = f64::from(tokens);
        let pairs = tokens * (f64::from(before_tokens) + tokens / 2.0);
        self.overhead_s + self.s_per_token * tokens + self.s_per_pair * pairs
    }
}

/// Units in which the three coefficients are of one size: seconds, seconds a kilotoken, seconds a megapair.
const SCALE: [f64; 3] = [1.0, 1e-3, 1e-6];

/// How much of what was learned a new prefill leaves: a hundred of them are remembered.
const FORGETTING: f64 = 0.99;

/// How far a profile may be off, as a share of each coefficient: the learned value starts with this spread.
const PROFILE_SPREAD: f64 = 0.7;

/// A coefficient that a profile gives as less than this is spread as if it were this, in units of [`SCALE`].
const SPREAD_FLOOR: [f64; 3] = [5e-3, 1e-4, 1e-5];

/// Noise of one measured prefill: this share of it, and a millisecond.
const NOISE_SHARE: f64 = 0.05;
const NOISE_S: f64 = 1e-3;

/// The three coefficients, refined by recursive least squares on what prefills took.
///
/// Measurements weigh by their own size, so that a short prefill teaches as much as a long one. Forgetting stops where it would
/// know less than the profile did: a stream of equal prompts cannot wind the uncertainty up.
#[derive(Clone, Debug)]
pub struct RecomputeModel {
    /// In units of [`SCALE`].
    learned: [f64; 3],
    covariance: [[f64; 3]; 3],
    spread_max: [f64; 3],
    measured: u64,
}

impl RecomputeModel {
    /// Starts from `profile`.
    #[must_use]
    pub fn new(profile: RecomputeCoefficients) -> RecomputeModel {
        let learned = [
            profile.overhead_s / SCALE[0],
            profile.s_per_token / SCALE[1],
            profile.s_per_pair / SCALE[2],
        ];
        let spread_max: [f64; 3] =
            std::array::from_fn(|index| (PROFILE_SPREAD * learned[index].abs().max(SPREAD_FLOOR[index])).powi(2));
        let covariance =
            std::array::from_fn(|line| std::array::from_fn(|index| if line == index { spread_max[line] } else { 0.0 }));
        RecomputeModel {
            learned,
            covariance,
            spread_max,
            measured: 0,
        }
    }

    /// What is known now.
    #[must_use]
    pub fn coefficients(&self) -> RecomputeCoefficients {
        RecomputeCoefficients {
            overhead_s: self.learned[0] * SCALE[0],
            s_per_token: self.learned[1] * SCALE[1],
            s_per_pair: self.learned[2] * SCALE[2],
        }
    }

    /// Prefills learned from.
    #[must_use]
    pub fn measured(&self) -> u64 {
        self.measured
    }

    /// Seconds for `tokens` after `before_tokens`.
    #[must_use]
    pub fn seconds(&self, tokens: u32, before_tokens: u32) -> f64 {
        self.coefficients().seconds(tokens, before_tokens)
    }

    /// A prefill of `tokens` after `before_tokens` took `measured_s` on the GPU, its queue not counted. What cannot be is ignored.
    pub fn observe(&mut self, tokens: u32, before_tokens: u32, measured_s: f64) {
        if tokens == 0 || !measured_s.is_finite() || measured_s <= 0.0 {
            return;
        }
        let count = f64::from(tokens);
        let row = [
            SCALE[0],
            count * SCALE[1],
            count * (f64::from(before_tokens) + count / 2.0) * SCALE[2],
        ];
        let expected_s: f64 = (0..3).map(|index| row[index] * self.learned[index]).sum();
        let noise_s = NOISE_SHARE * expected_s.max(measured_s) + NOISE_S;
        let carried: [f64; 3] =
            std::array::from_fn(|row_index| (0..3).map(|index| self.covariance[row_index][index] * row[index]).sum());
        let spread: f64 = (0..3).map(|index| row[index] * carried[index]).sum();
        let weight = 1.0 / (noise_s * noise_s + spread);
        let residual_s = measured_s - expected_s;
        for (learned, carried) in self.learned.iter_mut().zip(carried) {
            // A prefill never gets cheaper by more tokens: what noise makes negative is zero.
            *learned = (*learned + carried * weight * residual_s).max(0.0);
        }
        for (line, left) in self.covariance.iter_mut().zip(carried) {
            for (entry, right) in line.iter_mut().zip(carried) {
                *entry -= left * right * weight;
            }
        }
        if (0..3).all(|index| self.covariance[index][index] / FORGETTING <= self.spread_max[index]) {
            self.covariance
                .iter_mut()
                .flatten()
                .for_each(|entry| *entry /= FORGETTING);
        }
        self.measured += 1;
    }
}
