//! Rules about crates: who may depend on whom, what a pure crate may use, under which licences.

use serde_json::Value;
use toml::Table;

use super::Violation;
use super::source::PURE_ROOMS;

const LICENCE: &str = "Apache-2.0";

/// The arrows between crates of this workspace. `None`: any of them. Development dependencies obey the same table.
const ARROWS: [(&str, Option<&[&str]>); 10] = [
    ("kvtier-core", Some(&[])),
    // kvtier-softgpu: for tests alone.
    ("kvtier-transfer", Some(&["kvtier-softgpu"])),
    ("kvtier-softgpu", Some(&[])),
    (
        "kvtier-storage",
        Some(&["kvtier-core", "kvtier-transfer", "kvtier-softgpu"]),
    ),
    (
        "kvtier",
        Some(&["kvtier-core", "kvtier-storage", "kvtier-transfer", "kvtier-softgpu"]),
    ),
    ("kvtier-sim", Some(&["kvtier-core"])),
    (
        "kvtier-bench",
        Some(&[
            "kvtier",
            "kvtier-core",
            "kvtier-storage",
            "kvtier-transfer",
            "kvtier-softgpu",
        ]),
    ),
    (
        "kv-daemon",
        Some(&["kvtier", "kvtier-sim", "kvtier-bench", "kvtier-softgpu"]),
    ),
    ("kvtier-python", Some(&["kvtier"])),
    ("xtask", None),
];

/// Third-party crates that would bring a clock, chance, threads or I/O into a pure crate.
const IMPURE: [&str; 16] = [
    "tokio",
    "rand",
    "getrandom",
    "rustix",
    "libc",
    "io-uring",
    "parking_lot",
    "crossbeam-channel",
    "tracing",
    "tracing-subscriber",
    "prometheus-client",
    "tempfile",
    "axum",
    "chrono",
    "jiff",
    "memmap2",
];

/// Licences a dependency may be had under.
const ACCEPTED_LICENCES: [&str; 12] = [
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "0BSD",
    "Unlicense",
    "BSL-1.0",
    "MIT-0",
];

/// What `clippy.toml` of a pure crate must ban.
const BANNED_METHODS: [&str; 3] = [
    "std::time::SystemTime::now",
    "std::time::Instant::now",
    "std::thread::spawn",
];
const BANNED_TYPES: [&str; 2] = ["std::collections::HashMap", "std::collections::HashSet"];

/// Workspace crates depend on each other only along the arrows.
pub(super) fn check_arrows(metadata: &Value) -> Vec<Violation> {
    let packages = list(&metadata["packages"]);
    let ours: Vec<&str> = packages.iter().map(|package| text(&package["name"])).collect();
    let mut found = Vec::new();
    for package in packages {
        let name = text(&package["name"]);
        let path = manifest_path(metadata, package);
        let allowed = ARROWS.iter().find(|(from, _)| *from == name).map(|(_, to)| *to);
        let Some(allowed) = allowed else {
            found.push(Violation {
                path,
                line: 1,
                rule: "arrows",
                what: format!("{name} has no row in the table of arrows"),
                remedy: "add the room to the table in crates/xtask/src/lint/manifests.rs and to ARCHITECTURE.md",
            });
            continue;
        };
        for dependency in list(&package["dependencies"]) {
            let target = text(&dependency["name"]);
            if ours.contains(&target) && target != name && allowed.is_some_and(|allowed| !allowed.contains(&target)) {
                found.push(Violation {
                    path: path.clone(),
                    line: 1,
                    rule: "arrows",
                    what: format!("{name} depends on {target}{}", kind(dependency)),
                    remedy: "move the code to a room that may know it",
                });
            }
            if PURE_ROOMS.contains(&name) && dependency["kind"].is_null() && IMPURE.contains(&target) {
                found.push(Violation {
                    path: path.clone(),
                    line: 1,
                    rule: "pure",
                    what: format!("{name} depends on {target}"),
                    remedy: "pass what it would give as an argument",
                });
            }
        }
    }
    found
}

