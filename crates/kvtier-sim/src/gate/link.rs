/// Bytes one after another: a transfer begins when the one before it has passed, one latency later.
#[derive(Clone, Debug)]
pub(super) struct Link {
    bytes_per_s: f64,
    latency_s: f64,
    free_s: f64,
    /// All that passed.
    pub(super) bytes: u64,
    /// While something passed, seconds.
    pub(super) busy_s: f64,
}

impl Link {
    pub(super) fn new(gb_per_s: f64, latency_ms: f64) -> Link {
        Link {
            bytes_per_s: gb_per_s * 1e9,
            latency_s: latency_ms * 1e-3,
            free_s: 0.0,
            bytes: 0,
            busy_s: 0.0,
        }
    }

    /// When the last of `bytes` asked for at `at_s` has passed, seconds. Latencies of several transfers overlap.
    pub(super) fn pass(&mut self, at_s: f64, bytes: u64) -> f64 {
        let (_, end_s) = self.pass_as(at_s, bytes, self.latency_s, 1.0);
        end_s
    }

    /// The same where nothing else is in the way.
    pub(super) fn pass_alone(&mut self, at_s: f64, bytes: u64) -> f64 {
        self.free_s = 0.0;
        self.pass(at_s, bytes)
    }

    /// The same with a latency and a share of the bandwidth of its own: when the first byte passes, and the last.
    pub(super) fn pass_as(&mut self, at_s: f64, bytes: u64, latency_s: f64, share: f64) -> (f64, f64) {
        let takes_s = bytes as f64 / (self.bytes_per_s * share);
        let first_s = self.free_s.max(at_s + latency_s);
        self.free_s = first_s + takes_s;
        self.bytes += bytes;
        self.busy_s += takes_s;
        (first_s, self.free_s)
    }
}

/// Links side by side: a transfer takes the one that is free first. Without a number there is always a free one.
#[derive(Clone, Debug)]
pub(super) struct Lanes {
    links: Vec<Link>,
    always_free: bool,
}

impl Lanes {
    pub(super) fn new(number: usize, link: &Link) -> Lanes {
        Lanes {
            links: vec![link.clone(); number.max(1)],
            always_free: number == 0,
        }
    }

    /// When the last of `bytes` asked for at `at_s` has passed, seconds.
    pub(super) fn pass(&mut self, at_s: f64, bytes: u64) -> f64 {
        let first = self
            .links
            .iter_mut()
            .min_by(|left, right| left.free_s.total_cmp(&right.free_s));
        let first = first.expect("at least one");
        if self.always_free {
            first.pass_alone(at_s, bytes)
        } else {
            first.pass(at_s, bytes)
        }
    }

    /// All that passed.
    pub(super) fn bytes(&self) -> u64 {
        self.links.iter().map(|link| link.bytes).sum()
    }

    /// While something passed, seconds: of all together, divided among them.
    pub(super) fn busy_s(&self) -> f64 {
        self.links.iter().map(|link| link.busy_s).sum::<f64>() / self.links.len() as f64
    }
}

#[cfg(test)]
mod tests {
    use super::Link;

    #[test]
    fn a_transfer_waits_for_the_one_before_it() {
        let mut link = Link::new(2.0, 100.0);
        assert!((link.pass(0.0, 1_000_000_000) - 0.6).abs() < 1e-12);
        // The link is busy until 0.6; the second one's latency passes meanwhile.
        assert!((link.pass(0.2, 2_000_000_000) - 1.6).abs() < 1e-12);
        assert!((link.pass(5.0, 0) - 5.1).abs() < 1e-12);
        assert_eq!(link.bytes, 3_000_000_000);
        assert!((link.busy_s - 1.5).abs() < 1e-12);
    }
}
