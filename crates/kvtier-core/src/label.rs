/// What a caller wants to be able to purge by itself: an artifact, a document, a customer. A digest of its name; two names
/// that share one would be purged together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Label(pub u64);

impl Label {
    /// The label of a name.
    #[must_use]
    pub fn of(name: &str) -> Label {
        let digest = blake3::Hasher::new_derive_key("kvtier label v1")
            .update(name.as_bytes())
            .finalize();
        Label(u64::from_le_bytes(
            *digest.as_bytes().first_chunk().expect("a digest has 32 bytes"),
        ))
    }
}

/// The labels that a block was put under, as far as they are kept: two, or else any.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Labels {
    /// None.
    #[default]
    None,
    /// This one.
    One(Label),
    /// Both, the smaller one first.
    Two(Label, Label),
    /// More than are kept, or not known which: every label's purge takes the block.
    Any,
}

impl Labels {
    /// Those of a put.
    #[must_use]
    pub fn given(label: Option<Label>) -> Labels {
        label.map_or(Labels::None, Labels::One)
    }

    /// Those of both.
    #[must_use]
    pub fn and(self, other: Labels) -> Labels {
        match (self, other) {
            (Labels::Any, _) | (_, Labels::Any) => Labels::Any,
            (labels, Labels::None) | (Labels::None, labels) => labels,
            (labels, Labels::One(label)) | (Labels::One(label), labels) => labels.and_one(label),
            (Labels::Two(..), Labels::Two(..)) if self == other => self,
            (Labels::Two(..), Labels::Two(..)) => Labels::Any,
        }
    }

    fn and_one(self, label: Label) -> Labels {
        match self {
            _ if self.may_include(label) => self,
            Labels::None => Labels::One(label),
            Labels::One(one) => Labels::Two(one.min(label), one.max(label)),
            Labels::Two(..) | Labels::Any => Labels::Any,
        }
    }

    /// Whether a purge of this label has to take the block.
    #[must_use]
    pub fn may_include(self, label: Label) -> bool {
        match self {
            Labels::None => false,
            Labels::One(one) => one == label,
            Labels::Two(one, other) => one == label || other == label,
            Labels::Any => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_labels_are_kept_and_a_third_makes_it_any() {
        let [a, b, c] = [1, 2, 3].map(Label);
        let two = Labels::given(Some(b)).and(Labels::One(a));
        assert_eq!(two, Labels::Two(a, b));
        assert_eq!(two.and(Labels::One(b)), two);
        assert_eq!(two.and(Labels::None), two);
        assert_eq!(Labels::Two(a, b).and(two), two);
        assert_eq!(two.and(Labels::One(c)), Labels::Any);
        assert_eq!(two.and(Labels::Two(a, c)), Labels::Any);
        assert_eq!(Labels::None.and(Labels::Any), Labels::Any);
        assert!(two.may_include(a) && !two.may_include(c) && Labels::Any.may_include(c));
        assert!(!Labels::None.may_include(a));
    }

    #[test]
    fn a_name_has_one_label_everywhere() {
        assert_eq!(Label::of("weights"), Label::of("weights"));
        assert_ne!(Label::of("weights"), Label::of("weights "));
    }
}
