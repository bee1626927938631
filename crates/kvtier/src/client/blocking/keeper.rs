use std::sync::Weak;
use std::time::{Duration, Instant};

use super::Shared;
use crate::client::returns::{FLUSH_AFTER, Look, Returns, Rounds};

/// The thread that sends releases which no request takes along, and gives back slots that nobody used.
///
/// It sleeps while there is nothing to keep, and never sits on the path of a call.
pub(super) fn keep(returns: &Returns, shared: &Weak<Shared>) {
    let mut rounds = Rounds::default();
    let (mut longest, mut asleep) = (Some(FLUSH_AFTER), false);
    loop {
        returns.wait(longest, asleep);
        (longest, asleep) = match returns.look(&mut rounds) {
            Look::Stop => return,
            Look::Wait => (Some(FLUSH_AFTER), false),
            Look::Flush => {
                let Some(shared) = shared.upgrade() else { return };
                shared.send_returns();
                (Some(FLUSH_AFTER), false)
            }
            Look::Sleep => {
                let Some(shared) = shared.upgrade() else { return };
                (shared.expire_slots(), true)
            }
        };
    }
}

impl Shared {
    /// Unless a request is on its way: what waits goes with the next one then.
    fn send_returns(&self) {
        if let Some(mut line) = self.line.try_lock() {
            line.send_returns(self);
        }
    }

    /// Queues slots that are past half of their life, and says when to look again.
    fn expire_slots(&self) -> Option<Duration> {
        let Some(mut line) = self.line.try_lock() else {
            return Some(FLUSH_AFTER);
        };
        if !line.is_connected() {
            return None;
        }
        let session = &mut line.link(self).ok()?.session;
        let now = Instant::now();
        let mut expired = Vec::new();
        session.slots.expire(now, &mut expired);
        let (epoch, next) = (session.epoch, session.slots.expires_in(now));
        drop(line);
        self.returns.abandon(epoch, expired);
        next.map(|next| next.max(FLUSH_AFTER))
    }
}
