use crate::key_map::KeyMap;
use crate::label_table::LabelTable;
use crate::{Generation, NamespaceId, OperationId, Realization, RealizationId, Time, TrustDomain};

/// A namespace: its generation, what of it is durable, and what it uses.
#[derive(Debug)]
pub(crate) struct Namespace {
    pub(crate) domain: TrustDomain,
    name: Box<str>,
    pub(crate) generation: Generation,
    /// How often the generation was raised in this run: what entries carry, since it is half as long.
    pub(crate) epoch: u32,
    /// The generation that is durable.
    pub(crate) recorded: Generation,
    pub(crate) recording: Option<OperationId>,
    /// Failures to record in a row.
    pub(crate) record_failures: u32,
    /// Invalidations to acknowledge once their generation is durable.
    pub(crate) awaiting: Vec<(OperationId, Generation)>,
    /// Writers that asked before this operation are refused: blocks were deleted by their scope.
    pub(crate) fence: OperationId,
    pub(crate) quota_bytes: Option<u64>,
    pub(crate) used_bytes: u64,
    pub(crate) blocks: u64,
    /// Those of older generations.
    pub(crate) hidden_blocks: u64,
    pub(crate) host_blocks: u64,
    pub(crate) nvme_blocks: u64,
    /// What its blocks carry.
    pub(crate) labels: LabelTable,
}

impl Namespace {
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

/// Namespaces by domain and name.
#[derive(Debug, Default)]
pub(crate) struct NamespaceTable {
    entries: Vec<Namespace>,
    by_name: KeyMap<u32>,
}

impl NamespaceTable {
    pub(crate) fn find(&self, domain: TrustDomain, name: &str) -> Option<NamespaceId> {
        self.by_name
            .find(name_hash(domain, name), |&place| {
                let entry = &self.entries[place as usize];
                entry.domain == domain && &*entry.name == name
            })
            .map(|&place| NamespaceId(place))
    }

    /// The caller made sure that the name is new.
    pub(crate) fn insert(
        &mut self,
        domain: TrustDomain,
        name: &str,
        quota_bytes: Option<u64>,
        seed: u64,
    ) -> NamespaceId {
        let place = u32::try_from(self.entries.len()).expect("namespaces_max is at most 2^30");
        self.entries.push(Namespace {
            domain,
            name: name.into(),
            generation: Generation(1),
            epoch: 1,
            recorded: Generation(1),
            recording: None,
            record_failures: 0,
            awaiting: Vec::new(),
            fence: OperationId(0),
            quota_bytes,
            used_bytes: 0,
            blocks: 0,
            hidden_blocks: 0,
            host_blocks: 0,
            nvme_blocks: 0,
            labels: LabelTable::new(seed),
        });
        let NamespaceTable { entries, by_name } = self;
        by_name.insert(name_hash(domain, name), place, |&other| {
            let entry = &entries[other as usize];
            name_hash(entry.domain, &entry.name)
        });
        NamespaceId(place)
    }

    pub(crate) fn entry(&self, namespace: NamespaceId) -> Option<&Namespace> {
        self.entries.get(namespace.0 as usize)
    }

    pub(crate) fn at(&self, place: u32) -> &Namespace {
        &self.entries[place as usize]
    }

    pub(crate) fn at_mut(&mut self, place: u32) -> &mut Namespace {
        &mut self.entries[place as usize]
    }

    pub(crate) fn iter(&self) -> impl Iterator<Item = &Namespace> {
        self.entries.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        let names: usize = self.entries.iter().map(|entry| entry.name.len()).sum();
        let labels: u64 = self.entries.iter().map(|entry| entry.labels.memory_bytes()).sum();
        (names + self.entries.capacity() * size_of::<Namespace>()) as u64 + labels + self.by_name.memory_bytes()
    }
}

/// Realizations, interned.
#[derive(Debug, Default)]
pub(crate) struct RealizationTable {
    entries: Vec<Realization>,
    by_digest: KeyMap<u32>,
}

impl RealizationTable {
    pub(crate) fn find(&self, realization: Realization) -> Option<RealizationId> {
        self.by_digest
            .find(digest_hash(&realization), |&place| {
                self.entries[place as usize] == realization
            })
            .map(|&place| RealizationId(place))
    }

    pub(crate) fn insert(&mut self, realization: Realization) -> RealizationId {
        let place = u32::try_from(self.entries.len()).expect("realizations_max is at most 65,536");
        self.entries.push(realization);
        let RealizationTable { entries, by_digest } = self;
        by_digest.insert(digest_hash(&realization), place, |&other| {
            digest_hash(&entries[other as usize])
        });
        RealizationId(place)
    }

    pub(crate) fn len(&self) -> usize {
        self.entries.len()
    }
}

/// When a pause that doubles from `first` up to 64 times that ends.
pub(crate) fn backoff(now: Time, first: std::time::Duration, failures: u32) -> Time {
    now.after(first * (1 << failures.min(6)))
}

/// Names come from clients: a strong hash, so that nobody can aim for a bucket.
fn name_hash(domain: TrustDomain, name: &str) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&domain.0.to_le_bytes()).update(name.as_bytes());
    first_word(hasher.finalize().as_bytes())
}

fn digest_hash(realization: &Realization) -> u64 {
    first_word(blake3::hash(&realization.0).as_bytes())
}

fn first_word(digest: &[u8; 32]) -> u64 {
    u64::from_le_bytes(digest[..8].try_into().expect("8 of 32 bytes"))
}
