//! The settings of a [`crate::node::Node`]: plain data, checked once.

mod peers;
mod remote;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use kvtier_core::cost::{ComputeProfile, GpuProfile, ModelProfile};
use kvtier_core::{CheckedCoreSettings, CoreSettings, Eviction};
use serde::{Deserialize, Serialize};

pub use peers::{PeerGate, PeerTransport};
pub use remote::RemoteCompression;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const NVME_FLUSH_INTERVAL_MS_MAX: u64 = 3_600_000;

/// How the NVMe tier reaches its device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NvmeEngine {
    /// io_uring when the kernel allows it, else threads; chosen by trying, said once.
    #[default]
    Auto,
    /// io_uring, or a start error.
    #[serde(alias = "io_uring", alias = "uring")]
    IoUring,
    /// A pool of threads with `preadv` and `pwritev`.
    Threads,
}

/// How payloads on NVMe are protected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Encryption {
    /// Sealed by AES-256-GCM under a key of their namespace and generation.
    #[default]
    #[serde(rename = "aes-256-gcm")]
    Aes256Gcm,
    /// Readable by whoever reads the device; checked by CRC32C. What names a block is sealed all the same.
    #[serde(rename = "none")]
    None,
}

/// Which blocks go when room is needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum EvictionPolicy {
    /// Those used longest ago, leaves first.
    #[default]
    Lru,
    /// Those that are least likely to be used soon, as far as that was learned from the requests so far, leaves first.
    Hazard,
}

/// Whether host memory is asked for in huge pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HugePages {
    /// Reserved huge pages when there are enough, else what the system allows; said once.
    #[default]
    Auto,
    /// 4 KiB pages.
    Never,
    /// Reserved huge pages, or a start error.
    Require,
}

/// Which clock drives the tier manager.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Clock {
    /// The machine's monotonic clock.
    #[default]
    System,
    /// The largest time that a client has sent: a test mode for replaying traces at their own pace.
    Client,
}

/// A trust domain and who belongs to it. Clients of one domain share memory and trust each other.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DomainSettings {
    /// Name, unique; `uid-N` is taken by the default domains.
    pub name: String,
    /// The BLAKE3 digest (64 hex digits) of the token whose bearer belongs here.
    pub token_blake3: Option<String>,
    /// A file whose first line is the token. Read by the daemon at start.
    pub token_file: Option<PathBuf>,
    /// Users who belong here when they show no token.
    pub uids: Vec<u32>,
}

impl DomainSettings {
    /// The same domain, joined by bearers of `token` (white space around it does not count); only a digest is kept.
    #[must_use]
    pub fn with_token(self, token: &str) -> DomainSettings {
        let digest = blake3::hash(token.trim().as_bytes()).to_hex().to_string();
        DomainSettings {
            token_blake3: Some(digest),
            token_file: None,
            ..self
        }
    }
}

