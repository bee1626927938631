use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::keys::crash_disk::{CrashDisk, Tear};

fn master(number: u8) -> MasterKey {
    MasterKey::new(&[number; 32])
}

fn load(disk: &CrashDisk) -> Register {
    try_load(disk, 1, &[]).expect("a register opens")
}

fn try_load(disk: &CrashDisk, key: u8, others: &[u8]) -> Result<Register, KeyError> {
    let others: Vec<MasterKey> = others.iter().map(|key| master(*key)).collect();
    Register::load(Box::new(disk.clone()), Path::new("register"), master(key), &others)
}

fn name(slot: u32) -> (&'static str, String) {
    // The same names in two domains.
    (
        if slot.is_multiple_of(2) { "even" } else { "odd" },
        format!("space-{}", slot / 2),
    )
}

fn open(register: &Register, slot: u32) -> Result<(), RecordError> {
    let (domain, name) = name(slot);
    register.open(NamespaceId(slot), domain, &name)
}

fn raise(register: &Register, slot: u32, generation: u64) -> Result<(), RecordError> {
    register.raise(NamespaceId(slot), Generation(generation))
}

fn key(register: &Register, slot: u32, generation: u64) -> Option<[u8; 32]> {
    let key = register.data_key(NamespaceId(slot), Generation(generation))?;
    Some(*key.bytes())
}

fn generations(register: &Register) -> Vec<Option<u64>> {
    let namespaces = register.namespaces().into_iter();
    namespaces.map(|named| Some(named?.1.0)).collect()
}

#[test]
fn what_was_acknowledged_is_there_after_a_restart_under_the_same_number_with_the_same_key() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    for slot in 0..4 {
        open(&register, slot).unwrap();
    }
    raise(&register, 2, 5).unwrap();
    let keys = [(0, 1), (1, 1), (2, 5), (3, 1)].map(|(slot, generation)| key(&register, slot, generation).unwrap());
    let again = load(&disk);
    let expected: Vec<_> = [(0, 1), (1, 1), (2, 5), (3, 1)]
        .map(|(slot, generation)| {
            let (domain, name) = name(slot);
            let domain = domain.to_string();
            Some((Label { domain, name }, Generation(generation)))
        })
        .into();
    assert_eq!(again.namespaces(), expected);
    let read = [(0, 1), (1, 1), (2, 5), (3, 1)].map(|(slot, generation)| key(&again, slot, generation).unwrap());
    assert_eq!(read, keys);
    assert_eq!(again.lost(), []);
}

#[test]
fn a_key_is_known_for_the_durable_generation_only() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    assert_eq!(key(&register, 0, 1), None);
    open(&register, 0).unwrap();
    let first = key(&register, 0, 1).unwrap();
    disk.stop_after(Some(1));
    assert!(raise(&register, 0, 2).is_err(), "its sync fails");
    assert_eq!((key(&register, 0, 1), key(&register, 0, 2)), (Some(first), None));
    disk.stop_after(None);
    raise(&register, 0, 2).unwrap();
    assert_eq!(key(&register, 0, 1), None);
    assert_ne!(key(&register, 0, 2).unwrap(), first);
}

#[test]
fn a_generation_never_falls_and_raising_to_what_is_there_writes_nothing() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    raise(&register, 0, 7).unwrap();
    let (seven, operations) = (key(&register, 0, 7), disk.operations());
    raise(&register, 0, 7).unwrap();
    raise(&register, 0, 3).unwrap();
    open(&register, 0).unwrap();
    assert_eq!(disk.operations(), operations);
    assert_eq!(key(&register, 0, 7), seven);
}

