use std::collections::BTreeMap;

use super::TraceRequest;

/// What an engine that is busy takes for a token of an answer, milliseconds: 33 tokens a second.
pub const ANSWER_TOKEN_MS: u64 = 30;

/// The answer to a request of a trace.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TraceAnswer {
    /// When it was complete, milliseconds since the trace began. As few traces say: [`ANSWER_TOKEN_MS`] for each token.
    pub at_ms: u64,
    /// Its length in tokens.
    pub tokens: u32,
}

impl TraceAnswer {
    /// To a request that came at `at_ms`; none where the trace does not say how long it was.
    #[must_use]
    pub fn to(request: &TraceRequest, at_ms: u64) -> Option<TraceAnswer> {
        let tokens = u32::try_from(request.output_tokens).unwrap_or(u32::MAX);
        (tokens > 0).then(|| TraceAnswer {
            at_ms: at_ms.saturating_add(u64::from(tokens) * ANSWER_TOKEN_MS),
            tokens,
        })
    }
}

/// Answers that are being given, each with what tells its request.
#[derive(Clone, Debug)]
pub struct TraceAnswers<T> {
    given: BTreeMap<(TraceAnswer, u64), T>,
    begun: u64,
}

impl<T> Default for TraceAnswers<T> {
    fn default() -> TraceAnswers<T> {
        TraceAnswers {
            given: BTreeMap::new(),
            begun: 0,
        }
    }
}

impl<T> TraceAnswers<T> {
    /// One more is being given.
    pub fn begin(&mut self, answer: TraceAnswer, request: T) {
        self.begun += 1;
        self.given.insert((answer, self.begun), request);
    }

    /// The next one that was complete at this time.
    pub fn complete(&mut self, by_ms: u64) -> Option<(TraceAnswer, T)> {
        let entry = self.given.first_entry().filter(|entry| entry.key().0.at_ms <= by_ms)?;
        let ((answer, _), request) = entry.remove_entry();
        Some((answer, request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_complete_in_the_order_of_their_ends() {
        let mut answers = TraceAnswers::default();
        let request = |output_tokens| TraceRequest {
            output_tokens,
            ..TraceRequest::default()
        };
        let long = TraceAnswer::to(&request(100), 1_000).expect("it has a length");
        assert_eq!(long.at_ms, 4_000);
        answers.begin(long, "long");
        answers.begin(TraceAnswer::to(&request(1), 2_000).expect("it has a length"), "short");
        answers.begin(
            TraceAnswer::to(&request(1), 2_000).expect("it has a length"),
            "as short",
        );
        assert_eq!(TraceAnswer::to(&request(0), 5), None, "nobody said");
        assert_eq!(answers.complete(2_029), None);
        let order: Vec<&str> = std::iter::from_fn(|| answers.complete(4_000))
            .map(|(_, request)| request)
            .collect();
        assert_eq!(order, ["short", "as short", "long"]);
    }

    #[test]
    fn a_length_that_cannot_be_overflows_nothing() {
        let request = TraceRequest {
            output_tokens: u64::MAX,
            ..TraceRequest::default()
        };
        let answer = TraceAnswer::to(&request, u64::MAX - 1).expect("it has a length");
        assert_eq!((answer.at_ms, answer.tokens), (u64::MAX, u32::MAX));
    }
}
