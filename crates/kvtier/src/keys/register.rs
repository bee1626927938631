use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use kvtier_core::{Generation, NamespaceId};
use kvtier_storage::nvme::{DataKey, RecordKeys};
use parking_lot::{Mutex, RwLock};

use super::disk::Disk;
use super::master::{KeyId, MasterKey, draw_data_key, fill_random};
use super::slot::{self, Half, Incarnation, Label, PAGE_BYTES, Page, Read, SECTOR_BYTES, Sector};
use super::{KeyError, RecordError};

/// Slots read at once at the start: 2 MiB.
const SLOTS_AT_ONCE: u32 = 256;
/// Blank slots that the file gets beyond those in use when it grows: 128 KiB. Thousands of crash images are small.
const SLOTS_AHEAD: u32 = if cfg!(test) { 1 } else { 16 };

/// Namespaces in fixed slots: name, generation, and the data key of that generation, durable together.
///
/// A generation is a max-register: what was acknowledged never falls, whatever is torn. Slot numbers are namespace ids.
/// Writing is for one thread at a time; [`RecordKeys`] answers beside it.
pub struct Register {
    path: PathBuf,
    disk: Box<dyn Disk>,
    incarnation: Incarnation,
    master: RwLock<Arc<MasterKey>>,
    slots: Mutex<Vec<Slot>>,
    /// By slot: what is durable now.
    durable: RwLock<Vec<Option<Durable>>>,
    lost: Vec<NamespaceId>,
    syncs: AtomicU64,
    failures: AtomicU64,
}

/// What shall become durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// A namespace has this slot, at generation 1 at least.
    Open {
        /// Its slot.
        namespace: NamespaceId,
        /// Its name.
        label: Label,
    },
    /// Its generation is this at least, with a data key of its own.
    Raise {
        /// Its slot.
        namespace: NamespaceId,
        /// At least this.
        generation: Generation,
    },
}

struct Durable {
    generation: Generation,
    key: Arc<DataKey>,
}

#[derive(Default)]
struct Slot {
    fate: Fate,
    label: Option<Label>,
    newest: Option<Newest>,
    /// The highest that was written or tried.
    sequence: u64,
    /// The other half says the same.
    mirrored: bool,
}

/// The half that counts, and where it lies.
struct Newest {
    half: Half,
    at: usize,
    key: Arc<DataKey>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Fate {
    #[default]
    Usable,
    /// Asked for in an earlier run and never durable; those behind it were.
    Skipped,
    /// Was durable, and neither half can be read.
    Lost,
    /// The same, and said so in both halves.
    LostAndSaid,
}

impl Change {
    fn slot(&self) -> u32 {
        match self {
            Change::Open { namespace, .. } | Change::Raise { namespace, .. } => namespace.0,
        }
    }
}

impl Register {
    /// Reads every slot. `master` wraps what is written from now on; `others` may have wrapped what is there. Writes nothing
    /// unless the register is new or its header must be made good.
    pub(super) fn load(
        disk: Box<dyn Disk>,
        path: &Path,
        master: MasterKey,
        others: &[MasterKey],
    ) -> Result<Register, KeyError> {
        let scan = Scan::of(&*disk, path)?;
        let keys: Vec<&MasterKey> = std::iter::once(&master).chain(others).collect();
        let foreign = |half: &Half| !keys.iter().any(|key| key.id() == half.wrapped_by);
        let live = || {
            scan.slots
                .iter()
                .filter_map(Pair::newest)
                .filter(|(half, _)| half.label.is_some())
        };
        if let Some((half, _)) = live().find(|(half, _)| foreign(half)) {
            let given = others.first().unwrap_or(&master).id();
            let (path, other) = (path.to_owned(), half.wrapped_by);
            return Err(if live().all(|(half, _)| foreign(half)) {
                KeyError::WrongMasterKey {
                    path,
                    wrapped_by: other,
                    given,
                    hint: String::new(),
                }
            } else {
                KeyError::HalfRotated { path, given, other }
            });
        }
        let incarnation = match scan.incarnation {
            Some(incarnation) => incarnation,
            None => draw_incarnation()?,
        };
        if !scan.header_is_whole {
            disk.write_at(&slot::header(&incarnation), 0)
                .and_then(|()| disk.sync())
                .map_err(KeyError::io("write", path))?;
        }
        let mut names = BTreeSet::new();
        let mut slots: Vec<Slot> = scan
            .slots
            .into_iter()
            .map(|pair| pair.into_slot(&keys, &incarnation, &mut names))
            .collect();
        // What was asked for last and never durable was promised to nobody.
        while slots.last().is_some_and(|slot| slot.fate == Fate::Skipped) {
            slots.pop();
        }
        let durable = slots.iter().map(Slot::durable).collect();
        let lost = slots.iter().zip(0..).filter(|(slot, _)| slot.is_lost());
        let lost = lost.map(|(_, number)| NamespaceId(number)).collect();
        Ok(Register {
            path: path.to_owned(),
            disk,
            incarnation,
            master: RwLock::new(Arc::new(master)),
            slots: Mutex::new(slots),
            durable: RwLock::new(durable),
            lost,
            syncs: AtomicU64::new(0),
            failures: AtomicU64::new(0),
        })
    }

