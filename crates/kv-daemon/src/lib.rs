//! The daemon and the operator's tool.
