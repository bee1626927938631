use kvtier_core::cost::{GpuProfile, ModelProfile};
use serde::{Deserialize, Serialize};

use super::{Settings, SettingsError};

/// Members that a cluster's list may have.
const MEMBERS_MAX: usize = 64;

/// How blocks are read from peers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerTransport {
    /// By RDMA where both nodes have it and no certificates are named, else over TCP; said once in words.
    #[default]
    Auto,
    /// Over TCP.
    Tcp,
    /// By RDMA, or a start error. A peer without it is read over TCP.
    Verbs,
}

/// Whether peers are asked at all, where a cost model is named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerGate {
    /// By what was measured.
    #[default]
    Auto,
    /// Always; each request is weighed all the same.
    On,
    /// Never.
    Off,
}

fn names<'a>(presets: impl Iterator<Item = &'a str>) -> String {
    presets.collect::<Vec<_>>().join(", ")
}

impl Settings {
    pub(super) fn check_costs(&self) -> Result<(), SettingsError> {
        let refuse = |field: &'static str, value: String, remedy: String| Err(SettingsError { field, value, remedy });
        if let Some(model) = &self.cost_model
            && ModelProfile::preset(model).is_none()
        {
            let known = names(ModelProfile::PRESETS.iter().map(|preset| preset.name));
            return refuse("cost_model", format!("{model:?}"), format!("one of {known}"));
        }
        if GpuProfile::preset(&self.cost_gpu).is_none() {
            let known = names(GpuProfile::PRESETS.iter().map(|preset| preset.name));
            return refuse("cost_gpu", format!("{:?}", self.cost_gpu), format!("one of {known}"));
        }
        for (field, value) in [
            ("cost_gpus", u64::from(self.cost_gpus)),
            ("block_tokens", u64::from(self.block_tokens)),
            ("kv_bytes_per_token", self.kv_bytes_per_token.unwrap_or(1)),
        ] {
            if value == 0 || value > 1 << 32 {
                return refuse(field, value.to_string(), "at least 1".into());
            }
        }
        Ok(())
    }

    pub(super) fn check_peers(&self) -> Result<(), SettingsError> {
        let refuse = |field: &'static str, value: String, remedy: &str| {
            Err(SettingsError {
                field,
                value,
                remedy: remedy.to_owned(),
            })
        };
        let Some(listen) = self.peer_listen else {
            let has_members = !self.peers.is_empty() || self.peers_dns.is_some() || self.peers_redis.is_some();
            if has_members || self.cluster_fence {
                return refuse(
                    "peer_listen",
                    "none".into(),
                    "name the address at which peers reach this node",
                );
            }
            return Ok(());
        };
        // On loopback, too: other users of the machine reach it, and a peer reads what the domains hold.
        if self.peer_secret_file.is_none() {
            return refuse(
                "peer_listen",
                listen.to_string(),
                "whoever is taken for a peer reads the memory of the domains: set peer_secret_file, the same on all members",
            );
        }
        let named = [
            &self.peer_tls_certificate_file,
            &self.peer_tls_key_file,
            &self.peer_tls_ca_file,
        ];
        let is_tls = named.iter().all(|file| file.is_some());
        if !is_tls && (named.iter().any(|file| file.is_some()) || self.peer_tls_name.is_some()) {
            return refuse(
                "peer_tls_certificate_file",
                self.peer_tls_certificate_file
                    .as_ref()
                    .map_or_else(|| "none".into(), |path| path.display().to_string()),
                "TLS between members takes peer_tls_certificate_file, peer_tls_key_file and peer_tls_ca_file together",
            );
        }
        if self.peer_address.is_none() && (listen.ip().is_unspecified() || self.cluster_fence) {
            return refuse(
                "peer_address",
                "none".into(),
                "name this node as the others' list names it: HOST:PORT",
            );
        }
        for address in self.peers.iter().chain(&self.peer_address).chain(&self.peers_dns) {
            let port = address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok());
            if port.is_none() || address.len() > 256 || address.contains('@') {
                return refuse("peers", format!("{address:?}"), "each is HOST:PORT");
            }
        }
        if self.peers.len() > MEMBERS_MAX {
            return refuse("peers", self.peers.len().to_string(), "at most 64 members");
        }
        let is_dynamic = self.peers_dns.is_some() || self.peers_redis.is_some();
        if self.cluster_fence && (self.peers.len() < 3 || is_dynamic) {
            return refuse(
                "cluster_fence",
                "true".into(),
                "it needs a fixed list of at least three members in peers, this node among them, and neither peers_dns nor peers_redis",
            );
        }
        if self.peers_redis.is_some() && !cfg!(feature = "redis") {
            return refuse(
                "peers_redis",
                self.peers_redis.clone().unwrap_or_default(),
                "this program was built without the feature `redis`",
            );
        }
        if self.cluster_name.is_empty() || self.cluster_name.len() > 128 || self.cluster_name.contains(':') {
            return refuse(
                "cluster_name",
                format!("{:?}", self.cluster_name),
                "1 to 128 bytes without ':'",
            );
        }
        for (field, value) in [
            ("peer_connections", u64::from(self.peer_connections)),
            ("peer_readers", u64::from(self.peer_readers)),
            ("peer_lease_ttl_ms", self.peer_lease_ttl_ms),
            ("peer_fetch_timeout_ms", self.peer_fetch_timeout_ms),
            ("peer_query_timeout_ms", self.peer_query_timeout_ms),
            ("cluster_renew_ms", self.cluster_renew_ms),
        ] {
            if value == 0 || value > 3_600_000 {
                return refuse(field, value.to_string(), "at least 1, and at most 3600000");
            }
        }
        if self.peer_connections > 64 || self.peer_readers > 256 {
            return refuse(
                "peer_readers",
                self.peer_readers.to_string(),
                "at most 256, with at most 64 peer_connections",
            );
        }
        if self.peer_lease_ttl_ms <= self.peer_fetch_timeout_ms || self.peer_lease_ttl_ms >= self.lease_ttl_ms {
            return refuse(
                "peer_lease_ttl_ms",
                self.peer_lease_ttl_ms.to_string(),
                "above the peer_fetch_timeout_ms of every member, below lease_ttl_ms: a block stays for as long as somebody may read it",
            );
        }
        if self.cluster_lease_ms <= 2 * self.cluster_renew_ms {
            return refuse(
                "cluster_lease_ms",
                self.cluster_lease_ms.to_string(),
                "more than twice cluster_renew_ms, the same on all members",
            );
        }
        Ok(())
    }
}
