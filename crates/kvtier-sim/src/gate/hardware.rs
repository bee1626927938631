use serde::{Deserialize, Serialize};

use super::GateError;

/// Host memory beside the GPUs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostHardware {
    /// For blocks, GiB.
    pub gib: f64,
    /// To each group of GPUs, and as much from it, GB/s.
    pub gb_per_s: f64,
    /// Before the first byte, milliseconds.
    #[serde(default)]
    pub latency_ms: f64,
}

/// A disk in the node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvmeHardware {
    /// For blocks, GiB.
    pub gib: f64,
    /// Reading, GB/s.
    pub read_gb_per_s: f64,
    /// Writing, GB/s.
    pub write_gb_per_s: f64,
    /// Before the first byte, milliseconds.
    #[serde(default)]
    pub latency_ms: f64,
}

/// A store elsewhere that keeps what was computed: peers' memory, an object store.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoteHardware {
    /// How a report names it.
    pub name: String,
    /// Bandwidth each way, GB/s.
    pub gb_per_s: f64,
    /// Before the first byte, milliseconds, times exp(0.4·normal).
    pub latency_ms: f64,
    /// For blocks, GiB; without it, more than there will ever be.
    #[serde(default)]
    pub gib: Option<f64>,
    /// The bandwidth of each fetch is multiplied by exp(spread·normal).
    #[serde(default)]
    pub spread: f64,
    /// Probability that a fetch fails, which is known after two seconds.
    #[serde(default)]
    pub failure_probability: f64,
    /// Price of keeping a GiB for a month of 30 days.
    #[serde(default)]
    pub gib_month: f64,
    /// Price of moving a GB out of it.
    #[serde(default)]
    pub gb_moved: f64,
}

/// What things cost, in any one currency.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// How a report writes the currency.
    #[serde(default)]
    pub currency: String,
    /// One GPU for an hour.
    #[serde(default)]
    pub gpu_hour: f64,
    /// A GiB of host memory for a month of 30 days.
    #[serde(default)]
    pub host_gib_month: f64,
    /// A GiB of NVMe for a month of 30 days.
    #[serde(default)]
    pub nvme_gib_month: f64,
}

/// A node and what it can reach.
///
/// ```toml
/// gpu_servers = 4            # groups of GPUs that serve a prompt each; 0: one is always idle
/// engine_can_split = false   # it computes the front of a prompt while the rest is fetched
/// [host]
/// gib = 512
/// gb_per_s = 40
/// latency_ms = 0.05
/// [nvme]                     # may be left out
/// gib = 3500
/// read_gb_per_s = 12
/// write_gb_per_s = 6
/// latency_ms = 0.2
/// [[remote]]                 # any number
/// name = "peer"
/// gb_per_s = 12
/// latency_ms = 2
/// [prices]                   # may be left out; then nothing is said of costs
/// currency = "USD"
/// gpu_hour = 2.5
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GateHardware {
    /// How a report names it.
    #[serde(default)]
    pub name: String,
    /// Groups of GPUs that serve a prompt each; 0: one is always idle.
    #[serde(default)]
    pub gpu_servers: usize,
    /// The engine computes the front of a prompt while the rest is fetched.
    #[serde(default)]
    pub engine_can_split: bool,
    /// Host memory.
    pub host: HostHardware,
    /// The disk, where there is one.
    #[serde(default)]
    pub nvme: Option<NvmeHardware>,
    /// Stores elsewhere.
    #[serde(default)]
    pub remote: Vec<RemoteHardware>,
    /// What things cost, where that was said.
    #[serde(default)]
    pub prices: Option<Prices>,
}

impl GateHardware {
    /// Names of the presets.
    pub const PRESETS: [&'static str; 2] = ["idle", "busy"];

    /// `idle`: half a TiB of host memory at 40 GB/s, an NVMe disk, a peer at 12 GB/s and S3 at 1 GB/s, and always an idle GPU. `busy`:
    /// the same with four groups of GPUs that prompts queue for. No prices: nobody's are everybody's.
    #[must_use]
    pub fn preset(name: &str) -> Option<GateHardware> {
        let gpu_servers = match name {
            "idle" => 0,
            "busy" => 4,
            _ => return None,
        };
        let remote = |name: &str, gb_per_s, latency_ms, spread, failure_probability| RemoteHardware {
            name: name.to_string(),
            gb_per_s,
            latency_ms,
            gib: None,
            spread,
            failure_probability,
            gib_month: 0.0,
            gb_moved: 0.0,
        };
        Some(GateHardware {
            name: name.to_string(),
            gpu_servers,
            engine_can_split: false,
            host: HostHardware {
                gib: 512.0,
                gb_per_s: 40.0,
                latency_ms: 0.05,
            },
            nvme: Some(NvmeHardware {
                gib: 3_500.0,
                read_gb_per_s: 12.0,
                write_gb_per_s: 6.0,
                latency_ms: 0.2,
            }),
            remote: vec![remote("peer", 12.0, 2.0, 0.2, 1e-3), remote("s3", 1.0, 30.0, 0.2, 5e-3)],
            prices: None,
        })
    }

    /// The hardware of a TOML file.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn parse(text: &str) -> Result<GateHardware, GateError> {
        let hardware: GateHardware = toml::from_str(text).map_err(|error| GateError(error.to_string()))?;
        hardware.check()?;
        Ok(hardware)
    }

