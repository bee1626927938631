//! How much more or less often than others the visits of one namespace return.

use super::tables::{PHASES, PRIOR_RETURNS};

/// Namespaces that are told apart; more share what was learned of them, by their number.
const SLOTS: usize = 256;
/// Past these returns, seen or expected, what was learned of a namespace counts half.
const RETURNS_MAX: f32 = 16_384.0;
/// An octave more often is as many levels higher.
pub(super) const LEVELS_AN_OCTAVE: f64 = 8.0;

#[derive(Clone, Copy, Debug)]
struct Tenant {
    returns: [f32; PHASES],
    /// Returns that the model of all namespaces together expects.
    expected: [f32; PHASES],
    /// As of the last fit, and the same in levels.
    factors: [f32; PHASES],
    levels: [i8; PHASES],
}

/// What a namespace's visits did beside what the shared model expects of visits of their classes.
///
/// The shared model is the prior: a namespace of which little was seen is as all are, and thirty returns weigh as much as it.
#[derive(Debug)]
pub(super) struct Tenants(Box<[Tenant]>);

impl Tenants {
    pub(super) fn new() -> Tenants {
        let nothing = Tenant {
            returns: [0.0; PHASES],
            expected: [0.0; PHASES],
            factors: [1.0; PHASES],
            levels: [0; PHASES],
        };
        Tenants(vec![nothing; SLOTS].into_boxed_slice())
    }

    /// Where a namespace is remembered.
    pub(super) fn slot(namespace: u32) -> u8 {
        (namespace as usize % SLOTS) as u8
    }

    /// Visits that were at risk came back as often as said, where the model expected so many.
    pub(super) fn observe(&mut self, slot: u8, phase: usize, returns: f32, expected: f32) {
        let tenant = &mut self.0[usize::from(slot)];
        tenant.returns[phase] += returns;
        tenant.expected[phase] += expected;
    }

    /// Draws the conclusions.
    pub(super) fn fit(&mut self) {
        for tenant in &mut self.0 {
            let ratio = |returns: f64, expected: f64, prior: f64| {
                (returns + PRIOR_RETURNS * prior) / (expected + PRIOR_RETURNS)
            };
            let sum = |counts: &[f32; PHASES]| counts.iter().copied().map(f64::from).sum::<f64>();
            let overall = ratio(sum(&tenant.returns), sum(&tenant.expected), 1.0);
            for phase in 0..PHASES {
                let (returns, expected) = (f64::from(tenant.returns[phase]), f64::from(tenant.expected[phase]));
                let factor = ratio(returns, expected, overall);
                tenant.factors[phase] = factor as f32;
                tenant.levels[phase] = (LEVELS_AN_OCTAVE * factor.log2()).round() as i8;
            }
            if tenant.returns.iter().sum::<f32>().max(tenant.expected.iter().sum()) > RETURNS_MAX {
                for count in tenant.returns.iter_mut().chain(&mut tenant.expected) {
                    *count /= 2.0;
                }
            }
        }
    }

    /// How many times as often as the model says.
    pub(super) fn factor(&self, slot: u8, phase: usize) -> f64 {
        f64::from(self.0[usize::from(slot)].factors[phase])
    }

    /// The same in levels.
    pub(super) fn levels(&self, slot: u8, phase: usize) -> i32 {
        i32::from(self.0[usize::from(slot)].levels[phase])
    }

    pub(super) fn memory_bytes(&self) -> u64 {
        size_of_val(&*self.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_namespace_of_which_nothing_was_seen_is_as_all_are() {
        let mut tenants = Tenants::new();
        tenants.fit();
        for phase in 0..PHASES {
            assert_eq!((tenants.factor(7, phase), tenants.levels(7, phase)), (1.0, 0));
        }
    }

    #[test]
    fn much_evidence_tells_namespaces_apart_and_little_does_not() {
        let mut tenants = Tenants::new();
        tenants.observe(1, 0, 400.0, 100.0);
        tenants.observe(2, 0, 20.0, 400.0);
        tenants.observe(3, 0, 4.0, 1.0);
        tenants.fit();
        assert_eq!(tenants.levels(1, 0), 16, "some four times as often");
        assert!(tenants.levels(2, 0) < -16, "{}", tenants.levels(2, 0));
        assert_eq!(tenants.levels(3, 0), 2);
        assert!(
            tenants.factor(1, 2) > 1.5,
            "and in ages of which nothing was seen, as in others"
        );
        assert_eq!(tenants.levels(0, 0), 0);
    }

    #[test]
    fn what_is_old_counts_less() {
        let mut tenants = Tenants::new();
        tenants.observe(1, 0, 0.0, 100.0 * RETURNS_MAX);
        for _ in 0..20 {
            tenants.fit();
        }
        assert!(tenants.factor(1, 0) < 0.01);
        tenants.observe(1, 0, 4.0 * RETURNS_MAX, RETURNS_MAX);
        tenants.fit();
        assert!(tenants.factor(1, 0) > 1.0);
    }
}
