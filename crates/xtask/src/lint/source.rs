//! Rules about one Rust file.

use super::Violation;
use super::lexer::{code_only, lines_with_word};

/// Crates that may hold no clock, I/O, thread, randomness or `unsafe`.
pub(super) const PURE_ROOMS: [&str; 2] = ["kvtier-core", "kvtier-sim"];

/// Crates that read no environment: only the daemon and the developer commands do.
const LIBRARY_ROOMS: [&str; 5] = [
    "kvtier-core",
    "kvtier-transfer",
    "kvtier-storage",
    "kvtier",
    "kvtier-sim",
];

/// The only modules that may hold `unsafe` code (invariant 10), as path prefixes.
const CORNERS: [&str; 8] = [
    "crates/kvtier-transfer/src/memory",
    "crates/kvtier-transfer/src/socket",
    "crates/kvtier-transfer/src/rdma/verbs",
    "crates/kvtier-transfer/src/gpu",
    "crates/kvtier-storage/src/nvme/uring",
    "crates/kvtier-bench/src/baseline",
    // No part of the product: a driver for tests.
    "crates/kvtier-softgpu/src",
    "ffi/",
];

const LINES_MAX: usize = 900;

pub(super) fn check(path: &str, text: &str) -> Vec<Violation> {
    let code = code_only(text);
    let mut found = Vec::new();
    let mut add = |line, rule, what: &str, remedy| {
        found.push(Violation {
            path: path.to_owned(),
            line,
            rule,
            what: what.to_owned(),
            remedy,
        });
    };

    let count = text.lines().count();
    if count > LINES_MAX {
        add(
            count,
            "size",
            &format!("{count} lines, {LINES_MAX} at most"),
            "split it: one noun a file, tests in x/tests.rs",
        );
    }
    if !is_corner(path) {
        for line in lines_with_word(&code, "unsafe") {
            add(
                line,
                "unsafe",
                "unsafe code outside the corners",
                "move the operation into a corner of invariant 10",
            );
        }
        for line in lines_with_word(&code, "unsafe_code") {
            let text = code.lines().nth(line - 1).unwrap_or_default();
            if !text.contains("forbid(") && !text.contains("deny(") {
                add(
                    line,
                    "unsafe",
                    "the lint is lowered outside the corners",
                    "move the operation into a corner of invariant 10",
                );
            }
        }
    }
    if is_pure_root(path) && !code.contains("#![forbid(unsafe_code)]") {
        add(
            1,
            "pure",
            "a pure crate that does not forbid unsafe code",
            "open it with #![forbid(unsafe_code)]",
        );
    }
    for (index, line) in code.lines().enumerate() {
        let number = index + 1;
        if (line.contains("#[allow(") || line.contains("#![allow(")) && !is_shared_by_tests(path) {
            add(
                number,
                "allow",
                "a lint is silenced for good",
                "use #[expect(…, reason = \"…\")]",
            );
        }
        if line.contains("#[ignore") {
            add(
                number,
                "ignore",
                "a test that nothing runs",
                "let it print `skipped: NAME: REASON` and return",
            );
        }
        // Spelled in two halves, or this line would break its own rule.
        for stub in [concat!("to", "do!("), concat!("unimple", "mented!(")] {
            if line.contains(stub) {
                add(number, "stub", "a stub", "write it, or leave the door out");
            }
        }
        if reads_no_environment(path) && (line.contains("env::var") || line.contains("env::vars")) {
            add(
                number,
                "environment",
                "a library reads the environment",
                "take it as a field of Settings",
            );
        }
    }
    for room in super::tree::BANNED_ROOMS {
        for line in lines_with_word(&code, &format!("mod {room}")) {
            add(
                line,
                "rooms",
                &format!("a module named {room}"),
                "name the noun it holds",
            );
        }
    }
    found
}

fn is_corner(path: &str) -> bool {
    CORNERS.iter().any(|corner| {
        path.strip_prefix(corner)
            .is_some_and(|rest| corner.ends_with('/') || rest == ".rs" || rest.starts_with('/'))
    })
}

/// Several test programs include such a module and each uses its part, so that no lint about it is always met.
fn is_shared_by_tests(path: &str) -> bool {
    path.contains("/tests/") && path.ends_with("/mod.rs")
}

