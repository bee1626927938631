//! Who a connection is: from a token or the peer's uid to a trust domain.

use std::collections::BTreeMap;

use kvtier_core::TrustDomain;
use parking_lot::Mutex;
use subtle::ConstantTimeEq;

use crate::settings::DomainSettings;

/// Domains that may exist: those in the settings, and one for each uid that has connected.
const DOMAINS_MAX: usize = 65_536;

/// What a connection may do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Identity {
    pub(crate) domain: TrustDomain,
    /// The daemon's own user or root, without a token: sees and flushes every domain.
    pub(crate) administrator: bool,
}

/// Trust domains by name, and the rules for joining them.
pub(crate) struct Domains {
    configured: Vec<Configured>,
    names: Mutex<BTreeMap<String, TrustDomain>>,
    own_uid: u32,
}

struct Configured {
    domain: TrustDomain,
    token_digest: Option<[u8; 32]>,
    uids: Vec<u32>,
}

impl Domains {
    pub(crate) fn new(settings: &[DomainSettings], own_uid: u32) -> Domains {
        let mut names = BTreeMap::new();
        let configured = settings
            .iter()
            .zip(0..)
            .map(|(settings, index)| {
                let domain = TrustDomain(index);
                names.insert(settings.name.clone(), domain);
                let token_digest = settings
                    .token_blake3
                    .as_deref()
                    .and_then(|hex| blake3::Hash::from_hex(hex).ok());
                Configured {
                    domain,
                    token_digest: token_digest.map(Into::into),
                    uids: settings.uids.clone(),
                }
            })
            .collect();
        Domains {
            configured,
            names: Mutex::new(names),
            own_uid,
        }
    }

    /// The identity of a peer with this uid and token; `None` when the token is nobody's or there are too many domains.
    pub(crate) fn authenticate(&self, uid: u32, token: &[u8]) -> Option<Identity> {
        if token.is_empty() {
            let administrator = uid == self.own_uid || uid == 0;
            let configured = self.configured.iter().find(|configured| configured.uids.contains(&uid));
            let domain = match configured {
                Some(configured) => configured.domain,
                None => self.intern(&format!("uid-{uid}"))?,
            };
            return Some(Identity { domain, administrator });
        }
        let digest: [u8; 32] = blake3::hash(token.trim_ascii()).into();
        let mut joined = None;
        // Every digest is compared, whichever matches: the time taken tells nothing.
        for configured in &self.configured {
            let expected = configured.token_digest.unwrap_or_default();
            let equal = bool::from(expected.ct_eq(&digest)) && configured.token_digest.is_some();
            if equal {
                joined = Some(Identity {
                    domain: configured.domain,
                    administrator: false,
                });
            }
        }
        joined
    }

    /// Every domain with its name, in name order.
    pub(crate) fn all(&self) -> Vec<(String, TrustDomain)> {
        self.names
            .lock()
            .iter()
            .map(|(name, domain)| (name.clone(), *domain))
            .collect()
    }

    /// The name of a domain that somebody joined.
    pub(crate) fn name_of(&self, domain: TrustDomain) -> String {
        let names = self.names.lock();
        names
            .iter()
            .find(|(_, named)| **named == domain)
            .map(|(name, _)| name.clone())
            .unwrap_or_default()
    }

    /// The domain that the settings name so. Those of users are a node's own: between nodes only names of the settings match.
    pub(crate) fn shared(&self, name: &str) -> Option<TrustDomain> {
        let domain = self.names.lock().get(name).copied()?;
        self.is_shared(domain).then_some(domain)
    }

    /// Whether members of a cluster have this domain in common, if they are configured alike.
    pub(crate) fn is_shared(&self, domain: TrustDomain) -> bool {
        (domain.0 as usize) < self.configured.len()
    }

    /// The domain of this name, made if need be; `None` when there are too many.
    pub(crate) fn intern(&self, name: &str) -> Option<TrustDomain> {
        let mut names = self.names.lock();
        if let Some(domain) = names.get(name) {
            return Some(*domain);
        }
        if names.len() >= DOMAINS_MAX {
            return None;
        }
        let domain = TrustDomain(u32::try_from(names.len()).ok()?);
        names.insert(name.to_string(), domain);
        Some(domain)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn domains() -> Domains {
        let team = |name: &str, token: &str, uids: &[u32]| {
            DomainSettings {
                name: name.into(),
                uids: uids.to_vec(),
                ..DomainSettings::default()
            }
            .with_token(token)
        };
        Domains::new(&[team("a", "secret-a", &[]), team("b", "secret-b", &[1000])], 999)
    }

    #[test]
    fn a_token_wins_over_the_uid_and_gives_no_administrator() {
        let identity = domains().authenticate(0, b"secret-b\n").expect("known token");
        assert_eq!(
            identity,
            Identity {
                domain: TrustDomain(1),
                administrator: false
            }
        );
    }

    #[test]
    fn an_unknown_token_joins_nothing() {
        assert_eq!(domains().authenticate(999, b"secret-c"), None);
    }

    #[test]
    fn users_without_a_token_get_a_domain_each() {
        let domains = domains();
        let first = domains.authenticate(5, b"").expect("uid 5");
        let second = domains.authenticate(6, b"").expect("uid 6");
        assert_ne!(first.domain, second.domain);
        assert_eq!(domains.authenticate(5, b"").expect("again"), first);
        assert!(!first.administrator);
        assert!(domains.authenticate(999, b"").expect("own user").administrator);
        assert_eq!(
            domains.authenticate(1000, b"").expect("configured").domain,
            TrustDomain(1)
        );
    }
}