    /// Whose keys a register wraps, without any key at hand. `None`: nobody's yet.
    pub(super) fn wrapped_by(disk: &dyn Disk, path: &Path) -> Result<Option<KeyId>, KeyError> {
        let scan = Scan::of(disk, path)?;
        let mut live = scan.slots.iter().filter_map(Pair::newest);
        Ok(live
            .find(|(half, _)| half.label.is_some())
            .map(|(half, _)| half.wrapped_by))
    }

    /// Every slot in order: name and durable generation, or nothing where that is lost or was never durable. The caller
    /// keeps such a number from being used.
    #[must_use]
    pub fn namespaces(&self) -> Vec<Option<(Label, Generation)>> {
        let slots = self.slots.lock();
        let named = slots.iter().map(|slot| {
            let newest = slot.newest.as_ref()?;
            Some((slot.label.clone()?, newest.half.generation))
        });
        named.collect()
    }

    /// Slots whose names and keys are lost.
    #[must_use]
    pub fn lost(&self) -> &[NamespaceId] {
        &self.lost
    }

    /// Whether a namespace is durable.
    #[must_use]
    pub fn contains(&self, namespace: NamespaceId) -> bool {
        matches!(self.durable.read().get(namespace.0 as usize), Some(Some(_)))
    }

    /// Makes a namespace durable in this slot. Returns once it is, and at once if it was.
    ///
    /// # Errors
    /// When it cannot be written, or another name has the slot.
    pub fn open(&self, namespace: NamespaceId, domain: &str, name: &str) -> Result<(), RecordError> {
        let label = Label {
            domain: domain.to_owned(),
            name: name.to_owned(),
        };
        self.commit(&[Change::Open { namespace, label }]).remove(0)
    }

    /// Raises a generation and draws its data key; both become durable with one write and one sync before this returns. A
    /// generation that is not above the present one changes nothing.
    ///
    /// # Errors
    /// When it cannot be written, or nothing has the slot.
    pub fn raise(&self, namespace: NamespaceId, generation: Generation) -> Result<(), RecordError> {
        self.commit(&[Change::Raise { namespace, generation }]).remove(0)
    }

    /// Makes all of these durable with one sync, and answers each.
    #[must_use]
    pub fn commit(&self, changes: &[Change]) -> Vec<Result<(), RecordError>> {
        let mut slots = self.slots.lock();
        let mut wanted = BTreeMap::new();
        let planned: Vec<Result<(), RecordError>> = changes
            .iter()
            .map(|change| plan(&mut slots, change, &mut wanted))
            .collect();
        let written = self.write(&mut slots, &wanted).map_err(Arc::new);
        let answers = changes.iter().zip(planned).map(|(change, planned)| {
            planned?;
            let is_durable = slots[change.slot() as usize].satisfies(change);
            match &written {
                Err(error) if !is_durable => Err(RecordError::Io(Arc::clone(error))),
                _ => Ok(()),
            }
        });
        answers.collect()
    }

