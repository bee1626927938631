use hashbrown::HashTable;

/// The one map type: a hash table with a fixed, seeded mix. Never iterated to decide anything: order lives in the policy.
///
/// The caller gives the hash of a key and says how to find the hash of an element again, so that an element may be just
/// an index into a table that holds the key.
#[derive(Clone, Debug)]
pub(crate) struct KeyMap<T> {
    table: HashTable<T>,
}

impl<T> Default for KeyMap<T> {
    fn default() -> Self {
        KeyMap {
            table: HashTable::new(),
        }
    }
}

impl<T> KeyMap<T> {
    pub(crate) fn find(&self, hash: u64, same: impl FnMut(&T) -> bool) -> Option<&T> {
        self.table.find(hash, same)
    }

    pub(crate) fn find_mut(&mut self, hash: u64, same: impl FnMut(&T) -> bool) -> Option<&mut T> {
        self.table.find_mut(hash, same)
    }

    /// The caller made sure that the key is absent.
    pub(crate) fn insert(&mut self, hash: u64, element: T, rehash: impl Fn(&T) -> u64) {
        self.table.insert_unique(hash, element, rehash);
    }

    pub(crate) fn remove(&mut self, hash: u64, same: impl FnMut(&T) -> bool) -> Option<T> {
        self.table.find_entry(hash, same).ok().map(|entry| entry.remove().0)
    }

    /// In no meaningful order: sort what you take from it.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &T> {
        self.table.iter()
    }

    pub(crate) fn len(&self) -> usize {
        self.table.len()
    }

    pub(crate) fn memory_bytes(&self) -> u64 {
        self.table.allocation_size() as u64
    }
}

/// A map from small numbers: elements carry their key.
impl<T> KeyMap<(u64, T)> {
    pub(crate) fn at(&self, key: u64) -> Option<&T> {
        self.find(mix_number(key), |element| element.0 == key)
            .map(|element| &element.1)
    }

    pub(crate) fn at_mut(&mut self, key: u64) -> Option<&mut T> {
        self.find_mut(mix_number(key), |element| element.0 == key)
            .map(|element| &mut element.1)
    }

    pub(crate) fn put(&mut self, key: u64, value: T) {
        assert!(self.at(key).is_none(), "key {key} is in the map already");
        self.insert(mix_number(key), (key, value), |element| mix_number(element.0));
    }

    pub(crate) fn take(&mut self, key: u64) -> Option<T> {
        self.remove(mix_number(key), |element| element.0 == key)
            .map(|element| element.1)
    }
}

/// Spreads a number over 64 bits.
pub(crate) fn mix_number(number: u64) -> u64 {
    fold(number ^ 0x9e37_79b9_7f4a_7c15, 0xd6e8_feb8_6659_fd93)
}

/// Multiplies to 128 bits and folds the halves.
pub(crate) fn fold(left: u64, right: u64) -> u64 {
    let wide = u128::from(left) * u128::from(right);
    #[expect(clippy::cast_possible_truncation, reason = "both halves are taken")]
    let folded = (wide as u64) ^ ((wide >> 64) as u64);
    folded
}
