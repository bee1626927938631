use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use parking_lot::Mutex;

use crate::keys::{KeyError, disk};
use crate::purge::NamespaceSettings;

const FILE: &str = "namespaces.json";

/// What administrators set of namespaces, by `DOMAIN/NAME`: a JSON object in the state directory, replaced as a whole.
pub(super) struct NamespaceFile {
    path: PathBuf,
    settings: Mutex<BTreeMap<String, NamespaceSettings>>,
}

impl NamespaceFile {
    pub(super) fn open(directory: &Path) -> Result<NamespaceFile, KeyError> {
        let path = directory.join(FILE);
        let settings = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(|error| KeyError::io("read", &path)(error.into()))?,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(KeyError::io("read", &path)(error)),
        };
        Ok(NamespaceFile {
            path,
            settings: Mutex::new(settings),
        })
    }

    pub(super) fn of(&self, namespace: &str) -> NamespaceSettings {
        self.settings.lock().get(namespace).cloned().unwrap_or_default()
    }

    pub(super) fn all(&self) -> Vec<(String, NamespaceSettings)> {
        let settings = self.settings.lock();
        settings
            .iter()
            .map(|(name, settings)| (name.clone(), settings.clone()))
            .collect()
    }

    /// Durable before this returns.
    pub(super) fn set(&self, namespace: &str, settings: NamespaceSettings) -> Result<(), KeyError> {
        let mut present = self.settings.lock();
        let mut changed = present.clone();
        changed.insert(namespace.to_owned(), settings);
        let text =
            serde_json::to_vec_pretty(&changed).map_err(|error| KeyError::io("write", &self.path)(error.into()))?;
        let aside = self.path.with_extension("next");
        OpenOptions::new()
            .create(true)
            .write(true)
            .truncate(true)
            .mode(0o600)
            .open(&aside)
            .and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()))
            .map_err(KeyError::io("write", &aside))?;
        disk::rename(&aside, &self.path)?;
        *present = changed;
        Ok(())
    }
}