/// Settings of a node. Every field's doc says meaning, unit, default and the memory it may cost.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Where segment files, keys, the register of namespaces, the lock and the admin token live. No default here: the daemon chooses one.
    pub state_dir: PathBuf,
    /// Path of the Unix socket. Empty: `kvtier.sock` in the state directory.
    pub socket: PathBuf,
    /// Permission bits of the socket. Default 0600.
    pub socket_mode: u32,
    /// Host memory for blocks, bytes. Default 1 GiB. Costs exactly that, plus up to 128 bytes a block of index.
    pub host_bytes: u64,
    /// Base size of a host segment, bytes; 0 chooses a 32nd of `host_bytes`, at least 2 MiB and at most 64 MiB or a 512th.
    pub host_segment_bytes: u64,
    /// Memory of a GPU for copies of blocks that are used again, bytes, beside what engines on it take; 0 switches the tier off.
    /// Default 0. Blocks are read there by clients of the same device that ask for them with its memory as the target.
    pub hbm_bytes: u64,
    /// Size of a segment of device memory, bytes; 0 chooses a 32nd of `hbm_bytes`, at least 2 MiB and at most 64 MiB. Each belongs
    /// to one trust domain.
    pub hbm_segment_bytes: u64,
    /// Number of the GPU, as CUDA counts them. Default 0.
    pub hbm_device: u32,
    /// Where CUDA's driver library lies. Default: `libcuda.so.1` where the system has it.
    pub hbm_library: Option<PathBuf>,
    /// NVMe space, bytes; 0 switches the tier off. Default 0.
    pub nvme_bytes: u64,
    /// Size of an NVMe segment, bytes; 0 chooses a 128th of `nvme_bytes`, at least 1 MiB and at most 256 MiB or a 1024th; a 64th
    /// where a block of `block_bytes_max` would not fit that.
    pub nvme_segment_bytes: u64,
    /// One block device or file for the NVMe tier, in place of segment files in the state directory. A path where nothing is
    /// becomes a file of `nvme_bytes`; a device or file with something else on it is refused. Default: segment files.
    pub nvme_device: Option<PathBuf>,
    /// Give the room of emptied segments on `nvme_device` back to it: a discard, or a hole in the file. Default false.
    pub nvme_discard: bool,
    /// How the device is reached. Default `auto`.
    pub nvme_engine: NvmeEngine,
    /// Requests on the device at once. Default 32. Each may pin one block of host memory.
    pub nvme_queue_depth: u32,
    /// Threads of the `threads` engine. Default 4.
    pub nvme_threads: u32,
    /// How payloads on NVMe are protected. Default `aes-256-gcm`. What an earlier run wrote is read as it was written.
    pub encryption: Encryption,
    /// File of the master key that wraps the keys of namespaces: 64 hexadecimal digits, readable by its owner only. Default:
    /// `master.key` in the state directory, made at the first start. Without the key nothing on NVMe can be read.
    pub master_key_file: Option<PathBuf>,
    /// How long what was written to NVMe may wait before it survives a power cut, milliseconds. Default 1,000. After a
    /// power cut or a kill at most so much of the latest demotions is lost, and a loss is a miss; a flush waits for nothing.
    /// Costs no memory; each interval in which something was written costs a sync of each segment that was.
    pub nvme_flush_interval_ms: u64,
    /// NUMA node to place host memory on. Default: where the kernel puts it.
    pub numa_node: Option<u32>,
    /// Lock host memory when the limit allows. Default true.
    pub lock_memory: bool,
    /// Huge pages. Default `auto`.
    pub huge_pages: HugePages,
    /// Largest block, bytes. Default 64 MiB, or a quarter of `host_bytes` when that is less.
    pub block_bytes_max: u32,
    /// How long a lease promises, milliseconds. Default 30,000.
    pub lease_ttl_ms: u64,
    /// How long an unsealed reservation lives, milliseconds. Default 30,000.
    pub reservation_ttl_ms: u64,
    /// How long a request may wait when it carries no deadline of its own, milliseconds. Default 10,000.
    pub request_deadline_ms: u64,
    /// How long a device operation may take before its tier is reset, milliseconds. Default 10,000.
    pub operation_deadline_ms: u64,
    /// Connections at once. Default 256. Each costs a thread and up to 4 MiB of buffers.
    pub clients_max: u32,
    /// Namespaces. Default 65,536.
    pub namespaces_max: u32,
    /// Blocks in the index. Default 64 Mi, up to 128 bytes each.
    pub blocks_max: u64,
    /// Sets of labels that blocks of one namespace carry at once, 1 to 65,534 (each up to 64 bytes of memory). Default 16,384.
    /// Past it a block counts as put under every label: a purge by label takes too much then, never too little.
    pub label_sets_per_namespace_max: u32,
    /// Leases of one client. Default 65,536, 48 bytes each.
    pub leases_per_client_max: u32,
    /// Bytes of slots that one client may hold unsealed. Default: a quarter of `host_bytes`.
    pub reserved_bytes_per_client_max: u64,
    /// Bytes of expired leases and reservations that one live client may still map. Default: a quarter of `host_bytes`.
    pub quarantine_bytes_per_client_max: u64,
    /// Fetches and reserves that wait for the device or for room, all clients. Default 16,384.
    pub waiting_max: u32,
    /// The same of one client. Default 256.
    pub waiting_per_client_max: u32,
    /// Demotions in flight. Default 64.
    pub demotions_in_flight_max: u32,
    /// Promotions in flight. Default 256.
    pub promotions_in_flight_max: u32,
    /// Blocks after those of a fetch that found all it asked for that are read from NVMe before they are asked for, where they are cached
    /// and host memory has room for them. Default 32; 0: none. Costs 4 bytes a block of the index.
    pub prefetch_blocks: u32,
    /// Which blocks go when room is needed. Default `lru`. `hazard` costs up to 48 bytes a block more, and what
    /// `eviction_ghosts_max` says.
    pub eviction_policy: EvictionPolicy,
    /// Whether `hazard` keeps blocks from NVMe that are not worth writing there. Default true.
    pub nvme_admission: bool,
    /// Evicted blocks that `hazard` remembers, to learn whether they are asked for again. Default 1,048,576; 16 bytes each, and up
    /// to 48 for the visit that it belongs to, as they come.
    pub eviction_ghosts_max: u64,
    /// A file in which requests are recorded as a trace for `kvctl simulate` and `kvctl replay-gate`: times, lengths and keyed hashes, no
    /// contents. Each start begins a file of its own. Default none. Costs up to 160 MiB.
    pub record_trace: Option<PathBuf>,
    /// Byte quota of each namespace. Default none.
    pub namespace_quota_bytes: Option<u64>,
    /// How long a physical purge waits for clients to give back memory that they still hold, milliseconds. Default 5,000.
    /// What they hold for longer is not zeroed, and the receipt says so. Costs no memory.
    pub purge_lease_grace_ms: u64,
    /// How long a purge waits for caches of the namespace to confirm before its receipt calls them unconfirmed, milliseconds.
    /// Default 2,000. Costs no memory.
    pub purge_confirm_wait_ms: u64,
    /// A file outside the state directory that remembers the generation of every namespace that was invalidated, so that a
    /// state directory restored from an older copy is not served. It must not be restored together with it. Default none.
    /// Each invalidation waits for two more syncs.
    pub anchor_file: Option<PathBuf>,
    /// Kills the process at this step of a purge: a test mode. Default none.
    pub purge_fail_point: Option<String>,
    /// Where peers reach this node, address and port. It needs `peer_secret_file`. Default none: no peers.
    pub peer_listen: Option<SocketAddr>,
    /// This node as the others' list names it, `HOST:PORT`. Default: `peer_listen`.
    pub peer_address: Option<String>,
    /// Members of the cluster, `HOST:PORT` each, this node among them or not; at most 64. Each costs a connection, a thread and
    /// what `peer_connections` says, in each direction. Default none.
    pub peers: Vec<String>,
    /// A name whose addresses are members too, `NAME:PORT`, looked up every five seconds. Default none.
    pub peers_dns: Option<String>,
    /// A Redis server where members find each other, `redis://[USER@]HOST:PORT[/DB]`. Needs the feature `redis`. Default none.
    pub peers_redis: Option<String>,
    /// File of that server's password. Default none.
    pub peers_redis_password_file: Option<PathBuf>,
    /// What this cluster is called there: servers may be shared. Default `kvtier`.
    pub cluster_name: String,
    /// A file whose content, at least 16 bytes, all members know and nobody else. Default none: no peers.
    pub peer_secret_file: Option<PathBuf>,
    /// PEM of this node's certificate, for callers and for those it calls. With `peer_tls_key_file` and `peer_tls_ca_file` everything
    /// between members lies within TLS 1.3, and both ends show a certificate; bytes that go by RDMA stay plain, so that
    /// `peer_transport` takes TCP unless it says `verbs`. Default none.
    pub peer_tls_certificate_file: Option<PathBuf>,
    /// PEM of its key. Default none.
    pub peer_tls_key_file: Option<PathBuf>,
    /// PEM of the authorities that sign every member's certificate. Default none.
    pub peer_tls_ca_file: Option<PathBuf>,
    /// A name that every member's certificate has. Default none: each is for the IP address that is called.
    pub peer_tls_name: Option<String>,
    /// How blocks are read from peers. Default `auto`.
    pub peer_transport: PeerTransport,
    /// RDMA devices to use, by name. Default: all with an active port.
    pub peer_devices: Vec<String>,
    /// Port of `peer_listen`'s address at which bytes are read over TCP; 0 takes a free one. Default 0.
    pub peer_data_port: u16,
    /// TCP connections to each peer for bytes. Default 2.
    pub peer_connections: u32,
    /// Whether blocks that clients put are summed at once, on a thread of its own, rather than when a peer asks for them: the peer
    /// waits less, and who puts pays a pass over the bytes on some processor. Default true.
    pub peer_sums_ahead: bool,
    /// Threads that read from peers, each one fetch at a time; 64 more wait for each. Default 4.
    pub peer_readers: u32,
    /// How long a block stays for a peer that leased it, milliseconds. Default 5,000.
    pub peer_lease_ttl_ms: u64,
    /// How long a fetch may wait for peers before it is a miss, milliseconds. Default 1,000.
    pub peer_fetch_timeout_ms: u64,
    /// How long peers may take to say what they have, milliseconds. Default 100. A lookup of what is not here waits for it.
    pub peer_query_timeout_ms: u64,
    /// The model that engines serve, by its name in `docs/cost-profiles.md`: then a peer's block is fetched only where that is expected to be
    /// faster than recomputing it. Default none: peers are read from unasked.
    pub cost_model: Option<String>,
    /// Their GPUs, by name. Default `h100`.
    pub cost_gpu: String,
    /// How many GPUs share a prompt. Default 1.
    pub cost_gpus: u32,
    /// Tokens of a block, for the cost model. Default 256.
    pub block_tokens: u32,
    /// Keys and values of a token, bytes, for the cost model. Default: the model's at two bytes a number.
    pub kv_bytes_per_token: Option<u64>,
    /// Whether peers are asked at all: `auto` by what the cost model measured, `on` or `off`. Default `auto`.
    pub peer_gate: PeerGate,
    /// A Redis server, or any of a cluster, that keeps blocks of the trust domains that the settings name, `redis://[USER@]HOST:PORT[/DB]`. Each block is
    /// sealed with its namespace's key before it leaves. Needs the feature `redis`. Default none.
    pub remote_redis: Option<String>,
    /// File of that server's password. Default none.
    pub remote_redis_password_file: Option<PathBuf>,
    /// A bucket of S3, or of what speaks as it does, that keeps blocks as `remote_redis` does and instead of it, `s3://BUCKET[/PREFIX]`. Blocks are put
    /// together to packs of some MiB. Needs the feature `s3`. Default none.
    pub remote_s3: Option<String>,
    /// Where that server is, `https://HOST[:PORT]`, or `http://`: what is sent is sealed, and signed. Default: Amazon's, of the region.
    pub remote_s3_endpoint: Option<String>,
    /// The region that requests are signed for. Default `us-east-1`.
    pub remote_s3_region: String,
    /// Whether the bucket is named in the path or in the host. Default: in the path where an endpoint is given.
    pub remote_s3_path_style: Option<bool>,
    /// The file with the keys to that server, as `aws configure` writes it. Read again every minute. Needed with `remote_s3`.
    pub remote_s3_credentials_file: Option<PathBuf>,
    /// Blocks in that bucket whose place is kept in memory; what lies there beyond that is not found. Default 1,000,000. Each costs some
    /// 100 bytes, as it is found.
    pub remote_index_blocks: u32,
    /// Connections to that server that read blocks, each with a thread and one fetch at a time; 64 more wait for each. A connection more
    /// writes, and one probes. Default 2. Each costs 100 KiB and the block that it reads; with `remote_s3` up to 64 MiB that are read ahead.
    pub remote_readers: u32,
    /// Puts that wait to be written to that server; those that find no place are not written. Default 1,024, of 64 KiB at most. The
    /// writing thread costs 4 MiB and a block.
    pub remote_writes_max: u32,
    /// How long that server keeps a block that is not written again, seconds. Default 86,400. With `remote_s3` the same on all members.
    pub remote_ttl_s: u64,
    /// How long a fetch may wait for that server before it is a miss, milliseconds. Default 1,000.
    pub remote_fetch_timeout_ms: u64,
    /// How long that server may take to say what it has, milliseconds. Default 100. A lookup of what is not here waits for it.
    pub remote_query_timeout_ms: u64,
    /// Whether that server is asked at all, where a cost model is named: `auto` by what was measured, `on` or `off`. Default `auto`.
    pub remote_gate: PeerGate,
    /// Whether blocks are compressed before they are sealed for that server: `auto` where the cost model measured that it pays, as `bf16`,
    /// `fp16` or `bytes` always, or `off`. Default `auto`. What is read is known by itself. A reader and the writer take as much memory
    /// again as their block while they run.
    pub remote_compression: RemoteCompression,
    /// Whether members of the cluster hand each other the keys of their objects there, each at most one for a namespace, so that all of
    /// them read what one of them wrote. Default true; without peers there is nobody to share with. The same on all members.
    pub remote_shared: bool,
    /// Logs each n-th decision of the cost model with its terms, at level info; 0: none. Default 0. Costs no memory.
    pub cost_log_every: u32,
    /// Serve only while a majority of `peers` renews this member's lease, so that no member can serve what a purge of the cluster
    /// has hidden. Needs a fixed list of at least three. Default false.
    pub cluster_fence: bool,
    /// How long a renewal lets a member serve, milliseconds; a purge that cannot reach a member waits that long. Default 3,000. The
    /// same on all members.
    pub cluster_lease_ms: u64,
    /// How often leases are renewed and invalidations exchanged, milliseconds. Default 500.
    pub cluster_renew_ms: u64,
    /// Which clock drives the manager. Default `system`.
    pub clock: Clock,
    /// Trust domains beside the default of one a uid.
    pub domains: Vec<DomainSettings>,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            state_dir: PathBuf::new(),
            socket: PathBuf::new(),
            socket_mode: 0o600,
            host_bytes: GIB,
            host_segment_bytes: 0,
            hbm_bytes: 0,
            hbm_segment_bytes: 0,
            hbm_device: 0,
            hbm_library: None,
            nvme_bytes: 0,
            nvme_segment_bytes: 0,
            nvme_engine: NvmeEngine::Auto,
            nvme_queue_depth: 32,
            nvme_threads: 4,
            nvme_device: None,
            nvme_discard: false,
            encryption: Encryption::Aes256Gcm,
            master_key_file: None,
            nvme_flush_interval_ms: 1000,
            numa_node: None,
            lock_memory: true,
            huge_pages: HugePages::Auto,
            block_bytes_max: 0,
            lease_ttl_ms: 30_000,
            reservation_ttl_ms: 30_000,
            request_deadline_ms: 10_000,
            operation_deadline_ms: 10_000,
            clients_max: 256,
            namespaces_max: 65_536,
            blocks_max: 64 << 20,
            label_sets_per_namespace_max: 16_384,
            leases_per_client_max: 65_536,
            reserved_bytes_per_client_max: 0,
            quarantine_bytes_per_client_max: 0,
            waiting_max: 16_384,
            waiting_per_client_max: 256,
            demotions_in_flight_max: 64,
            promotions_in_flight_max: 256,
            prefetch_blocks: 32,
            eviction_policy: EvictionPolicy::Lru,
            nvme_admission: true,
            eviction_ghosts_max: 1 << 20,
            record_trace: None,
            namespace_quota_bytes: None,
            purge_lease_grace_ms: 5000,
            purge_confirm_wait_ms: 2000,
            anchor_file: None,
            purge_fail_point: None,
            peer_listen: None,
            peer_address: None,
            peers: Vec::new(),
            peers_dns: None,
            peers_redis: None,
            peers_redis_password_file: None,
            cluster_name: "kvtier".into(),
            peer_secret_file: None,
            peer_tls_certificate_file: None,
            peer_tls_key_file: None,
            peer_tls_ca_file: None,
            peer_tls_name: None,
            peer_transport: PeerTransport::Auto,
            peer_devices: Vec::new(),
            peer_data_port: 0,
            peer_connections: 2,
            peer_sums_ahead: true,
            peer_readers: 4,
            peer_lease_ttl_ms: 5000,
            peer_fetch_timeout_ms: 1000,
            peer_query_timeout_ms: 100,
            cost_model: None,
            cost_gpu: "h100".into(),
            cost_gpus: 1,
            block_tokens: 256,
            kv_bytes_per_token: None,
            cost_log_every: 0,
            peer_gate: PeerGate::Auto,
            remote_redis: None,
            remote_redis_password_file: None,
            remote_s3: None,
            remote_s3_endpoint: None,
            remote_s3_region: "us-east-1".into(),
            remote_s3_path_style: None,
            remote_s3_credentials_file: None,
            remote_index_blocks: 1_000_000,
            remote_readers: 2,
            remote_writes_max: 1024,
            remote_ttl_s: 86_400,
            remote_fetch_timeout_ms: 1000,
            remote_query_timeout_ms: 100,
            remote_gate: PeerGate::Auto,
            remote_compression: RemoteCompression::Auto,
            remote_shared: true,
            cluster_fence: false,
            cluster_lease_ms: 3000,
            cluster_renew_ms: 500,
            clock: Clock::System,
            domains: Vec::new(),
        }
    }
}

