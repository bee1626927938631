//! Measures: baselines and the harness behind kvctl bench.
