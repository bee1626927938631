//! The planted bug: a `session` hint that is longer than its eight bytes is taken, and what follows them is lost.

use std::cell::Cell;

thread_local! {
    static ON: Cell<bool> = const { Cell::new(false) };
}

/// Whether the decoder of this thread has the bug.
pub(in crate::wire) fn is_on() -> bool {
    ON.get()
}

/// Takes the bug out again when it is dropped.
pub(super) struct Planted;

pub(super) fn plant(on: bool) -> Planted {
    ON.set(on);
    Planted
}

impl Drop for Planted {
    fn drop(&mut self) {
        ON.set(false);
    }
}
