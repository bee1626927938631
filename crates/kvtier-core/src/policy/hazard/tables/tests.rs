use super::*;
use crate::policy::hazard::order::LEVELS;

const CLASS: Class = Class(0);

fn conversation(turn: u8) -> Class {
    use super::super::class::Conversation;
    Class::conversation(Conversation {
        turn,
        pause: (turn > 0).then_some(60_000),
        fresh_tokens: 600,
        tokens: 3_000,
        answer: 0,
    })
}

/// So many visits of a class, of which so many return in the middle of the bin; the others are watched to the end of it.
fn watch(tables: &mut Tables, class: Class, bin: usize, visits: u32, returns: u32) {
    for before in 0..bin {
        tables.observe(class, before, visits as f32, width(before), false);
    }
    tables.observe(class, bin, returns as f32, width(bin) / 2.0, true);
    tables.observe(class, bin, (visits - returns) as f32, width(bin), false);
}

#[test]
fn without_evidence_what_was_used_last_goes_last() {
    let mut tables = Tables::new();
    let levels: Vec<i16> = (0..BINS).map(|bin| tables.level(CLASS, bin)).collect();
    assert!(levels.windows(2).all(|pair| pair[0] >= pair[1]), "{levels:?}");
    assert!(levels[0] > levels[BINS - 1] + 20, "{levels:?}");
    assert!(levels.iter().all(|level| *level < LEVELS as i16), "{levels:?}");
}

#[test]
fn a_hazard_is_returns_by_time_at_risk() {
    let mut tables = Tables::new();
    watch(&mut tables, conversation(1), 15, 100_000, 30_000);
    tables.fit(0);
    let row = &tables.rows[usize::from(tables.row_of[usize::from(conversation(1).0)])];
    let hazard = tables.hazards(row, 0)[15];
    let expected = 30_000.0 / (100_000.0 - 15_000.0) / width(15);
    assert!((hazard / expected - 1.0).abs() < 0.02, "{hazard} {expected}");
    assert!(tables.hazards(row, 0)[10] < expected / 100.0);
}

#[test]
fn what_is_still_watched_counts_as_not_returned_yet() {
    let hazard = |open: f32| {
        let mut tables = Tables::new();
        watch(&mut tables, CLASS, 12, 2_000, 1_000);
        let entered = 1_000_000;
        tables.enter(CLASS, 12, open, entered);
        tables.fit(entered + width(12) as u64);
        let row = &tables.rows[usize::from(tables.row_of[0])];
        tables.hazards(row, 12)[12]
    };
    let (few, many) = (hazard(0.0), hazard(6_000.0));
    assert!(many < few / 3.0, "{few} {many}");
}

#[test]
fn withdrawing_undoes_entering() {
    let mut tables = Tables::new();
    tables.enter(CLASS, 3, 0.75, 12_345);
    tables.withdraw(CLASS, 3, 0.75, 12_345);
    let row = &tables.rows[0];
    assert!(row.open[3].abs() < 1e-6 && row.entered[3].abs() < 1e-3);
}

#[test]
fn a_class_that_was_never_seen_borrows_from_those_that_share_a_property() {
    let mut tables = Tables::new();
    for bin in [10, 14, 18] {
        watch(&mut tables, conversation(0), bin, 5_000, 200);
        watch(&mut tables, conversation(4), bin, 5_000, 2_500);
    }
    tables.fit(0);
    let other = |turn| {
        use super::super::class::Conversation;
        Class::conversation(Conversation {
            turn,
            pause: None,
            fresh_tokens: 10_000,
            tokens: 50_000,
            answer: 0,
        })
    };
    assert!(tables.level(other(4), 10) > tables.level(other(0), 10));
}

#[test]
fn what_comes_back_late_is_worth_more_when_its_time_comes() {
    let mut tables = Tables::new();
    watch(&mut tables, CLASS, 16, 20_000, 15_000);
    tables.fit(0);
    let before = tables.level(CLASS, 8);
    let due = tables.level(CLASS, 16);
    let after = tables.level(CLASS, 20);
    assert!(before < due && after < due, "{before} {due} {after}");
}

#[test]
fn the_share_that_returns_grows_with_the_time_given() {
    let mut tables = Tables::new();
    watch(&mut tables, CLASS, 10, 50_000, 25_000);
    tables.fit(0);
    let shares: Vec<f64> = [0, 10_000, 100_000, u32::MAX]
        .iter()
        .map(|ticks| tables.return_share(CLASS, 0, *ticks, 1.0))
        .collect();
    assert!(shares[0] < 1e-9, "{shares:?}");
    assert!(shares.windows(2).all(|pair| pair[0] <= pair[1]), "{shares:?}");
    assert!((0.4..0.7).contains(&shares[2]) && shares[3] <= 1.0, "{shares:?}");
}

#[test]
fn much_evidence_is_halved_so_that_new_evidence_counts() {
    let mut tables = Tables::new();
    watch(&mut tables, CLASS, 10, 200_000, 100_000);
    let before = tables.counts().next().expect("a class").1.returns[10];
    tables.fit(0);
    let after = tables.counts().next().expect("a class").1.returns[10];
    assert!((after / before - 0.5).abs() < 1e-3);
}

#[test]
fn levels_rise_with_worth_eight_in_an_octave() {
    assert_eq!((level_of(2.0_f64.powi(-40)), level_of(2.0_f64.powi(-44))), (0, -32));
    assert_eq!(level_of(2.0_f64.powi(-20)) + 8, level_of(2.0_f64.powi(-19)));
    assert!(level_of(0.0) < -100 && level_of(f64::INFINITY) > LEVELS as i16);
}

#[test]
fn who_seldom_returns_soon_is_not_taken_to_return_late_more_seldom_than_others() {
    let mut tables = Tables::new();
    for bin in [10, 14, 18] {
        watch(&mut tables, conversation(0), bin, 5_000, 200);
        watch(&mut tables, conversation(4), bin, 5_000, 2_500);
    }
    tables.fit(0);
    let mut levels =
        |seconds: f64| [0, 4].map(|turn| tables.level(conversation(turn), bin_of((seconds * SECOND) as u32)));
    let (soon, late) = (levels(100.0), levels(1_500.0));
    assert!(soon[0] + 8 < soon[1], "{soon:?}");
    assert_eq!(late[0], late[1]);
}

#[test]
fn what_was_left_behind_is_worth_less_until_it_is_seen_to_return() {
    let mut tables = Tables::new();
    let lower = |tables: &mut Tables| tables.level(Class::LEFT, 14) < tables.level(conversation(2), 14);
    assert!(lower(&mut tables));
    watch(&mut tables, Class::LEFT, 14, 1_000, 800);
    tables.fit(0);
    assert!(!lower(&mut tables));
}
