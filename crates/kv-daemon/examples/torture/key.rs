//! The blocks of a torture: their names, lengths and what they must hold.

use kvtier::{BlockHash, Parent, Realization};

/// Namespaces by name. Both hold the same hashes, with different bytes.
pub(crate) const NAMESPACES: [&str; 2] = ["torture-left", "torture-right"];

/// Client threads that put. Each alone decides about its own keys; all read everything.
pub(crate) const WORKERS: usize = 3;

/// Blocks in one prefix.
const CHAIN: u32 = 8;

/// Lengths, in thousandths of all blocks. Some are no whole pages.
const LENGTHS: [(u64, usize); 5] = [
    (300, 4 << 10),
    (300, 16 << 10),
    (210, 70_001),
    (130, 256 << 10),
    (60, 1 << 20),
];

/// The largest of [`LENGTHS`].
pub(crate) const LENGTH_MAX: usize = 1 << 20;

/// The form that a namespace's blocks have.
pub(crate) fn form(namespace: usize) -> Realization {
    Realization::digest(&[("torture", NAMESPACES[namespace])])
}

/// A block: the namespace, the worker that puts it, and its number there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Key {
    pub(crate) namespace: usize,
    pub(crate) worker: usize,
    pub(crate) number: u32,
}

impl Key {
    /// The same in each namespace, so that one namespace's block in place of another's is found.
    pub(crate) fn hash(self) -> BlockHash {
        let name = (self.worker as u64) << 32 | u64::from(self.number);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&scramble(name).to_le_bytes());
        bytes[8..].copy_from_slice(&name.to_le_bytes());
        BlockHash(bytes)
    }

    pub(crate) fn parent(self) -> Parent {
        if self.number.is_multiple_of(CHAIN) {
            return Parent::Root;
        }
        let number = self.number - 1;
        Parent::Block(Key { number, ..self }.hash())
    }

    /// How many keys, this one included, follow each other in its prefix.
    pub(crate) fn rest_of_chain(self) -> u32 {
        CHAIN - self.number % CHAIN
    }

    pub(crate) fn length(self) -> usize {
        let mut draw = scramble(self.id(0)) % 1000;
        for (share, length) in LENGTHS {
            match draw.checked_sub(share) {
                Some(rest) => draw = rest,
                None => return length,
            }
        }
        LENGTH_MAX
    }

    /// What decides the bytes: everything that must match for them to be usable. The head of a block holds it.
    pub(crate) fn id(self, generation: u64) -> u64 {
        (generation & 0xffff) << 48
            | (self.namespace as u64) << 40
            | (self.worker as u64) << 32
            | u64::from(self.number)
    }

    /// The generation that an id names, if it is an id of this key.
    pub(crate) fn generation_in(self, id: u64) -> Option<u64> {
        let generation = id >> 48;
        (self.id(generation) == id).then_some(generation)
    }
}

/// An id in words.
pub(crate) fn describe(id: u64) -> String {
    let (generation, namespace, worker, number) = (id >> 48, id >> 40 & 0xff, id >> 32 & 0xff, id & 0xffff_ffff);
    format!("block {number} of worker {worker}, namespace {namespace}, generation {generation}")
}

fn scramble(value: u64) -> u64 {
    kvtier_sim::Random::new(value).next_u64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_names_one_key_and_one_generation() {
        let key = Key {
            namespace: 1,
            worker: 2,
            number: 70_000,
        };
        assert_eq!(key.generation_in(key.id(9)), Some(9));
        let other = Key { namespace: 0, ..key };
        assert_eq!(key.generation_in(other.id(9)), None);
        assert_eq!(
            key.hash(),
            other.hash(),
            "one namespace's block may be taken for the other's"
        );
        assert_ne!(key.id(9), other.id(9));
    }

    #[test]
    fn every_length_occurs_and_their_shares_are_a_whole() {
        assert_eq!(LENGTHS.iter().map(|(share, _)| share).sum::<u64>(), 1000);
        let drawn: Vec<usize> = (0..2000)
            .map(|number| {
                Key {
                    namespace: 0,
                    worker: 0,
                    number,
                }
                .length()
            })
            .collect();
        assert!(LENGTHS.iter().all(|(_, length)| drawn.contains(length)));
    }
}
