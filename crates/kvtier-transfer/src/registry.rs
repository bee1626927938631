//! The regions that a transport has registered, who is at one of them now, and how they are taken back.

use std::collections::HashMap;
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};

use crate::memory::{MemoryRegion, MemorySlice};
use crate::remote::{RegionId, RemoteAccess};
use crate::transfer::Direction;
use crate::transport::RevokeError;

/// How long a revocation lets copies that have begun finish by themselves.
const GRACE: Duration = Duration::from_millis(100);
/// After which it gives up and says so.
const GIVE_UP: Duration = Duration::from_secs(5);

/// Why a request for a range is refused. Two reasons on purpose look the same to a peer: unknown and revoked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Denied {
    /// No such registration, or not any more.
    Unknown,
    /// Not in the region.
    Range,
    /// Registered for reads only.
    Access,
}

impl Denied {
    pub(crate) fn words(self) -> &'static str {
        match self {
            Denied::Unknown => "no such region, or revoked",
            Denied::Range => "outside the region",
            Denied::Access => "registered for reads only",
        }
    }
}

/// Registered regions by id.
#[derive(Default)]
pub(crate) struct Registry {
    entries: Mutex<HashMap<RegionId, Arc<Entry>>>,
}

struct Entry {
    region: Arc<MemoryRegion>,
    access: RemoteAccess,
    users: Mutex<Users>,
    left: Condvar,
}

#[derive(Default)]
struct Users {
    count: usize,
    /// Sockets that bytes of this region flow through now, to be cut when a revocation has waited long enough.
    sockets: Vec<(u64, Arc<TcpStream>)>,
    next: u64,
    revoked: bool,
}

/// The right to touch a range until it is dropped: a revocation waits for it.
pub(crate) struct Use {
    pub(crate) slice: MemorySlice,
    entry: Arc<Entry>,
    socket: Option<u64>,
}

impl Drop for Use {
    fn drop(&mut self) {
        let mut users = self.entry.users.lock();
        users.count -= 1;
        if let Some(id) = self.socket {
            users.sockets.retain(|(other, _)| *other != id);
        }
        if users.count == 0 && users.revoked {
            self.entry.left.notify_all();
        }
    }
}

impl Registry {
    pub(crate) fn insert(&self, region: &Arc<MemoryRegion>, access: RemoteAccess) -> RegionId {
        let id = RegionId::draw();
        self.insert_as(id, region, access);
        id
    }

    /// Under the number that its owner drew.
    pub(crate) fn insert_as(&self, id: RegionId, region: &Arc<MemoryRegion>, access: RemoteAccess) {
        let entry = Entry {
            region: Arc::clone(region),
            access,
            users: Mutex::new(Users::default()),
            left: Condvar::new(),
        };
        self.entries.lock().insert(id, Arc::new(entry));
    }

    /// The right to touch a range. With `socket`, a revocation may cut it to end that right.
    pub(crate) fn begin(
        &self,
        id: RegionId,
        offset: u64,
        length: u64,
        direction: Direction,
        socket: Option<&Arc<TcpStream>>,
    ) -> Result<Use, Denied> {
        let entry = self.entries.lock().get(&id).cloned().ok_or(Denied::Unknown)?;
        if direction == Direction::Write && entry.access == RemoteAccess::Read {
            return Err(Denied::Access);
        }
        let offset = usize::try_from(offset).map_err(|_| Denied::Range)?;
        let length = usize::try_from(length).map_err(|_| Denied::Range)?;
        let slice = entry.region.slice(offset, length).map_err(|_| Denied::Range)?;
        let mut users = entry.users.lock();
        // Looked up before, revoked since.
        if users.revoked {
            return Err(Denied::Unknown);
        }
        users.count += 1;
        let socket = socket.map(|socket| {
            users.next += 1;
            let id = users.next;
            users.sockets.push((id, Arc::clone(socket)));
            id
        });
        drop(users);
        Ok(Use { slice, entry, socket })
    }

    /// Refuses new users, waits for the present ones, cuts the sockets of those that take too long.
    pub(crate) fn revoke(&self, id: RegionId) -> Result<(), RevokeError> {
        let Some(entry) = self.entries.lock().remove(&id) else {
            return Ok(());
        };
        let begun = Instant::now();
        let mut users = entry.users.lock();
        users.revoked = true;
        let mut cut = false;
        while users.count > 0 {
            let wait = if cut { GIVE_UP } else { GRACE };
            let timed_out = entry.left.wait_until(&mut users, begun + wait).timed_out();
            if timed_out && users.count > 0 {
                if cut {
                    return Err(RevokeError(format!("{} copies have not ended", users.count)));
                }
                cut = true;
                for (_, socket) in &users.sockets {
                    // Fails only for a socket that is closed already.
                    let _ = socket.shutdown(Shutdown::Both);
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_revocation_refuses_new_users_first_and_waits_for_the_present_ones() {
        let registry = Arc::new(Registry::default());
        let region = MemoryRegion::anonymous(4096).expect("memory");
        let id = registry.insert(&region, RemoteAccess::Read);
        let using = registry.begin(id, 0, 4096, Direction::Read, None).expect("registered");
        let revoking = std::thread::spawn({
            let registry = Arc::clone(&registry);
            move || registry.revoke(id)
        });
        while registry.begin(id, 0, 1, Direction::Read, None).is_ok() {
            std::thread::yield_now();
        }
        std::thread::sleep(Duration::from_millis(20));
        assert!(!revoking.is_finished(), "a copy is still going on");
        drop(using);
        assert_eq!(revoking.join().expect("no panic"), Ok(()));
    }

    #[test]
    fn ranges_and_writes_that_were_not_registered_are_refused() {
        let registry = Registry::default();
        let region = MemoryRegion::anonymous(4096).expect("memory");
        let id = registry.insert(&region, RemoteAccess::Read);
        let ask = |id, offset, length, direction| registry.begin(id, offset, length, direction, None).err();
        assert_eq!(ask(id, 0, 4097, Direction::Read), Some(Denied::Range));
        assert_eq!(ask(id, u64::MAX, 2, Direction::Read), Some(Denied::Range));
        assert_eq!(ask(id, 0, 1, Direction::Write), Some(Denied::Access));
        assert_eq!(ask(RegionId(id.0 ^ 1), 0, 1, Direction::Read), Some(Denied::Unknown));
        assert_eq!(ask(id, 0, 4096, Direction::Read), None);
    }
}
