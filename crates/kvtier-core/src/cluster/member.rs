/// A member of the fixed list: its place in it, the same on every node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberId(pub u32);

/// One run of a member. Only compared for equality: a counter on disk or a random number will do, as long as no earlier run had it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Incarnation(pub u64);

/// A renewal, counted within an incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Round(pub u64);

/// The state of a member's table, counted within an incarnation: each change of a name's generation is the next version.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version(pub u64);

/// How much of a member's table another has durable. Says nothing once that member has another incarnation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Known {
    /// Whose versions these are.
    pub incarnation: Incarnation,
    /// Everything up to this one.
    pub version: Version,
}

/// A set of members, one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct MemberSet(u64);

impl MemberSet {
    pub(super) const MEMBERS_MAX: u32 = 64;

    pub(super) fn add(&mut self, member: MemberId) {
        self.0 |= 1 << member.0;
    }

    pub(super) fn has(self, member: MemberId) -> bool {
        self.0 & (1 << member.0) != 0
    }
}
