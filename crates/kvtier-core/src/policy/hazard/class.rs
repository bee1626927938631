//! What kind of visit it is, as far as it bears on when the next one comes.

use super::ages::SECOND;

/// Properties of a visit to a conversation of its own.
pub(super) const FEATURES: usize = 5;
/// Values of each: which turn, the pause before it, how much of the prompt is new, how long the prompt is, how long its answer.
pub(super) const VALUES: [usize; FEATURES] = [7, 8, 6, 5, 4];
/// The one that says how long the answer is.
pub(super) const ANSWER: usize = 4;
/// More values than any feature has.
pub(super) const VALUES_MAX: usize = 8;
/// Classes of visits to conversations.
pub(super) const CONVERSATIONS: usize = VALUES[0] * VALUES[1] * VALUES[2] * VALUES[3] * VALUES[4];
/// Frequencies that prefixes of many conversations are told apart by.
const FREQUENCIES: usize = 8;
/// The first class of prefixes that many share.
const SHARED: usize = CONVERSATIONS + 2;
/// All classes: conversations, the unfinished last block of a prompt, what was left behind, prefixes that many share.
pub(super) const CLASSES: usize = SHARED + FREQUENCIES;

/// The same where no answers are told apart.
pub(super) const CLASSES_OLDER: usize = CLASSES - CONVERSATIONS + CONVERSATIONS_OLDER;
const CONVERSATIONS_OLDER: usize = CONVERSATIONS / VALUES[ANSWER];

/// A class of visits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Class(pub(super) u16);

/// What is known of a visit to a conversation.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Conversation {
    /// How many visits came before, saturating.
    pub(super) turn: u8,
    /// Ticks since the last one; none for the first.
    pub(super) pause: Option<u32>,
    /// Tokens of the prompt that were not known before.
    pub(super) fresh_tokens: u32,
    /// Tokens of the prompt.
    pub(super) tokens: u32,
    /// See [`answer`].
    pub(super) answer: u8,
}

/// How long an answer is, of so many tokens; 0 where that is not known.
pub(super) fn answer(tokens: u32) -> u8 {
    1 + step(tokens, &[32, 256]) as u8
}

impl Class {
    /// The last block of a prompt, where it is not full: the next turn replaces it.
    pub(super) const PARTIAL: Class = class(CONVERSATIONS);
    /// What is left of a visit to a conversation where the next one took another way: an answer was asked for again, a question changed.
    pub(super) const LEFT: Class = class(CONVERSATIONS + 1);

    pub(super) fn conversation(known: Conversation) -> Class {
        let turn = usize::from(known.turn).min(VALUES[0] - 1);
        let pause = known
            .pause
            .map_or(0, |pause| 1 + step(pause, &[8, 20, 45, 100, 250, 500].map(seconds)));
        let fresh = step(known.fresh_tokens, &[256, 512, 1024, 2048, 8192]);
        let tokens = step(known.tokens, &[1024, 2048, 8192, 32_768]);
        let answer = usize::from(known.answer).min(VALUES[ANSWER] - 1);
        class((((turn * VALUES[1] + pause) * VALUES[2] + fresh) * VALUES[3] + tokens) * VALUES[ANSWER] + answer)
    }

    /// A prefix of many conversations, used `uses` times.
    pub(super) fn shared(uses: u8) -> Class {
        let frequency = (8 - uses.leading_zeros() as usize).min(FREQUENCIES - 1);
        class(SHARED + frequency)
    }

    /// What it is where no answers are told apart: nobody says how long they are.
    pub(super) fn of_older(class: u16) -> Class {
        let class = usize::from(class);
        let class = if class < CONVERSATIONS_OLDER {
            class * VALUES[ANSWER]
        } else {
            class - CONVERSATIONS_OLDER + CONVERSATIONS
        };
        Class(class as u16)
    }

    pub(super) fn is_conversation(self) -> bool {
        usize::from(self.0) < CONVERSATIONS
    }

    pub(super) fn is_shared(self) -> bool {
        usize::from(self.0) >= SHARED
    }

    /// The value of each feature; of a conversation only.
    pub(super) fn values(self) -> [usize; FEATURES] {
        let mut rest = usize::from(self.0);
        let mut values = [0; FEATURES];
        for (value, count) in values.iter_mut().zip(VALUES).rev() {
            *value = rest % count;
            rest /= count;
        }
        values
    }
}

const fn class(number: usize) -> Class {
    assert!(number < CLASSES, "a class");
    Class(number as u16)
}

fn seconds(seconds: u32) -> u32 {
    (f64::from(seconds) * SECOND) as u32
}

/// How many of the bounds, which rise, `value` has reached.
fn step(value: u32, bounds: &[u32]) -> usize {
    bounds.iter().take_while(|bound| value >= **bound).count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_class_says_again_what_it_was_made_of() {
        let known = Conversation {
            turn: 3,
            pause: Some(seconds(50)),
            fresh_tokens: 700,
            tokens: 40_000,
            answer: answer(32),
        };
        let class = Class::conversation(known);
        assert_eq!(class.values(), [3, 4, 2, 4, 2]);
        assert!(class.is_conversation() && !class.is_shared());
        let first = Conversation { pause: None, ..known };
        assert_eq!(Class::conversation(first).values()[1], 0);
    }

    #[test]
    fn every_extreme_has_a_class_of_its_own_kind() {
        let most = Conversation {
            turn: u8::MAX,
            pause: Some(u32::MAX),
            fresh_tokens: u32::MAX,
            tokens: u32::MAX,
            answer: answer(u32::MAX),
        };
        assert_eq!(Class::conversation(most).values(), VALUES.map(|values| values - 1));
        assert_eq!(Class::conversation(Conversation::default()), Class(0));
        assert!(Class::shared(0).is_shared() && Class::shared(u8::MAX).is_shared());
        for class in [Class::PARTIAL, Class::LEFT] {
            assert!(!class.is_shared() && !class.is_conversation());
        }
    }
}
