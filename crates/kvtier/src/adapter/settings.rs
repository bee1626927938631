use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What LMCache is told of a store that the node did not take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailedStores {
    /// That it failed. LMCache then keeps the objects in its own memory.
    #[default]
    Report,
    /// That it succeeded with no bytes moved: a cache may forget. For an LMCache whose own memory is only a way through
    /// (`--l2-store-policy skip_l1 --eviction-policy noop`): there, what is kept after a failure is never evicted.
    Drop,
}

/// Settings of an [`super::Adapter`]: LMCache's `adapter_params`. Plain data, checked once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct AdapterSettings {
    /// Path of the node's Unix socket. Required.
    pub socket: PathBuf,
    /// Names a trust domain by its token. Default: the user id does.
    pub token: Option<String>,
    /// What stands before a salt in the name of its namespace. Default `lmcache:`; no `/`.
    pub namespace_prefix: String,
    /// Namespaces of certain salts, by salt: the mapping that names tenants. An entry for `""` names the empty salt's.
    pub namespaces: BTreeMap<String, String>,
    /// Put a digest of the salt into the name instead of the salt. Default false. Salts too long for a name always are.
    pub hide_salts: bool,
    /// What all stores are put under, so that `kvctl purge NS --label` takes them by itself: 1 to 1,024 bytes. Default: nothing.
    pub label: Option<String>,
    /// Tokens of one LMCache chunk (`--chunk-size`), which LMCache does not tell. Default 256.
    pub tokens_per_chunk: u32,
    /// Tokens of a typical prompt, which LMCache does not tell. Default: not known.
    pub prompt_tokens: Option<u32>,
    /// How long a typical request waits for a GPU, microseconds, which LMCache does not tell: what is fetched meanwhile costs it nothing.
    /// Default: not known, and counted as none.
    pub queue_wait_us: Option<u64>,
    /// Threads that copy. Default 0: one for each core, at most 4.
    pub copy_threads: u32,
    /// A lookup without an answer by then is a miss, milliseconds. Default 1,000.
    pub lookup_timeout_ms: u64,
    /// What a load did not copy by then is a miss, milliseconds. Default 5,000.
    pub load_timeout_ms: u64,
    /// A store that is not published by then has failed, milliseconds. Default 30,000.
    pub store_timeout_ms: u64,
    /// How long a store waits for room at the node, milliseconds. Default 2,000.
    pub store_room_ms: u64,
    /// Stores, lookups and loads at once; more fail at once. Default 4,096.
    pub tasks_max: usize,
    /// Bytes of blocks that loads hold leased at once, and the same for slots of stores. Default 256 MiB.
    pub in_flight_bytes_max: u64,
    /// Bytes that one request of a load or store asks for. Default 16 MiB; a larger object goes alone.
    pub window_bytes: u64,
    /// Bytes of blocks that lookups keep leased for loads to come. Default 256 MiB; 0 leases none.
    pub locked_bytes_max: u64,
    /// A lock that nobody gave back by then is forgotten, milliseconds. Default 60,000.
    pub lock_ms_max: u64,
    /// Keys known by name, for listing, deleting and accounting. Default 1,048,576, about 300 bytes each.
    pub directory_keys_max: usize,
    /// Capacity that LMCache is told, bytes. Default 0: none, and the node alone decides what to evict.
    pub capacity_bytes: u64,
    /// What LMCache is told of failed stores. Default `report`.
    pub failed_stores: FailedStores,
    /// Withhold the completion of a store or load until [`super::Adapter::publish`]. Not for `adapter_params`.
    #[serde(skip)]
    pub notices: bool,
}

impl Default for AdapterSettings {
    fn default() -> Self {
        AdapterSettings {
            socket: PathBuf::new(),
            token: None,
            namespace_prefix: "lmcache:".into(),
            namespaces: BTreeMap::new(),
            hide_salts: false,
            label: None,
            tokens_per_chunk: 256,
            prompt_tokens: None,
            queue_wait_us: None,
            copy_threads: 0,
            lookup_timeout_ms: 1_000,
            load_timeout_ms: 5_000,
            store_timeout_ms: 30_000,
            store_room_ms: 2_000,
            tasks_max: 4_096,
            in_flight_bytes_max: 256 << 20,
            window_bytes: 16 << 20,
            locked_bytes_max: 256 << 20,
            lock_ms_max: 60_000,
            directory_keys_max: 1 << 20,
            capacity_bytes: 0,
            failed_stores: FailedStores::Report,
            notices: false,
        }
    }
}