    /// Writes what is durable in one half into the other half too, where it is not: from then on neither damage to one
    /// half nor a copy of the file shows an older generation or its key. Nobody need wait for it.
    ///
    /// # Errors
    /// When it cannot be written. What was durable still is; ask again.
    pub fn settle(&self) -> Result<(), RecordError> {
        let mut slots = self.slots.lock();
        self.settle_locked(&mut slots)
            .map_err(|error| RecordError::Io(Arc::new(error)))
    }

    /// Wraps every data key by the present master key, in both halves, and overwrites what was lost. May be cut short at
    /// any write and begun anew.
    pub(super) fn rewrap(&self) -> Result<u32, KeyError> {
        let mut slots = self.slots.lock();
        let done = self.rewrap_locked(&mut slots).and_then(|rewrapped| {
            self.settle_locked(&mut slots)?;
            self.overwrite_damaged(&mut slots)?;
            Ok(rewrapped)
        });
        done.map_err(KeyError::io("write", &self.path))
    }

    /// Draws a new data key for every namespace, one generation further on: nothing older can be read any more.
    pub(super) fn raise_all(&self) -> Result<(), KeyError> {
        let raises: Vec<Change> = self
            .namespaces()
            .into_iter()
            .zip(0..)
            .filter_map(|(named, slot)| {
                let (_, generation) = named?;
                Some(Change::Raise {
                    namespace: NamespaceId(slot),
                    generation: Generation(generation.0.saturating_add(1)),
                })
            })
            .collect();
        for answer in self.commit(&raises) {
            answer.map_err(|error| KeyError::io("write", &self.path)(io::Error::other(error.to_string())))?;
        }
        Ok(())
    }

    pub(super) fn incarnation(&self) -> &Incarnation {
        &self.incarnation
    }

    fn master(&self) -> Arc<MasterKey> {
        Arc::clone(&self.master.read())
    }

    /// Wraps every data key by another master key, in both halves, while the node runs. When it fails, some are wrapped by
    /// the one and some by the other: both have to be kept, and it has to be done again.
    pub(super) fn rewrap_by(&self, master: MasterKey) -> Result<u32, KeyError> {
        *self.master.write() = Arc::new(master);
        self.rewrap()
    }

    /// Which register: 32 hexadecimal digits that it keeps for as long as it lives.
    #[must_use]
    pub fn identity(&self) -> String {
        let digest = blake3::derive_key("kvtier v1 node identity", &self.incarnation);
        KeyId(*digest.first_chunk().expect("16 of 32 bytes")).to_string()
    }

    /// Reads a slot from the disk: whether neither half holds a generation below this one.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn holds_nothing_older(&self, namespace: NamespaceId, generation: u64) -> Result<bool, KeyError> {
        let _slots = self.slots.lock();
        let mut sector: Sector = [0; SECTOR_BYTES];
        for half in 0..2 {
            self.disk
                .read_at(&mut sector, slot::place(namespace.0, half))
                .map_err(KeyError::io("read", &self.path))?;
            match Half::decode(&sector, namespace.0, Some(&self.incarnation)) {
                Read::Whole((half, _)) if half.generation.0 >= generation => {}
                _ => return Ok(false),
            }
        }
        Ok(true)
    }

    /// A namespace's name.
    #[must_use]
    pub fn label(&self, namespace: NamespaceId) -> Option<Label> {
        self.slots.lock().get(namespace.0 as usize)?.label.clone()
    }

    /// Which master key wraps what is written.
    #[must_use]
    pub fn master_key(&self) -> KeyId {
        self.master.read().id()
    }

    /// Syncs so far, and writes or syncs that failed.
    #[must_use]
    pub fn counts(&self) -> (u64, u64) {
        (
            self.syncs.load(Ordering::Relaxed),
            self.failures.load(Ordering::Relaxed),
        )
    }

