//! Which pack has which object: kept in memory, made from what was put here and from the fronts of packs that a listing found.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::time::Instant;

use super::pack::Entry;
use crate::remote::{ObjectGroup, ObjectName};

/// A pack's name behind its group: `EXPIRES-RANDOM`, ten and sixteen hexadecimal digits. A listing has what expires first at its front.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct PackId {
    /// Seconds since 1970 after which nobody reads it; `EXPIRES_NEVER`: without end.
    pub(super) expires_s: u64,
    pub(super) random: u64,
}

/// The largest that ten digits have.
pub(super) const EXPIRES_NEVER: u64 = (1 << 40) - 1;

impl fmt::Display for PackId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{:010x}-{:016x}", self.expires_s, self.random)
    }
}

impl PackId {
    /// `None`: not written by us.
    pub(super) fn parse(text: &str) -> Option<PackId> {
        let (expires, random) = text.split_once('-')?;
        let id = PackId {
            expires_s: u64::from_str_radix(expires, 16).ok()?,
            random: u64::from_str_radix(random, 16).ok()?,
        };
        (id.to_string() == text).then_some(id)
    }

    pub(super) fn is_over(self, now_s: u64) -> bool {
        self.expires_s <= now_s
    }
}

/// Packs of a group that are remembered as of no use, at most.
const REJECTED_MAX: usize = 100_000;

/// Where an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Located {
    pub(super) pack: PackId,
    pub(super) offset: u64,
    pub(super) length: u32,
}

struct Pack {
    entries: Box<[Entry]>,
    /// When it was heard of: what was put during a listing may be missing in it.
    added: Instant,
}

/// Why a pack is of no use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rejected {
    /// It cannot be read, or is none of ours.
    Unread,
    /// There is no room for what it has.
    NoRoom,
}

struct Group {
    packs: BTreeMap<PackId, Pack>,
    objects: HashMap<ObjectName, Located>,
    /// Of all packs; more than `objects` where two have the same.
    entries: usize,
    /// Packs that are of no use: not tried again before the next listing of all.
    rejected: HashMap<PackId, Rejected>,
    used: Instant,
    /// When the latest listing of all of it began.
    listed: Option<Instant>,
    /// When the latest listing of what is new began.
    looked: Option<Instant>,
}

/// See the module.
pub(super) struct Index {
    groups: HashMap<ObjectGroup, Group>,
    entries: usize,
    most: usize,
}

impl Index {
    /// Of so many objects at most: the groups that were not used for the longest time are forgotten first.
    pub(super) fn new(most: usize) -> Index {
        Index {
            groups: HashMap::new(),
            entries: 0,
            most: most.max(1),
        }
    }

    /// Objects, one for each pack that has it.
    pub(super) fn len(&self) -> usize {
        self.entries
    }

    fn group(&mut self, group: &ObjectGroup, now: Instant) -> &mut Group {
        let group = self.groups.entry(*group).or_insert_with(|| Group {
            packs: BTreeMap::new(),
            objects: HashMap::new(),
            entries: 0,
            rejected: HashMap::new(),
            used: now,
            listed: None,
            looked: None,
        });
        group.used = now;
        group
    }

    /// When the latest listings of a group began: of all of it, and of what is new.
    pub(super) fn listings(&mut self, group: &ObjectGroup, now: Instant) -> (Option<Instant>, Option<Instant>) {
        let group = self.group(group, now);
        (group.listed, group.looked)
    }

    /// A pack is there. False where there is no room for what it has, whatever else is forgotten.
    pub(super) fn add(&mut self, group: &ObjectGroup, id: PackId, entries: Vec<Entry>, now: Instant) -> bool {
        let known = self.group(group, now);
        if known.packs.contains_key(&id) {
            return true;
        }
        if known.entries + entries.len() > self.most {
            self.reject(group, id, Rejected::NoRoom);
            return false;
        }
        while self.entries + entries.len() > self.most {
            let others = self.groups.iter().filter(|(other, _)| *other != group);
            let Some((&oldest, _)) = others.min_by_key(|(_, group)| group.used) else {
                break;
            };
            self.forget_group(&oldest);
        }
        self.entries += entries.len();
        let known = self.group(group, now);
        known.entries += entries.len();
        known.place(id, entries.iter());
        let entries = entries.into_boxed_slice();
        known.packs.insert(id, Pack { entries, added: now });
        true
    }