/// A setting that cannot be, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: {remedy}")]
pub struct SettingsError {
    /// Which field, as it is spelled in the settings file.
    pub field: &'static str,
    /// Its value.
    pub value: String,
    /// What to do.
    pub remedy: String,
}

/// Settings whose every field was checked and whose zeros were replaced by what they stand for.
#[derive(Clone, Debug)]
pub struct CheckedSettings {
    settings: Settings,
    core: CheckedCoreSettings,
}

impl std::ops::Deref for CheckedSettings {
    type Target = Settings;
    fn deref(&self) -> &Settings {
        &self.settings
    }
}

impl CheckedSettings {
    /// What the tier manager is given.
    #[must_use]
    pub fn core(&self) -> &CheckedCoreSettings {
        &self.core
    }
}

/// Bytes of an NVMe segment's header, before its first record.
pub(crate) const NVME_HEADER_BYTES: u64 = kvtier_storage::nvme::format::HEADER_BYTES;

impl Settings {
    /// Checks every field, replaces zeros that mean "choose", and derives the core's settings.
    ///
    /// # Errors
    /// The first field that cannot be, with its value and the remedy.
    pub fn check(mut self) -> Result<CheckedSettings, SettingsError> {
        fn refuse(field: &'static str, value: impl ToString, remedy: impl Into<String>) -> SettingsError {
            SettingsError {
                field,
                value: value.to_string(),
                remedy: remedy.into(),
            }
        }
        fn at_least_one(field: &'static str, value: u64) -> Result<(), SettingsError> {
            if value == 0 {
                Err(refuse(field, value, "must be at least 1"))
            } else {
                Ok(())
            }
        }
        if self.state_dir.as_os_str().is_empty() {
            return Err(refuse("state_dir", "\"\"", "name a directory that only this node uses"));
        }
        if self.socket.as_os_str().is_empty() {
            self.socket = self.state_dir.join("kvtier.sock");
        }
        if self.socket.as_os_str().len() > 107 {
            return Err(refuse(
                "socket",
                self.socket.display(),
                "the kernel takes at most 107 bytes for a socket path: choose a shorter one",
            ));
        }
        if self.socket_mode & !0o777 != 0 || self.socket_mode & 0o600 != 0o600 {
            return Err(refuse(
                "socket_mode",
                format!("0o{:o}", self.socket_mode),
                "permission bits between 0o600 and 0o777 that let the owner read and write",
            ));
        }
        if self.eviction_ghosts_max > 1 << 31 {
            return Err(refuse(
                "eviction_ghosts_max",
                self.eviction_ghosts_max,
                "choose at most 2147483648",
            ));
        }
        if self.host_bytes < 8 * MIB || self.host_bytes > 64 << 40 {
            return Err(refuse("host_bytes", self.host_bytes, "choose between 8 MiB and 64 TiB"));
        }
        self.host_bytes &= !(2 * MIB - 1);
        if self.host_segment_bytes == 0 {
            // Each segment is an open file and a mapping, here and in each client: some hundreds of them, not thousands.
            let largest = power_of_two_below(self.host_bytes / 512).max(64 * MIB);
            self.host_segment_bytes = power_of_two_below(self.host_bytes / 32).clamp(2 * MIB, largest);
        }
        if !self.host_segment_bytes.is_multiple_of(4 * KIB) || self.host_segment_bytes > self.host_bytes / 2 {
            return Err(refuse(
                "host_segment_bytes",
                self.host_segment_bytes,
                "a multiple of 4 KiB that fits host_bytes at least twice; 0 chooses one",
            ));
        }
        if self.block_bytes_max == 0 {
            self.block_bytes_max = u32::try_from((self.host_bytes / 4).min(64 * MIB)).unwrap_or(u32::MAX);
        }
        if !(4096..=64 << 20).contains(&self.block_bytes_max) || u64::from(self.block_bytes_max) > self.host_bytes / 2 {
            return Err(refuse(
                "block_bytes_max",
                self.block_bytes_max,
                "between 4 KiB and 64 MiB, and at most half of host_bytes",
            ));
        }
        if self.hbm_bytes > 0 {
            if self.hbm_segment_bytes == 0 {
                self.hbm_segment_bytes = power_of_two_below(self.hbm_bytes / 32).clamp(2 * MIB, 64 * MIB);
            }
            if !self.hbm_segment_bytes.is_multiple_of(2 * MIB) || self.hbm_segment_bytes > 4 * GIB {
                return Err(refuse(
                    "hbm_segment_bytes",
                    self.hbm_segment_bytes,
                    "a multiple of 2 MiB, at most 4 GiB; 0 chooses one",
                ));
            }
            if self.hbm_bytes < self.hbm_segment_bytes || self.hbm_bytes > 16 << 40 {
                return Err(refuse(
                    "hbm_bytes",
                    self.hbm_bytes,
                    format!(
                        "between one segment of {} bytes and 16 TiB, or 0 for no tier in device memory",
                        self.hbm_segment_bytes
                    ),
                ));
            }
        }
        if self.nvme_bytes > 0 {
            if self.nvme_segment_bytes == 0 {
                let largest = power_of_two_below(self.nvme_bytes / 1024).clamp(256 * MIB, 2 * GIB);
                let part = |parts: u64| power_of_two_below(self.nvme_bytes / parts).clamp(MIB, largest);
                // Larger ones where the largest blocks would not fit else.
                let block = u64::from(self.block_bytes_max) + NVME_HEADER_BYTES + 4 * KIB;
                self.nvme_segment_bytes = if part(128) >= block { part(128) } else { part(64) };
            }
            if !self.nvme_segment_bytes.is_multiple_of(4 * KIB)
                || self.nvme_segment_bytes < 64 * KIB
                || self.nvme_segment_bytes > 4 * GIB - 4 * KIB
            {
                return Err(refuse(
                    "nvme_segment_bytes",
                    self.nvme_segment_bytes,
                    "a multiple of 4 KiB between 64 KiB and 4 GiB; 0 chooses one",
                ));
            }
            if self.nvme_bytes < 4 * self.nvme_segment_bytes {
                return Err(refuse(
                    "nvme_bytes",
                    self.nvme_bytes,
                    format!(
                        "room for at least four segments of {} bytes, or 0 for no NVMe tier",
                        self.nvme_segment_bytes
                    ),
                ));
            }
        }
        for (field, value) in [
            ("nvme_queue_depth", u64::from(self.nvme_queue_depth)),
            ("nvme_threads", u64::from(self.nvme_threads)),
            ("nvme_flush_interval_ms", self.nvme_flush_interval_ms),
            ("lease_ttl_ms", self.lease_ttl_ms),
            ("reservation_ttl_ms", self.reservation_ttl_ms),
            ("request_deadline_ms", self.request_deadline_ms),
            ("operation_deadline_ms", self.operation_deadline_ms),
            ("clients_max", u64::from(self.clients_max)),
            ("namespaces_max", u64::from(self.namespaces_max)),
            ("blocks_max", self.blocks_max),
            (
                "label_sets_per_namespace_max",
                u64::from(self.label_sets_per_namespace_max),
            ),
            ("leases_per_client_max", u64::from(self.leases_per_client_max)),
            ("waiting_max", u64::from(self.waiting_max)),
            ("waiting_per_client_max", u64::from(self.waiting_per_client_max)),
            ("demotions_in_flight_max", u64::from(self.demotions_in_flight_max)),
            ("promotions_in_flight_max", u64::from(self.promotions_in_flight_max)),
        ] {
            at_least_one(field, value)?;
        }
        if self.prefetch_blocks > 4096 {
            return Err(refuse(
                "prefetch_blocks",
                self.prefetch_blocks,
                "at most 4096, or 0 for none",
            ));
        }
        if self.nvme_queue_depth > 1024 {
            return Err(refuse("nvme_queue_depth", self.nvme_queue_depth, "at most 1024"));
        }
        if self.nvme_threads > 256 {
            return Err(refuse("nvme_threads", self.nvme_threads, "at most 256"));
        }
        if self
            .nvme_device
            .as_ref()
            .is_some_and(|path| path.as_os_str().is_empty())
        {
            return Err(refuse(
                "nvme_device",
                "\"\"",
                "the path of a block device or a file; leave it out for segment files in the state directory",
            ));
        }
        if self.nvme_discard && self.nvme_device.is_none() {
            return Err(refuse(
                "nvme_discard",
                "true",
                "false, or set nvme_device: the file of an emptied segment is removed anyway",
            ));
        }
        if self.nvme_flush_interval_ms > NVME_FLUSH_INTERVAL_MS_MAX {
            return Err(refuse(
                "nvme_flush_interval_ms",
                self.nvme_flush_interval_ms,
                "at most an hour (3600000): what was demoted since the last is lost with the power",
            ));
        }
        if self
            .master_key_file
            .as_ref()
            .is_some_and(|path| path.as_os_str().is_empty())
        {
            return Err(refuse(
                "master_key_file",
                "\"\"",
                "name a file with 64 hexadecimal digits, or leave it out for master.key in the state directory",
            ));
        }
        if self
            .anchor_file
            .as_ref()
            .is_some_and(|path| path.as_os_str().is_empty())
        {
            return Err(refuse(
                "anchor_file",
                "\"\"",
                "name a file on other storage than the state directory, or leave it out",
            ));
        }
        if let Some(step) = &self.purge_fail_point
            && !crate::node::PURGE_STEPS.contains(&step.as_str())
        {
            return Err(refuse(
                "purge_fail_point",
                step,
                format!("one of {}", crate::node::PURGE_STEPS.join(", ")),
            ));
        }
        let quarter = self.host_bytes / 4;
        if self.reserved_bytes_per_client_max == 0 {
            self.reserved_bytes_per_client_max = quarter;
        }
        if self.quarantine_bytes_per_client_max == 0 {
            self.quarantine_bytes_per_client_max = quarter;
        }
        self.check_domains()?;
        self.check_costs()?;
        self.check_peers()?;
        self.check_remote()?;
        let core = self.core_settings().check().map_err(|error| SettingsError {
            field: error.field,
            value: error.value,
            remedy: error.remedy,
        })?;
        Ok(CheckedSettings { settings: self, core })
    }

