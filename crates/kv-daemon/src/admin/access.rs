//! Who asks, and what they may.

use serde::{Deserialize, Serialize};

/// What a token is for. Each role may do what the one before it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Look: namespaces, purges, receipts, events; unbound also status and metrics.
    Read,
    /// Also purge and invalidate.
    Purge,
    /// Also set namespaces; unbound also flush and manage tokens.
    Admin,
}

impl Role {
    /// As it is spelled in JSON.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Role::Read => "read",
            Role::Purge => "purge",
            Role::Admin => "admin",
        }
    }
}

/// Who asks: a token that was shown and found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The token's id, never the token.
    pub token: String,
    /// What it is for.
    pub role: Role,
    /// Names that it is bound to, `DOMAIN/NAME` or `NAME` of any domain; `None`: all.
    pub namespaces: Option<Vec<String>>,
}

impl Caller {
    /// Whether this namespace, `DOMAIN/NAME`, exists for the caller.
    #[must_use]
    pub fn may_see(&self, namespace: &str) -> bool {
        let name = bare(namespace);
        self.namespaces.as_ref().is_none_or(|bound| {
            bound
                .iter()
                .any(|one| one == namespace || (one == name && !one.contains('/')))
        })
    }

    /// What a name stands for in a call that takes every domain at once: itself when the caller may have it in all of them,
    /// else each `DOMAIN/NAME` that the caller is bound to.
    #[must_use]
    pub fn expand(&self, name: &str) -> Vec<String> {
        let Some(bound) = &self.namespaces else {
            return vec![name.to_string()];
        };
        if name.contains('/') {
            return Vec::from_iter(self.may_see(name).then(|| name.to_string()));
        }
        if bound.iter().any(|one| one == name) {
            return vec![name.to_string()];
        }
        let mut names: Vec<String> = bound.iter().filter(|one| bare(one) == name).cloned().collect();
        names.sort();
        names.dedup();
        names
    }
}

/// `NAME` of `DOMAIN/NAME`.
#[must_use]
pub fn bare(namespace: &str) -> &str {
    namespace.split_once('/').map_or(namespace, |(_, name)| name)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bound(names: &[&str]) -> Caller {
        Caller {
            token: "tok".into(),
            role: Role::Read,
            namespaces: Some(names.iter().map(ToString::to_string).collect()),
        }
    }

    #[test]
    fn a_bound_token_sees_its_names_and_no_others() {
        let caller = bound(&["red/a", "b"]);
        for (namespace, seen) in [
            ("red/a", true),
            ("blue/a", false),
            ("red/b", true),
            ("blue/b", true),
            ("red/ab", false),
            ("b/red", false),
            ("red/a/b", false),
        ] {
            assert_eq!(caller.may_see(namespace), seen, "{namespace}");
        }
        assert!(!bound(&[]).may_see("red/a"));
        assert_eq!(caller.expand("a"), ["red/a"]);
        assert_eq!(caller.expand("b"), ["b"]);
        assert_eq!(caller.expand("c"), Vec::<String>::new());
        assert_eq!(caller.expand("blue/a"), Vec::<String>::new());
    }

    #[test]
    fn an_unbound_token_sees_all() {
        let caller = Caller {
            namespaces: None,
            ..bound(&[])
        };
        assert!(caller.may_see("x/y"));
        assert_eq!(caller.expand("y"), ["y"]);
    }

    #[test]
    fn roles_contain_each_other() {
        assert!(Role::Read < Role::Purge && Role::Purge < Role::Admin);
    }
}