    fn check(&self) -> Result<(), GateError> {
        let mut fields = vec![
            ("gpu_servers".to_string(), self.gpu_servers as f64, 0.0, 1e4),
            ("host.gib".to_string(), self.host.gib, 1e-3, 1e6),
            ("host.gb_per_s".to_string(), self.host.gb_per_s, 1e-3, 1e5),
            ("host.latency_ms".to_string(), self.host.latency_ms, 0.0, 1e5),
        ];
        if let Some(nvme) = &self.nvme {
            fields.extend([
                ("nvme.gib".to_string(), nvme.gib, 1e-3, 1e6),
                ("nvme.read_gb_per_s".to_string(), nvme.read_gb_per_s, 1e-3, 1e5),
                ("nvme.write_gb_per_s".to_string(), nvme.write_gb_per_s, 1e-3, 1e5),
                ("nvme.latency_ms".to_string(), nvme.latency_ms, 0.0, 1e5),
            ]);
        }
        for (index, remote) in self.remote.iter().enumerate() {
            let named = |field: &str| format!("remote {:?}: {field}", remote.name);
            fields.extend([
                (named("gb_per_s"), remote.gb_per_s, 1e-3, 1e5),
                (named("latency_ms"), remote.latency_ms, 0.0, 1e5),
                (named("gib"), remote.gib.unwrap_or(1.0), 1e-3, 1e9),
                (named("spread"), remote.spread, 0.0, 2.0),
                (named("failure_probability"), remote.failure_probability, 0.0, 1.0),
                (named("gib_month"), remote.gib_month, 0.0, 1e9),
                (named("gb_moved"), remote.gb_moved, 0.0, 1e9),
            ]);
            let taken = self.remote[..index].iter().any(|other| other.name == remote.name);
            if remote.name.trim().is_empty() || taken || ["host", "nvme", "together"].contains(&remote.name.as_str()) {
                return Err(GateError(format!(
                    "remote {:?}: give it a name of its own",
                    remote.name
                )));
            }
        }
        if let Some(prices) = &self.prices {
            fields.extend([
                ("prices.gpu_hour".to_string(), prices.gpu_hour, 0.0, 1e9),
                ("prices.host_gib_month".to_string(), prices.host_gib_month, 0.0, 1e9),
                ("prices.nvme_gib_month".to_string(), prices.nvme_gib_month, 0.0, 1e9),
            ]);
        }
        if self.remote.len() > 16 {
            return Err(GateError("more than 16 remotes: give fewer".to_string()));
        }
        match fields
            .into_iter()
            .find(|(_, value, least, most)| !(least..=most).contains(&value))
        {
            Some((name, value, least, most)) => Err(GateError(format!("{name} = {value}: give {least} to {most}"))),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::GateHardware;

    #[test]
    fn presets_hold_and_are_written_and_read_again() {
        for name in GateHardware::PRESETS {
            let preset = GateHardware::preset(name).expect("a preset");
            let text = toml::to_string(&preset).expect("TOML");
            assert_eq!(GateHardware::parse(&text).expect("hardware"), preset);
        }
        assert_eq!(GateHardware::preset("nobody's"), None);
    }

    #[test]
    fn what_cannot_be_is_named() {
        let host = "[host]\ngib = 1\ngb_per_s = 1\n";
        for (text, word) in [
            (String::new(), "host"),
            ("[host]\ngib = -1\ngb_per_s = 1\n".to_string(), "host.gib"),
            ("[host]\ngib = nan\ngb_per_s = 1\n".to_string(), "host.gib"),
            (format!("gpu_server = 3\n{host}"), "gpu_server"),
            (
                format!("{host}[[remote]]\nname = \"a\"\ngb_per_s = 0\nlatency_ms = 1\n"),
                "remote \"a\": gb_per_s",
            ),
            (
                format!("{host}[[remote]]\nname = \"host\"\ngb_per_s = 1\nlatency_ms = 1\n"),
                "name of its own",
            ),
        ] {
            let error = GateHardware::parse(&text).expect_err("cannot be");
            assert!(error.0.contains(word), "{error}");
        }
    }
}
