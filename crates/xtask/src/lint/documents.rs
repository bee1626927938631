//! Rules about the documents: links lead somewhere, the ten invariants are all there, decisions are numbered and whole.

use super::Violation;

const INVARIANTS: usize = 10;
const DECISION_HEADINGS: [&str; 4] = ["## Context", "## Decision", "## Consequences", "## Alternatives"];
/// Prefixes by which a `code span` is taken for a path in the tree.
const TREE_PATHS: [&str; 3] = ["crates/", "docs/", ".ci/"];

/// Every relative link and every path in a code span of `path` exists, and so does the heading that a link names.
pub(super) fn check_links(
    path: &str,
    text: &str,
    exists: &dyn Fn(&str) -> bool,
    read: &dyn Fn(&str) -> Option<String>,
) -> Vec<Violation> {
    let directory = path.rsplit_once('/').map_or("", |(directory, _)| directory);
    let mut found = Vec::new();
    let mut add = |line, what: String, remedy| {
        found.push(Violation {
            path: path.to_owned(),
            line,
            rule: "link",
            what,
            remedy,
        });
    };
    for (line, prose) in prose_lines(text) {
        for link in links(prose) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() {
                path.to_owned()
            } else {
                join(directory, file)
            };
            if !exists(&target) {
                add(
                    line,
                    format!("{link} leads nowhere"),
                    "correct the link or write the file",
                );
            } else if !heading.is_empty() && !read(&target).is_some_and(|text| has_heading(&text, heading)) {
                add(line, format!("{target} has no heading #{heading}"), "correct the link");
            }
        }
        for span in prose.split('`').skip(1).step_by(2) {
            let is_path = TREE_PATHS.iter().any(|prefix| span.starts_with(prefix));
            let is_pattern = span.contains(['*', '<', '{', ' ', '…']) || span.contains("NNNN");
            if is_path && !is_pattern && !exists(span.trim_end_matches('/')) {
                add(line, format!("{span} does not exist"), "correct the path");
            }
        }
    }
    found
}

/// ARCHITECTURE.md numbers exactly the ten invariants of the house under one heading.
pub(super) fn check_architecture(text: &str) -> Vec<Violation> {
    let start = text.lines().position(|line| line.trim() == "## Invariants");
    let numbered: Vec<usize> = start.map_or_else(Vec::new, |start| {
        text.lines()
            .skip(start + 1)
            .take_while(|line| !line.starts_with("## "))
            .filter_map(|line| line.split_once(". ").and_then(|(number, _)| number.parse().ok()))
            .collect()
    });
    if numbered == (1..=INVARIANTS).collect::<Vec<_>>() {
        return Vec::new();
    }
    vec![Violation {
        path: "ARCHITECTURE.md".to_owned(),
        line: start.map_or(1, |line| line + 1),
        rule: "invariants",
        what: format!("the list under `## Invariants` is numbered {numbered:?}"),
        remedy: "list all ten, in order",
    }]
}

/// Decisions are `docs/decisions/NNNN-title.md`, numbered without gaps, each with its four headings.
pub(super) fn check_decisions(files: &[String], read: &dyn Fn(&str) -> Option<String>) -> Vec<Violation> {
    let mut found = Vec::new();
    let decisions = files
        .iter()
        .filter_map(|path| Some((path, path.strip_prefix("docs/decisions/")?)));
    for (index, (path, name)) in decisions.enumerate() {
        let mut add = |what, remedy| {
            found.push(Violation {
                path: path.clone(),
                line: 1,
                rule: "decision",
                what,
                remedy,
            });
        };
        if !name.starts_with(&format!("{:04}-", index + 1)) || !name.ends_with(".md") {
            add(
                format!("{name} is not number {:04}", index + 1),
                "number decisions without gaps: NNNN-title.md",
            );
        }
        let text = read(path).unwrap_or_default();
        for heading in DECISION_HEADINGS
            .iter()
            .filter(|heading| !text.lines().any(|line| line == **heading))
        {
            add(format!("no `{heading}`"), "a decision says all four");
        }
    }
    found
}

/// Lines outside fenced code, counted from 1.
fn prose_lines(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        (!fenced && !fence).then_some((index + 1, line))
    })
}

/// Targets of `[text](target)` in one line.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("](").filter_map(|(at, opening)| {
        let rest = &line[at + opening.len()..];
        rest.find(')').map(|end| &rest[..end])
    })
}

fn join(directory: &str, file: &str) -> String {
    let mut parts: Vec<&str> = directory.split('/').filter(|part| !part.is_empty()).collect();
    for part in file.split('/') {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    parts.join("/")
}

/// Headings become anchors as on GitHub: lower case, blanks to dashes, punctuation dropped.
fn has_heading(text: &str, anchor: &str) -> bool {
    prose_lines(text)
        .filter(|(_, line)| line.starts_with('#'))
        .any(|(_, line)| {
            let slug: String = line
                .trim_start_matches('#')
                .trim()
                .to_lowercase()
                .chars()
                .filter(|character| character.is_alphanumeric() || matches!(character, ' ' | '-' | '_'))
                .map(|character| if character == ' ' { '-' } else { character })
                .collect();
            slug == anchor
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OTHER: &str = "# Title\n\n## Where to go\n";

    fn lines(path: &str, text: &str) -> Vec<usize> {
        let exists = |target: &str| ["README.md", "docs/other.md", "crates/kvtier"].contains(&target);
        let read = |target: &str| (target == "docs/other.md").then(|| OTHER.to_owned());
        check_links(path, text, &exists, &read)
            .into_iter()
            .map(|violation| violation.line)
            .collect()
    }

    #[test]
    fn links_and_paths_that_lead_nowhere_are_found() {
        let text = "[a](docs/other.md) [b](docs/gone.md)\n`crates/kvtier/` `crates/gone/src` `crates/*/src`\n";
        assert_eq!(lines("README.md", text), [1, 2]);
        assert_eq!(
            lines(
                "docs/other.md",
                "[up](../README.md) [x](./gone.md) [web](https://example.org/)\n"
            ),
            [1]
        );
        assert!(lines("README.md", "```\n[b](docs/gone.md)\n```\n").is_empty());
    }

    #[test]
    fn a_heading_that_does_not_exist_is_found() {
        assert_eq!(
            lines(
                "README.md",
                "[a](docs/other.md#where-to-go)\n[b](docs/other.md#elsewhere)\n"
            ),
            [2]
        );
    }

    #[test]
    fn a_missing_invariant_is_found() {
        let listed = |count: usize| {
            let numbers: String = (1..=count).map(|number| format!("{number}. Holds.\n")).collect();
            format!("# A\n\n## Invariants\n\n{numbers}\n## Next\n")
        };
        assert_eq!(check_architecture(&listed(10)), []);
        assert_eq!(check_architecture(&listed(9)).len(), 1);
        assert_eq!(check_architecture("").len(), 1);
    }

    #[test]
    fn decisions_with_a_gap_or_without_a_heading_are_found() {
        let whole = DECISION_HEADINGS.join("\n\n");
        let files = |names: [&str; 2]| names.map(|name| format!("docs/decisions/{name}"));
        let read = |_: &str| Some(whole.clone());
        assert_eq!(check_decisions(&files(["0001-a.md", "0002-b.md"]), &read), []);
        assert_eq!(check_decisions(&files(["0001-a.md", "0003-b.md"]), &read).len(), 1);
        let poor = |_: &str| Some("## Context\n## Decision\n## Consequences\n".to_owned());
        assert_eq!(check_decisions(&files(["0001-a.md", "0002-b.md"]), &poor).len(), 2);
    }
}
