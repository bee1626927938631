//! Addresses of this node's network interfaces.

use std::ffi::CStr;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// IP addresses of the interface `name`, link-local ones left out: they mean nothing without the interface.
///
/// # Errors
/// What the system says.
pub(crate) fn addresses_of(name: &str) -> io::Result<Vec<IpAddr>> {
    let mut first = std::ptr::null_mut();
    // SAFETY: the system writes one pointer.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut addresses = Vec::new();
    let mut entry = first;
    while !entry.is_null() {
        // SAFETY: an entry of the list, which is freed below.
        let this = unsafe { &*entry };
        entry = this.ifa_next;
        // SAFETY: every entry has a name that ends in zero.
        let of = unsafe { CStr::from_ptr(this.ifa_name) };
        if this.ifa_addr.is_null() || of.to_bytes() != name.as_bytes() {
            continue;
        }
        // SAFETY: an address has at least its family.
        let family = libc::c_int::from(unsafe { (*this.ifa_addr).sa_family });
        if family == libc::AF_INET {
            // SAFETY: the family says what it is; the copy needs no alignment.
            let address = unsafe { this.ifa_addr.cast::<libc::sockaddr_in>().read_unaligned() };
            addresses.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))));
        } else if family == libc::AF_INET6 {
            // SAFETY: the family says what it is; the copy needs no alignment.
            let address = unsafe { this.ifa_addr.cast::<libc::sockaddr_in6>().read_unaligned() };
            addresses.push(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)));
        }
    }
    // SAFETY: the list came from the system and is freed once.
    unsafe { libc::freeifaddrs(first) };
    addresses.retain(|address| !matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()));
    Ok(addresses)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_loopback_interface_has_its_address_and_an_unknown_one_none() {
        let addresses = addresses_of("lo").expect("listed");
        assert!(addresses.contains(&IpAddr::V4(Ipv4Addr::LOCALHOST)), "{addresses:?}");
        assert!(addresses_of("no-such-interface").expect("listed").is_empty());
    }
}