    fn check_domains(&self) -> Result<(), SettingsError> {
        for (index, domain) in self.domains.iter().enumerate() {
            let refuse = |remedy: &str| SettingsError {
                field: "domains",
                value: format!("{:?}", domain.name),
                remedy: remedy.to_string(),
            };
            let named = !domain.name.is_empty() && domain.name.len() <= 128;
            if !named || domain.name.contains('/') || domain.name.starts_with("uid-") {
                return Err(refuse("a name of 1 to 128 bytes without '/', not starting with 'uid-'"));
            }
            if self.domains[..index].iter().any(|other| other.name == domain.name) {
                return Err(refuse("two domains have this name: rename one"));
            }
            if let Some(digest) = &domain.token_blake3
                && (digest.len() != 64 || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()))
            {
                return Err(refuse(
                    "token_blake3 must be 64 hex digits: the BLAKE3 digest of the token",
                ));
            }
            if domain.token_file.is_some() {
                return Err(refuse(
                    "its token_file was not read: whoever loads the settings replaces it with_token",
                ));
            }
            if domain.token_blake3.is_none() && domain.uids.is_empty() {
                return Err(refuse("nobody can join it: give token_file, token_blake3 or uids"));
            }
            let taken = |uid: &u32| self.domains[..index].iter().any(|other| other.uids.contains(uid));
            if domain.uids.iter().any(taken) {
                return Err(refuse(
                    "one of its uids belongs to an earlier domain: remove it from one of them",
                ));
            }
        }
        Ok(())
    }

    /// How much longer a token takes for each token before it, where a model is named.
    fn depth_cost(&self) -> f64 {
        let model = self.cost_model.as_deref().and_then(ModelProfile::preset);
        let gpu = GpuProfile::preset(&self.cost_gpu);
        let (Some(model), Some(gpu)) = (model, gpu) else {
            return 0.0;
        };
        let profile = ComputeProfile {
            model,
            gpu,
            gpus: self.cost_gpus,
            utilization: 0.5,
            overhead_s: 0.0,
        };
        let coefficients = profile.coefficients();
        (coefficients.s_per_pair / coefficients.s_per_token).clamp(0.0, 1.0)
    }

    fn core_settings(&self) -> CoreSettings {
        // A client's clock leaps over hours between two requests: nothing may expire while it does.
        let patience = |milliseconds: u64| match self.clock {
            Clock::System => Duration::from_millis(milliseconds),
            Clock::Client => Duration::from_secs(86_400),
        };
        CoreSettings {
            host_bytes: self.host_bytes,
            host_segment_bytes: self.host_segment_bytes,
            hbm_bytes: self.hbm_bytes,
            hbm_segment_bytes: self.hbm_segment_bytes,
            nvme_bytes: self.nvme_bytes,
            nvme_segment_bytes: if self.nvme_bytes == 0 {
                4 * MIB
            } else {
                self.nvme_segment_bytes
            },
            nvme_segment_header_bytes: NVME_HEADER_BYTES,
            nvme_record_index_bytes: kvtier_storage::nvme::format::ENTRY_BYTES,
            // Keys come from clients: without a seed of our own they could choose some that all collide.
            index_seed: getrandom::u64().unwrap_or_else(|_| u64::from(std::process::id())),
            block_bytes_max: self.block_bytes_max,
            eviction: match self.eviction_policy {
                EvictionPolicy::Lru => Eviction::Lru,
                EvictionPolicy::Hazard => Eviction::Hazard,
            },
            ghosts_max: usize::try_from(self.eviction_ghosts_max).unwrap_or(usize::MAX),
            depth_cost: self.depth_cost(),
            nvme_admission: self.nvme_admission,
            // Copies that NVMe holds too take room from others, and a burst of puts needs them: what the policy is to gain decides.
            host_clean_low_permille: match self.eviction_policy {
                EvictionPolicy::Lru => 100,
                EvictionPolicy::Hazard => 50,
            },
            host_clean_high_permille: match self.eviction_policy {
                EvictionPolicy::Lru => 200,
                EvictionPolicy::Hazard => 100,
            },
            namespace_quota_bytes: self.namespace_quota_bytes,
            lease_ttl: patience(self.lease_ttl_ms),
            reservation_ttl: patience(self.reservation_ttl_ms),
            operation_deadline: patience(self.operation_deadline_ms),
            clients_max: self.clients_max as usize,
            namespaces_max: self.namespaces_max as usize,
            blocks_max: usize::try_from(self.blocks_max).unwrap_or(usize::MAX),
            label_sets_per_namespace_max: self.label_sets_per_namespace_max as usize,
            leases_per_client_max: self.leases_per_client_max as usize,
            reserved_bytes_per_client_max: self.reserved_bytes_per_client_max,
            quarantine_bytes_per_client_max: self.quarantine_bytes_per_client_max,
            waiting_max: self.waiting_max as usize,
            waiting_per_client_max: self.waiting_per_client_max as usize,
            demotions_in_flight_max: self.demotions_in_flight_max as usize,
            promotions_in_flight_max: self.promotions_in_flight_max as usize,
            prefetch_blocks: self.prefetch_blocks as usize,
            ..CoreSettings::default()
        }
    }
}

fn power_of_two_below(value: u64) -> u64 {
    if value == 0 { 0 } else { 1 << value.ilog2() }
}

#[cfg(test)]
mod tests;