    /// A pack is of no use.
    pub(super) fn reject(&mut self, group: &ObjectGroup, id: PackId, why: Rejected) {
        if let Some(known) = self.groups.get_mut(group)
            && known.rejected.len() < REJECTED_MAX
        {
            known.rejected.insert(id, why);
        }
    }

    /// A listing of all of a group begins: what was rejected is tried once more.
    pub(super) fn begin_whole(&mut self, group: &ObjectGroup, now: Instant) {
        self.group(group, now).rejected.clear();
    }

    /// Where an object is that has not expired.
    pub(super) fn find(&self, group: &ObjectGroup, name: &ObjectName, now_s: u64) -> Option<Located> {
        let located = self.groups.get(group)?.objects.get(name)?;
        (!located.pack.is_over(now_s)).then_some(*located)
    }

    /// Which packs of these nobody has told of yet.
    pub(super) fn unknown(&mut self, group: &ObjectGroup, found: &[(PackId, u64)], now: Instant) -> Vec<(PackId, u64)> {
        let known = self.group(group, now);
        let is_new = |(id, _): &&(PackId, u64)| !known.packs.contains_key(id) && !known.rejected.contains_key(id);
        found.iter().filter(is_new).copied().collect()
    }

    /// Which of these cannot be read; `None` where not of all of the others is known what they have.
    pub(super) fn unread_of(&self, group: &ObjectGroup, packs: impl Iterator<Item = PackId>) -> Option<Vec<PackId>> {
        let known = self.groups.get(group);
        let mut unread = Vec::new();
        for id in packs {
            match known.map(|known| (known.packs.contains_key(&id), known.rejected.get(&id))) {
                Some((true, _)) => {}
                Some((false, Some(Rejected::Unread))) => unread.push(id),
                _ => return None,
            }
        }
        Some(unread)
    }

    /// A listing of all of a group, begun then, found these: what it lacks is gone.
    pub(super) fn listed(&mut self, group: &ObjectGroup, begun: Instant, found: &[(PackId, u64)]) {
        let there: HashSet<PackId> = found.iter().map(|(id, _)| *id).collect();
        let Some(known) = self.groups.get_mut(group) else {
            return;
        };
        known.listed = Some(begun);
        known.looked = Some(begun);
        let packs = known.packs.iter();
        let gone = packs.filter(|(id, pack)| pack.added < begun && !there.contains(id));
        let gone: Vec<PackId> = gone.map(|(id, _)| *id).collect();
        self.drop_packs(group, &gone);
    }

    /// A listing of what is new, begun then, is done.
    pub(super) fn looked(&mut self, group: &ObjectGroup, begun: Instant) {
        if let Some(group) = self.groups.get_mut(group) {
            group.looked = Some(begun);
        }
    }

    /// Packs are not there any more, and what they had with them, but for what another has as well.
    pub(super) fn drop_packs(&mut self, group: &ObjectGroup, ids: &[PackId]) {
        let Some(known) = self.groups.get_mut(group) else {
            return;
        };
        let has_twice = known.entries > known.objects.len();
        let mut homeless = HashSet::new();
        for id in ids {
            let Some(pack) = known.packs.remove(id) else { continue };
            known.entries -= pack.entries.len();
            self.entries -= pack.entries.len();
            for entry in &*pack.entries {
                if known.objects.get(&entry.name).is_some_and(|at| at.pack == *id) {
                    known.objects.remove(&entry.name);
                    homeless.insert(entry.name);
                }
            }
        }
        // Once through all, however many went.
        if has_twice && !homeless.is_empty() {
            let packs = std::mem::take(&mut known.packs);
            for (id, pack) in &packs {
                let others = pack.entries.iter().filter(|entry| homeless.contains(&entry.name));
                known.place(*id, others);
            }
            known.packs = packs;
        }
    }