#[test]
fn many_changes_share_one_sync() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    let opens: Vec<Change> = (0..50)
        .map(|slot| {
            let (domain, name) = name(slot);
            let label = Label {
                domain: domain.into(),
                name,
            };
            Change::Open {
                namespace: NamespaceId(slot),
                label,
            }
        })
        .collect();
    let before = disk.syncs();
    assert!(register.commit(&opens).iter().all(Result::is_ok));
    assert_eq!(disk.syncs() - before, 1);
    let raises: Vec<Change> = (0..200)
        .map(|number| Change::Raise {
            namespace: NamespaceId(number % 50),
            generation: Generation(2 + u64::from(number / 50)),
        })
        .collect();
    assert!(register.commit(&raises).iter().all(Result::is_ok));
    assert_eq!(disk.syncs() - before, 2);
    assert_eq!(generations(&load(&disk)), vec![Some(5); 50]);
}

#[test]
fn a_failure_is_answered_to_those_it_concerns_and_the_next_attempt_makes_it_good() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    disk.stop_after(Some(0));
    let (domain, second) = name(1);
    let changes = [
        Change::Raise {
            namespace: NamespaceId(0),
            generation: Generation(1),
        },
        Change::Open {
            namespace: NamespaceId(1),
            label: Label {
                domain: domain.into(),
                name: second,
            },
        },
        Change::Raise {
            namespace: NamespaceId(9),
            generation: Generation(2),
        },
    ];
    let answers = register.commit(&changes);
    assert!(answers[0].is_ok(), "nothing had to be written for it");
    assert!(matches!(answers[1], Err(RecordError::Io(_))), "{answers:?}");
    assert!(
        matches!(answers[2], Err(RecordError::Unknown(NamespaceId(9)))),
        "{answers:?}"
    );
    assert!(!register.contains(NamespaceId(1)));
    disk.stop_after(None);
    // A generation of a namespace that is not durable yet takes its name along.
    raise(&register, 1, 4).unwrap();
    assert_eq!(generations(&load(&disk)), [Some(1), Some(4)]);
    assert!(register.counts().1 > 0);
}

#[test]
fn a_slot_belongs_to_one_name() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    let other = register.open(NamespaceId(0), "even", "another");
    assert!(matches!(other, Err(RecordError::Misnamed(_))), "{other:?}");
    let long = register.open(NamespaceId(1), "even", &"x".repeat(257));
    assert!(matches!(long, Err(RecordError::Misnamed(_))), "{long:?}");
    register
        .open(NamespaceId(1), &"d".repeat(128), &"x".repeat(256))
        .unwrap();
    assert_eq!(generations(&load(&disk)), [Some(1), Some(1)]);
}

#[test]
fn a_settled_slot_survives_damage_to_either_half_and_keeps_no_older_key() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    raise(&register, 0, 2).unwrap();
    raise(&register, 0, 3).unwrap();
    register.settle().unwrap();
    let three = key(&register, 0, 3);
    let image = disk.image();
    assert_eq!(image[4096..8192], image[8192..12288], "both halves say the same");
    for byte in (4096..4096 + 512).chain(8192..8192 + 512) {
        let mut damaged = image.clone();
        damaged[byte] ^= 0x10;
        let disk = CrashDisk::of(damaged);
        let register = load(&disk);
        assert_eq!(key(&register, 0, 3), three, "byte {byte}");
        register.settle().unwrap();
        assert_eq!(disk.image(), image, "made good");
    }
    let operations = disk.operations();
    register.settle().unwrap();
    assert_eq!(disk.operations(), operations, "there is nothing more to do");
}

#[test]
fn a_slot_with_two_damaged_halves_is_lost_and_its_number_is_not_used_again() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    for slot in 0..3 {
        open(&register, slot).unwrap();
    }
    register.settle().unwrap();
    let keys = [0, 2].map(|slot| key(&register, slot, 1));
    for slot in [1, 2] {
        let disk = CrashDisk::of(disk.image());
        disk.change(|image| {
            image[slot::place(slot, 0) as usize + 100] ^= 1;
            image[slot::place(slot, 1) as usize + 200] ^= 1;
        });
        let register = load(&disk);
        let mut expected = vec![Some(1); 3];
        expected[slot as usize] = None;
        assert_eq!(generations(&register), expected);
        assert_eq!(register.lost(), [NamespaceId(slot)]);
        assert_eq!(key(&register, slot, 1), None);
        assert_eq!(key(&register, 0, 1), keys[0]);
        assert!(open(&register, slot).is_err());
        // A rotation overwrites what is left of it, and it stays lost.
        let register = try_load(&disk, 2, &[1]).unwrap();
        register.rewrap().unwrap();
        let register = try_load(&disk, 2, &[]).unwrap();
        assert_eq!(generations(&register), expected);
        assert_eq!(register.lost(), [NamespaceId(slot)]);
        assert_eq!(key(&register, 0, 1), keys[0]);
    }
}

