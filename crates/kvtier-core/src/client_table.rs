use crate::host_table::place_in;
use crate::key_map::KeyMap;
use crate::{ClientId, OperationId, TrustDomain};

/// A connected client, or one whose process still maps memory, and what it holds.
#[derive(Debug)]
pub(crate) struct Client {
    pub(crate) id: ClientId,
    pub(crate) domain: TrustDomain,
    /// The connection is lost, the process lives: only its end frees what it holds.
    pub(crate) lost: bool,
    pub(crate) leases: u32,
    pub(crate) reservations: u32,
    /// Slots' bytes of reservations and grants, expired ones included.
    pub(crate) reserved_bytes: u64,
    pub(crate) quarantined_slots: u64,
    pub(crate) quarantined_bytes: u64,
    /// Its fetches and reserves that wait.
    pub(crate) waiting: Vec<OperationId>,
}

/// Clients by id, at places that leases and reservations name.
#[derive(Debug, Default)]
pub(crate) struct ClientTable {
    entries: Vec<Option<Client>>,
    free: Vec<u32>,
    by_id: KeyMap<(u64, u32)>,
}

impl ClientTable {
    pub(crate) fn find(&self, id: ClientId) -> Option<u32> {
        self.by_id.at(id.0).copied()
    }

    pub(crate) fn insert(&mut self, id: ClientId, domain: TrustDomain) -> u32 {
        let client = Client {
            id,
            domain,
            lost: false,
            leases: 0,
            reservations: 0,
            reserved_bytes: 0,
            quarantined_slots: 0,
            quarantined_bytes: 0,
            waiting: Vec::new(),
        };
        let place = place_in(&mut self.entries, &mut self.free, client);
        self.by_id.put(id.0, place);
        place
    }

    pub(crate) fn remove(&mut self, place: u32) {
        let client = self.entries[place as usize].take().expect("a client in use");
        self.by_id.take(client.id.0);
        self.free.push(place);
    }

    pub(crate) fn at(&self, place: u32) -> &Client {
        self.entries[place as usize].as_ref().expect("a client in use")
    }

    pub(crate) fn at_mut(&mut self, place: u32) -> &mut Client {
        self.entries[place as usize].as_mut().expect("a client in use")
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = (u32, &Client)> {
        (0..)
            .zip(&self.entries)
            .filter_map(|(place, client)| client.as_ref().map(|client| (place, client)))
    }

    pub(crate) fn len(&self) -> usize {
        self.by_id.len()
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        (self.entries.capacity() * size_of::<Option<Client>>()) as u64 + self.by_id.memory_bytes()
    }
}
