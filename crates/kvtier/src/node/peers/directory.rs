//! Members that find each other through a Redis server.
//!
//! Each member keeps one key, `CLUSTER:member:ADDRESS`, that expires; its value is a JSON object with the member's name and the epoch of its
//! run. Whoever's key is there is a member. What was invalidated is not kept there: a server that fails over may lose it.

use std::io;
use std::time::Duration;

use redis::{Connection, ConnectionInfo, IntoConnectionInfo};
use serde_json::json;

use super::message::Introduction;

/// How long an entry stays after its member was last there.
const EXPIRY_SECONDS: u64 = 15;
/// How long the server may take for each answer.
const PATIENCE: Duration = Duration::from_secs(2);
/// Keys that one step of a scan looks at.
const SCAN_COUNT: u32 = 512;
/// Members that are taken from the server.
const MEMBERS_MAX: usize = 1024;

/// See the module.
pub(super) struct Directory {
    server: ConnectionInfo,
    /// Where it is, for messages: no password in it.
    pub(super) name: String,
    prefix: String,
    key: String,
    entry: String,
    connection: Option<Connection>,
}

impl Directory {
    /// `url` is `redis://[USER@]HOST:PORT[/DB]`.
    pub(super) fn new(url: &str, password: Option<&str>, cluster: &str, own: &Introduction) -> io::Result<Directory> {
        let mut server = url.into_connection_info().map_err(io::Error::other)?;
        if let Some(password) = password {
            let settings = server.redis_settings().clone().set_password(password);
            server = server.set_redis_settings(settings);
        }
        let prefix = format!("{cluster}:member:");
        Ok(Directory {
            name: server.addr().to_string(),
            server,
            key: format!("{prefix}{}", own.address),
            prefix,
            entry: json!({"member": own.member, "epoch": own.incarnation}).to_string(),
            connection: None,
        })
    }

    /// Says that this node is there, and takes the addresses of all who are.
    pub(super) fn exchange(&mut self) -> io::Result<Vec<String>> {
        let outcome = self.try_exchange();
        if outcome.is_err() {
            // What a broken connection still delivers would be taken for an answer.
            self.connection = None;
        }
        outcome.map_err(io::Error::other)
    }

    /// This node goes.
    pub(super) fn leave(&mut self) {
        let key = self.key.clone();
        if let Ok(connection) = self.connection() {
            let _: redis::RedisResult<()> = redis::cmd("DEL").arg(key).query(connection);
        }
    }

    fn try_exchange(&mut self) -> redis::RedisResult<Vec<String>> {
        let (key, entry, prefix) = (self.key.clone(), self.entry.clone(), self.prefix.clone());
        let connection = self.connection()?;
        let () = redis::cmd("SET")
            .arg(key)
            .arg(entry)
            .arg("EX")
            .arg(EXPIRY_SECONDS)
            .query(connection)?;
        let mut members = Vec::new();
        let mut cursor = 0_u64;
        loop {
            let (next, keys): (u64, Vec<String>) = redis::cmd("SCAN")
                .arg(cursor)
                .arg("MATCH")
                .arg(format!("{}*", escaped(&prefix)))
                .arg("COUNT")
                .arg(SCAN_COUNT)
                .query(connection)?;
            members.extend(
                keys.iter()
                    .filter_map(|key| Some(key.strip_prefix(&prefix)?.to_owned())),
            );
            if next == 0 || members.len() >= MEMBERS_MAX {
                break;
            }
            cursor = next;
        }
        members.sort_unstable();
        members.dedup();
        Ok(members)
    }

    fn connection(&mut self) -> redis::RedisResult<&mut Connection> {
        let connection = match self.connection.take() {
            Some(connection) => connection,
            None => {
                let client = redis::Client::open(self.server.clone())?;
                let connection = client.get_connection_with_timeout(PATIENCE)?;
                connection.set_read_timeout(Some(PATIENCE))?;
                connection.set_write_timeout(Some(PATIENCE))?;
                connection
            }
        };
        Ok(self.connection.insert(connection))
    }
}

/// A pattern that matches only this text.
fn escaped(text: &str) -> String {
    let mut pattern = String::with_capacity(text.len());
    for character in text.chars() {
        if matches!(character, '*' | '?' | '[' | ']' | '^' | '\\') {
            pattern.push('\\');
        }
        pattern.push(character);
    }
    pattern
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clusters_name_is_no_pattern() {
        assert_eq!(escaped("a*b?[c]:member:"), "a\\*b\\?\\[c\\]:member:");
    }

    #[test]
    fn a_password_is_not_part_of_the_name() {
        let own = Introduction {
            address: "node-a:7411".into(),
            ..Introduction::default()
        };
        let directory = Directory::new("redis://localhost:7777/2", Some("secret"), "c", &own).expect("a url");
        assert!(
            !directory.name.contains("secret") && directory.name.contains("7777"),
            "{}",
            directory.name
        );
    }
}
