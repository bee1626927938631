use std::time::Duration;

use crate::wire::{AdviceKind, Keys, Request};

/// What a caller knows of the future of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Advice {
    /// There will be no further turn: its blocks may go first.
    Closed,
    /// Its blocks are to stay for this time, at most an hour, as far as that is possible; zero takes back what was said.
    Pinned(Duration),
    /// An agent works on it and will ask again within this time, at most an hour: its blocks go after all that are not pinned, until then.
    Expected(Duration),
}

impl Advice {
    pub(super) fn request(self, keys: Keys<'_>) -> Request<'_> {
        let (advice, within) = match self {
            Advice::Closed => (AdviceKind::Closed, Duration::ZERO),
            Advice::Pinned(within) => (AdviceKind::Pinned, within),
            Advice::Expected(within) => (AdviceKind::Expected, within),
        };
        Request::Advise {
            advice,
            within_ms: u32::try_from(within.as_millis()).unwrap_or(u32::MAX),
            keys,
        }
    }
}