/// Each package lies in the folder of its name, carries the licence, and inherits the workspace's lints.
pub(super) fn check_packages(metadata: &Value, read: &dyn Fn(&str) -> Option<String>) -> Vec<Violation> {
    let mut found = Vec::new();
    for package in list(&metadata["packages"]) {
        let name = text(&package["name"]);
        let path = manifest_path(metadata, package);
        let mut add = |rule, what: String, remedy| {
            found.push(Violation {
                path: path.clone(),
                line: 1,
                rule,
                what,
                remedy,
            })
        };
        if path.starts_with("crates/") && path != format!("crates/{name}/Cargo.toml") {
            add(
                "rooms",
                format!("package {name} lies elsewhere"),
                "name the folder after the crate",
            );
        }
        if text(&package["license"]) != LICENCE {
            add(
                "licence",
                format!("{name} is not marked {LICENCE}"),
                "set license.workspace = true",
            );
        }
        let manifest = read(&path)
            .and_then(|text| text.parse::<Table>().ok())
            .unwrap_or_default();
        let inherits = manifest
            .get("lints")
            .and_then(|lints| lints.get("workspace"))
            .and_then(toml::Value::as_bool);
        if inherits != Some(true) {
            add(
                "lints",
                format!("{name} does not inherit the workspace's lints"),
                "add [lints] workspace = true",
            );
        }
    }
    found
}

/// Every dependency can be had under an accepted licence.
pub(super) fn check_licences(metadata: &Value) -> Vec<Violation> {
    let foreign = list(&metadata["packages"])
        .iter()
        .filter(|package| !package["source"].is_null());
    foreign
        .filter(|package| !licence_accepted(text(&package["license"])))
        .map(|package| Violation {
            path: "Cargo.toml".to_owned(),
            line: 1,
            rule: "licence",
            what: format!("{} is under {:?}", text(&package["name"]), text(&package["license"])),
            remedy: "use another crate, or accept the licence in crates/xtask/src/lint/manifests.rs",
        })
        .collect()
}

/// The `clippy.toml` of a pure crate bans what would make it impure, each with a reason.
pub(super) fn check_bans(path: &str, toml: &str) -> Vec<Violation> {
    let table = toml.parse::<Table>().unwrap_or_default();
    let banned = |key: &str, wanted: &str| {
        table.get(key).and_then(toml::Value::as_array).is_some_and(|entries| {
            entries.iter().any(|entry| {
                entry.get("path").and_then(toml::Value::as_str) == Some(wanted) && entry.get("reason").is_some()
            })
        })
    };
    let methods = BANNED_METHODS.iter().map(|wanted| ("disallowed-methods", *wanted));
    let types = BANNED_TYPES.iter().map(|wanted| ("disallowed-types", *wanted));
    methods
        .chain(types)
        .filter(|(key, wanted)| !banned(key, wanted))
        .map(|(key, wanted)| Violation {
            path: path.to_owned(),
            line: 1,
            rule: "pure",
            what: format!("{wanted} is not among its {key}"),
            remedy: "ban it, with what to use instead as the reason",
        })
        .collect()
}

/// Evaluates an SPDX expression: `OR` needs one accepted side, `AND` both; a `WITH` exception only widens a licence.
fn licence_accepted(expression: &str) -> bool {
    let expression = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<&str> = expression.split_whitespace().collect();
    let mut at = 0;
    let accepted = either(&words, &mut at);
    accepted && at == words.len()
}

fn either(words: &[&str], at: &mut usize) -> bool {
    let mut accepted = both(words, at);
    while words.get(*at) == Some(&"OR") {
        *at += 1;
        accepted |= both(words, at);
    }
    accepted
}

fn both(words: &[&str], at: &mut usize) -> bool {
    let mut accepted = one(words, at);
    while words.get(*at) == Some(&"AND") {
        *at += 1;
        accepted &= one(words, at);
    }
    accepted
}

fn one(words: &[&str], at: &mut usize) -> bool {
    let word = words.get(*at).copied().unwrap_or_default();
    *at += 1;
    if word == "(" {
        let accepted = either(words, at);
        *at += 1;
        return accepted;
    }
    if words.get(*at) == Some(&"WITH") {
        *at += 2;
    }
    ACCEPTED_LICENCES.contains(&word)
}

fn manifest_path(metadata: &Value, package: &Value) -> String {
    let path = text(&package["manifest_path"]);
    path.strip_prefix(text(&metadata["workspace_root"]))
        .unwrap_or(path)
        .trim_start_matches('/')
        .to_owned()
}

