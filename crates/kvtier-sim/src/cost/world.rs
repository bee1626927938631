use serde::{Deserialize, Deserializer};

/// When something holds, over and over: from `from_s` for `for_s`, every `every_s`.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Window {
    /// Start of the first, seconds.
    #[serde(default)]
    pub from_s: f64,
    /// Length, seconds.
    pub for_s: f64,
    /// From start to start, seconds.
    pub every_s: f64,
}

impl Window {
    /// Whether it holds at `at_s`.
    #[must_use]
    pub fn holds(&self, at_s: f64) -> bool {
        at_s >= self.from_s && (at_s - self.from_s).rem_euclid(self.every_s) < self.for_s
    }
}

/// A time of more failures.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Burst {
    /// Probability that a fetch fails in it.
    pub probability: f64,
    /// When.
    pub when: Window,
}

/// A time of slow lookups.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Stall {
    /// Latency in it, milliseconds.
    pub latency_ms: f64,
    /// When.
    pub when: Window,
}

/// One change of the bandwidth for good.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Step {
    /// When, seconds.
    pub at_s: f64,
    /// To what, GB/s.
    pub gb_per_s: f64,
}

/// A number, or several.
#[derive(Deserialize)]
#[serde(untagged)]
enum Bandwidths {
    One(f64),
    Several(Vec<f64>),
}

fn one_or_several<'de, D: Deserializer<'de>>(source: D) -> Result<Vec<f64>, D::Error> {
    Ok(match Bandwidths::deserialize(source)? {
        Bandwidths::One(gb_per_s) => vec![gb_per_s],
        Bandwidths::Several(gb_per_s) => gb_per_s,
    })
}

fn regime_mean_s() -> f64 {
    120.0
}

fn servers() -> usize {
    4
}

/// A link, and the GPUs beside it. In a file: one `[[world]]` each. Only `name`, `gb_per_s` and `latency_ms` must be there:
///
/// ```toml
/// [[world]]
/// name = "nightly_backup"
/// gb_per_s = 5
/// spread = 0.2
/// latency_ms = 4
/// failure_probability = 0.001
/// burst = { probability = 0.1, when = { from_s = 600, for_s = 120, every_s = 1200 } }
/// outage = { from_s = 900, for_s = 30, every_s = 1800 }
/// stall = { latency_ms = 200, when = { for_s = 5, every_s = 60 } }
/// step = { at_s = 1800, gb_per_s = 0.5 }
/// contended = true
/// ```
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CostWorld {
    /// How rows name it.
    pub name: String,
    /// Bandwidth, GB/s: a number, or a list of which one holds at a time.
    #[serde(deserialize_with = "one_or_several")]
    pub gb_per_s: Vec<f64>,
    /// The bandwidth is multiplied by exp(spread·x), where x wanders.
    #[serde(default)]
    pub spread: f64,
    /// Of several bandwidths another is drawn after this long on average, seconds.
    #[serde(default = "regime_mean_s")]
    pub regime_mean_s: f64,
    /// One change for good.
    #[serde(default)]
    pub step: Option<Step>,
    /// The link slows itself: divided by 1 + fetches in flight over this.
    #[serde(default)]
    pub slowed_by_fetches: Option<f64>,
    /// Probability that a fetch fails.
    #[serde(default)]
    pub failure_probability: f64,
    /// Times of more failures.
    #[serde(default)]
    pub burst: Option<Burst>,
    /// Times when every fetch fails.
    #[serde(default)]
    pub outage: Option<Window>,
    /// Before the first byte, milliseconds, times exp(0.4·normal).
    pub latency_ms: f64,
    /// Times of slow lookups.
    #[serde(default)]
    pub stall: Option<Stall>,
    /// Whole prompts queue for GPUs; else each request has one to itself.
    #[serde(default)]
    pub contended: bool,
    /// How many GPUs where they are queued for.
    #[serde(default = "servers")]
    pub servers: usize,
}

/// A file of worlds that cannot be used, in words.
#[derive(Debug, PartialEq, Eq)]
pub struct WorldError(pub String);

impl std::fmt::Display for WorldError {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for WorldError {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    world: Vec<CostWorld>,
}

impl CostWorld {
    fn new(name: &str, gb_per_s: f64, spread: f64, latency_ms: f64) -> CostWorld {
        CostWorld {
            name: name.to_owned(),
            gb_per_s: vec![gb_per_s],
            spread,
            regime_mean_s: regime_mean_s(),
            step: None,
            slowed_by_fetches: None,
            failure_probability: 1e-3,
            burst: None,
            outage: None,
            latency_ms,
            stall: None,
            contended: false,
            servers: servers(),
        }
    }

