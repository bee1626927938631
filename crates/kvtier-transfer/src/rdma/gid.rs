//! Which of a port's addresses a queue pair uses.

use std::net::{IpAddr, Ipv6Addr};

/// A network: an address of it and the length of its prefix in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Any address of it.
    pub address: IpAddr,
    /// Length of the prefix, up to 32 or 128.
    pub prefix: u8,
}

impl Network {
    fn contains(&self, address: Ipv6Addr) -> bool {
        let (network, prefix) = match self.address {
            IpAddr::V4(v4) => (v4.to_ipv6_mapped(), 96 + u32::from(self.prefix.min(32))),
            IpAddr::V6(v6) => (v6, u32::from(self.prefix.min(128))),
        };
        let mask = if prefix == 0 { 0 } else { u128::MAX << (128 - prefix) };
        u128::from(network) & mask == u128::from(address) & mask
    }
}

/// What kind of packets an address stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    InfiniBand,
    RoceV1,
    RoceV2,
    /// An IP address of the device's network interface.
    Iwarp,
}

/// One entry of a port's table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Gid {
    pub(super) index: u8,
    pub(super) address: [u8; 16],
    pub(super) kind: Kind,
}

/// The best of a table: of the wanted network first, then RoCE v2 before v1, IPv4 before global IPv6 before link-local.
pub(super) fn choose(table: &[Gid], network: Option<&Network>) -> Option<Gid> {
    let rank = |gid: &&Gid| {
        let address = Ipv6Addr::from(gid.address);
        let in_network = network.is_some_and(|network| network.contains(address));
        let kind = match gid.kind {
            Kind::RoceV2 | Kind::Iwarp => 2,
            Kind::InfiniBand => 1,
            Kind::RoceV1 => 0,
        };
        let reach = if address.to_ipv4_mapped().is_some() {
            2
        } else {
            i32::from(!address.is_unicast_link_local())
        };
        (in_network, kind, reach, std::cmp::Reverse(gid.index))
    };
    table.iter().max_by_key(rank).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gid(index: u8, address: &str, kind: Kind) -> Gid {
        let address: IpAddr = address.parse().expect("an address");
        let address = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped(),
            IpAddr::V6(v6) => v6,
        };
        Gid {
            index,
            address: address.octets(),
            kind,
        }
    }

    fn usual() -> Vec<Gid> {
        vec![
            gid(0, "fe80::1", Kind::RoceV1),
            gid(1, "fe80::1", Kind::RoceV2),
            gid(2, "10.0.0.1", Kind::RoceV1),
            gid(3, "10.0.0.1", Kind::RoceV2),
            gid(4, "2001:db8::1", Kind::RoceV2),
            gid(5, "192.168.7.1", Kind::RoceV1),
        ]
    }

    #[test]
    fn the_second_version_with_an_ipv4_address_is_preferred() {
        assert_eq!(choose(&usual(), None).map(|gid| gid.index), Some(3));
        let without = [gid(0, "fe80::1", Kind::RoceV2), gid(1, "2001:db8::1", Kind::RoceV2)];
        assert_eq!(choose(&without, None).map(|gid| gid.index), Some(1));
        assert_eq!(choose(&[], None), None);
    }

    #[test]
    fn an_address_of_the_wanted_network_wins_whatever_its_kind() {
        let network = |address: &str, prefix| Network {
            address: address.parse().expect("an address"),
            prefix,
        };
        let chosen = |network: Network| choose(&usual(), Some(&network)).map(|gid| gid.index);
        assert_eq!(chosen(network("192.168.0.0", 16)), Some(5));
        assert_eq!(chosen(network("2001:db8::", 32)), Some(4));
        assert_eq!(chosen(network("10.0.0.0", 8)), Some(3));
        assert_eq!(chosen(network("172.16.0.0", 12)), Some(3), "none is in it");
        assert_eq!(chosen(network("0.0.0.0", 0)), Some(3), "all IPv4 addresses are");
    }
}