#[test]
fn a_half_that_was_forged_loses_its_slot_rather_than_show_an_older_generation() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    raise(&register, 0, 2).unwrap();
    // The newest half, with its name changed and its checksum made right.
    disk.change(|image| {
        let at = slot::place(0, 1) as usize;
        image[at + 192] ^= 1;
        let sum = kvtier_transfer::crc32c(&image[at..at + 508]);
        image[at + 508..at + 512].copy_from_slice(&sum.to_le_bytes());
    });
    let register = load(&disk);
    assert_eq!(generations(&register), [None]);
    assert_eq!(register.lost(), [NamespaceId(0)]);
}

#[test]
fn a_wrong_master_key_is_refused_by_name_and_nothing_is_changed() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    let (image, operations) = (disk.image(), disk.operations());
    let error = try_load(&disk, 2, &[]).err().expect("refused");
    let words = error.to_string();
    assert!(matches!(error, KeyError::WrongMasterKey { .. }), "{words}");
    assert!(
        words.contains(&master(1).id().to_string()) && words.contains("--master-key-file"),
        "{words}"
    );
    assert_eq!((disk.image(), disk.operations()), (image, operations));
}

#[test]
fn a_later_version_is_refused_and_left_as_it_is() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    let reclose = |image: &mut Vec<u8>, at: usize| {
        let sum = kvtier_transfer::crc32c(&image[at..at + 508]);
        image[at + 508..at + 512].copy_from_slice(&sum.to_le_bytes());
    };
    for (byte, at) in [(8, 0), (4096 + 4, 4096)] {
        for whole in [true, false] {
            let disk = CrashDisk::of(disk.image());
            disk.change(|image| {
                image[byte] = 2;
                if whole || at > 0 {
                    reclose(image, at);
                }
            });
            let (image, operations) = (disk.image(), disk.operations());
            let words = try_load(&disk, 1, &[]).err().expect("refused").to_string();
            assert!(words.contains("version 2") && words.contains("newer"), "{words}");
            assert_eq!((disk.image(), disk.operations()), (image, operations));
        }
    }
}

#[test]
fn a_damaged_header_is_made_good_and_a_strangers_file_is_left_alone() {
    let disk = CrashDisk::default();
    let register = load(&disk);
    open(&register, 0).unwrap();
    let image = disk.image();
    let first = key(&register, 0, 1);
    for byte in (0..512).filter(|byte| !(8..12).contains(byte)) {
        let disk = CrashDisk::of(image.clone());
        disk.change(|image| image[byte] ^= 1);
        assert_eq!(key(&load(&disk), 0, 1), first, "byte {byte}");
        assert_eq!(disk.image(), image);
    }
    for stranger in [b"hello\n".to_vec(), vec![7; 20_000]] {
        let disk = CrashDisk::of(stranger.clone());
        let words = try_load(&disk, 1, &[]).err().expect("refused").to_string();
        assert!(words.contains("move it away"), "{words}");
        assert_eq!(disk.image(), stranger);
    }
}

/// One step of a script.
#[derive(Clone, Debug)]
enum Step {
    Open,
    Raise(u32, u64),
    Batch(Vec<(u32, u64)>),
    Settle,
    /// By another master key.
    Rotate,
    Restart,
}

/// What a script was told.
#[derive(Default)]
struct Told {
    /// Acknowledged generation and its key, by slot.
    acknowledged: BTreeMap<u32, (u64, [u8; 32])>,
    /// The highest that was ever asked for.
    asked: BTreeMap<u32, u64>,
    next_slot: u32,
    /// The keys that may wrap what is there.
    master: u8,
    rotating: bool,
}

