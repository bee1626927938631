//! Keys of objects on a remote tier, from member to member: so that each can read what another wrote there, and the server cannot.
//!
//! Two members whose counters of a namespace are equal have seen the same invalidations, so one may hand the other what its objects are
//! sealed with. It does so under a key that both agree on for this once (X25519, the public halves in frames that only a member can have
//! sent), because frames are not encrypted; who records them and learns the cluster's secret later reads nothing.
//!
//! ```text
//! agreed -> HKDF-SHA256, salt = both public halves, the asker's first -> key   info "kvtier shared group v1"
//! answer  = public half (32), AES-256-GCM under a nonce of zeroes of: group (16), key of its objects (32); tag (16)
//!           the name DOMAIN/NAME and the counters are associated data
//! ```

use std::time::Instant;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use aws_lc_rs::agreement::{EphemeralPrivateKey, UnparsedPublicKey, X25519, agree_ephemeral};
use aws_lc_rs::hkdf::{HKDF_SHA256, Salt};
use aws_lc_rs::rand::SystemRandom;
use zeroize::Zeroizing;

use super::Shared;
use super::message::{MemberKey, Message, Versions};

const PUBLIC_BYTES: usize = 32;
const GROUP_BYTES: usize = 16 + 32;
const TAG_BYTES: usize = 16;

/// What objects of one namespace are sealed with under one state of its invalidations. Zeroed when dropped.
#[derive(Clone)]
pub(in crate::node) struct SharedGroup {
    /// Its fingerprint, which is in the objects' names.
    pub(in crate::node) generation: [u8; 16],
    /// What the key of its objects is made of.
    pub(in crate::node) key: Zeroizing<[u8; 32]>,
}

/// A question that was asked.
struct Asking {
    private: EphemeralPrivateKey,
    public: [u8; PUBLIC_BYTES],
}

impl Asking {
    fn new() -> Option<Asking> {
        let private = EphemeralPrivateKey::generate(&X25519, &SystemRandom::new()).ok()?;
        let public = private.compute_public_key().ok()?.as_ref().try_into().ok()?;
        Some(Asking { private, public })
    }

    fn open(self, name: &str, versions: &Versions, answer: &[u8]) -> Option<SharedGroup> {
        if answer.len() != PUBLIC_BYTES + GROUP_BYTES + TAG_BYTES {
            return None;
        }
        let (theirs, sealed) = answer.split_at(PUBLIC_BYTES);
        let key = agree(self.private, theirs, &self.public, theirs)?;
        let mut sealed = Zeroizing::new(sealed.to_vec());
        let opened = key
            .open_in_place(
                Nonce::assume_unique_for_key([0; NONCE_LEN]),
                Aad::from(binding(name, versions)),
                &mut sealed,
            )
            .ok()?;
        let (generation, key) = opened.split_at_checked(16)?;
        Some(SharedGroup {
            generation: generation.try_into().ok()?,
            key: Zeroizing::new(key.try_into().ok()?),
        })
    }
}

fn answer(name: &str, versions: &Versions, asker: &[u8; PUBLIC_BYTES], group: &SharedGroup) -> Option<Vec<u8>> {
    let Asking { private, public } = Asking::new()?;
    let key = agree(private, asker, asker, &public)?;
    let mut sealed = Zeroizing::new(group.generation.to_vec());
    sealed.reserve_exact(32 + TAG_BYTES);
    sealed.extend_from_slice(&*group.key);
    key.seal_in_place_append_tag(
        Nonce::assume_unique_for_key([0; NONCE_LEN]),
        Aad::from(binding(name, versions)),
        &mut *sealed,
    )
    .ok()?;
    let mut answer = public.to_vec();
    answer.extend_from_slice(&sealed);
    Some(answer)
}

/// The key of one answer: it seals one message.
fn agree(private: EphemeralPrivateKey, theirs: &[u8], asker: &[u8], answerer: &[u8]) -> Option<LessSafeKey> {
    let salt = [asker, answerer].concat();
    agree_ephemeral(private, UnparsedPublicKey::new(&X25519, theirs), (), |agreed| {
        let secret = Salt::new(HKDF_SHA256, &salt).extract(agreed);
        let mut key = Zeroizing::new([0; 32]);
        let output = secret.expand(&[b"kvtier shared group v1"], HKDF_SHA256).map_err(drop)?;
        output.fill(&mut *key).map_err(drop)?;
        UnboundKey::new(&AES_256_GCM, &*key).map(LessSafeKey::new).map_err(drop)
    })
    .ok()
}

