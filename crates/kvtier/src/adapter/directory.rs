use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Bound;
use std::sync::Arc;

use super::key::ObjectKey;

/// Forms of one model and group that are remembered; a deployment has one, or a few while it changes.
const SIZES_MAX: usize = 4;
/// Models and groups whose forms are remembered.
const FORMS_MAX: usize = 4096;

/// Objects that this process has stored or found, by name: the node itself knows digests only.
///
/// It serves listing and accounting, and says of which size an object is where LMCache does not. It may be wrong about
/// what the node has evicted; a lookup that misses corrects it.
pub(super) struct Directory {
    keys_max: usize,
    keys: BTreeMap<ObjectKey, u64>,
    /// In the order they came, for the bound. May name keys that are gone.
    order: VecDeque<ObjectKey>,
    bytes_by_salt: HashMap<Arc<str>, u64>,
    /// Newest first.
    sizes: HashMap<(Arc<str>, u32), Vec<u64>>,
}

impl Directory {
    pub(super) fn new(keys_max: usize) -> Directory {
        Directory {
            keys_max,
            keys: BTreeMap::new(),
            order: VecDeque::new(),
            bytes_by_salt: HashMap::new(),
            sizes: HashMap::new(),
        }
    }

    /// Notes an object. True if it was not known, in this size.
    pub(super) fn insert(&mut self, key: &ObjectKey, bytes: u64) -> bool {
        self.learn(key, bytes);
        if self.keys.get(key) == Some(&bytes) {
            return false;
        }
        self.remove(key);
        while self.keys.len() >= self.keys_max {
            let Some(oldest) = self.order.pop_front() else { break };
            self.remove(&oldest);
        }
        if self.order.len() > self.keys_max.saturating_mul(2) {
            self.order.retain(|key| self.keys.contains_key(key));
        }
        self.keys.insert(key.clone(), bytes);
        self.order.push_back(key.clone());
        *self.bytes_by_salt.entry(Arc::clone(&key.salt)).or_default() += bytes;
        true
    }

    /// Forgets an object; its size if it was known.
    pub(super) fn remove(&mut self, key: &ObjectKey) -> Option<u64> {
        let bytes = self.keys.remove(key)?;
        if let Some(sum) = self.bytes_by_salt.get_mut(&key.salt) {
            *sum -= bytes;
            if *sum == 0 {
                self.bytes_by_salt.remove(&key.salt);
            }
        }
        Some(bytes)
    }

    /// Forgets all objects of a salt.
    pub(super) fn remove_salt(&mut self, salt: &str) -> Vec<(ObjectKey, u64)> {
        let gone: Vec<(ObjectKey, u64)> = self
            .keys
            .iter()
            .filter(|(key, _)| &*key.salt == salt)
            .map(|(key, bytes)| (key.clone(), *bytes))
            .collect();
        for (key, _) in &gone {
            self.remove(key);
        }
        gone
    }

    /// Notes that objects of this key's model and group have this size.
    pub(super) fn learn(&mut self, key: &ObjectKey, bytes: u64) {
        let form = (Arc::clone(&key.model), key.group);
        if self.sizes.len() >= FORMS_MAX && !self.sizes.contains_key(&form) {
            self.sizes.clear();
        }
        let sizes = self.sizes.entry(form).or_default();
        if sizes.first() != Some(&bytes) {
            sizes.retain(|known| *known != bytes);
            sizes.insert(0, bytes);
            sizes.truncate(SIZES_MAX);
        }
    }

    /// Of which sizes an object may be, the likeliest first.
    pub(super) fn sizes(&self, key: &ObjectKey) -> Vec<u64> {
        if let Some(bytes) = self.keys.get(key) {
            return vec![*bytes];
        }
        let form = (Arc::clone(&key.model), key.group);
        self.sizes.get(&form).cloned().unwrap_or_default()
    }

    /// Up to `count` objects behind `after`, in a fixed order, of one model or of all.
    pub(super) fn page(&self, model: Option<&str>, count: usize, after: Option<&ObjectKey>) -> Vec<(ObjectKey, u64)> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        self.keys
            .range::<ObjectKey, _>((from, Bound::Unbounded))
            .filter(|(key, _)| model.is_none_or(|model| &*key.model == model))
            .take(count)
            .map(|(key, bytes)| (key.clone(), *bytes))
            .collect()
    }

    pub(super) fn usage(&self) -> Vec<(Arc<str>, u64)> {
        self.bytes_by_salt
            .iter()
            .map(|(salt, bytes)| (Arc::clone(salt), *bytes))
            .collect()
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(number: u8, salt: &str) -> ObjectKey {
        ObjectKey {
            salt: salt.into(),
            model: "m".into(),
            group: 0,
            rank: 0,
            chunk_hash: Box::new([number]),
        }
    }

    #[test]
    fn bytes_are_counted_by_salt_and_once() {
        let mut directory = Directory::new(10);
        assert!(directory.insert(&key(1, "a"), 100));
        assert!(!directory.insert(&key(1, "a"), 100));
        assert!(directory.insert(&key(1, "b"), 7));
        let mut usage = directory.usage();
        usage.sort();
        assert_eq!(usage, [("a".into(), 100), ("b".into(), 7)]);
        assert_eq!(directory.remove(&key(1, "a")), Some(100));
        assert_eq!(directory.remove(&key(1, "a")), None);
        assert_eq!(directory.usage(), [("b".into(), 7)]);
    }

    #[test]
    fn the_oldest_is_forgotten_at_the_bound() {
        let mut directory = Directory::new(2);
        for number in 0..3 {
            directory.insert(&key(number, "a"), 1);
        }
        assert_eq!(directory.len(), 2);
        assert_eq!(directory.remove(&key(0, "a")), None);
        for _ in 0..100 {
            directory.remove(&key(1, "a"));
            directory.insert(&key(1, "a"), 1);
        }
        assert!(directory.order.len() <= 5, "{}", directory.order.len());
    }

    #[test]
    fn pages_follow_each_other_without_gap_or_repetition() {
        let mut directory = Directory::new(100);
        for number in 0..25 {
            directory.insert(&key(number, "a"), u64::from(number));
        }
        let (mut seen, mut after) = (Vec::new(), None);
        loop {
            let page = directory.page(Some("m"), 10, after.as_ref());
            let Some((last, _)) = page.last() else { break };
            after = Some(last.clone());
            seen.extend(page.into_iter().map(|(_, bytes)| bytes));
        }
        assert_eq!(seen, (0..25).collect::<Vec<u64>>());
        assert!(directory.page(Some("other"), 10, None).is_empty());
    }

    #[test]
    fn the_size_of_an_unknown_key_is_guessed_from_its_model() {
        let mut directory = Directory::new(100);
        assert!(directory.sizes(&key(9, "a")).is_empty());
        directory.insert(&key(1, "a"), 10);
        directory.insert(&key(2, "b"), 20);
        assert_eq!(directory.sizes(&key(9, "c")), [20, 10]);
        assert_eq!(directory.sizes(&key(1, "a")), [10]);
    }
}
