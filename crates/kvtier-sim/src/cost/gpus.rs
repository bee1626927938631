use std::collections::BTreeMap;

/// Who waits for a GPU.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    ready: bool,
    /// What it is expected to take of a GPU, seconds.
    nominal_s: f64,
}

/// GPUs behind one queue: the request that arrived first among those whose bytes are there goes first. One that still waits for
/// bytes keeps its place and holds nobody up.
pub(crate) struct Gpus {
    busy_until_s: Vec<f64>,
    waiting: BTreeMap<u64, Waiting>,
}

impl Gpus {
    pub(crate) fn new(servers: usize) -> Gpus {
        Gpus {
            busy_until_s: vec![0.0; servers.max(1)],
            waiting: BTreeMap::new(),
        }
    }

    /// How long one that arrives now will wait, seconds, as an engine would estimate it from those ahead.
    pub(crate) fn wait_s(&self, now_s: f64) -> f64 {
        let mut free_s: Vec<f64> = self.busy_until_s.iter().map(|until_s| until_s.max(now_s)).collect();
        for waiting in self.waiting.values() {
            let first = earliest(&free_s);
            free_s[first] += waiting.nominal_s;
        }
        free_s[earliest(&free_s)] - now_s
    }

    /// `request` joins the queue, and goes when it is ready.
    pub(crate) fn join(&mut self, request: u64, nominal_s: f64, ready: bool) {
        self.waiting.insert(request, Waiting { ready, nominal_s });
    }

    /// The bytes of `request` are there, or will not come: it takes `nominal_s` of a GPU.
    pub(crate) fn make_ready(&mut self, request: u64, nominal_s: f64) {
        if let Some(waiting) = self.waiting.get_mut(&request) {
            *waiting = Waiting { ready: true, nominal_s };
        }
    }

    /// The next request to start now, where a GPU is free; [`Gpus::start`] must follow.
    pub(crate) fn next(&self, now_s: f64) -> Option<u64> {
        self.busy_until_s
            .iter()
            .any(|until_s| *until_s <= now_s)
            .then_some(())?;
        self.waiting
            .iter()
            .find(|(_, waiting)| waiting.ready)
            .map(|(request, _)| *request)
    }

    /// `request` has a GPU until `until_s`.
    pub(crate) fn start(&mut self, request: u64, until_s: f64) {
        self.waiting.remove(&request);
        let first = earliest(&self.busy_until_s);
        self.busy_until_s[first] = until_s;
    }
}

fn earliest(times_s: &[f64]) -> usize {
    (0..times_s.len())
        .min_by(|left, right| times_s[*left].total_cmp(&times_s[*right]))
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::Gpus;

    #[test]
    fn one_that_waits_for_bytes_keeps_its_place_and_holds_nobody_up() {
        let mut gpus = Gpus::new(1);
        gpus.join(1, 5.0, false);
        gpus.join(2, 3.0, true);
        assert_eq!(gpus.wait_s(0.0), 8.0);
        assert_eq!(gpus.next(0.0), Some(2));
        gpus.start(2, 3.0);
        gpus.join(3, 1.0, true);
        gpus.make_ready(1, 5.0);
        assert_eq!(gpus.next(2.0), None, "its GPU is busy");
        assert_eq!(gpus.next(3.0), Some(1), "it arrived before the third");
    }
}