    fn write(&self, slots: &mut [Slot], wanted: &BTreeMap<u32, Generation>) -> io::Result<()> {
        if wanted.is_empty() {
            return Ok(());
        }
        if let Some((last, _)) = wanted.last_key_value() {
            self.grow_for(*last)?;
        }
        let mut written = Vec::with_capacity(wanted.len());
        for (&number, &generation) in wanted {
            let slot = &mut slots[number as usize];
            let key = Arc::new(draw_data_key()?);
            written.push((number, self.write_half(slot, number, generation, key)?));
        }
        self.sync()?;
        let mut durable = self.durable.write();
        for (number, newest) in written {
            let slot = &mut slots[number as usize];
            slot.newest = Some(newest);
            let number = number as usize;
            if durable.len() <= number {
                durable.resize_with(number + 1, || None);
            }
            durable[number] = slot.durable();
        }
        Ok(())
    }

    /// Blank slots up to this one and a few more: both halves of a slot get their blocks together, and raising a generation
    /// needs no space.
    fn grow_for(&self, slot: u32) -> io::Result<()> {
        let (bytes, end) = (self.disk.bytes()?, slot::place(slot, 2));
        if end <= bytes {
            return Ok(());
        }
        let grown = end - bytes + slot::place(SLOTS_AHEAD, 0) - slot::place(0, 0);
        let blank = vec![0; usize::try_from(grown).map_err(io::Error::other)?];
        self.disk.write_at(&blank, bytes).inspect_err(|_| self.count_failure())
    }

    /// Overwrites the half that does not count.
    fn write_half(
        &self,
        slot: &mut Slot,
        number: u32,
        generation: Generation,
        key: Arc<DataKey>,
    ) -> io::Result<Newest> {
        let label = slot.label.as_ref().expect("only named slots are written");
        // Never the same twice, for what was tried before may have failed halfway. So may this.
        slot.sequence += 1;
        slot.mirrored = false;
        let half = Half::seal(
            &self.master(),
            &self.incarnation,
            (number, slot.sequence),
            (label, generation),
            &key,
        )?;
        let at = slot.newest.as_ref().map_or(0, |newest| 1 - newest.at);
        self.put(&half.page(&self.incarnation), number, at)?;
        Ok(Newest { half, at, key })
    }

    fn settle_locked(&self, slots: &mut [Slot]) -> io::Result<()> {
        let mut any = false;
        for (slot, number) in slots.iter().zip(0..).filter(|(slot, _)| !slot.mirrored) {
            if let Some(newest) = &slot.newest {
                self.put(&newest.half.page(&self.incarnation), number, 1 - newest.at)?;
                any = true;
            }
        }
        if any {
            self.sync()?;
        }
        for slot in slots.iter_mut().filter(|slot| slot.newest.is_some()) {
            slot.mirrored = true;
        }
        Ok(())
    }

    fn rewrap_locked(&self, slots: &mut [Slot]) -> io::Result<u32> {
        let mut written = Vec::new();
        for (slot, number) in slots.iter_mut().zip(0..) {
            let Some(newest) = &slot.newest else { continue };
            if newest.half.wrapped_by == self.master().id() {
                continue;
            }
            let (generation, key) = (newest.half.generation, Arc::clone(&newest.key));
            written.push((number, self.write_half(slot, number, generation, key)?));
        }
        if !written.is_empty() {
            self.sync()?;
        }
        let rewrapped = u32::try_from(written.len()).unwrap_or(u32::MAX);
        for (number, newest) in written {
            slots[number as usize].newest = Some(newest);
        }
        Ok(rewrapped)
    }

    /// Overwrites damaged halves: what is left of them may still hold a key that an earlier master key opens.
    fn overwrite_damaged(&self, slots: &mut [Slot]) -> io::Result<()> {
        let mut any = false;
        for (slot, number) in slots.iter_mut().zip(0..) {
            match slot.fate {
                Fate::Usable | Fate::LostAndSaid => continue,
                Fate::Skipped => self.put(&[0; PAGE_BYTES], number, 0)?,
                Fate::Lost => {
                    slot.sequence += 1;
                    let page = Half::lost(&self.master(), number, slot.sequence).page(&self.incarnation);
                    self.put(&page, number, 0)?;
                    self.put(&page, number, 1)?;
                }
            }
            any = true;
        }
        if any {
            self.sync()?;
        }
        for slot in slots.iter_mut().filter(|slot| slot.fate == Fate::Lost) {
            slot.fate = Fate::LostAndSaid;
        }
        Ok(())
    }

