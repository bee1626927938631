//! What stands in for the remote tier in a program that was built without it: there is none, and settings that name one are refused.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvtier_core::{BlockHash, NamespaceId, RealizationId, Tier, TrustDomain};

use super::attempt::Attempt;
use super::domains::Domains;
use super::driver::Driver;
use super::peers::versions::VersionBook;
use super::peers::{FetchJob, LookupJob, SharedGroup, Versions};
use super::remote_status::{Erasure, RemoteStatus};
use super::{StartError, StartProgress};
use crate::keys::KeyError;
use crate::settings::CheckedSettings;

/// Never there.
pub(crate) enum Remote {}

impl Remote {
    #[expect(clippy::unnecessary_wraps, reason = "the face of the real one")]
    pub(super) fn start(
        _settings: &CheckedSettings,
        _driver: &Arc<Driver>,
        _domains: &Arc<Domains>,
        _versions: Option<&Arc<VersionBook>>,
        _observer: &dyn Fn(StartProgress),
    ) -> Result<Option<Arc<Remote>>, StartError> {
        Ok(None)
    }

    pub(super) fn stop(&self) {
        match *self {}
    }

    pub(crate) fn may_help(&self, _: TrustDomain) -> bool {
        match *self {}
    }

    pub(crate) fn is_open(&self) -> bool {
        match *self {}
    }

    pub(crate) fn weigh_behind(&self, _: &FetchJob) {
        match *self {}
    }

    pub(crate) fn offer(&self, _: TrustDomain, _: NamespaceId, _: RealizationId, _: Vec<BlockHash>) {
        match *self {}
    }

    pub(crate) fn forget(
        &self,
        _: TrustDomain,
        _: NamespaceId,
        _: RealizationId,
        _: &[BlockHash],
    ) -> Result<Vec<bool>, KeyError> {
        match *self {}
    }

    pub(crate) fn set_apart(&self, _: NamespaceId) -> Result<(), KeyError> {
        match *self {}
    }

    pub(crate) fn erase(&self, _: NamespaceId, _: Instant) -> Option<Result<Erasure, String>> {
        match *self {}
    }

    pub(in crate::node) fn group_to_share(&self, _: NamespaceId, _: &Versions) -> Option<SharedGroup> {
        match *self {}
    }

    pub(in crate::node) fn shares_groups(&self) -> bool {
        match *self {}
    }

    pub(crate) fn computed(&self, _: u32, _: u32, _: Duration) {
        match *self {}
    }

    pub(crate) fn kind(&self) -> &str {
        match *self {}
    }

    pub(crate) fn address(&self) -> &str {
        match *self {}
    }

    pub(crate) fn status(&self) -> RemoteStatus {
        match *self {}
    }

    pub(crate) fn fetch_here(&self, _: FetchJob) -> bool {
        match *self {}
    }

    pub(crate) fn look_here(&self, _: LookupJob) -> bool {
        match *self {}
    }

    pub(crate) fn explain_here(&self, _: LookupJob) -> bool {
        match *self {}
    }

    pub(crate) fn can_explain(&self, _: TrustDomain) -> Result<(), String> {
        match *self {}
    }

    pub(crate) fn add_found(&self, _: &LookupJob, _: &mut [Option<Tier>]) {
        match *self {}
    }

    pub(crate) fn copy(&self, _: &Arc<Attempt>, _: bool) {
        match *self {}
    }
}
