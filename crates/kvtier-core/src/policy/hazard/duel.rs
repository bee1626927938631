//! The duel: what a cache of the same size would have hit that keeps what was used last.
//!
//! Such a cache holds the newest visits that have as many blocks as are cached, so nothing more than a mark on a visit
//! is needed to know what it would have hit.

/// Who loses by more than this share of the other's hits, yields.
const MARGIN: f64 = 0.02;
/// A share of all tokens that makes no difference.
const SLACK: f64 = 0.003;
/// How often the cache's blocks are used in a term, after which is decided for the next one.
const TERM_TURNOVERS: u64 = 4;
/// Longest time that recency rules before the hazards are tried again, in terms.
const TERMS_MAX: u32 = 64;

/// Who decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// What was learned.
    Hazard,
    /// What was used last stays.
    Recency,
}

#[derive(Debug)]
pub(super) struct Duel {
    rule: Rule,
    hits: f64,
    recency_hits: f64,
    tokens: f64,
    /// Blocks judged in this term.
    blocks: u64,
    /// Terms for which recency rules next time.
    term: u32,
    /// Terms for which it still rules.
    left: u32,
    /// Terms that the hazards have ruled since.
    ruled: u32,
}

impl Duel {
    pub(super) fn new() -> Duel {
        Duel {
            rule: Rule::Hazard,
            hits: 0.0,
            recency_hits: 0.0,
            tokens: 0.0,
            blocks: 0,
            term: 1,
            left: 0,
            ruled: 0,
        }
    }

    pub(super) fn rule(&self) -> Rule {
        self.rule
    }

    /// A block was used: whether it was cached, and whether it would have been.
    pub(super) fn judge(&mut self, tokens: u32, hit: bool, recency_hit: bool) {
        let tokens = f64::from(tokens);
        self.tokens += tokens;
        self.hits += if hit { tokens } else { 0.0 };
        self.recency_hits += if recency_hit { tokens } else { 0.0 };
        self.blocks += 1;
    }

    /// Whether the rule changed. `cached`: blocks that are cached.
    pub(super) fn decide(&mut self, cached: u64) -> bool {
        if self.blocks <= TERM_TURNOVERS * cached.max(256) {
            return false;
        }
        self.blocks = 0;
        match self.rule {
            Rule::Hazard => {
                let behind = self.recency_hits - self.hits;
                if behind <= MARGIN * self.recency_hits || behind <= SLACK * self.tokens {
                    self.ruled += 1;
                    if self.ruled > self.term {
                        self.term = 1;
                    }
                    // Older evidence counts half.
                    self.tokens /= 2.0;
                    self.hits /= 2.0;
                    self.recency_hits /= 2.0;
                    return false;
                }
                self.rule = Rule::Recency;
                self.left = self.term;
                self.term = (self.term * 2).min(TERMS_MAX);
            }
            Rule::Recency => {
                self.left -= 1;
                if self.left > 0 {
                    return false;
                }
                self.rule = Rule::Hazard;
                self.ruled = 0;
            }
        }
        self.tokens = 0.0;
        self.hits = 0.0;
        self.recency_hits = 0.0;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rounds(duel: &mut Duel, hit: bool, recency_hit: bool, blocks: u32) -> u32 {
        let mut changes = 0;
        for _ in 0..blocks {
            duel.judge(512, hit, recency_hit);
            changes += u32::from(duel.decide(256));
        }
        changes
    }

    #[test]
    fn who_is_behind_yields_and_tries_again_later_and_later() {
        let mut duel = Duel::new();
        assert_eq!(rounds(&mut duel, true, true, 5_000), 0);
        let mut begun = Vec::new();
        for block in 0..200_000 {
            duel.judge(512, false, true);
            if duel.decide(256) && duel.rule() == Rule::Recency {
                begun.push(block);
            }
        }
        let terms: Vec<i32> = begun.windows(2).map(|pair| pair[1] - pair[0]).collect();
        assert!(
            terms.len() >= 4 && terms.windows(2).all(|pair| pair[1] > pair[0]),
            "{terms:?}"
        );
    }

    #[test]
    fn who_is_ahead_stays() {
        let mut duel = Duel::new();
        assert_eq!(rounds(&mut duel, true, false, 100_000), 0);
        assert_eq!(duel.rule(), Rule::Hazard);
    }

    #[test]
    fn a_few_tokens_decide_nothing() {
        let mut duel = Duel::new();
        assert_eq!(rounds(&mut duel, false, true, 100), 0);
    }
}
