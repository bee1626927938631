//! The file that says who a node is to the server, as other tools of S3 keep theirs.
//!
//! ```text
//! [default]
//! aws_access_key_id = AKIA...
//! aws_secret_access_key = ...
//! aws_session_token = ...            (where there is one)
//! ```
//!
//! It is read again every minute, so that keys that change need no restart.

use std::fmt;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use aws_credential_types::Credentials;
use aws_credential_types::provider::error::CredentialsError;
use aws_credential_types::provider::{ProvideCredentials, Result as Provided, future};
use zeroize::Zeroizing;

/// How long what was read is used.
const READ_AGAIN: Duration = Duration::from_secs(60);

/// Reads the file whenever the SDK asks.
pub(super) struct FromFile(pub(super) PathBuf);

impl FromFile {
    pub(super) fn read(&self) -> Result<Credentials, String> {
        let path = self.0.display();
        let text = std::fs::read_to_string(&self.0).map_err(|error| format!("{path} cannot be read: {error}"))?;
        parse(&Zeroizing::new(text)).map_err(|what| format!("{path} {what}"))
    }
}

/// Without what the file says.
impl fmt::Debug for FromFile {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "FromFile({})", self.0.display())
    }
}

impl ProvideCredentials for FromFile {
    fn provide_credentials<'a>(&'a self) -> future::ProvideCredentials<'a>
    where
        Self: 'a,
    {
        let provided: Provided = self.read().map_err(CredentialsError::provider_error);
        future::ProvideCredentials::ready(provided)
    }
}

/// Of the section `default`, or of the only one, or of lines without one.
fn parse(text: &str) -> Result<Credentials, String> {
    let mut sections: Vec<(&str, Section<'_>)> = vec![("", Section::default())];
    for line in text.lines().map(str::trim) {
        if line.is_empty() || line.starts_with(['#', ';']) {
            continue;
        }
        if let Some(section) = line.strip_prefix('[').and_then(|line| line.strip_suffix(']')) {
            sections.push((section.trim(), Section::default()));
            continue;
        }
        let (Some((name, value)), Some((_, section))) = (line.split_once('='), sections.last_mut()) else {
            return Err("has a line that is no `NAME = VALUE`".to_owned());
        };
        let value = Some(value.trim()).filter(|value| !value.is_empty());
        match name.trim() {
            "aws_access_key_id" => section.key = value,
            "aws_secret_access_key" => section.secret = value,
            "aws_session_token" => section.token = value,
            // Tools keep other things there.
            _ => {}
        }
    }
    sections.retain(|(_, section)| section.key.is_some() || section.secret.is_some());
    let is_default = |(name, _): &&(&str, Section<'_>)| *name == "default";
    let section = match (sections.iter().find(is_default), sections.as_slice()) {
        (Some((_, section)), _) | (None, [(_, section)]) => section,
        (None, []) => return Err("has no aws_access_key_id and aws_secret_access_key".to_owned()),
        (None, _) => return Err("has several sections and none is called [default]".to_owned()),
    };
    let (Some(key), Some(secret)) = (section.key, section.secret) else {
        return Err("has aws_access_key_id or aws_secret_access_key, and needs both".to_owned());
    };
    let again = SystemTime::now() + READ_AGAIN;
    let token = section.token.map(str::to_owned);
    Ok(Credentials::new(key, secret, token, Some(again), "file"))
}

#[derive(Default)]
struct Section<'a> {
    key: Option<&'a str>,
    secret: Option<&'a str>,
    token: Option<&'a str>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_section_or_the_only_one_is_read() {
        let both = "# mine\n[other]\naws_access_key_id=x\naws_secret_access_key=y\n[default]\naws_access_key_id = AK\naws_secret_access_key = se=cret\naws_session_token = t\nregion = eu\n";
        let read = parse(both).expect("credentials");
        assert_eq!((read.access_key_id(), read.secret_access_key()), ("AK", "se=cret"));
        assert_eq!(read.session_token(), Some("t"));
        assert!(read.expiry().is_some_and(|at| at > SystemTime::now()));
        for one in [
            "aws_access_key_id=AK\naws_secret_access_key=s",
            "[team]\naws_access_key_id=AK\naws_secret_access_key=s\n",
        ] {
            assert_eq!(parse(one).expect("credentials").access_key_id(), "AK");
        }
    }

    #[test]
    fn what_is_none_is_refused_without_being_shown() {
        for bad in [
            "",
            "[default]\n",
            "aws_access_key_id=AK",
            "aws_secret_access_key=secret",
            "secret",
            "[a]\naws_access_key_id=AK\naws_secret_access_key=secret\n[b]\naws_access_key_id=AK\naws_secret_access_key=secret",
            "aws_access_key_id=AK\naws_secret_access_key=",
        ] {
            let words = parse(bad).err().unwrap_or_else(|| panic!("{bad} is taken"));
            assert!(!words.contains("secret\"") && !words.contains("= secret"), "{words}");
        }
        let missing = FromFile("/nonexistent/keys".into());
        assert!(missing.read().is_err_and(|words| words.contains("/nonexistent/keys")));
        assert!(!format!("{missing:?}").contains("AK"));
    }
}
