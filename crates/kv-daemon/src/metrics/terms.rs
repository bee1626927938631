//! What the cost model expected, term by term, beside what it took.

use std::fmt;

use kvtier::node::TermComparison;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::registry::Unit;

use super::cluster::counter;

/// Of failures it is fetches, of everything else seconds.
const FAILURE: &str = "failure";

/// `compared` has what each backend, or all peers together, compare.
pub(super) fn encode(encoder: &mut DescriptorEncoder<'_>, compared: &[(&str, &Vec<TermComparison>)]) -> fmt::Result {
    let all = || {
        compared
            .iter()
            .flat_map(|(backend, terms)| terms.iter().map(move |term| (*backend, term)))
    };
    type Pick = fn(&TermComparison) -> u64;
    let (expected, actual): (Pick, Pick) = (|term| term.expected_us, |term| term.actual_us);
    for (name, help, pick) in [
        (
            "cost_expected",
            "Time that the cost model expected, of fetches and prefills that ended",
            expected,
        ),
        ("cost_actual", "Time that they took", actual),
    ] {
        let mut family = encoder.encode_descriptor(name, help, Some(&Unit::Seconds), MetricType::Counter)?;
        for (backend, term) in all().filter(|(_, term)| term.term != FAILURE) {
            let labels = [("backend", backend), ("term", term.term.as_str())];
            ConstCounter::new(pick(term) as f64 / 1e6).encode(family.encode_family(&labels)?)?;
        }
    }
    for (name, help, pick) in [
        (
            "cost_expected_failures",
            "Fetches that the cost model expected to fail",
            expected,
        ),
        ("cost_failures", "Fetches that it decided on and that failed", actual),
    ] {
        let mut family = encoder.encode_descriptor(name, help, None, MetricType::Counter)?;
        for (backend, term) in all().filter(|(_, term)| term.term == FAILURE) {
            ConstCounter::new(pick(term) as f64 / 1e6).encode(family.encode_family(&[("backend", backend)])?)?;
        }
    }
    let labelled = |(backend, term): (&str, &TermComparison)| {
        let labels = vec![("backend", backend.to_owned()), ("term", term.term.clone())];
        (labels, term.count)
    };
    let counts: Vec<_> = all().map(labelled).collect();
    counter(encoder, "cost_compared", "How often both are known", None, &counts)
}
