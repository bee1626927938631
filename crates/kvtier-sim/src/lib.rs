//! Proves: seeded worlds, faults, an oracle, planted mutants, workloads and traces.