/// A setting that cannot be, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("adapter_params: {field}: {remedy}")]
pub struct AdapterSettingsError {
    /// Which field.
    pub field: String,
    /// What to do.
    pub remedy: String,
}

const NAME_BYTES_MAX: usize = crate::wire::NAME_BYTES_MAX;
const COPY_THREADS_MAX: u32 = 64;

impl AdapterSettings {
    /// Settings from the JSON object that LMCache passes on.
    ///
    /// # Errors
    /// A field that is unknown or cannot be.
    pub fn from_json(json: &str) -> Result<AdapterSettings, AdapterSettingsError> {
        let settings: AdapterSettings = serde_json::from_str(json).map_err(|error| AdapterSettingsError {
            field: "JSON".into(),
            remedy: error.to_string(),
        })?;
        settings.check()
    }

    /// Checks every field and replaces zeros that mean "choose".
    ///
    /// # Errors
    /// The first field that cannot be.
    pub fn check(mut self) -> Result<AdapterSettings, AdapterSettingsError> {
        let refuse = |field: &str, remedy: String| {
            Err(AdapterSettingsError {
                field: field.into(),
                remedy,
            })
        };
        if self.socket.as_os_str().is_empty() {
            return refuse("socket", "give the path of kv-daemon's socket".into());
        }
        // A digest of 32 digits must still fit behind it.
        if self.namespace_prefix.contains('/') || self.namespace_prefix.len() > NAME_BYTES_MAX - 32 {
            return refuse("namespace_prefix", "give a short text without '/'".into());
        }
        for (salt, name) in &self.namespaces {
            if name.is_empty() || name.len() > NAME_BYTES_MAX || name.contains('/') {
                return refuse(
                    "namespaces",
                    format!("the name for salt {salt:?} needs 1 to {NAME_BYTES_MAX} bytes without '/'"),
                );
            }
        }
        if self.namespace_prefix.is_empty() && !self.namespaces.contains_key("") && !self.hide_salts {
            return refuse(
                "namespace_prefix",
                "an empty prefix leaves no name for the empty salt: map it in `namespaces`".into(),
            );
        }
        let label_bytes = self.label.as_ref().map_or(1, String::len);
        if !(1..=crate::purge::LABEL_BYTES_MAX).contains(&label_bytes) {
            return refuse("label", format!("give 1 to {} bytes", crate::purge::LABEL_BYTES_MAX));
        }
        if self.copy_threads == 0 {
            let cores = std::thread::available_parallelism().map_or(2, usize::from);
            self.copy_threads = u32::try_from(cores.min(4)).unwrap_or(4);
        }
        if self.copy_threads > COPY_THREADS_MAX {
            return refuse("copy_threads", format!("give at most {COPY_THREADS_MAX}"));
        }
        for (field, value) in [
            ("lookup_timeout_ms", self.lookup_timeout_ms),
            ("load_timeout_ms", self.load_timeout_ms),
            ("store_timeout_ms", self.store_timeout_ms),
            ("store_room_ms", self.store_room_ms),
            ("lock_ms_max", self.lock_ms_max),
        ] {
            if !(1..=3_600_000).contains(&value) {
                return refuse(field, "give 1 ms to an hour".into());
            }
        }
        for (field, value) in [
            ("in_flight_bytes_max", self.in_flight_bytes_max),
            ("window_bytes", self.window_bytes),
            ("tasks_max", self.tasks_max as u64),
            ("directory_keys_max", self.directory_keys_max as u64),
        ] {
            if value == 0 || value > 1 << 40 {
                return refuse(field, "give 1 to 2^40".into());
            }
        }
        Ok(self)
    }
}
