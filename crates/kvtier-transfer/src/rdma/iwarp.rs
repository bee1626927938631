//! iWARP: RDMA over a TCP connection of the device, which only librdmacm can make.
//!
//! What differs from RoCE and InfiniBand, and where it is dealt with:
//!
//! - The answering side listens at an IP address of its device; what it answers a question with is the port, and a token
//!   that whoever calls must show ([`Manager`]).
//! - A write completes when it was sent, whether it is refused or not: a read of a byte of it goes behind each, and that one's
//!   completion counts. Completions of reads and writes have no common order. Both in `verbs::queue`.
//! - A refused request ends the connection without a word about which it was: everything in flight goes again, each alone,
//!   and one that ends the connection alone, twice, was refused. In `peer`.
//! - The target of a read is memory that the peer may write, under a key of its own. In `verbs::device`.

use std::io;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::VerbsSettings;
use super::gid::{self, Gid, Kind};
use super::verbs::{Call, Ends, Listener, Path, QueuePair, addresses_of};
use super::wire::End;
use crate::remote::draw_u64;

/// How long the listening thread sleeps at most, which bounds how long its end takes.
const SLEEP: Duration = Duration::from_millis(100);

/// Connects queue pairs of one NIC.
pub(super) struct Manager {
    address: IpAddr,
    listener: Listener,
}

impl Manager {
    pub(super) fn start(name: &str, address: [u8; 16]) -> Result<Arc<Manager>, String> {
        let address = Ipv6Addr::from(address).to_canonical();
        let listener = Listener::bind(address)
            .map_err(|why| format!("{name} speaks iWARP, which is connected through librdmacm: {why}"))?;
        let manager = Arc::new(Manager { address, listener });
        let weak = Arc::downgrade(&manager);
        let listening = std::thread::Builder::new()
            .name(format!("kvtier-{name}-cm"))
            .spawn(move || listen_until_gone(&weak));
        listening.map_err(|error| format!("{name}: no thread: {error}"))?;
        Ok(manager)
    }

    pub(super) fn port(&self) -> u16 {
        self.listener.port()
    }

    /// Lets one call for this queue pair: who shows the answer.
    pub(super) fn expect(&self, pair: &Arc<QueuePair>, path: &Path) -> u64 {
        let token = draw_u64();
        self.listener.expect(token, pair, ends(pair, path));
        token
    }

    pub(super) fn call(&self, pair: &QueuePair, path: &Path, peer: &End, patience: Duration) -> io::Result<()> {
        let port = u16::try_from(peer.destination.number).map_err(io::Error::other)?;
        let to = SocketAddr::new(Ipv6Addr::from(peer.destination.gid).to_canonical(), port);
        let call = Call {
            from: self.address,
            to,
            token: peer.token,
            ends: ends(pair, path),
        };
        pair.keep(call.run(patience)?);
        Ok(())
    }
}

fn ends(pair: &QueuePair, path: &Path) -> Ends {
    Ends {
        number: pair.number(),
        reads_out: path.reads_out,
        reads_in: path.reads_in,
    }
}

fn listen_until_gone(manager: &Weak<Manager>) {
    while let Some(manager) = manager.upgrade() {
        if manager.listener.serve(SLEEP).is_err() {
            std::thread::sleep(SLEEP);
        }
    }
}

/// The address of a device: one of its network interface, by the same rules as for RoCE.
pub(super) fn choose(name: &str, gid: Option<[u8; 16]>, settings: &VerbsSettings) -> Result<Gid, String> {
    let interface = interface_of(name, gid).ok_or_else(|| format!("{name} belongs to no network interface"))?;
    let addresses = addresses_of(&interface).map_err(|error| format!("{interface}: {error}"))?;
    let table: Vec<Gid> = (0u8..)
        .zip(addresses)
        .filter(|(index, _)| settings.gid_index.is_none_or(|only| only == *index))
        .map(|(index, address)| Gid {
            index,
            address: match address {
                IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
                IpAddr::V6(v6) => v6.octets(),
            },
            kind: Kind::Iwarp,
        })
        .collect();
    gid::choose(&table, settings.network.as_ref())
        .ok_or_else(|| format!("{name}: its network interface {interface} has no address"))
}

/// Where the kernel does not say, by the hardware address, which an iWARP device's GID begins with.
fn interface_of(name: &str, gid: Option<[u8; 16]>) -> Option<String> {
    let told = std::fs::read_to_string(format!("/sys/class/infiniband/{name}/ports/1/gid_attrs/ndevs/0"));
    if let Ok(told) = told
        && !told.trim().is_empty()
    {
        return Some(told.trim().to_owned());
    }
    let hardware: Vec<String> = gid?[..6].iter().map(|byte| format!("{byte:02x}")).collect();
    let hardware = hardware.join(":");
    let mut interfaces = std::fs::read_dir("/sys/class/net").ok()?.flatten();
    interfaces.find_map(|entry| {
        let address = std::fs::read_to_string(entry.path().join("address")).ok()?;
        (address.trim() == hardware).then(|| entry.file_name().to_string_lossy().into_owned())
    })
}