fn binding(name: &str, versions: &Versions) -> Vec<u8> {
    let mut bytes = name.as_bytes().to_vec();
    for (member, count) in &versions.0 {
        bytes.extend(member.0);
        bytes.extend(count.to_le_bytes());
    }
    bytes
}

impl Shared {
    /// Members that can be asked now.
    pub(in crate::node) fn live_members(&self) -> Vec<MemberKey> {
        let links = self.links();
        let live = links.iter().filter(|link| link.live().is_some());
        live.filter_map(|link| MemberKey::parse(&link.peer()?.member)).collect()
    }

    /// The groups that these members' own objects of a namespace lie in, of those that have one and know of the same invalidations.
    pub(in crate::node) fn ask_for_groups(
        &self,
        members: &[MemberKey],
        name: &str,
        versions: &Versions,
        until: Instant,
    ) -> Vec<(MemberKey, SharedGroup)> {
        let mut groups = Vec::new();
        for link in self.links() {
            let member = link.peer().and_then(|peer| MemberKey::parse(&peer.member));
            let (Some(member), Some(asking)) = (member, Asking::new()) else {
                continue;
            };
            if !members.contains(&member) {
                continue;
            }
            let question = Message::Share {
                namespace: name.to_owned(),
                versions: versions.clone(),
                public: asking.public,
            };
            if let Ok(Message::Shared(answer)) = link.ask(&question, until)
                && let Some(group) = asking.open(name, versions, &answer)
            {
                groups.push((member, group));
            }
        }
        groups
    }

    /// What a member is answered that asks for this node's group; empty: it has none that the member may have.
    pub(super) fn share_group(&self, name: &str, versions: &Versions, public: &[u8; PUBLIC_BYTES]) -> Vec<u8> {
        let shared = || {
            let (domain_name, bare) = name.split_once('/')?;
            let domain = self.domains.shared(domain_name)?;
            let (namespace, generation) = self.driver.look(|manager| manager.find_namespace(domain, bare))?;
            let refusal = self.driver.recorder.refusal(domain_name, bare, generation);
            if refusal.is_some() || !self.generations.is_serving() {
                return None;
            }
            let group = self.driver.remote()?.group_to_share(namespace, versions)?;
            answer(name, versions, public, &group)
        };
        shared().unwrap_or_default()
    }

    /// Names a namespace the same way on every member, and tells who lacks the cluster's secret nothing.
    #[cfg(feature = "remote")]
    pub(in crate::node) fn print_of(&self, name: &str) -> [u8; 32] {
        self.credentials.secret.print_of(name)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn versions(count: u64) -> Versions {
        Versions(BTreeMap::from([(MemberKey([7; 16]), count)]))
    }

    fn group() -> SharedGroup {
        SharedGroup {
            generation: [3; 16],
            key: Zeroizing::new([5; 32]),
        }
    }

    #[test]
    fn who_asked_can_open_the_answer_and_its_key_is_not_in_it() {
        let asking = Asking::new().expect("random bytes");
        let answer = answer("team/chat", &versions(2), &asking.public, &group()).expect("sealed");
        assert!(!answer.windows(8).any(|window| window == [5; 8] || window == [3; 8]));
        let opened = asking.open("team/chat", &versions(2), &answer).expect("opened");
        assert_eq!((opened.generation, *opened.key), ([3; 16], [5; 32]));
    }

    #[test]
    fn an_answer_to_another_question_does_not_open() {
        let ask = || Asking::new().expect("random bytes");
        let asked = ask();
        let sealed = answer("team/chat", &versions(2), &asked.public, &group()).expect("sealed");
        assert!(
            ask().open("team/chat", &versions(2), &sealed).is_none(),
            "another asker"
        );
        let with = |name: &str, versions: &Versions, change: &dyn Fn(&mut Vec<u8>)| {
            let asked = ask();
            let mut sealed = answer("team/chat", &super::tests::versions(2), &asked.public, &group()).expect("sealed");
            change(&mut sealed);
            asked.open(name, versions, &sealed).is_some()
        };
        assert!(with("team/chat", &versions(2), &|_| ()));
        assert!(!with("team/other", &versions(2), &|_| ()));
        assert!(!with("team/chat", &versions(3), &|_| ()));
        assert!(!with("team/chat", &versions(2), &|sealed| sealed[40] ^= 1));
        assert!(!with("team/chat", &versions(2), &|sealed| sealed[0] ^= 1));
        assert!(!with("team/chat", &versions(2), &|sealed| sealed.truncate(90)));
        assert!(!with("team/chat", &versions(2), &Vec::clear));
    }
}
