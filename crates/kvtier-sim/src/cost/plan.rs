/// How a simulated engine decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum CostPlan {
    /// The backend is never asked.
    Recompute,
    /// Whatever is cached is fetched.
    AlwaysFetch,
    /// Fetches where an average of the bandwidth promises to be faster.
    Ewma,
    /// [`kvtier_core::cost::CostModel`], all or nothing.
    GatedBinary,
    /// [`kvtier_core::cost::CostModel`], for an engine that can compute and fetch at the same time.
    GatedSplit,
    /// Knows what this fetch would take and whether it would fail.
    OracleBinary,
    /// The same, and splits.
    OracleSplit,
}

impl CostPlan {
    /// All of them, in the order of a report.
    pub const ALL: [CostPlan; 7] = [
        CostPlan::Recompute,
        CostPlan::AlwaysFetch,
        CostPlan::Ewma,
        CostPlan::GatedBinary,
        CostPlan::GatedSplit,
        CostPlan::OracleBinary,
        CostPlan::OracleSplit,
    ];

    /// How rows name it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            CostPlan::Recompute => "recompute",
            CostPlan::AlwaysFetch => "always_fetch",
            CostPlan::Ewma => "ewma",
            CostPlan::GatedBinary => "gated_binary",
            CostPlan::GatedSplit => "gated_split",
            CostPlan::OracleBinary => "oracle_binary",
            CostPlan::OracleSplit => "oracle_split",
        }
    }

    pub(super) fn is_gated(self) -> bool {
        matches!(self, CostPlan::GatedBinary | CostPlan::GatedSplit)
    }
}