impl Told {
    fn acknowledge(&mut self, register: &Register, slot: u32) {
        let generation = generations(register)[slot as usize].unwrap();
        let key = key(register, slot, generation).expect("durable");
        self.acknowledged.insert(slot, (generation, key));
    }

    fn ask(&mut self, slot: u32, generation: u64) {
        let asked = self.asked.entry(slot).or_default();
        *asked = generation.max(*asked);
    }

    /// Runs the script until the disk stops.
    fn run(&mut self, disk: &CrashDisk, script: &[Step]) -> Result<(), ()> {
        self.master = 1;
        let mut register = try_load(disk, self.master, &[]).map_err(drop)?;
        for step in script {
            match step {
                Step::Open if self.next_slot >= 4 => {}
                Step::Open => {
                    let slot = self.next_slot;
                    self.next_slot += 1;
                    self.ask(slot, 1);
                    open(&register, slot).map_err(drop)?;
                    self.acknowledge(&register, slot);
                }
                Step::Raise(slot, by) if *slot < self.next_slot => {
                    let generation = self.asked[slot] + by;
                    self.ask(*slot, generation);
                    raise(&register, *slot, generation).map_err(drop)?;
                    self.acknowledge(&register, *slot);
                }
                Step::Raise(..) => {}
                Step::Batch(raises) => {
                    let raises: Vec<_> = raises.iter().filter(|(slot, _)| *slot < self.next_slot).collect();
                    let mut changes = Vec::new();
                    for (slot, by) in &raises {
                        let generation = Generation(self.asked[slot] + by);
                        self.ask(*slot, generation.0);
                        let namespace = NamespaceId(*slot);
                        changes.push(Change::Raise { namespace, generation });
                    }
                    let answers = register.commit(&changes);
                    for ((slot, _), answer) in raises.iter().zip(&answers) {
                        if answer.is_ok() {
                            self.acknowledge(&register, *slot);
                        }
                    }
                    if answers.iter().any(Result::is_err) {
                        return Err(());
                    }
                }
                Step::Settle => register.settle().map_err(drop)?,
                Step::Rotate => {
                    let old = self.master;
                    self.master += 1;
                    self.rotating = true;
                    register = try_load(disk, self.master, &[old]).map_err(drop)?;
                    register.rewrap().map_err(drop)?;
                    self.rotating = false;
                }
                Step::Restart => register = try_load(disk, self.master, &[]).map_err(drop)?,
            }
        }
        Ok(())
    }

    /// Checks an image against what was told, and goes on with it.
    fn check(&self, image: Vec<u8>) {
        let disk = CrashDisk::of(image);
        self.check_once(&disk);
        // The same again while what was left is made good, stopped at every place.
        for stop in 0.. {
            let recovering = CrashDisk::of(disk.image());
            recovering.stop_after(Some(stop));
            let done = self.open(&recovering).and_then(|register| register.rewrap());
            self.check_once(&CrashDisk::of(recovering.killed(Tear::First(200))));
            self.check_once(&CrashDisk::of(recovering.unpowered(|| Tear::Last(4000))));
            if done.is_ok() {
                break;
            }
        }
    }

    fn open(&self, disk: &CrashDisk) -> Result<Register, KeyError> {
        let others: &[u8] = if self.rotating { &[self.master - 1] } else { &[] };
        try_load(disk, self.master, others)
    }

    fn check_once(&self, disk: &CrashDisk) {
        let register = self.open(disk).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(register.lost(), [], "nothing that was acknowledged is lost");
        let found = register.namespaces();
        for (slot, (generation, data_key)) in &self.acknowledged {
            let (label, read) = found[*slot as usize].clone().expect("acknowledged");
            let (domain, name) = name(*slot);
            assert_eq!((&*label.domain, &label.name), (domain, &name));
            assert!(
                read.0 >= *generation,
                "slot {slot} fell from {generation} to {}",
                read.0
            );
            assert!(
                read.0 <= self.asked[slot],
                "slot {slot} at {} was never asked for",
                read.0
            );
            let known = key(&register, *slot, read.0).expect("a key for the generation in force");
            assert_eq!(
                read.0 == *generation,
                known == *data_key,
                "another generation has another key"
            );
        }
        assert!(found.len() <= self.next_slot as usize);
    }
}