    fn put(&self, page: &Page, slot: u32, half: usize) -> io::Result<()> {
        let written = self.disk.write_at(page, slot::place(slot, half));
        written.inspect_err(|_| self.count_failure())
    }

    fn sync(&self) -> io::Result<()> {
        self.syncs.fetch_add(1, Ordering::Relaxed);
        self.disk.sync().inspect_err(|_| self.count_failure())
    }

    fn count_failure(&self) {
        self.failures.fetch_add(1, Ordering::Relaxed);
    }
}

impl RecordKeys for Register {
    fn data_key(&self, namespace: NamespaceId, generation: Generation) -> Option<Arc<DataKey>> {
        let durable = self.durable.read();
        let found = durable.get(namespace.0 as usize)?.as_ref()?;
        (found.generation == generation).then(|| Arc::clone(&found.key))
    }
}

/// What a change needs written: nothing, or the slot's generation in `wanted`.
fn plan(slots: &mut Vec<Slot>, change: &Change, wanted: &mut BTreeMap<u32, Generation>) -> Result<(), RecordError> {
    let number = change.slot();
    let generation = match change {
        Change::Open { namespace, label } => {
            if slots.len() <= number as usize {
                slots.resize_with(number as usize + 1, Slot::default);
            }
            let slot = &mut slots[number as usize];
            let free = slot.label.is_none() && slot.fate == Fate::Usable;
            if !label.fits() || !(free || slot.label.as_ref() == Some(label)) {
                return Err(RecordError::Misnamed(*namespace));
            }
            slot.label = Some(label.clone());
            Generation(1)
        }
        Change::Raise { namespace, generation } => {
            let named = slots.get(number as usize).is_some_and(|slot| slot.label.is_some());
            if !named {
                return Err(RecordError::Unknown(*namespace));
            }
            *generation
        }
    };
    if !slots[number as usize].satisfies(change) {
        let planned = wanted.entry(number).or_insert(generation);
        *planned = generation.max(*planned);
    }
    Ok(())
}

impl Slot {
    fn satisfies(&self, change: &Change) -> bool {
        let present = self.newest.as_ref().map(|newest| newest.half.generation);
        match change {
            Change::Open { .. } => present.is_some(),
            Change::Raise { generation, .. } => present.is_some_and(|present| present >= *generation),
        }
    }

    fn durable(&self) -> Option<Durable> {
        self.newest.as_ref().map(|newest| Durable {
            generation: newest.half.generation,
            key: Arc::clone(&newest.key),
        })
    }

    fn is_lost(&self) -> bool {
        matches!(self.fate, Fate::Lost | Fate::LostAndSaid)
    }
}

/// What lies in a register, before any key is tried.
struct Scan {
    header_is_whole: bool,
    /// `None`: a new register.
    incarnation: Option<Incarnation>,
    slots: Vec<Pair>,
}

/// A slot's two halves.
struct Pair([Read<Half>; 2]);

impl Scan {
    fn of(disk: &dyn Disk, path: &Path) -> Result<Scan, KeyError> {
        let failed = || KeyError::io("read", path);
        let unreadable = || KeyError::Unreadable {
            path: path.to_owned(),
            what: "register",
        };
        let newer = |version| KeyError::Newer {
            path: path.to_owned(),
            version,
            known: slot::VERSION,
        };
        let mut sector: Sector = [0; SECTOR_BYTES];
        disk.read_at(&mut sector, 0).map_err(failed())?;
        let count = slot::slots_in(disk.bytes().map_err(failed())?);
        let count = u32::try_from(count).map_err(|_| unreadable())?;
        let header = slot::decode_header(&sector);
        let torn = slot::is_torn_header(&sector);
        let incarnation = match header {
            Read::Newer(version) => return Err(newer(version)),
            Read::Whole(incarnation) => Some(incarnation),
            // The header is durable before the first slot is written.
            Read::Blank | Read::Damaged if count == 0 && torn => None,
            // The halves know whose they are: they stand in for a damaged header.
            Read::Blank | Read::Damaged => Some(surviving_incarnation(disk, count, path)?.ok_or_else(unreadable)?),
        };
        let mut slots = Vec::new();
        for_each_slot(disk, count, path, |number, sectors| {
            let mut halves = [Read::Blank, Read::Blank];
            for (half, sector) in halves.iter_mut().zip(sectors) {
                *half = match Half::decode(sector, number, incarnation.as_ref()) {
                    Read::Newer(version) => return Err(newer(version)),
                    Read::Whole((half, _)) => Read::Whole(half),
                    Read::Blank => Read::Blank,
                    Read::Damaged => Read::Damaged,
                };
            }
            slots.push(Pair(halves));
            Ok(())
        })?;
        Ok(Scan {
            header_is_whole: matches!(header, Read::Whole(_)),
            incarnation,
            slots,
        })
    }
}