fn kind(dependency: &Value) -> String {
    dependency["kind"]
        .as_str()
        .map(|kind| format!(" ({kind})"))
        .unwrap_or_default()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn package(name: &str, dependencies: &[(&str, Option<&str>)]) -> Value {
        let dependencies: Vec<Value> = dependencies
            .iter()
            .map(|(name, kind)| json!({ "name": name, "kind": kind }))
            .collect();
        json!({
            "name": name, "license": "Apache-2.0", "source": null,
            "manifest_path": format!("/tree/crates/{name}/Cargo.toml"), "dependencies": dependencies,
        })
    }

    fn metadata(packages: &[Value]) -> Value {
        json!({ "workspace_root": "/tree", "packages": packages })
    }

    #[test]
    fn an_arrow_that_is_not_in_the_table_is_found_also_between_tests() {
        let storage = package("kvtier-storage", &[("kvtier-core", None), ("libc", None)]);
        let good = metadata(&[package("kvtier-core", &[]), storage.clone()]);
        assert_eq!(check_arrows(&good), []);
        for kind in [None, Some("dev"), Some("build")] {
            let bad = metadata(&[package("kvtier-core", &[("kvtier-storage", kind)]), storage.clone()]);
            assert_eq!(check_arrows(&bad).len(), 1, "{kind:?}");
        }
    }

    #[test]
    fn a_crate_without_a_row_in_the_table_is_found() {
        assert_eq!(check_arrows(&metadata(&[package("kvtier-extra", &[])])).len(), 1);
    }

    #[test]
    fn a_pure_crate_with_an_impure_dependency_is_found() {
        assert_eq!(
            check_arrows(&metadata(&[package("kvtier-core", &[("tokio", None)])])).len(),
            1
        );
        assert_eq!(
            check_arrows(&metadata(&[package("kvtier-core", &[("tempfile", Some("dev"))])])),
            []
        );
    }

    #[test]
    fn a_package_without_licence_or_lints_or_in_the_wrong_folder_is_found() {
        let lints = |_: &str| Some("[lints]\nworkspace = true\n".to_owned());
        let good = package("kvtier", &[]);
        assert_eq!(check_packages(&metadata(std::slice::from_ref(&good)), &lints), []);
        assert_eq!(
            check_packages(&metadata(std::slice::from_ref(&good)), &|_| Some(String::new())).len(),
            1
        );
        let mut bad = good;
        bad["license"] = json!(null);
        bad["manifest_path"] = json!("/tree/crates/tier/Cargo.toml");
        assert_eq!(check_packages(&metadata(&[bad]), &lints).len(), 2);
    }

    #[test]
    fn a_dependency_under_another_licence_is_found() {
        let mut foreign = package("other", &[]);
        foreign["source"] = json!("registry");
        for (licence, violations) in [
            ("MIT OR Apache-2.0", 0),
            ("MIT/Apache-2.0", 0),
            ("(MIT OR GPL-3.0) AND Unicode-3.0", 0),
            ("Apache-2.0 WITH LLVM-exception", 0),
            ("GPL-3.0", 1),
            ("MIT AND GPL-3.0", 1),
            ("", 1),
        ] {
            foreign["license"] = json!(licence);
            assert_eq!(
                check_licences(&metadata(std::slice::from_ref(&foreign))).len(),
                violations,
                "{licence}"
            );
        }
    }

    #[test]
    fn a_pure_crate_that_drops_a_ban_is_found() {
        let entry = |path: &&str| format!("{{ path = \"{path}\", reason = \"r\" }}");
        let methods: Vec<String> = BANNED_METHODS.iter().map(entry).collect();
        let types: Vec<String> = BANNED_TYPES.iter().map(entry).collect();
        let toml = format!(
            "disallowed-methods = [{}]\ndisallowed-types = [{}]\n",
            methods.join(","),
            types.join(",")
        );
        assert_eq!(check_bans("clippy.toml", &toml), []);
        assert_eq!(check_bans("clippy.toml", &toml.replace("HashMap", "BTreeMap")).len(), 1);
        assert_eq!(check_bans("clippy.toml", "").len(), 5);
    }
}