const TEARS: [Tear; 8] = [
    Tear::Nothing,
    Tear::Everything,
    Tear::First(1),
    Tear::First(47),
    Tear::First(470),
    Tear::First(511),
    Tear::Last(4095),
    Tear::Last(3600),
];

#[test]
fn at_every_write_of_a_script_every_image_holds_what_was_acknowledged() {
    let script = [
        Step::Open,
        Step::Settle,
        Step::Raise(0, 1),
        Step::Raise(0, 2),
        Step::Settle,
        Step::Open,
        Step::Open,
        Step::Batch(vec![(0, 1), (1, 1), (2, 3)]),
        Step::Restart,
        Step::Settle,
        Step::Raise(1, 1),
        Step::Rotate,
        Step::Open,
        Step::Batch(vec![(0, 1), (0, 2), (3, 1)]),
        Step::Settle,
        Step::Rotate,
    ];
    let mut images = 0;
    for stop in 0.. {
        let disk = CrashDisk::default();
        disk.stop_after(Some(stop));
        let mut told = Told::default();
        let ended = told.run(&disk, &script);
        for tear in TEARS {
            told.check(disk.killed(tear));
            images += 1;
        }
        // Each write that no sync covers is there, is not, or is torn, whatever the others are.
        let undecided = u32::try_from(disk.undecided()).unwrap();
        let combinations = (TEARS.len() as u64).pow(undecided.min(3));
        for combination in 0..combinations {
            let mut choice = combination;
            told.check(disk.unpowered(|| {
                let tear = TEARS[usize::try_from(choice).unwrap() % TEARS.len()];
                choice /= TEARS.len() as u64;
                tear
            }));
            images += 1;
        }
        if ended.is_ok() {
            assert!(stop > 30, "the script has {stop} writes and syncs");
            break;
        }
    }
    assert!(images > 2000, "{images} images");
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        2 => Just(Step::Open),
        4 => (0..4u32, 1..4u64).prop_map(|(slot, by)| Step::Raise(slot, by)),
        2 => proptest::collection::vec((0..4u32, 1..4u64), 1..5).prop_map(Step::Batch),
        2 => Just(Step::Settle),
        1 => Just(Step::Rotate),
        1 => Just(Step::Restart),
    ]
}

fn tear() -> impl Strategy<Value = Tear> {
    prop_oneof![
        Just(Tear::Nothing),
        Just(Tear::Everything),
        (0..4096usize).prop_map(Tear::First),
        (0..512usize).prop_map(Tear::First),
        (0..4096usize).prop_map(Tear::Last),
    ]
}

proptest! {
    #[test]
    fn acknowledged_generations_never_fall_whatever_is_torn_wherever_it_stops(
        script in proptest::collection::vec(step(), 1..16),
        stop in 0..60usize,
        tears in proptest::collection::vec(tear(), 1..8),
    ) {
        let disk = CrashDisk::default();
        disk.stop_after(Some(stop));
        let mut told = Told::default();
        let _ = told.run(&disk, &script);
        told.check(disk.killed(tears[0]));
        let mut next = tears.iter().copied().cycle();
        told.check(disk.unpowered(|| next.next().unwrap()));
    }

    #[test]
    fn arbitrary_bytes_are_refused_or_read_without_harm(
        bytes in proptest::collection::vec(any::<u8>(), 0..20_000), headed: bool,
    ) {
        let mut image = bytes;
        if headed {
            image.resize(image.len().max(4096), 0);
            image[..4096].copy_from_slice(&slot::header(&[3; 16]));
        }
        if let Ok(register) = try_load(&CrashDisk::of(image), 1, &[]) {
            let _ = (register.namespaces(), register.settle(), register.rewrap());
        }
    }
}
