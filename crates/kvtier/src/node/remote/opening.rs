//! Opens the server that the settings name.

use std::io;
use std::time::Duration;

use kvtier_storage::remote::{ObjectStore, StoreError};

use crate::node::StartError;
use crate::settings::CheckedSettings;

/// `None` where they name none.
pub(super) fn open(settings: &CheckedSettings) -> Result<Option<Box<dyn ObjectStore>>, StartError> {
    let Some(address) = settings.remote() else {
        return Ok(None);
    };
    let opened = if settings.remote_s3.is_some() {
        bucket(settings)
    } else {
        server(settings)
    };
    let refused = |error: StoreError| StartError::Remote {
        address: address.to_owned(),
        source: io::Error::other(error),
    };
    Ok(Some(opened.map_err(refused)?))
}

fn timeout(settings: &CheckedSettings) -> Duration {
    Duration::from_millis(settings.remote_fetch_timeout_ms)
}

#[cfg(feature = "redis")]
fn server(settings: &CheckedSettings) -> Result<Box<dyn ObjectStore>, StoreError> {
    use kvtier_storage::remote::redis::{RedisSettings, RedisStore};

    let url = settings.remote_redis.clone().unwrap_or_default();
    let password = settings.remote_redis_password_file.as_ref();
    let password = password.map(|file| {
        let read = std::fs::read_to_string(file).map(zeroize::Zeroizing::new);
        read.map_err(|error| StoreError::Settings {
            reason: format!("its password file {} cannot be read: {error}", file.display()),
        })
    });
    let store = RedisStore::new(RedisSettings {
        url: match password.transpose()? {
            Some(password) => with_password(&url, password.trim()),
            None => url,
        },
        connections: settings.remote_readers as usize + 2,
        timeout: timeout(settings),
    })?;
    Ok(Box::new(store))
}

#[cfg(feature = "s3")]
fn bucket(settings: &CheckedSettings) -> Result<Box<dyn ObjectStore>, StoreError> {
    use kvtier_storage::remote::s3::{S3Settings, S3Store};

    /// Requests at once: what it takes to fill a link to a server that answers after some tens of milliseconds.
    const REQUESTS: usize = 16;

    let url = settings.remote_s3.as_deref().unwrap_or_default();
    let path = url.strip_prefix("s3://").unwrap_or(url);
    let (bucket, prefix) = path.split_once('/').unwrap_or((path, ""));
    let store = S3Store::new(&S3Settings {
        bucket: bucket.to_owned(),
        prefix: prefix.trim_end_matches('/').to_owned(),
        endpoint: settings.remote_s3_endpoint.clone(),
        region: settings.remote_s3_region.clone(),
        // Amazon's has buckets in the host, almost all others in the path.
        path_style: settings
            .remote_s3_path_style
            .unwrap_or(settings.remote_s3_endpoint.is_some()),
        credentials: settings.remote_s3_credentials_file.clone().unwrap_or_default(),
        requests: REQUESTS,
        ttl: Duration::from_secs(settings.remote_ttl_s),
        timeout: timeout(settings),
        index_objects: settings.remote_index_blocks as usize,
    })?;
    Ok(Box::new(store))
}

#[cfg(not(feature = "redis"))]
fn server(_: &CheckedSettings) -> Result<Box<dyn ObjectStore>, StoreError> {
    Err(lacking("redis"))
}

#[cfg(not(feature = "s3"))]
fn bucket(_: &CheckedSettings) -> Result<Box<dyn ObjectStore>, StoreError> {
    Err(lacking("s3"))
}

/// The settings were checked for it.
#[cfg(not(all(feature = "redis", feature = "s3")))]
fn lacking(feature: &str) -> StoreError {
    StoreError::Settings {
        reason: format!("this program was built without the feature `{feature}`"),
    }
}

/// The address with a password in it, which was checked to have none.
#[cfg(feature = "redis")]
fn with_password(url: &str, password: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("redis", url));
    let (user, host) = rest.rsplit_once('@').unwrap_or(("", rest));
    let mut escaped = zeroize::Zeroizing::new(String::with_capacity(3 * password.len()));
    for byte in password.bytes() {
        if byte.is_ascii_alphanumeric() {
            escaped.push(byte.into());
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    format!("{scheme}://{user}:{}@{host}", escaped.as_str())
}

#[cfg(all(test, feature = "redis"))]
mod tests {
    use super::with_password;

    #[test]
    fn a_password_of_any_characters_fits_into_an_address() {
        assert_eq!(with_password("redis://h:1/2", "a b@/"), "redis://:a%20b%40%2F@h:1/2");
        assert_eq!(with_password("rediss://user@h", "word"), "rediss://user:word@h");
    }
}
