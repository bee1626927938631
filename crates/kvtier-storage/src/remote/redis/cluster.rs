//! Which server of a Redis cluster has a key (<https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/>).

use std::sync::Arc;
use std::time::Instant;

use super::connection::{Answer, Connection, Fault};
use super::pool::{Pool, Trouble};

/// Every cluster has so many.
const SLOTS: usize = 16_384;
/// Servers that slots lie on, at most: the specification's own bound is a thousand.
const SERVERS_MAX: usize = 4096;
/// A slot that lies nowhere.
const NOWHERE: u16 = u16::MAX;

/// The servers, and where each slot lies. One server that is no cluster has all.
pub(super) struct Servers {
    pub(super) pools: Vec<Arc<Pool>>,
    /// Empty: all on the first.
    slots: Vec<u16>,
}

/// Its host, empty for where it was asked, its port, and ranges of slots.
type Master = (String, u16, Vec<(u16, u16)>);

/// What a server says of its cluster.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Told {
    masters: Vec<Master>,
    /// Slots are on their way to or from the server that was asked.
    is_moving: bool,
}

/// The slot of a key without braces.
pub(super) fn slot(key: &[u8]) -> usize {
    usize::from(crc16(key)) % SLOTS
}

/// CRC-16/XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0_u16, |crc, byte| {
        (0..8).fold(crc ^ (u16::from(*byte) << 8), |crc, _| {
            if crc & 0x8000 == 0 {
                crc << 1
            } else {
                (crc << 1) ^ 0x1021
            }
        })
    })
}

impl Servers {
    pub(super) fn one(pool: &Arc<Pool>) -> Servers {
        Servers {
            pools: vec![Arc::clone(pool)],
            slots: Vec::new(),
        }
    }

    pub(super) fn is_cluster(&self) -> bool {
        !self.slots.is_empty()
    }

    /// Which of the servers has a key; `None` while nobody has its slot.
    pub(super) fn of(&self, key: &str) -> Option<usize> {
        match self.slots.get(slot(key.as_bytes())) {
            None => Some(0),
            Some(&NOWHERE) => None,
            Some(&server) => Some(usize::from(server)),
        }
    }

    /// Whether another map says the same.
    pub(super) fn is_like(&self, other: &Servers) -> bool {
        let names = |servers: &Servers| -> Vec<String> {
            let pools = servers.pools.iter();
            pools.map(|pool| pool.server.name.clone()).collect()
        };
        self.slots == other.slots && names(self) == names(other)
    }

    /// Those that were told, at connections that are there already where they are the same servers.
    pub(super) fn of_told(told: &Told, asked: &Arc<Pool>, known: &Servers) -> Servers {
        let mut servers = Servers {
            pools: Vec::new(),
            slots: vec![NOWHERE; SLOTS],
        };
        for (host, port, ranges) in told.masters.iter().take(SERVERS_MAX) {
            let server = asked.server.sibling(host, *port);
            let same = known.pools.iter().find(|pool| pool.server.name == server.name);
            let pool = same.map_or_else(|| Arc::new(asked.beside(server)), Arc::clone);
            let place = u16::try_from(servers.pools.len()).unwrap_or(NOWHERE);
            servers.pools.push(pool);
            for &(first, last) in ranges {
                servers.slots[usize::from(first)..=usize::from(last)].fill(place);
            }
        }
        servers
    }
}

/// Asks a server for its cluster; `None`: it is in none.
pub(super) fn ask(pool: &Pool, until: Instant) -> Result<Option<Told>, Trouble> {
    pool.run("CLUSTER NODES", until, |connection| match told(connection) {
        Err(Fault::Refused(reason)) if is_none(&reason) => Ok(None),
        told => told.map(Some),
    })
}

/// The server has no cluster. Whoever may not ask, or asks too many, is told something else: an erasure must not take that for this.
fn is_none(reason: &str) -> bool {
    let reason = reason.to_ascii_lowercase();
    reason.contains("unknown command") || reason.contains("cluster") && reason.contains("disabled")
}

fn told(connection: &mut Connection) -> Result<Told, Fault> {
    connection.ask(&[b"CLUSTER", b"NODES"])?;
    connection.flush()?;
    match connection.answer()? {
        Answer::String(Some(text)) => Ok(parse(&String::from_utf8_lossy(&text))),
        _ => Err(Fault::Garbled("something else than a cluster's nodes")),
    }
}

