//! Families of generated workloads that policies are compared on: shapes, not likenesses of anyone's traffic.

use crate::random::Random;
use crate::trace::{TOKENS_PER_ID, TraceRequest};
use crate::workload::ChatWorkload;

/// A shape of traffic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Family {
    /// A few prompts that come again and again among many that come once.
    Scan,
    /// The same prompts round and round.
    Loop,
    /// Prompts in no order, one as likely as the other.
    Uniform,
    /// The same, the n-th n times less likely than the first.
    Zipf,
    /// Conversations of people: [`ChatWorkload`].
    Chat,
    /// Agents at work: many short steps in a row, some begun in the middle of another's.
    Agent,
}

impl Family {
    /// All of them.
    pub const ALL: [Family; 6] = [
        Family::Scan,
        Family::Loop,
        Family::Uniform,
        Family::Zipf,
        Family::Chat,
        Family::Agent,
    ];

    /// Some thousand requests, the same for the same seed.
    #[must_use]
    pub fn generate(self, seed: u64) -> Vec<TraceRequest> {
        let mut random = Random::new(seed ^ ((self as u64) << 32));
        match self {
            Family::Scan => scan(&mut random),
            Family::Loop => {
                let library = Library::new(&mut random, 400);
                library.prompts(&mut random, 3_000, |number, _| number % 400)
            }
            Family::Uniform => {
                let library = Library::new(&mut random, 600);
                library.prompts(&mut random, 4_000, |_, random| random.index(600))
            }
            Family::Zipf => {
                let library = Library::new(&mut random, 2_000);
                let order = Zipf::new(2_000);
                library.prompts(&mut random, 5_000, |_, random| order.draw(random))
            }
            Family::Chat => ChatWorkload {
                seed,
                ..ChatWorkload::default()
            }
            .generate(),
            Family::Agent => agents(&mut random),
        }
    }
}

/// Documents of different lengths that share nothing.
struct Library {
    documents: Vec<Vec<u64>>,
}

impl Library {
    fn new(random: &mut Random, documents: usize) -> Library {
        let mut next = 0;
        let mut document = || {
            let length = 1 + random.exponential(8).min(60);
            next += length;
            (next - length..next).collect()
        };
        Library {
            documents: (0..documents).map(|_| document()).collect(),
        }
    }

    fn prompts(
        &self,
        random: &mut Random,
        requests: usize,
        mut draw: impl FnMut(usize, &mut Random) -> usize,
    ) -> Vec<TraceRequest> {
        let mut timestamp_ms = 0;
        (0..requests)
            .map(|number| {
                timestamp_ms += random.exponential(500);
                request(timestamp_ms, self.documents[draw(number, random)].clone())
            })
            .collect()
    }
}

fn request(timestamp_ms: u64, hash_ids: Vec<u64>) -> TraceRequest {
    TraceRequest {
        timestamp_ms,
        input_tokens: hash_ids.len() as u64 * u64::from(TOKENS_PER_ID),
        output_tokens: 100,
        hash_ids,
    }
}

/// The first ranks are the likely ones: rank n with a weight of 1/n.
struct Zipf {
    /// Sums of weights, in units of 2^-20.
    sums: Vec<u64>,
}

impl Zipf {
    fn new(ranks: u64) -> Zipf {
        let weights = (1..=ranks).map(|rank| (1 << 20) / rank);
        Zipf {
            sums: weights
                .scan(0, |sum, weight| {
                    *sum += weight;
                    Some(*sum)
                })
                .collect(),
        }
    }

    fn draw(&self, random: &mut Random) -> usize {
        let sum = self.sums.last().copied().unwrap_or(0);
        let drawn = random.below(sum);
        self.sums.partition_point(|sum| *sum <= drawn)
    }
}

fn scan(random: &mut Random) -> Vec<TraceRequest> {
    let library = Library::new(random, 3_000);
    let mut once = 100;
    library.prompts(random, 4_000, |_, random| {
        if random.chance(400) {
            random.index(100)
        } else {
            once = 100 + (once - 99) % 2_900;
            once
        }
    })
}

/// One agent: its context, and when its next step is due.
struct Agent {
    due_ms: u64,
    steps: u64,
    context: Vec<u64>,
}

fn agents(random: &mut Random) -> Vec<TraceRequest> {
    const AGENTS: usize = 40;
    const REQUESTS: usize = 4_000;
    let mut next = 64;
    let mut start = |random: &mut Random, at_ms: u64, other: Option<Vec<u64>>| {
        // Tools and instructions are shared; one in four goes on from where another stands.
        let mut context: Vec<u64> = (0..16).collect();
        if let Some(other) = other.filter(|other| other.len() > 16) {
            context = other[..random.between(16, other.len() as u64 - 1) as usize].to_vec();
        }
        context.extend(next..next + 4);
        next += 4;
        Agent {
            due_ms: at_ms + random.exponential(20_000),
            steps: 1 + random.exponential(12),
            context,
        }
    };
    let mut agents: Vec<Agent> = (0..AGENTS).map(|_| start(random, 0, None)).collect();
    let mut fresh = 1 << 32;
    let mut requests = Vec::new();
    while requests.len() < REQUESTS {
        let turn = (0..AGENTS)
            .min_by_key(|agent| agents[*agent].due_ms)
            .expect("there are agents");
        let agent = &mut agents[turn];
        let at_ms = agent.due_ms;
        requests.push(request(at_ms, agent.context.clone()));
        agent.steps -= 1;
        let grown = 1 + random.exponential(2);
        agent.context.extend(fresh..fresh + grown);
        fresh += grown;
        // Mostly a tool answers within seconds, now and then a person within minutes.
        agent.due_ms += if random.chance(80) {
            random.exponential(120_000)
        } else {
            1_000 + random.exponential(6_000)
        };
        if agent.steps == 0 || agent.context.len() > 200 {
            let other = random.chance(250).then(|| agents[random.index(AGENTS)].context.clone());
            agents[turn] = start(random, at_ms, other);
        }
    }
    requests
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_gives_the_same_requests_and_another_seed_others() {
        for family in Family::ALL {
            assert_eq!(family.generate(7), family.generate(7), "{family:?}");
            assert_ne!(family.generate(7), family.generate(8), "{family:?}");
        }
    }

    #[test]
    fn equal_ids_have_equal_prefixes_and_time_goes_on() {
        for family in Family::ALL {
            let requests = family.generate(3);
            assert!(requests.len() >= 1_000, "{family:?}");
            assert!(
                requests
                    .windows(2)
                    .all(|pair| pair[0].timestamp_ms <= pair[1].timestamp_ms)
            );
            let mut parents = std::collections::BTreeMap::new();
            for request in &requests {
                for (index, id) in request.hash_ids.iter().enumerate() {
                    let parent = index.checked_sub(1).map(|before| request.hash_ids[before]);
                    assert_eq!(*parents.entry(*id).or_insert(parent), parent, "{family:?}");
                }
            }
        }
    }
}
