//! `kvctl explain`: what the node would decide about fetching a prompt's blocks from other nodes, and why.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use kvtier::node::Explanation;
use kvtier::wire::KEYS_MAX;
use kvtier::{BlockHash, ErrorKind, Hints};

use super::{Connection, block_hash, commands::NAMESPACE, failure};
use crate::exit::{ExitCode, Failure};
use crate::{output, size};

/// Largest file of hashes: many comments, and as many hashes as one lookup takes.
const FILE_BYTES_MAX: u64 = 4 << 20;

#[derive(Clone, Debug, Args)]
pub(super) struct ExplainOptions {
    /// File of the prompt's block hashes in order, 32 hex digits a line; - for standard input. Blank lines and what follows # are skipped
    #[arg(long, value_name = "FILE")]
    hashes_from: PathBuf,
    /// Tokens of the whole prompt
    #[arg(long, value_name = "N")]
    prompt_tokens: u32,
    /// How long the request waits for a GPU anyway, microseconds
    #[arg(long, value_name = "W", default_value_t = 0)]
    queue_wait_us: u64,
    /// Tokens of its prefix that the engine has already
    #[arg(long, value_name = "N", default_value_t = 0)]
    local_prefix_tokens: u32,
    /// The engine can compute the front while the rest is fetched
    #[arg(long)]
    can_split: bool,
}

pub(super) fn explain(connection: &Connection, options: &ExplainOptions) -> Result<(), Failure> {
    let path = &options.hashes_from;
    let hashes =
        parse(&read(path)?).map_err(|why| Failure::new(ExitCode::DataFormat, format!("{}: {why}", path.display())))?;
    let hints = Hints {
        prompt_tokens: Some(options.prompt_tokens),
        local_prefix_tokens: Some(options.local_prefix_tokens),
        queue_wait_us: Some(options.queue_wait_us),
        can_split: options.can_split,
        ..Hints::default()
    };
    let namespace = connection.open(NAMESPACE)?.with_hints(hints);
    let text = namespace.explain(&hashes).map_err(|error| match error.kind {
        // The daemon is there: what it lacks is in its words.
        ErrorKind::Unavailable => Failure::new(ExitCode::Unavailable, error.message),
        _ => failure(error),
    })?;
    let explanation: Explanation = serde_json::from_str(&text).map_err(|error| {
        let words = format!("the daemon's explanation cannot be read ({error}): use a kvctl of its version");
        Failure::new(ExitCode::Internal, words)
    })?;
    if connection.json {
        let json = serde_json::to_string_pretty(&explanation)
            .map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
        return output::print(&format!("{json}\n"));
    }
    output::print(&describe(&explanation))
}

fn read(path: &Path) -> Result<Vec<u8>, Failure> {
    let cannot = |error: std::io::Error| Failure::new(ExitCode::NoInput, format!("{}: {error}", path.display()));
    let mut bytes = Vec::new();
    let limit = FILE_BYTES_MAX + 1;
    if path == Path::new("-") {
        std::io::stdin().lock().take(limit).read_to_end(&mut bytes)
    } else {
        File::open(path).and_then(|file| file.take(limit).read_to_end(&mut bytes))
    }
    .map_err(cannot)?;
    if bytes.len() as u64 >= limit {
        let words = format!("{}: over {}", path.display(), size::exact(FILE_BYTES_MAX));
        return Err(Failure::new(ExitCode::DataFormat, words));
    }
    Ok(bytes)
}

/// The hashes of a file, or which line is wrong and why.
fn parse(bytes: &[u8]) -> Result<Vec<BlockHash>, String> {
    let mut hashes = Vec::new();
    for (at, line) in bytes.split(|byte| *byte == b'\n').enumerate() {
        let text = String::from_utf8_lossy(line);
        let hash = text.split('#').next().unwrap_or_default().trim();
        if hash.is_empty() {
            continue;
        }
        let number = at + 1;
        if hash.len() != 32 || !hash.bytes().all(|digit| digit.is_ascii_hexdigit()) {
            let shown: String = hash.chars().take(40).collect();
            return Err(format!("line {number}: {shown:?} is no hash of 32 hex digits"));
        }
        if hashes.len() == KEYS_MAX {
            return Err(format!("line {number}: a lookup takes at most {KEYS_MAX} hashes"));
        }
        hashes.push(block_hash(hash));
    }
    if hashes.is_empty() {
        return Err("it has no hash".into());
    }
    Ok(hashes)
}

