use std::time::Duration;

use crate::wire::{AdviceKind, Keys, Request};

/// What a caller knows of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// There will be no further turn: its blocks may go first.
    Closed,
    /// Its blocks are to stay for this time, at most an hour, as far as that is possible; zero takes back what was said.
    Pinned(Duration),
    /// An agent works on it and will ask again within this time, at most an hour: its blocks go after all that are not pinned, until then.
    Expected(Duration),
    /// The prompt has been answered, with so many tokens. Who gets a few words asks again at other times than who gets a page, as a node may
    /// have learned; its recording of requests has the length, too. Where blocks of the answer were put, their keys belong behind the prompt's:
    /// else it looks as if another prompt had gone on from there, and nothing is learned.
    Answered(u32),
}

impl Advice {
    pub(super) fn request(self, keys: Keys<'_>) -> Request<'_> {
        let milliseconds = |within: Duration| u32::try_from(within.as_millis()).unwrap_or(u32::MAX);
        let (advice, amount) = match self {
            Advice::Closed => (AdviceKind::Closed, 0),
            Advice::Pinned(within) => (AdviceKind::Pinned, milliseconds(within)),
            Advice::Expected(within) => (AdviceKind::Expected, milliseconds(within)),
            Advice::Answered(tokens) => (AdviceKind::Answered, tokens),
        };
        Request::Advise { advice, amount, keys }
    }
}