/// Lines `ID HOST:PORT@BUS[,NAME] FLAGS MASTER PING PONG EPOCH LINK [SLOT | FIRST-LAST | [SLOT->-ID] | [SLOT-<-ID]]...`. What is not
/// understood is left out: then nobody has those slots.
fn parse(text: &str) -> Told {
    let mut told = Told {
        masters: Vec::new(),
        is_moving: false,
    };
    for line in text.lines() {
        let fields: Vec<&str> = line.split_ascii_whitespace().collect();
        let [_, address, flags, _, _, _, _, _, slots @ ..] = fields.as_slice() else {
            continue;
        };
        let flags: Vec<&str> = flags.split(',').collect();
        if flags.contains(&"myself") && slots.iter().any(|slot| slot.starts_with('[')) {
            told.is_moving = true;
        }
        if !flags.contains(&"master") || flags.contains(&"noaddr") || flags.contains(&"fail") {
            continue;
        }
        let (address, name) = address.split_once(',').unwrap_or((address, ""));
        // What follows a second comma are further properties.
        let name = name.split(',').next().unwrap_or_default();
        let address = address.split('@').next().unwrap_or_default();
        let Some((host, port)) = address.rsplit_once(':') else {
            continue;
        };
        let Ok(port) = port.parse() else { continue };
        let host = if name.is_empty() { host } else { name };
        let ranges: Vec<(u16, u16)> = slots.iter().filter_map(|slots| range(slots)).collect();
        if !ranges.is_empty() {
            told.masters.push((host.to_owned(), port, ranges));
        }
    }
    told
}

fn range(slots: &str) -> Option<(u16, u16)> {
    let (first, last) = slots.split_once('-').unwrap_or((slots, slots));
    let (first, last) = (first.parse().ok()?, last.parse().ok()?);
    (first <= last && usize::from(last) < SLOTS).then_some((first, last))
}

impl Told {
    /// Whether slots are on their way: a look through all keys may miss one that moves meanwhile.
    pub(super) fn is_moving(&self) -> bool {
        self.is_moving
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn slots_are_the_specifications() {
        assert_eq!(crc16(b"123456789"), 0x31c3);
        assert_eq!(slot(b"foo"), 12_182);
        assert_eq!(slot(b""), 0);
    }

    #[test]
    fn what_a_cluster_says_is_taken_apart() {
        let text = "\
07c37df 127.0.0.1:30004@31004,hostname4 slave e7d1ee 0 1426238317239 4 connected\n\
67ed2db 127.0.0.1:30002@31002 master - 0 1426238316232 2 connected 5461-10922\n\
292f8b3 127.0.0.1:30003@31003,name3,shard-id=1 master - 0 1426238318243 3 connected 10923-16383 7\n\
6ec2392 :30005@31005 myself,master - 0 1426238316741 5 connected 0-3 5 [93-<-292f8b3] [4->-67ed2db]\n\
824fe11 127.0.0.1:30006@31006 master,fail - 0 1426238317741 6 connected 20-30\n\
e7d1eec 127.0.0.1:30001@31001 master - 0 0 1 connected\n\
broken line\n\
bad 127.0.0.1:x@1 master - 0 0 1 connected 1 99999 7-3 -\n";
        let told = parse(text);
        assert!(told.is_moving());
        let expected = [
            ("127.0.0.1", 30_002, vec![(5461, 10_922)]),
            ("name3", 30_003, vec![(10_923, 16_383), (7, 7)]),
            ("", 30_005, vec![(0, 3), (5, 5)]),
        ];
        let expected = expected.map(|(host, port, ranges)| (host.to_owned(), port, ranges));
        assert_eq!(told.masters, expected);
    }

    #[test]
    fn only_a_server_without_a_cluster_is_taken_for_one() {
        assert!(is_none("ERR This instance has cluster support disabled"));
        assert!(is_none(
            "ERR unknown command 'CLUSTER', with args beginning with: 'NODES'"
        ));
        for other in [
            "ERR max number of clients reached",
            "NOPERM this user has no permissions to run the 'cluster|nodes' command",
            "LOADING Redis is loading the dataset in memory",
            "CLUSTERDOWN The cluster is down",
        ] {
            assert!(!is_none(other), "{other}");
        }
    }

    proptest! {
        #[test]
        fn arbitrary_text_never_panics(text in "[a-z0-9 ,:@\\[\\]<>\\-\n]{0,300}") {
            let _ = parse(&text);
        }
    }
}
