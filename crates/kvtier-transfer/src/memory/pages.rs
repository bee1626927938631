use std::fs;

/// Which pages a new region should lie on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PageRequest {
    /// 4 KiB pages.
    Small,
    /// Reserved 2 MiB pages if there are enough, else transparent ones if the system allows, else 4 KiB.
    #[default]
    Auto,
    /// Reserved 2 MiB pages or an error.
    Huge,
}

/// Which pages a region lies on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PageKind {
    /// 4 KiB pages.
    Small,
    /// Asked for 2 MiB pages; the kernel gives them while it has them.
    Transparent,
    /// Reserved 2 MiB pages (hugetlb).
    Huge,
}

impl PageKind {
    /// Size in KiB.
    #[must_use]
    pub fn kib(self) -> u32 {
        match self {
            PageKind::Small => 4,
            PageKind::Transparent | PageKind::Huge => 2048,
        }
    }
}

/// Reserved 2 MiB pages that nobody uses or has a claim on.
#[must_use]
pub fn free_huge_pages() -> u64 {
    let counter = |name: &str| -> u64 {
        let path = format!("/sys/kernel/mm/hugepages/hugepages-2048kB/{name}");
        fs::read_to_string(path)
            .ok()
            .and_then(|text| text.trim().parse().ok())
            .unwrap_or(0)
    };
    counter("free_hugepages").saturating_sub(counter("resv_hugepages"))
}

/// Whether memory files may get transparent huge pages when they ask.
#[must_use]
pub fn shared_huge_pages_allowed() -> bool {
    let root = "/sys/kernel/mm/transparent_hugepage";
    match chosen(&format!("{root}/hugepages-2048kB/shmem_enabled")).as_deref() {
        Some("always" | "within_size" | "advise") => return true,
        Some("never") => return false,
        _ => {}
    }
    matches!(
        chosen(&format!("{root}/shmem_enabled")).as_deref(),
        Some("always" | "within_size" | "advise" | "force")
    )
}

/// Whether private memory may get transparent huge pages when it asks.
pub(super) fn private_huge_pages_allowed() -> bool {
    matches!(
        chosen("/sys/kernel/mm/transparent_hugepage/enabled").as_deref(),
        Some("always" | "madvise")
    )
}

/// The word in brackets, as these files mark what is in force.
fn chosen(path: &str) -> Option<String> {
    bracketed(&fs::read_to_string(path).ok()?)
}

fn bracketed(text: &str) -> Option<String> {
    let (_, rest) = text.split_once('[')?;
    Some(rest.split_once(']')?.0.to_owned())
}

#[cfg(test)]
mod tests {
    use super::bracketed;

    #[test]
    fn the_bracketed_word_is_the_one_in_force() {
        assert_eq!(
            bracketed("always within_size advise [never] deny force\n").as_deref(),
            Some("never")
        );
        assert_eq!(bracketed("[always] madvise never").as_deref(), Some("always"));
        assert_eq!(bracketed("always madvise never"), None);
    }
}