    /// Every pack that has one of these.
    pub(super) fn packs_with(&self, group: &ObjectGroup, names: &[ObjectName]) -> Vec<PackId> {
        let names: HashSet<&ObjectName> = names.iter().collect();
        let Some(known) = self.groups.get(group) else {
            return Vec::new();
        };
        let has_one = |pack: &Pack| pack.entries.iter().any(|entry| names.contains(&entry.name));
        let packs = known.packs.iter().filter(|(_, pack)| has_one(pack));
        packs.map(|(id, _)| *id).collect()
    }

    /// All groups of a namespace.
    pub(super) fn forget_namespace(&mut self, namespace: &[u8; 16]) {
        let groups = self.groups.keys().filter(|group| group.namespace == *namespace);
        let groups: Vec<ObjectGroup> = groups.copied().collect();
        groups.iter().for_each(|group| self.forget_group(group));
    }

    fn forget_group(&mut self, group: &ObjectGroup) {
        if let Some(group) = self.groups.remove(group) {
            self.entries -= group.entries;
        }
    }
}

impl Group {
    /// A pack has these: of two the one that is there for longer is read.
    fn place<'a>(&mut self, id: PackId, entries: impl Iterator<Item = &'a Entry>) {
        for entry in entries {
            let located = Located {
                pack: id,
                offset: entry.offset,
                length: entry.length,
            };
            let known = self.objects.get(&entry.name);
            if known.is_none_or(|known| known.pack < id) {
                self.objects.insert(entry.name, located);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const GROUP: ObjectGroup = ObjectGroup {
        namespace: [1; 16],
        generation: [2; 16],
    };

    fn name(number: u8) -> ObjectName {
        ObjectName([number; 16])
    }

    fn id(expires_s: u64) -> PackId {
        PackId { expires_s, random: 7 }
    }

    fn entries(names: &[u8]) -> Vec<Entry> {
        let entry = |number: &u8| Entry {
            name: name(*number),
            offset: 100 * u64::from(*number),
            length: 10,
        };
        names.iter().map(entry).collect()
    }

    #[test]
    fn a_packs_name_says_what_it_said() {
        let id = PackId {
            expires_s: 0x65_a1b2_c3d4,
            random: u64::MAX - 1,
        };
        assert_eq!(id.to_string(), "65a1b2c3d4-fffffffffffffffe");
        assert_eq!(PackId::parse(&id.to_string()), Some(id));
        for other in [
            "",
            "65a1b2c3d4",
            "65a1b2c3d4-",
            "65A1B2C3D4-fffffffffffffffe",
            "1-2",
            "+000000001-0000000000000002",
        ] {
            assert_eq!(PackId::parse(other), None, "{other}");
        }
    }

    #[test]
    fn an_object_is_found_until_its_pack_is_gone_or_over() {
        let (mut index, now) = (Index::new(100), Instant::now());
        assert!(index.add(&GROUP, id(50), entries(&[1, 2]), now));
        let found = index.find(&GROUP, &name(2), 49).expect("there");
        assert_eq!((found.pack, found.offset, found.length), (id(50), 200, 10));
        assert_eq!(index.find(&GROUP, &name(2), 50), None, "it is over");
        assert_eq!(index.find(&GROUP, &name(3), 0), None);
        let other = ObjectGroup {
            generation: [3; 16],
            ..GROUP
        };
        assert_eq!(index.find(&other, &name(2), 0), None, "nor in another generation");
        index.drop_packs(&GROUP, &[id(50)]);
        assert_eq!(index.find(&GROUP, &name(2), 0), None);
        assert_eq!(index.len(), 0);
    }

    #[test]
    fn of_two_packs_the_one_that_lasts_longer_is_read_and_both_are_told_of() {
        let (mut index, now) = (Index::new(100), Instant::now());
        for order in [[60, 50], [50, 60]] {
            index.forget_namespace(&GROUP.namespace);
            for expires_s in order {
                assert!(index.add(&GROUP, id(expires_s), entries(&[1]), now));
            }
            assert_eq!(index.find(&GROUP, &name(1), 0).expect("there").pack, id(60));
            assert_eq!(index.packs_with(&GROUP, &[name(1), name(9)]), [id(50), id(60)]);
            assert_eq!(index.len(), 2, "each takes memory");
            // What the other has as well is read from there.
            index.drop_packs(&GROUP, &[id(60)]);
            assert_eq!(index.find(&GROUP, &name(1), 0).expect("there").pack, id(50));
            index.drop_packs(&GROUP, &[id(50)]);
            assert_eq!((index.find(&GROUP, &name(1), 0), index.len()), (None, 0));
        }
    }

    #[test]
    fn what_a_listing_lacks_is_gone_unless_it_came_meanwhile() {
        let (mut index, before) = (Index::new(100), Instant::now());
        let begun = before + Duration::from_secs(1);
        index.add(&GROUP, id(50), entries(&[1]), before);
        index.add(&GROUP, id(60), entries(&[2]), before);
        index.add(&GROUP, id(70), entries(&[3]), begun + Duration::from_millis(1));
        assert_eq!(index.unknown(&GROUP, &[(id(50), 1), (id(80), 2)], begun), [(id(80), 2)]);
        index.reject(&GROUP, id(80), Rejected::Unread);
        assert!(
            index.unknown(&GROUP, &[(id(80), 2)], begun).is_empty(),
            "not every two seconds"
        );
        index.begin_whole(&GROUP, begun);
        assert_eq!(index.unknown(&GROUP, &[(id(80), 2)], begun), [(id(80), 2)]);
        let unread_of = |index: &Index, packs: [PackId; 2]| index.unread_of(&GROUP, packs.into_iter());
        assert_eq!(unread_of(&index, [id(50), id(60)]), Some(vec![]));
        assert_eq!(unread_of(&index, [id(50), id(80)]), None);
        index.reject(&GROUP, id(80), Rejected::NoRoom);
        assert_eq!(unread_of(&index, [id(50), id(80)]), None);
        index.reject(&GROUP, id(80), Rejected::Unread);
        assert_eq!(unread_of(&index, [id(50), id(80)]), Some(vec![id(80)]));
        index.listed(&GROUP, begun, &[(id(50), 1)]);
        let there = |number| index.find(&GROUP, &name(number), 0).is_some();
        assert_eq!([there(1), there(2), there(3)], [true, false, true]);
        assert_eq!(index.listings(&GROUP, begun), (Some(begun), Some(begun)));
    }

    #[test]
    fn the_group_that_was_not_used_for_longest_makes_room_and_never_the_one_that_needs_it() {
        let (mut index, now) = (Index::new(3), Instant::now());
        let group = |generation: u8| ObjectGroup {
            generation: [generation; 16],
            ..GROUP
        };
        let later = |seconds| now + Duration::from_secs(seconds);
        assert!(index.add(&group(1), id(50), entries(&[1]), later(1)));
        assert!(index.add(&group(2), id(50), entries(&[1]), later(2)));
        index.listings(&group(1), later(3));
        assert!(index.add(&group(3), id(50), entries(&[1, 2]), later(4)));
        assert!(index.find(&group(2), &name(1), 0).is_none());
        assert!(index.find(&group(1), &name(1), 0).is_some());
        assert_eq!(index.len(), 3);
        assert!(
            !index.add(&group(3), id(60), entries(&[3, 4]), later(5)),
            "two of three are its own"
        );
        assert!(index.find(&group(3), &name(2), 0).is_some());
        assert!(
            index.find(&group(1), &name(1), 0).is_some(),
            "nobody goes for what finds no room anyway"
        );
        assert_eq!(index.len(), 3);
    }
}
