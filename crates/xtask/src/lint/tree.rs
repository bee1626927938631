//! Rules about names and about any text file.

use super::Violation;

/// Names that say nothing about what is inside.
pub(super) const BANNED_ROOMS: [&str; 7] = ["common", "util", "utils", "helper", "helpers", "types", "prelude"];

/// Paths that exist only on one machine. Spelled in halves, or this file would break its own rule.
const MACHINE_PATHS: [&str; 6] = [
    concat!("/wo", "rk/"),
    concat!("/fa", "rm/"),
    concat!("/ro", "ot/"),
    concat!("../sha", "red"),
    concat!("/tmp", "/kv/"),
    concat!("/ho", "me/"),
];

/// Rooms are nouns, in every directory and file name.
pub(super) fn check_names(files: &[String]) -> Vec<Violation> {
    files
        .iter()
        .filter(|path| {
            path.split('/')
                .any(|part| BANNED_ROOMS.contains(&part.strip_suffix(".rs").unwrap_or(part)))
        })
        .map(|path| Violation {
            path: path.clone(),
            line: 1,
            rule: "rooms",
            what: "a room without a noun".to_owned(),
            remedy: "name it after what it holds",
        })
        .collect()
}

/// Nobody else has this machine's directories.
pub(super) fn check_text(path: &str, text: &str) -> Vec<Violation> {
    if path == ".gitignore" {
        return Vec::new();
    }
    let lines = text.lines().enumerate();
    lines
        .flat_map(|(index, line)| {
            MACHINE_PATHS
                .iter()
                .filter(move |machine| line.contains(**machine))
                .map(move |machine| (index + 1, *machine))
        })
        .map(|(line, machine)| Violation {
            path: path.to_owned(),
            line,
            rule: "machine path",
            what: format!("{machine} exists on one machine only"),
            remedy: "take it from an argument, a setting or a KVTIER_ variable",
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_without_a_noun_are_found_as_directories_and_as_files() {
        let files = [
            "crates/kvtier/src/utils.rs",
            "crates/common/src/lib.rs",
            "crates/kvtier/src/commonality.rs",
        ];
        let found = check_names(&files.map(str::to_owned));
        let paths: Vec<&str> = found.iter().map(|violation| violation.path.as_str()).collect();
        assert_eq!(paths, &files[..2]);
    }

    #[test]
    fn paths_of_one_machine_are_found_in_any_text() {
        let text = concat!("fine\ncat /ro", "ot/x\ncd ../sha", "red\n");
        let lines: Vec<usize> = check_text("README.md", text)
            .iter()
            .map(|violation| violation.line)
            .collect();
        assert_eq!(lines, [2, 3]);
        assert_eq!(check_text(".gitignore", text), []);
    }
}