/// An explanation for people, times in milliseconds.
fn describe(explanation: &Explanation) -> String {
    let question = &explanation.question;
    let mut lines = vec![format!(
        "{} blocks: {} here, {} of them in front; prompt of {} tokens, {} there already; {} tokens a block, {} a token",
        explanation.blocks,
        explanation.here,
        explanation.here_prefix,
        question.prompt_tokens,
        question.local_prefix_tokens,
        question.block_tokens,
        size::rounded(question.kv_bytes_per_token),
    )];
    for peer in &explanation.peers {
        let has = if peer.answered {
            format!("{} more blocks, {} in front with them", peer.blocks, peer.prefix)
        } else {
            "nothing: no answer in time, or it has not seen the same invalidations".into()
        };
        lines.push(format!("{:<24} {has}", peer.address));
        if peer.gate_reason.is_empty() {
            lines.push("  nothing is known of it yet".into());
        } else {
            lines.push(format!(
                "  gate {}: {} ({:.3}); expected {}/s after {} us",
                if peer.gate_open { "open" } else { "closed" },
                peer.gate_reason,
                peer.gate_value,
                size::rounded(peer.bytes_per_second),
                peer.lookup_us,
            ));
        }
    }
    lines.push(format!(
        "backend                             {}",
        explanation.backend.as_deref().unwrap_or("none")
    ));
    let terms = &explanation.terms;
    for (name, seconds) in [
        ("lookup", terms.lookup_s),
        ("queue", terms.queue_s),
        ("transfer", terms.transfer_s),
        ("decompression", terms.decompression_s),
        ("risk", terms.risk_s),
        ("R, recompute, with the GPU's wait", explanation.recompute_s),
        ("expected, with the GPU's wait", explanation.expected_s),
        ("wait for a GPU", question.queue_wait_s),
        ("relief of others", explanation.relief_s),
        ("soft deadline", explanation.soft_deadline_s),
    ] {
        lines.push(format!("{name:<36}{:>12.3} ms", seconds * 1e3));
    }
    lines.push(format!(
        "matched {} tokens, to fetch {}, {}",
        explanation.matched_tokens,
        explanation.fetch_tokens,
        size::rounded(explanation.fetch_bytes)
    ));
    if explanation.compute_front_tokens > 0 {
        let front = explanation.compute_front_tokens;
        lines.push(format!(
            "{front} tokens in front are computed while the others are fetched"
        ));
    }
    lines.push(format!("plan: {}: {}", explanation.plan, explanation.reason));
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use super::{KEYS_MAX, describe, parse};
    use kvtier::BlockHash;
    use kvtier::node::{ExplainedPeer, ExplainedTerms, Explanation};

    #[test]
    fn hashes_are_read_in_order_between_blank_lines_and_comments() {
        let file = "# a prompt\n\n00112233445566778899aabbccddeeff\r\n  FF000000000000000000000000000001 # the second\n   # end";
        let mut second = [0; 16];
        (second[0], second[15]) = (0xff, 1);
        let first = [
            0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff,
        ];
        assert_eq!(parse(file.as_bytes()), Ok(vec![BlockHash(first), BlockHash(second)]));
    }

    #[test]
    fn a_bad_line_is_refused_with_its_number() {
        let good = "00112233445566778899aabbccddeeff\n";
        for bad in [
            "00112233445566778899aabbccddee",
            "any text",
            "0x112233445566778899aabbccddeeff",
            "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff",
            "00112233445566778899aabbccddeeff 1",
        ] {
            let refused = parse(format!("{good}# comment\n{bad}\n").as_bytes()).expect_err("refused");
            assert!(refused.starts_with("line 3: "), "{bad}: {refused}");
        }
        let refused = parse(b"\n\xff\xfe\n").expect_err("refused");
        assert!(refused.starts_with("line 2: "), "{refused}");
        assert!(parse(b"# nothing\n").is_err());
    }

    #[test]
    fn more_hashes_than_one_lookup_takes_are_refused() {
        let line = "00112233445566778899aabbccddeeff\n";
        let most = line.repeat(KEYS_MAX);
        assert_eq!(parse(most.as_bytes()).map(|hashes| hashes.len()), Ok(KEYS_MAX));
        let refused = parse((most + line).as_bytes()).expect_err("refused");
        assert!(refused.starts_with("line 4097: "), "{refused}");
    }

    #[test]
    fn every_term_is_shown_in_milliseconds() {
        let text = describe(&Explanation {
            terms: ExplainedTerms {
                lookup_s: 0.001,
                queue_s: 0.002,
                transfer_s: 0.003,
                decompression_s: 0.004,
                risk_s: 0.005,
            },
            recompute_s: 0.75,
            expected_s: 0.015,
            backend: Some("10.0.0.2:7411".into()),
            peers: vec![ExplainedPeer {
                address: "10.0.0.2:7411".into(),
                answered: true,
                blocks: 3,
                gate_reason: "asking it pays".into(),
                gate_open: true,
                ..ExplainedPeer::default()
            }],
            plan: "fetch".into(),
            reason: "fetching is expected to be faster".into(),
            ..Explanation::default()
        });
        for (name, value) in [
            ("lookup", "1.000 ms"),
            ("queue", "2.000 ms"),
            ("transfer", "3.000 ms"),
            ("decompression", "4.000 ms"),
            ("risk", "5.000 ms"),
            ("R, recompute", "750.000 ms"),
            ("expected, with", "15.000 ms"),
            ("10.0.0.2:7411", "3 more blocks"),
            ("  gate open", "asking it pays"),
            ("plan: fetch", "faster"),
        ] {
            let line = text.lines().find(|line| line.starts_with(name));
            assert!(line.is_some_and(|line| line.contains(value)), "{name} {value}: {text}");
        }
    }
}
