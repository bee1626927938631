//! Labels: what a block was put under, and what a purge of one label takes.

use crate::world::{KIB, ME, SECOND, World, hash, hashes, leases, name, settings};
use kvtier_core::{CoreSettings, FetchScope, ForgetScope, Label, Labels, Parent, Reserved, SealItem, Sealed, Tier};

const BLOCK: u32 = 8 * KIB;
const A: Label = Label(1);
const B: Label = Label(2);
const C: Label = Label(3);
const D: Label = Label(4);

fn roomy() -> CoreSettings {
    settings(256 << 10, 1 << 20)
}

fn put(world: &mut World, label: Option<Label>, parent: Parent, numbers: impl IntoIterator<Item = u64>) -> Vec<Sealed> {
    world.label = label;
    let sealed = world.put_after(parent, &hashes(numbers), BLOCK);
    world.label = None;
    world.core.check_invariants();
    sealed
}

/// What a purge of a label deletes.
fn purge(world: &mut World, label: Label) -> u64 {
    let forgotten = world.forget_scope(&ForgetScope::Label(label));
    let destroyed = world.destroy(0);
    assert_eq!(world.destroyed[&destroyed].nvme_left, 0);
    world.core.check_invariants();
    world.forgotten[&forgotten]
}

fn recorded(world: &World) -> Vec<Labels> {
    let records = world.log.values().flat_map(|segment| &segment.records);
    records.map(|record| record.label.labels).collect()
}

#[test]
fn a_purge_takes_what_was_put_under_the_label_and_all_that_extends_it() {
    let mut world = World::new(roomy());
    put(&mut world, None, Parent::Root, 0..2);
    put(&mut world, Some(A), Parent::Block(hash(1)), 10..12);
    put(&mut world, None, Parent::Block(hash(11)), 12..14);
    put(&mut world, Some(B), Parent::Block(hash(1)), 20..22);
    assert_eq!(purge(&mut world, A), 4);
    assert_eq!(world.present(0..30), [0, 1, 20, 21]);
    assert_eq!((purge(&mut world, A), world.of_any_label), (0, 0));
    assert_eq!(
        put(&mut world, Some(A), Parent::Block(hash(1)), 10..12),
        [Sealed::Published; 2]
    );
}

#[test]
fn a_block_carries_the_labels_of_all_its_puts() {
    let mut world = World::new(roomy());
    put(&mut world, Some(A), Parent::Root, [1]);
    assert_eq!(put(&mut world, Some(A), Parent::Root, [1]), [Sealed::Present]);
    assert_eq!(put(&mut world, None, Parent::Root, [1]), [Sealed::Present]);
    assert_eq!(put(&mut world, Some(B), Parent::Root, [1]), [Sealed::Published]);
    for label in [A, B] {
        assert_eq!(put(&mut world, Some(label), Parent::Root, [1]), [Sealed::Present]);
    }
    assert_eq!(purge(&mut world, C), 0);
    assert_eq!(world.present(0..2), [1]);
    assert_eq!(purge(&mut world, A), 1);
    assert_eq!(world.present(0..2), []);
}

#[test]
fn a_slot_granted_ahead_gives_its_label_to_a_block_that_is_there() {
    let mut world = World::new(roomy());
    put(&mut world, Some(A), Parent::Root, [1]);
    put(&mut world, None, Parent::Block(hash(1)), [2]);
    let slots = world.grant(crate::world::ME, BLOCK, 2);
    let slots: Vec<Reserved> = slots
        .into_iter()
        .map(|(reservation, extent)| Reserved::Granted { reservation, extent })
        .collect();
    world.label = Some(B);
    assert_eq!(
        world.seal_granted(&slots[..1], &hashes([1]), Parent::Root),
        [Sealed::Published]
    );
    assert_eq!(
        world.seal_granted(&slots[1..], &hashes([1]), Parent::Root),
        [Sealed::Present]
    );
    assert_eq!(world.present(0..3), [1, 2]);
    assert_eq!(purge(&mut world, B), 2, "and what extended it before");
}

#[test]
fn a_third_label_makes_it_any_and_is_said() {
    let mut world = World::new(roomy());
    for label in [A, B, C] {
        assert_eq!(put(&mut world, Some(label), Parent::Root, [1]), [Sealed::Published]);
    }
    put(&mut world, Some(A), Parent::Root, [5]);
    assert_eq!(world.core.statistics().blocks_of_any_label, 1);
    assert_eq!((purge(&mut world, D), world.of_any_label), (1, 1));
    assert_eq!(world.present(0..6), [5]);
}

