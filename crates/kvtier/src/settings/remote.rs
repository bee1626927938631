use serde::{Deserialize, Serialize};

use super::{Settings, SettingsError};

/// How blocks are compressed for the remote tier: without loss, and only those that shrink.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RemoteCompression {
    /// As what shrinks a sample of the block most, where the cost model measured that this makes the tier faster; without a model not
    /// at all.
    #[default]
    Auto,
    /// Always, as brain floats: their exponents are set apart.
    Bf16,
    /// Always, as half-precision floats.
    Fp16,
    /// Always, as bytes of any kind.
    Bytes,
    /// Never.
    Off,
}

impl Settings {
    /// The server of the remote tier, if there is one.
    pub(crate) fn remote(&self) -> Option<&str> {
        self.remote_redis.as_deref().or(self.remote_s3.as_deref())
    }

    pub(super) fn check_remote(&self) -> Result<(), SettingsError> {
        let refuse = |field: &'static str, value: String, remedy: &str| {
            Err(SettingsError {
                field,
                value,
                remedy: remedy.to_owned(),
            })
        };
        match (&self.remote_redis, &self.remote_s3) {
            (Some(_), Some(url)) => {
                return refuse(
                    "remote_s3",
                    shown(url),
                    "a node has one remote tier: leave remote_redis out, or this",
                );
            }
            (None, None) => {
                return match (&self.remote_redis_password_file, &self.remote_s3_credentials_file) {
                    (Some(file), _) => refuse(
                        "remote_redis_password_file",
                        file.display().to_string(),
                        "name the server in remote_redis, too",
                    ),
                    (None, Some(file)) => refuse(
                        "remote_s3_credentials_file",
                        file.display().to_string(),
                        "name the bucket in remote_s3, too",
                    ),
                    (None, None) => Ok(()),
                };
            }
            (Some(url), None) => {
                if !cfg!(feature = "redis") {
                    return refuse(
                        "remote_redis",
                        url.clone(),
                        "this program was built without the feature `redis`",
                    );
                }
                if has_password(url) {
                    return refuse(
                        "remote_redis",
                        "a URL with a password".into(),
                        "a password is not for settings that others may see: put it into remote_redis_password_file",
                    );
                }
            }
            (None, Some(url)) => {
                if !cfg!(feature = "s3") {
                    return refuse(
                        "remote_s3",
                        shown(url),
                        "this program was built without the feature `s3`: cargo build --release --features s3",
                    );
                }
                if !url.starts_with("s3://") || url.contains(['?', '#', '@', ' ']) {
                    return refuse("remote_s3", shown(url), "write s3://BUCKET or s3://BUCKET/PREFIX");
                }
                if self.remote_s3_credentials_file.is_none() {
                    return refuse(
                        "remote_s3",
                        url.clone(),
                        "its keys are needed: name a file of them in remote_s3_credentials_file",
                    );
                }
            }
        }
        let (field, url) = match (&self.remote_redis, &self.remote_s3) {
            (Some(url), _) => ("remote_redis", url),
            (None, url) => ("remote_s3", url.as_ref().expect("one of them is there")),
        };
        if self.domains.is_empty() {
            return refuse(
                field,
                url.clone(),
                "blocks leave the node only for trust domains that the settings name: add [[domains]]",
            );
        }
        for (field, value, most) in [
            ("remote_readers", u64::from(self.remote_readers), 256),
            ("remote_index_blocks", u64::from(self.remote_index_blocks), 1 << 30),
            ("remote_writes_max", u64::from(self.remote_writes_max), 1 << 20),
            ("remote_ttl_s", self.remote_ttl_s, 10 * 365 * 86_400),
            ("remote_fetch_timeout_ms", self.remote_fetch_timeout_ms, 3_600_000),
            ("remote_query_timeout_ms", self.remote_query_timeout_ms, 3_600_000),
        ] {
            if value == 0 || value > most {
                return refuse(field, value.to_string(), &format!("at least 1, and at most {most}"));
            }
        }
        Ok(())
    }
}

/// Without what may be secret in it.
fn shown(url: &str) -> String {
    if url.contains('@') {
        "a URL with keys in it".to_owned()
    } else {
        url.to_owned()
    }
}

fn has_password(url: &str) -> bool {
    let authority = url.split_once("://").map_or(url, |(_, rest)| rest);
    let authority = authority.split('/').next().unwrap_or_default();
    let user = authority.rsplit_once('@').map(|(user, _)| user);
    user.is_some_and(|user| user.contains(':'))
}

#[cfg(test)]
mod tests {
    use super::has_password;

    #[test]
    fn a_password_in_an_address_is_seen() {
        assert!(has_password("redis://user:word@host:6379/0"));
        assert!(has_password("redis://:word@host"));
        assert!(!has_password("redis://user@host:6379/0"));
        assert!(!has_password("redis://host:6379"));
    }
}