/// The roots of a pure crate's library and programs; its tests may do as they please within the workspace's lints.
fn is_pure_root(path: &str) -> bool {
    PURE_ROOMS.iter().any(|room| {
        path.strip_prefix(&format!("crates/{room}/src/")).is_some_and(|rest| {
            rest == "lib.rs" || rest == "main.rs" || (rest.starts_with("bin/") && rest.matches('/').count() == 1)
        })
    })
}

fn reads_no_environment(path: &str) -> bool {
    !path.ends_with("/tests.rs")
        && LIBRARY_ROOMS.iter().any(|room| {
            path.strip_prefix(&format!("crates/{room}/src/"))
                .is_some_and(|rest| !rest.starts_with("bin/"))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(path: &str, text: &str) -> Vec<(&'static str, usize)> {
        check(path, text)
            .into_iter()
            .map(|violation| (violation.rule, violation.line))
            .collect()
    }

    #[test]
    fn unsafe_code_is_found_outside_the_corners_and_nowhere_else() {
        let text = "//! unsafe in words is fine\nfn f() {\n    unsafe { g() }\n}\n";
        assert_eq!(rules("crates/kvtier/src/node.rs", text), [("unsafe", 3)]);
        assert_eq!(rules("crates/kvtier-transfer/src/memory.rs", text), []);
        assert_eq!(rules("crates/kvtier-transfer/src/memory/region.rs", text), []);
        assert_eq!(rules("crates/kvtier-transfer/src/memory_map.rs", text), [("unsafe", 3)]);
        assert_eq!(rules("crates/kvtier-storage/src/nvme/uring.rs", text), []);
    }

    #[test]
    fn lowering_the_unsafe_lint_outside_a_corner_is_found() {
        let text = "#![expect(unsafe_code, reason = \"fast\")]\n";
        assert_eq!(rules("crates/kvtier/src/client.rs", text), [("unsafe", 1)]);
        assert_eq!(rules("crates/kvtier/src/lib.rs", "#![forbid(unsafe_code)]\n"), []);
    }

    #[test]
    fn a_pure_crate_must_forbid_unsafe_code_in_each_of_its_roots() {
        for root in [
            "crates/kvtier-core/src/lib.rs",
            "crates/kvtier-sim/src/bin/kvtier-sim.rs",
        ] {
            assert_eq!(rules(root, "fn f() {}\n"), [("pure", 1)]);
            assert_eq!(rules(root, "#![forbid(unsafe_code)]\n"), []);
        }
        assert_eq!(rules("crates/kvtier-core/src/block.rs", "fn f() {}\n"), []);
    }

    #[test]
    fn silenced_lints_ignored_tests_and_stubs_are_found() {
        let stub = concat!("fn f() { to", "do!() }\nfn g() { unimple", "mented!(\"later\") }\n");
        assert_eq!(rules("crates/kvtier/src/a.rs", stub), [("stub", 1), ("stub", 2)]);
        assert_eq!(
            rules("crates/kvtier/src/a.rs", "#[allow(dead_code)]\nfn f() {}\n"),
            [("allow", 1)]
        );
        assert_eq!(
            rules("crates/kvtier/src/a.rs", "#[test]\n#[ignore]\nfn f() {}\n"),
            [("ignore", 2)]
        );
    }

    #[test]
    fn a_library_that_reads_the_environment_is_found_and_the_daemon_may() {
        let text = "fn f() { let _ = std::env::var(\"X\"); }\n";
        assert_eq!(rules("crates/kvtier/src/settings.rs", text), [("environment", 1)]);
        assert_eq!(rules("crates/kv-daemon/src/settings.rs", text), []);
        assert_eq!(rules("crates/kvtier/src/settings/tests.rs", text), []);
    }

    #[test]
    fn a_file_past_the_limit_and_a_module_without_a_noun_are_found() {
        assert_eq!(rules("crates/kvtier/src/a.rs", &"\n".repeat(901)), [("size", 901)]);
        assert_eq!(rules("crates/kvtier/src/a.rs", &"\n".repeat(900)), []);
        assert_eq!(
            rules("crates/kvtier/src/a.rs", concat!("mod uti", "ls;\n")),
            [("rooms", 1)]
        );
    }
}