    /// The worlds that the cost model is held to.
    #[must_use]
    pub fn all() -> Vec<CostWorld> {
        let window = |from_s, for_s, every_s| Window { from_s, for_s, every_s };
        let step = |name, from, to| CostWorld {
            step: Some(Step {
                at_s: 1_800.0,
                gb_per_s: to,
            }),
            ..CostWorld::new(name, from, 0.0, 3.0)
        };
        let first = vec![
            CostWorld::new("healthy", 12.0, 0.3, 2.0),
            CostWorld::new("random_walk", 3.0, 1.0, 3.0),
            CostWorld {
                gb_per_s: vec![12.0, 3.0, 0.4],
                ..CostWorld::new("regimes", 12.0, 0.2, 3.0)
            },
            CostWorld {
                burst: Some(Burst {
                    probability: 0.25,
                    when: window(300.0, 300.0, 1_200.0),
                }),
                outage: Some(window(900.0, 90.0, 1_200.0)),
                ..CostWorld::new("failures", 8.0, 0.3, 4.0)
            },
            CostWorld {
                failure_probability: 5e-3,
                ..CostWorld::new("s3_like", 1.0, 0.3, 30.0)
            },
        ];
        let contended: Vec<CostWorld> = first
            .iter()
            .map(|world| CostWorld {
                name: format!("contended_{}", world.name),
                contended: true,
                ..world.clone()
            })
            .collect();
        let further = [
            step("step_up", 0.6, 6.0),
            step("step_down", 6.0, 0.6),
            CostWorld {
                slowed_by_fetches: Some(4.0),
                ..CostWorld::new("self_slow", 12.0, 0.0, 3.0)
            },
            CostWorld {
                stall: Some(Stall {
                    latency_ms: 200.0,
                    when: window(0.0, 5.0, 60.0),
                }),
                ..CostWorld::new("lookup_stalls", 12.0, 0.3, 2.0)
            },
        ];
        first.into_iter().chain(further).chain(contended).collect()
    }

    /// The worlds of a TOML file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<Vec<CostWorld>, WorldError> {
        let file: File = toml::from_str(text).map_err(|error| WorldError(error.to_string()))?;
        for world in &file.world {
            world
                .check()
                .map_err(|reason| WorldError(format!("world {}: {reason}", world.name)))?;
        }
        if file.world.is_empty() {
            return Err(WorldError("no [[world]] in it".to_owned()));
        }
        Ok(file.world)
    }

    fn check(&self) -> Result<(), String> {
        let positive = |name: &str, value: f64| {
            if value.is_finite() && value > 0.0 {
                Ok(())
            } else {
                Err(format!("{name} is {value}: give more than 0"))
            }
        };
        let share = |name: &str, value: f64| {
            if (0.0..=1.0).contains(&value) {
                Ok(())
            } else {
                Err(format!("{name} is {value}: give 0 to 1"))
            }
        };
        let window = |name: &str, window: &Window| {
            positive(&format!("{name}.for_s"), window.for_s)?;
            positive(&format!("{name}.every_s"), window.every_s)?;
            if window.from_s.is_finite() {
                Ok(())
            } else {
                Err(format!("{name}.from_s is {}: give seconds", window.from_s))
            }
        };
        if self.gb_per_s.is_empty() {
            return Err("gb_per_s is empty: give at least one bandwidth".to_owned());
        }
        self.gb_per_s
            .iter()
            .try_for_each(|value| positive("gb_per_s", *value))?;
        positive("latency_ms", self.latency_ms)?;
        positive("regime_mean_s", self.regime_mean_s)?;
        share("failure_probability", self.failure_probability)?;
        if !self.spread.is_finite() || self.spread < 0.0 {
            return Err(format!("spread is {}: give 0 or more", self.spread));
        }
        if let Some(step) = &self.step {
            positive("step.gb_per_s", step.gb_per_s)?;
            positive("step.at_s", step.at_s)?;
        }
        if let Some(fetches) = self.slowed_by_fetches {
            positive("slowed_by_fetches", fetches)?;
        }
        if let Some(burst) = &self.burst {
            share("burst.probability", burst.probability)?;
            window("burst.when", &burst.when)?;
        }
        if let Some(outage) = &self.outage {
            window("outage", outage)?;
        }
        if let Some(stall) = &self.stall {
            positive("stall.latency_ms", stall.latency_ms)?;
            window("stall.when", &stall.when)?;
        }
        if self.servers == 0 {
            return Err("servers is 0: give at least one".to_owned());
        }
        Ok(())
    }

    /// Probability that a fetch which begins at `at_s` fails.
    #[must_use]
    pub fn failure_probability_at(&self, at_s: f64) -> f64 {
        if self.outage.is_some_and(|outage| outage.holds(at_s)) {
            return 1.0;
        }
        match &self.burst {
            Some(burst) if burst.when.holds(at_s) => burst.probability,
            _ => self.failure_probability,
        }
    }

    /// Latency at `at_s` before it is spread, seconds.
    #[must_use]
    pub fn latency_s_at(&self, at_s: f64) -> f64 {
        match &self.stall {
            Some(stall) if stall.when.holds(at_s) => stall.latency_ms * 1e-3,
            _ => self.latency_ms * 1e-3,
        }
    }
}
