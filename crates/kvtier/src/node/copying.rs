use kvtier_core::NamespaceId;
use parking_lot::{Condvar, Mutex};

/// Copies from elsewhere that are under way, so that a deletion can wait for those that began before it.
#[derive(Default)]
pub(crate) struct Copying {
    state: Mutex<UnderWay>,
    ended: Condvar,
}

#[derive(Default)]
struct UnderWay {
    last: u64,
    tickets: Vec<(u64, NamespaceId)>,
}

impl Copying {
    pub(crate) fn begin(&self, namespace: NamespaceId) -> u64 {
        let mut state = self.state.lock();
        state.last += 1;
        let ticket = state.last;
        state.tickets.push((ticket, namespace));
        ticket
    }

    pub(crate) fn end(&self, ticket: u64) {
        self.state.lock().tickets.retain(|(other, _)| *other != ticket);
        self.ended.notify_all();
    }

    pub(crate) fn wait_for_earlier(&self, namespace: NamespaceId) {
        let mut state = self.state.lock();
        let last = state.last;
        let is_earlier = |(ticket, other): &(u64, NamespaceId)| *ticket <= last && *other == namespace;
        while state.tickets.iter().any(is_earlier) {
            self.ended.wait(&mut state);
        }
    }
}
