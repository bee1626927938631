use kvtier_core::cost::{Candidate, Decision, FetchId, FetchPlan, Patience, Question};

use super::{FAILURE_KNOWN_S, Happening, Life, PART_TOKENS, seconds, time};
use crate::gate::remote::Luck;

/// What remotes are asked, what comes of it, and what they are sent.
impl Life<'_> {
    /// Decides what to do about what remotes have beyond `local_tokens`.
    pub(super) fn ask_remotes(&mut self, request: usize, local_tokens: u32, wait_s: f64) {
        if self.remotes.is_empty() {
            return;
        }
        let prompt = &self.prompts[request];
        let question = Question {
            prompt_tokens: prompt.tokens,
            local_prefix_tokens: local_tokens,
            block_tokens: self.block_tokens,
            kv_bytes_per_token: self.profile.kv_bytes_per_token,
            queue_wait_s: wait_s,
            can_split: self.can_split,
        };
        let candidates: Vec<Candidate> = self
            .remotes
            .iter()
            .map(|remote| Candidate {
                backend: remote.backend,
                matched_tokens: prompt.tokens_of(remote.matched(&prompt.ids), self.block_tokens),
            })
            .collect();
        let decision = self.model.decide(self.now, &question, &candidates);
        let offered = candidates
            .iter()
            .any(|candidate| candidate.matched_tokens > local_tokens);
        if !offered {
            self.ask_in_vain(request);
            return;
        }
        let taken = decision.backend.filter(|_| decision.plan != FetchPlan::Recompute);
        let index = taken.and_then(|backend| self.remotes.iter().position(|remote| remote.backend == backend));
        self.flight(request, |flight| {
            flight.declined = index.is_none();
            flight.plan = decision.plan;
        });
        if let Some(index) = index {
            self.begin_fetch(request, index, local_tokens, &decision);
        }
    }

    /// Who asks for what is not there waits for that answer too.
    fn ask_in_vain(&mut self, request: usize) {
        let (model, now) = (&self.model, self.now);
        let asked = self
            .remotes
            .iter()
            .filter(|remote| model.gate(remote.backend, now).is_some_and(|gate| gate.open));
        let latency_s = asked
            .map(|remote| remote.luck(request as u64).latency_s)
            .fold(0.0, f64::max);
        if latency_s > 0.0 {
            self.flight(request, |flight| flight.asks_in_vain = true);
            self.push(time(seconds(now) + latency_s), Happening::Answered { request });
        }
    }

    fn begin_fetch(&mut self, request: usize, index: usize, local_tokens: u32, decision: &Decision) {
        let name = FetchId(request as u64);
        self.model.begin_fetch(self.now, name, decision);
        let luck = self.remotes[index].luck(request as u64);
        let waits = decision.plan == FetchPlan::Fetch;
        let place = self.remotes[index].place;
        self.flight(request, |flight| {
            flight.fetching = waits;
            flight.remote = Some(place);
            flight.remote_tokens = local_tokens + decision.matched_tokens;
        });
        let now_s = seconds(self.now);
        if waits {
            self.push(time(now_s + decision.soft_deadline_s), Happening::Overdue { request });
        }
        if luck.fails {
            self.push(time(now_s + FAILURE_KNOWN_S), Happening::Failed { request });
            return;
        }
        let end_s = self.follow(request, index, luck, decision.fetch_bytes);
        self.flight(request, |flight| flight.arrives_at_s = Some(end_s));
    }

    /// Announces what the model will see of a fetch: its first byte, each part, its end. When that is, seconds.
    fn follow(&mut self, request: usize, index: usize, luck: Luck, bytes: u64) -> f64 {
        let now_s = seconds(self.now);
        let (first_s, end_s) = self.remotes[index]
            .down
            .pass_as(now_s, bytes, luck.latency_s, luck.share);
        self.push(
            time(first_s),
            Happening::FirstByte {
                request,
                lookup_s: luck.latency_s,
            },
        );
        let part = u64::from(PART_TOKENS.max(self.block_tokens)) * self.profile.kv_bytes_per_token;
        let s_per_byte = (end_s - first_s) / (bytes as f64).max(1.0);
        let mut arrived = 0;
        while arrived < bytes {
            let more = part.min(bytes - arrived);
            arrived += more;
            self.push(
                time(first_s + arrived as f64 * s_per_byte),
                Happening::Part {
                    request,
                    bytes: more,
                    took_s: more as f64 * s_per_byte,
                },
            );
        }
        let actual_s = end_s - now_s;
        self.push(time(end_s), Happening::Fetched { request, actual_s });
        end_s
    }

    pub(super) fn overdue(&mut self, request: usize) {
        let Some(flight) = self.flights.get(&request).filter(|flight| flight.fetching) else {
            return;
        };
        let local = flight.local_tokens();
        let recompute_s = self
            .profile
            .coefficients
            .seconds(flight.remote_tokens.saturating_sub(local), local);
        match self.model.judge(self.now, FetchId(request as u64), recompute_s) {
            Patience::Wait { until } => self.push(until, Happening::Overdue { request }),
            Patience::GiveUp => self.settle(request, false),
        }
    }

    /// A fetch has ended, or nobody waits for it any longer.
    pub(super) fn settle(&mut self, request: usize, arrived: bool) {
        let waited = self.flight(request, |flight| {
            let waited = std::mem::take(&mut flight.fetching);
            if waited && !arrived {
                flight.plan = FetchPlan::Recompute;
                flight.failed = true;
            }
            waited
        });
        if waited == Some(true) {
            self.try_start(request);
        }
    }

    pub(super) fn store_remotely(&mut self, request: usize) {
        let ids = &self.prompts[request].ids;
        for index in 0..self.remotes.len() {
            let remote = &mut self.remotes[index];
            let lacking = (ids.len() - remote.matched(ids)) as u64 * self.block_bytes;
            if let Some(at_s) = remote.store(seconds(self.now), lacking) {
                self.push(time(at_s), Happening::Stored { request, remote: index });
            }
        }
    }

    pub(super) fn probe(&mut self) {
        let now_s = seconds(self.now);
        while let Some((backend, probe)) = self.model.poll_probe(self.now) {
            let Some(index) = self.remotes.iter().position(|remote| remote.backend == backend) else {
                return;
            };
            let luck = self.remotes[index].probe_luck();
            if luck.fails {
                self.push(time(now_s + FAILURE_KNOWN_S), Happening::ProbeFailed { remote: index });
                continue;
            }
            let link = &mut self.remotes[index].down;
            let (first_s, end_s) = link.pass_as(now_s, probe.bytes, luck.latency_s, luck.share);
            self.push(
                time(end_s),
                Happening::Probed {
                    remote: index,
                    lookup_s: luck.latency_s,
                    bytes: probe.bytes,
                    took_s: end_s - first_s,
                },
            );
        }
    }
}