/// The incarnation of the first half that can be read.
fn surviving_incarnation(disk: &dyn Disk, count: u32, path: &Path) -> Result<Option<Incarnation>, KeyError> {
    let mut found = None;
    for_each_slot(disk, count, path, |number, sectors| {
        for sector in sectors {
            if let Read::Whole((_, incarnation)) = Half::decode(sector, number, None) {
                found.get_or_insert(incarnation);
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// Shows every slot's two sectors, read many slots at a time.
fn for_each_slot(
    disk: &dyn Disk,
    count: u32,
    path: &Path,
    mut look: impl FnMut(u32, [&Sector; 2]) -> Result<(), KeyError>,
) -> Result<(), KeyError> {
    let mut bytes = vec![0; 2 * PAGE_BYTES * count.min(SLOTS_AT_ONCE) as usize];
    let mut number = 0;
    while number < count {
        let slots = (count - number).min(SLOTS_AT_ONCE);
        let bytes = &mut bytes[..2 * PAGE_BYTES * slots as usize];
        disk.read_at(bytes, slot::place(number, 0))
            .map_err(KeyError::io("read", path))?;
        for pages in bytes.chunks_exact(2 * PAGE_BYTES) {
            let sector = |at: usize| -> &Sector { pages[at..at + SECTOR_BYTES].try_into().expect("a sector") };
            look(number, [sector(0), sector(PAGE_BYTES)])?;
            number += 1;
        }
    }
    Ok(())
}

impl Pair {
    /// The half that counts, and where it lies.
    fn newest(&self) -> Option<(&Half, usize)> {
        let whole = self.0.iter().zip(0..).filter_map(|(read, at)| match read {
            Read::Whole(half) => Some((half, at)),
            _ => None,
        });
        // Of two equal ones the first.
        whole.reduce(|best, next| if next.0.sequence > best.0.sequence { next } else { best })
    }

    fn into_slot(self, keys: &[&MasterKey], incarnation: &Incarnation, names: &mut BTreeSet<Label>) -> Slot {
        let dead = |fate| Slot {
            fate,
            ..Slot::default()
        };
        let Some((half, at)) = self.newest() else {
            // A slot's first half is durable before its second is written, so one beside a blank was promised to nobody.
            return dead(match self.0 {
                [_, Read::Blank] => Fate::Skipped,
                _ => Fate::Lost,
            });
        };
        let (half, sequence) = (half.clone(), half.sequence);
        let mirrored = self.0[0] == self.0[1];
        let Some(label) = half.label.clone() else {
            let fate = if mirrored { Fate::LostAndSaid } else { Fate::Lost };
            return Slot { sequence, ..dead(fate) };
        };
        let key = keys
            .iter()
            .find(|key| key.id() == half.wrapped_by)
            .and_then(|key| half.open(key, incarnation));
        match key {
            Some(key) if names.insert(label.clone()) => Slot {
                fate: Fate::Usable,
                label: Some(label),
                newest: Some(Newest {
                    half,
                    at,
                    key: Arc::new(key),
                }),
                sequence,
                mirrored,
            },
            // Whole, and yet not what was wrapped: nobody tore that. An older half would undo what was acknowledged.
            _ => Slot {
                sequence,
                ..dead(Fate::Lost)
            },
        }
    }
}

fn draw_incarnation() -> Result<Incarnation, KeyError> {
    let mut incarnation = [0; 16];
    fill_random(&mut incarnation).map_err(KeyError::Randomness)?;
    Ok(incarnation)
}

#[cfg(test)]
mod tests;
