//! Just enough of Rust's grammar to tell code from comments and text.

/// `source` with every comment and every string or character literal blanked out: same length in lines and columns,
/// so that what is found in it can be pointed at.
pub(super) fn code_only(source: &str) -> String {
    let mut rest = source;
    let mut code = String::with_capacity(source.len());
    while let Some(first) = rest.chars().next() {
        let after_word = code
            .chars()
            .next_back()
            .is_some_and(|last| last.is_alphanumeric() || last == '_');
        let skipped = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if first == '"' {
            text_literal(rest)
        } else if !after_word && matches!(first, 'r' | 'b' | 'c') {
            prefixed_literal(rest)
        } else if first == '\'' {
            character_literal(rest)
        } else {
            0
        };
        if skipped == 0 {
            code.push(first);
            rest = &rest[first.len_utf8()..];
        } else {
            code.extend(
                rest[..skipped]
                    .chars()
                    .map(|character| if character == '\n' { '\n' } else { ' ' }),
            );
            rest = &rest[skipped..];
        }
    }
    code
}

fn block_comment(rest: &str) -> usize {
    let mut depth = 0usize;
    let mut at = 0;
    while at < rest.len() {
        let tail = &rest[at..];
        if tail.starts_with("/*") {
            depth += 1;
            at += 2;
        } else if tail.starts_with("*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                return at;
            }
        } else {
            at += tail.chars().next().map_or(1, char::len_utf8);
        }
    }
    rest.len()
}

/// Length of the literal that `rest` opens with a double quote.
fn text_literal(rest: &str) -> usize {
    let mut escaped = false;
    for (at, character) in rest.char_indices().skip(1) {
        match character {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// Length of `r"…"`, `r#"…"#`, `b"…"`, `br#"…"#`, `c"…"` or `b'…'` at the start of `rest`; 0 for an ordinary word.
fn prefixed_literal(rest: &str) -> usize {
    let prefix = rest
        .find(|character| !matches!(character, 'r' | 'b' | 'c'))
        .unwrap_or(rest.len());
    let tail = &rest[prefix..];
    if prefix > 2 {
        return 0;
    }
    if rest[..prefix].contains('r') {
        let hashes = tail.find(|character| character != '#').unwrap_or(tail.len());
        if !tail[hashes..].starts_with('"') {
            return 0;
        }
        let closing = format!("\"{}", "#".repeat(hashes));
        let body = prefix + hashes + 1;
        return rest[body..]
            .find(&closing)
            .map_or(rest.len(), |at| body + at + closing.len());
    }
    match tail.chars().next() {
        Some('"') => prefix + text_literal(tail),
        Some('\'') => match character_literal(tail) {
            0 => 0,
            length => prefix + length,
        },
        _ => 0,
    }
}

/// Length of the character literal at the start of `rest`; 0 for a lifetime.
fn character_literal(rest: &str) -> usize {
    let mut characters = rest.char_indices().skip(1);
    match characters.next() {
        Some((_, '\\')) => rest[3..].find('\'').map_or(0, |at| at + 4),
        Some(_) => match characters.next() {
            Some((at, '\'')) => at + 1,
            _ => 0,
        },
        None => 0,
    }
}

/// The lines of `code` that hold `word` as a whole word, counted from 1.
pub(super) fn lines_with_word(code: &str, word: &str) -> Vec<usize> {
    let is_part = |character: char| character.is_alphanumeric() || character == '_';
    let holds = |line: &str| {
        line.match_indices(word).any(|(at, _)| {
            !line[..at].chars().next_back().is_some_and(is_part)
                && !line[at + word.len()..].chars().next().is_some_and(is_part)
        })
    };
    code.lines()
        .enumerate()
        .filter(|(_, line)| holds(line))
        .map(|(index, _)| index + 1)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_and_literals_are_blanked_and_code_stays_in_place() {
        let source = "let a = \"x \\\" y\"; // z\nlet b = r#\"q \" r\"#; /* s /* t */ u */ let c = 'v';\n";
        let code = code_only(source);
        assert_eq!(code.lines().count(), source.lines().count());
        assert_eq!(code.len(), source.len());
        for word in ["x", "y", "z", "q", "s", "t", "u", "v"] {
            assert!(lines_with_word(&code, word).is_empty(), "{word} is not code: {code}");
        }
        for (word, line) in [("a", 1), ("b", 2), ("c", 2)] {
            assert_eq!(lines_with_word(&code, word), [line]);
        }
    }

    #[test]
    fn lifetimes_escapes_and_words_that_look_like_prefixes_are_code() {
        let code = code_only("fn f<'a>(r: &'a str, b: u8) -> char { '\\'' } fn bar() { b'\\n'; br\"x\"; rb; }");
        assert_eq!(lines_with_word(&code, "str"), [1]);
        assert_eq!(lines_with_word(&code, "bar"), [1]);
        assert_eq!(lines_with_word(&code, "rb"), [1]);
        assert!(lines_with_word(&code, "x").is_empty());
    }

    #[test]
    fn a_word_is_found_only_whole() {
        assert_eq!(lines_with_word("unsafe_code\nunsafe fn\nnot_unsafe", "unsafe"), [2]);
    }
}
