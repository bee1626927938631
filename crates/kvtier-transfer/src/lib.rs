//! Moves bytes between memory regions. Knows no block keys.
