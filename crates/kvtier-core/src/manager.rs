use crate::*;

/// The state machine.
pub struct TierManager {
    settings: CheckedCoreSettings,
    policy: Box<dyn EvictionPolicy>,
}

#[expect(unused_variables, clippy::unused_self, reason = "first shape")]
impl TierManager {
    /// No I/O; segments are opened on demand.
    #[must_use]
    pub fn new(settings: CheckedCoreSettings, policy: Box<dyn EvictionPolicy>) -> TierManager {
        TierManager { settings, policy }
    }
    /// Interns a namespace.
    pub fn open_namespace(&mut self, domain: TrustDomain, name: &str) -> Result<(NamespaceId, Generation), Refusal> {
        Ok((NamespaceId(0), Generation(1)))
    }
    /// Finds a namespace.
    #[must_use]
    pub fn find_namespace(&self, domain: TrustDomain, name: &str) -> Option<(NamespaceId, Generation)> {
        None
    }
    /// Sets a quota.
    pub fn set_quota(&mut self, namespace: NamespaceId, quota_bytes: Option<u64>) {}
    /// Interns a realization.
    pub fn open_realization(&mut self, realization: Realization) -> Result<RealizationId, Refusal> {
        Ok(RealizationId(0))
    }
    /// A client arrives.
    pub fn connect(&mut self, client: ClientId, domain: TrustDomain, now: Time) -> Result<(), Refusal> {
        Ok(())
    }
    /// A client leaves.
    pub fn disconnect(&mut self, client: ClientId, departure: Departure, now: Time) {}
    /// Where each key is.
    pub fn lookup(&mut self, request: &Request<'_>, now: Time) -> Result<Vec<Option<Tier>>, Refusal> {
        Ok(vec![None; request.hashes.len()])
    }
    /// Leases.
    pub fn fetch(&mut self, request: &Request<'_>, scope: FetchScope, now: Time) -> Result<Answer<Vec<Fetched>>, Refusal> {
        Ok(Answer::Ready(vec![Fetched::Miss; request.hashes.len()]))
    }
    /// Slots.
    pub fn reserve(&mut self, request: &Request<'_>, lengths: &[u32], now: Time) -> Result<Answer<Vec<Reserved>>, Refusal> {
        Ok(Answer::Ready(vec![Reserved::Busy; request.hashes.len()]))
    }
    /// Slots ahead.
    pub fn grant(&mut self, client: ClientId, length: u32, count: u32, now: Time) -> Vec<(ReservationId, Extent)> {
        Vec::new()
    }
    /// Publishes.
    pub fn seal(
        &mut self, client: ClientId, namespace: NamespaceId, realization: RealizationId, generation: Generation, items: &[SealItem], now: Time,
    ) -> Result<Vec<Sealed>, Refusal> {
        Ok(vec![Sealed::Stale; items.len()])
    }
    /// Gives slots back.
    pub fn abandon(&mut self, client: ClientId, reservations: &[ReservationId], now: Time) -> u32 {
        0
    }
    /// Gives leases back.
    pub fn release(&mut self, client: ClientId, leases: &[LeaseId], now: Time) -> u32 {
        0
    }
    /// Forgets.
    pub fn delete(&mut self, request: &Request<'_>, now: Time) -> Result<Vec<bool>, Refusal> {
        Ok(vec![false; request.hashes.len()])
    }
    /// Raises a generation.
    pub fn invalidate(&mut self, namespace: NamespaceId, target: Option<Generation>, now: Time) -> OperationId {
        OperationId(0)
    }
    /// Writes down.
    pub fn flush(&mut self, domain: Option<TrustDomain>, now: Time) -> OperationId {
        OperationId(0)
    }
    /// No new leases, reservations or grants.
    pub fn drain(&mut self, now: Time) {}
    /// An answer.
    pub fn handle_event(&mut self, event: Event, now: Time) {}
    /// Time passed.
    pub fn handle_timeout(&mut self, now: Time) {}
    /// The next thing to do.
    #[must_use]
    pub fn poll_action(&mut self) -> Option<Action> {
        None
    }
    /// When to call [`TierManager::handle_timeout`].
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        None
    }
    /// Counters and gauges.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        Statistics::default()
    }
    /// Of one domain.
    #[must_use]
    pub fn domain_statistics(&self, domain: TrustDomain) -> DomainStatistics {
        DomainStatistics::default()
    }
    /// The generation of a namespace that is in force.
    #[must_use]
    pub fn generation(&self, namespace: NamespaceId) -> Generation {
        let _ = namespace;
        Generation(1)
    }

    /// Whether a client, connected or departed alive, still holds a lease or a reservation.
    #[must_use]
    pub fn holds_anything(&self, client: ClientId) -> bool {
        let _ = client;
        true
    }
    /// Panics where tables contradict each other.
    pub fn check_invariants(&self) {
        self.policy.check_invariants();
        assert!(self.settings.host_bytes > 0);
    }
}
