//! A first file system: an archive in the kernel's `newc` format (`Documentation/driver-api/early-userspace`), which needs
//! no program to write.

use std::io::{self, Write};

const FILE: u32 = 0o100_755;
const DIRECTORY: u32 = 0o040_755;
const LINK: u32 = 0o120_777;

/// Entries in the order in which the kernel unpacks them: directories before what lies in them.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: Vec<String>,
}

impl Archive {
    /// `path` without a leading slash; the directories above it are made.
    pub(super) fn file(&mut self, path: &str, content: &[u8]) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, FILE, content)
    }

    pub(super) fn link(&mut self, path: &str, target: &str) -> io::Result<()> {
        self.parents(path)?;
        self.entry(path, LINK, target.as_bytes())
    }

    pub(super) fn directory(&mut self, path: &str) -> io::Result<()> {
        self.parents(path)?;
        if self.directories.iter().any(|known| known == path) {
            return Ok(());
        }
        self.directories.push(path.to_owned());
        self.entry(path, DIRECTORY, &[])
    }

    pub(super) fn finish(mut self) -> io::Result<Vec<u8>> {
        self.entry("TRAILER!!!", 0, &[])?;
        Ok(self.bytes)
    }

    fn parents(&mut self, path: &str) -> io::Result<()> {
        match path.rsplit_once('/') {
            Some((parent, _)) => self.directory(parent),
            None => Ok(()),
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) -> io::Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len()).map_err(io::Error::other)?;
        let name = u32::try_from(path.len() + 1).map_err(io::Error::other)?;
        // Magic, then thirteen numbers of eight hexadecimal digits.
        let numbers = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0];
        write!(self.bytes, "070701")?;
        for number in numbers {
            write!(self.bytes, "{number:08x}")?;
        }
        self.bytes.extend(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend(content);
        self.pad();
        Ok(())
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::Archive;

    #[test]
    fn directories_come_once_and_before_their_content() {
        let mut archive = Archive::default();
        archive.file("a/b/file", b"12345").expect("written");
        archive.link("a/b/link", "file").expect("written");
        let bytes = archive.finish().expect("written");
        assert_eq!(bytes.len() % 4, 0);
        let text = String::from_utf8_lossy(&bytes);
        let at = |name: &str| text.find(&format!("{name}\0")).expect("it is there");
        assert!(at("a") < at("a/b") && at("a/b") < at("a/b/file") && at("a/b/file") < at("TRAILER!!!"));
        assert_eq!(text.matches("070701").count(), 5);
        assert_eq!(text.matches("a/b\0").count(), 1);
    }
}
