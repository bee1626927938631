use std::path::Path;
use std::sync::Arc;

use clap::ValueEnum;
use kvtier_storage::nvme::Encryption;

use crate::cache::Cache;
use crate::ours::Tier;
use crate::rival::{Foyer, Setup};
use crate::values::Values;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Engine {
    /// kvtier, sealed: its default.
    Kvtier,
    /// kvtier with a checksum alone, which is what foyer has.
    KvtierNone,
    /// foyer on threads, at its best.
    FoyerPsync,
    /// foyer on its io_uring engine, at its best.
    FoyerUring,
    /// foyer with its own settings.
    FoyerDefault,
    /// foyer on threads, with writers that insert without waiting.
    FoyerUnpaced,
}

impl Engine {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Engine::Kvtier | Engine::KvtierNone => "kvtier",
            Engine::FoyerPsync => "foyer psync",
            Engine::FoyerUring => "foyer io_uring",
            Engine::FoyerDefault => "foyer default",
            Engine::FoyerUnpaced => "foyer unpaced",
        }
    }

    pub(crate) fn encryption(self) -> &'static str {
        match self {
            Engine::Kvtier => "aes-256-gcm",
            _ => "none",
        }
    }

    pub(crate) fn is_ours(self) -> bool {
        matches!(self, Engine::Kvtier | Engine::KvtierNone)
    }

    /// Whether the figures are compared with it: with the better of these two, for reads and writes apart.
    pub(crate) fn is_rival(self) -> bool {
        matches!(self, Engine::FoyerPsync | Engine::FoyerUring)
    }

    pub(crate) async fn open(self, directory: &Path, values: &Arc<Values>) -> anyhow::Result<Arc<dyn Cache>> {
        Ok(match self {
            Engine::Kvtier => Arc::new(Tier::open(directory, Encryption::Aes256Gcm, values).await?),
            Engine::KvtierNone => Arc::new(Tier::open(directory, Encryption::None, values).await?),
            Engine::FoyerPsync => Arc::new(Foyer::open(directory, Setup::PSYNC, values).await?),
            Engine::FoyerUring => Arc::new(Foyer::open(directory, Setup::URING, values).await?),
            Engine::FoyerDefault => Arc::new(Foyer::open(directory, Setup::DEFAULT, values).await?),
            Engine::FoyerUnpaced => Arc::new(Foyer::open(directory, Setup::UNPACED, values).await?),
        })
    }
}