#[test]
fn too_many_labels_of_a_namespace_are_any() {
    let mut world = World::new(CoreSettings {
        label_sets_per_namespace_max: 2,
        ..roomy()
    });
    for (number, label) in [(1, A), (2, B), (3, C), (4, A)] {
        put(&mut world, Some(label), Parent::Root, [number]);
    }
    assert_eq!(
        purge(&mut world, B),
        2,
        "its own, and the one whose label found no place"
    );
    assert_eq!(world.present(0..5), [1, 4]);
    put(&mut world, Some(D), Parent::Root, [6]);
    assert_eq!(purge(&mut world, C), 0, "the place of one that is gone is free");
}

#[test]
fn a_restart_brings_labels_back() {
    let mut world = World::new(roomy());
    put(&mut world, Some(A), Parent::Root, 1..3);
    put(&mut world, None, Parent::Root, [5]);
    put(&mut world, Some(A), Parent::Root, [7]);
    put(&mut world, Some(B), Parent::Root, [7]);
    world.flush();
    let (mut world, _) = world.restart(roomy());
    assert_eq!(world.present(0..10), [1, 2, 5, 7]);
    assert_eq!(purge(&mut world, B), 1);
    assert_eq!(purge(&mut world, A), 2);
    let (mut world, _) = world.restart(roomy());
    assert_eq!(world.present(0..10), [5]);
}

#[test]
fn records_that_do_not_know_their_labels_go_with_every_one() {
    let mut world = World::new(roomy());
    put(&mut world, None, Parent::Root, 1..3);
    put(&mut world, None, Parent::Root, [5]);
    world.flush();
    for record in world.log.values_mut().flat_map(|segment| &mut segment.records) {
        if record.label.hash != hash(5) {
            record.label.labels = Labels::Any;
        }
    }
    let (mut world, _) = world.restart(roomy());
    assert_eq!((purge(&mut world, A), world.of_any_label), (2, 2));
    assert_eq!(world.present(0..10), [5]);
}

#[test]
fn a_record_without_the_new_label_is_forgotten_and_the_next_one_has_both() {
    let mut world = World::new(roomy());
    put(&mut world, Some(A), Parent::Root, [1]);
    world.flush();
    assert_eq!(recorded(&world), [Labels::One(A)]);
    let (mut world, _) = world.restart(roomy());
    assert_eq!(world.lookup(&hashes([1])), [Some(Tier::Nvme)]);
    assert_eq!(put(&mut world, Some(B), Parent::Root, [1]), [Sealed::Published]);
    assert_eq!(recorded(&world), []);
    world.flush();
    assert_eq!(recorded(&world), [Labels::Two(A, B)]);
}

/// The block went before the room for its successor was found, and its child stayed without it.
#[test]
fn a_block_stays_where_there_is_no_room_to_put_it_under_another_label() {
    let mut world = World::new(CoreSettings {
        namespace_quota_bytes: Some(u64::from(2 * BLOCK)),
        ..roomy()
    });
    put(&mut world, Some(A), Parent::Root, [1, 2]);
    let held = world.fetch_as(ME, &hashes([2]), FetchScope::Each);
    assert_eq!(leases(&held).len(), 1);
    world.label = Some(B);
    for (length, answer) in [(2 * BLOCK, Sealed::Busy), (BLOCK, Sealed::Published)] {
        // A slot that was granted before anybody knew for which block.
        let (reservation, extent) = world.grant(ME, length, 1)[0];
        world.write(&extent, hash(1));
        let item = SealItem {
            reservation,
            hash: hash(1),
            parent: Parent::Root,
            length,
            tokens: 512,
        };
        assert_eq!(world.seal(&[item]), [answer]);
        assert_eq!(world.present(0..4), [1, 2]);
    }
    world.label = None;
    world.check_and_release(&hashes([2]), &held);
    assert_eq!(world.present(0..4), [1, 2]);
    world.core.check_invariants();
}

#[test]
fn a_block_that_is_being_written_to_the_device_gets_its_label() {
    let mut world = World::new(roomy());
    put(&mut world, Some(A), Parent::Root, [1]);
    world.hold = |action| name(action) == "demote";
    world.flush();
    assert_eq!(put(&mut world, Some(B), Parent::Root, [1]), [Sealed::Published]);
    world.let_go();
    world.pass(SECOND);
    world.flush();
    assert_eq!(
        recorded(&world),
        [Labels::Two(A, B)],
        "what was written meanwhile is forgotten"
    );
}
