use proptest::prelude::*;

use super::*;
use crate::keys::crash_disk::{CrashDisk, Tear};

const INCARNATION: Incarnation = [4; 16];

fn path() -> &'static Path {
    Path::new("realizations")
}

fn begin(disk: &CrashDisk) -> Realizations {
    Realizations::begin(Box::new(disk.clone()), path(), &INCARNATION).expect("a list begins")
}

fn load(disk: &CrashDisk) -> Option<Realizations> {
    match Realizations::load(Box::new(disk.clone()), path(), &INCARNATION).expect("a list opens") {
        Found::Own(realizations) => Some(realizations),
        Found::None(_) => None,
    }
}

fn realization(number: usize) -> Realization {
    Realization::digest(&[("number", &number.to_string())])
}

fn append(realizations: &Realizations, numbers: std::ops::Range<usize>) -> Result<(), RecordError> {
    let wanted: Vec<_> = numbers
        .map(|number| (RealizationId(u32::try_from(number).unwrap()), realization(number)))
        .collect();
    realizations.append(&wanted)
}

#[test]
fn a_position_is_kept_across_a_restart() {
    let disk = CrashDisk::default();
    let list = begin(&disk);
    append(&list, 0..3).unwrap();
    let syncs = disk.syncs();
    append(&list, 0..5).unwrap();
    append(&list, 2..4).unwrap();
    assert_eq!(disk.syncs(), syncs + 1, "one for the new ones, none for the old");
    let again = load(&disk).expect("its own");
    assert_eq!(
        again.entries(),
        (0..5).map(|number| Some(realization(number))).collect::<Vec<_>>()
    );
    assert!(again.contains(RealizationId(4)) && !again.contains(RealizationId(5)));
    append(&again, 5..6).unwrap();
    assert_eq!(load(&disk).unwrap().entries().len(), 6);
}

#[test]
fn what_failed_is_written_with_the_next() {
    let disk = CrashDisk::default();
    let list = begin(&disk);
    disk.stop_after(Some(1));
    assert!(append(&list, 0..2).is_err());
    assert!(!list.contains(RealizationId(0)));
    disk.stop_after(None);
    append(&list, 2..3).unwrap();
    assert!(list.contains(RealizationId(0)));
    assert_eq!(load(&disk).unwrap().entries().len(), 3);
}

#[test]
fn a_damaged_record_keeps_its_position_and_nothing_else_moves() {
    let disk = CrashDisk::default();
    append(&begin(&disk), 0..4).unwrap();
    for damaged in 0..4 {
        let disk = CrashDisk::of(disk.image());
        disk.change(|image| image[place(damaged) as usize + 20] ^= 1);
        let list = load(&disk).unwrap();
        let mut expected: Vec<_> = (0..4).map(|number| Some(realization(number))).collect();
        expected[damaged] = None;
        assert_eq!(list.entries(), expected);
        append(&list, 4..5).unwrap();
        assert_eq!(load(&disk).unwrap().entries()[4], Some(realization(4)));
    }
    assert_ne!(placeholder(1), placeholder(2));
}

#[test]
fn another_registers_list_is_none_and_a_later_version_or_a_stranger_is_refused() {
    let disk = CrashDisk::default();
    append(&begin(&disk), 0..4).unwrap();
    let foreign = Realizations::load(Box::new(disk.clone()), path(), &[9; 16]).unwrap();
    let Found::None(foreign) = foreign else {
        panic!("of another register")
    };
    let list = Realizations::begin(foreign, path(), &[9; 16]).unwrap();
    assert_eq!(list.entries(), []);
    let Found::Own(list) = Realizations::load(Box::new(disk.clone()), path(), &[9; 16]).unwrap() else {
        panic!("its own now")
    };
    assert_eq!(list.entries(), [], "nothing of the other's is left");
    let newer = CrashDisk::of(disk.image());
    newer.change(|image| image[8] = 2);
    let stranger = CrashDisk::of(b"hello, world".to_vec());
    for (disk, words) in [(newer, "version 2"), (stranger, "move it away")] {
        let image = disk.image();
        let error = Realizations::load(Box::new(disk.clone()), path(), &INCARNATION)
            .err()
            .expect("refused");
        assert!(error.to_string().contains(words), "{error}");
        assert_eq!(disk.image(), image);
    }
}

proptest! {
    #[test]
    fn what_was_acknowledged_keeps_its_position_whatever_is_torn(
        batches in proptest::collection::vec(1..4usize, 1..6),
        stop in 0..16usize,
        tears in proptest::collection::vec(prop_oneof![
            Just(Tear::Nothing),
            Just(Tear::Everything),
            (0..300usize).prop_map(Tear::First),
            (0..4096usize).prop_map(Tear::Last),
        ], 1..4),
    ) {
        let disk = CrashDisk::default();
        disk.stop_after(Some(stop));
        let mut acknowledged = 0;
        let mut begun = false;
        if let Ok(list) = Realizations::begin(Box::new(disk.clone()), path(), &INCARNATION) {
            begun = true;
            for batch in batches {
                if append(&list, acknowledged..acknowledged + batch).is_err() {
                    break;
                }
                acknowledged += batch;
            }
        }
        let mut next = tears.iter().copied().cycle();
        for image in [disk.killed(tears[0]), disk.unpowered(|| next.next().unwrap())] {
            let disk = CrashDisk::of(image);
            let Some(list) = load(&disk) else {
                prop_assert!(!begun, "a list that was begun stays begun");
                continue;
            };
            let found = list.entries();
            prop_assert!(found.len() >= acknowledged);
            for (position, found) in found.iter().enumerate() {
                let is_right = *found == Some(realization(position));
                prop_assert!(is_right || (found.is_none() && position >= acknowledged), "{position}");
            }
            let count = found.len();
            append(&list, count..count + 1).unwrap();
            prop_assert_eq!(load(&disk).unwrap().entries()[count], Some(realization(count)));
        }
    }
}
