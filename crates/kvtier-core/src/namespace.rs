/// A tenant's isolation domain, interned once. A name is scoped to its [`TrustDomain`].
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NamespaceId(pub u32);

/// The version of a namespace. Raising it hides every older block at once. A max-register: it never falls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Generation(pub u64);

/// Who may see whose memory: clients of one domain share segments and trust each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(pub u32);
