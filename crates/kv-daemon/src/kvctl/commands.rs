//! The short commands.

use std::fs::File;
use std::io::{BufWriter, Read, Write};
use std::path::Path;

use kvtier::client::{FetchScope, Lineage, PutOutcome};
use kvtier::{BlockHash, Hints, Label, Parent, Tier};
use kvtier_sim::trace::write_trace;
use kvtier_sim::workload::ChatWorkload;
use serde_json::{Value, json};

use super::{Connection, block_hash, failure, hex};
use crate::exit::{ExitCode, Failure};
use crate::output;
use crate::size;

/// The namespace of keys when nobody names one.
pub(super) const NAMESPACE: &str = "default";

/// Largest file that can be one block.
const BLOCK_BYTES_MAX: u64 = 64 << 20;

pub(super) fn status(connection: &Connection) -> Result<(), Failure> {
    let text = connection.connect()?.status().map_err(failure)?;
    let status: Value = serde_json::from_str(&text).map_err(|error| {
        Failure::new(
            ExitCode::Internal,
            format!("the daemon's status is no JSON ({error}): report a bug"),
        )
    })?;
    if connection.json {
        return output::print(&format!("{status:#}\n"));
    }
    output::print(&describe(&status))
}

/// A status for people: what is large first, zeros left out.
fn describe(status: &Value) -> String {
    let number = |name: &str| status[name].as_u64();
    let text = |name: &str| status[name].as_str().unwrap_or("");
    let mut lines = Vec::new();
    if let (Some(used), Some(capacity)) = (number("host_used_bytes"), number("host_capacity_bytes")) {
        lines.push(format!(
            "kv-daemon {}, {}, up {:.0} s",
            text("version"),
            text("state"),
            status["uptime_seconds"].as_f64().unwrap_or(0.0)
        ));
        lines.push(format!(
            "host memory   {} of {}, {} blocks; {}",
            size::rounded(used),
            size::rounded(capacity),
            number("host_blocks").unwrap_or(0),
            text("host_pages")
        ));
        if let Some(capacity) = number("hbm_capacity_bytes").filter(|capacity| *capacity > 0) {
            lines.push(format!(
                "GPU memory    {} of {}, {} blocks; {}; NICs could reach it: {}",
                size::rounded(number("hbm_used_bytes").unwrap_or(0)),
                size::rounded(capacity),
                number("hbm_blocks").unwrap_or(0),
                text("hbm_device"),
                text("hbm_path")
            ));
        }
        match number("nvme_capacity_bytes") {
            Some(capacity) if capacity > 0 => lines.push(format!(
                "NVMe          {} of {}, {} blocks; engine {}{}",
                size::rounded(number("nvme_used_bytes").unwrap_or(0)),
                size::rounded(capacity),
                number("nvme_blocks").unwrap_or(0),
                text("nvme_engine"),
                if number("nvme_in_service") == Some(1) {
                    ""
                } else {
                    "; OUT OF SERVICE"
                },
            )),
            _ => lines.push("NVMe          none".to_string()),
        }
        lines.push(format!(
            "index         {:.0} bytes a block",
            status["index_bytes_per_block"].as_f64().unwrap_or(0.0)
        ));
        lines.push(String::new());
    }
    let Some(fields) = status.as_object() else {
        return lines.join("\n");
    };
    for (name, value) in fields
        .iter()
        .filter(|(_, value)| value.as_u64().is_some_and(|value| value > 0))
    {
        lines.push(format!("{name:<24}{value:>16}"));
    }
    for domain in status["domains"].as_array().into_iter().flatten() {
        let blocks = domain["blocks"].as_u64().unwrap_or(0);
        let used = size::rounded(domain["used_bytes"].as_u64().unwrap_or(0));
        lines.push(format!(
            "domain {:<17}{blocks:>16} blocks, {used}",
            domain["domain"].as_str().unwrap_or("")
        ));
    }
    lines.join("\n") + "\n"
}

pub(super) fn put(
    connection: &Connection,
    key: &str,
    file: &Path,
    tokens: u32,
    label: Option<&str>,
) -> Result<(), Failure> {
    let bytes = read_block(file)?;
    let hash = block_hash(key);
    let hints = Hints {
        label: label.map(Label::of),
        ..Hints::default()
    };
    let namespace = connection.open(NAMESPACE)?.with_hints(hints);
    let outcomes = namespace
        .put_from(Lineage::Chain(Parent::Unknown), &[(hash, &bytes[..])], tokens)
        .map_err(failure)?;
    let outcome = outcomes.first().copied().unwrap_or(PutOutcome::Invalid);
    let word = match outcome {
        PutOutcome::Published => "published",
        PutOutcome::Present => "present",
        PutOutcome::Stale => "stale",
        PutOutcome::Busy => "busy",
        PutOutcome::Invalid => "invalid",
    };
    if connection.json {
        output::print(&format!(
            "{}\n",
            json!({"key": hex(hash), "outcome": word, "bytes": bytes.len()})
        ))?;
    } else {
        output::print(&format!("{} {word}\n", hex(hash)))?;
    }
    match outcome {
        PutOutcome::Published | PutOutcome::Present => Ok(()),
        PutOutcome::Stale => Err(Failure::new(
            ExitCode::TryAgain,
            "the namespace was invalidated meanwhile: put it again",
        )),
        PutOutcome::Busy => Err(Failure::new(
            ExitCode::TryAgain,
            "no room in time: everything is in use or over its quota; try again, or give the daemon more memory",
        )),
        PutOutcome::Invalid => Err(Failure::new(
            ExitCode::DataFormat,
            "the daemon takes no block of this size (see block_bytes_max); empty ones neither",
        )),
    }
}

fn read_block(file: &Path) -> Result<Vec<u8>, Failure> {
    let cannot = |error: std::io::Error| Failure::new(ExitCode::NoInput, format!("{}: {error}", file.display()));
    let mut bytes = Vec::new();
    let limit = BLOCK_BYTES_MAX + 1;
    if file == Path::new("-") {
        std::io::stdin()
            .lock()
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(cannot)?;
    } else {
        File::open(file)
            .map_err(cannot)?
            .take(limit)
            .read_to_end(&mut bytes)
            .map_err(cannot)?;
    }
    if bytes.is_empty() || bytes.len() as u64 >= limit {
        let words = format!(
            "{}: a block has 1 byte to {}",
            file.display(),
            size::exact(BLOCK_BYTES_MAX)
        );
        return Err(Failure::new(ExitCode::DataFormat, words));
    }
    Ok(bytes)
}

pub(super) fn get(connection: &Connection, key: &str, target: Option<&Path>, hints: Hints) -> Result<(), Failure> {
    let hash = block_hash(key);
    let namespace = connection.open(NAMESPACE)?.with_hints(hints);
    let mut found = namespace.get(&[hash], FetchScope::Each).map_err(failure)?;
    let Some(handle) = found.pop().flatten() else {
        if connection.json {
            output::print(&format!("{}\n", json!({"key": hex(hash), "found": false})))?;
            return Err(Failure::new(ExitCode::No, ""));
        }
        return Err(Failure::new(ExitCode::No, format!("miss: {}", hex(hash))));
    };
    let mut bytes = vec![0; handle.len()];
    handle.copy_to(&mut bytes).map_err(failure)?;
    let tier = tier_name(handle.tier());
    drop(handle);
    match target {
        Some(path) if path != Path::new("-") => {
            std::fs::write(path, &bytes)
                .map_err(|error| Failure::new(ExitCode::CannotCreate, format!("{}: {error}", path.display())))?;
        }
        _ if connection.json => {}
        _ => output::print_bytes(&bytes)?,
    }
    if connection.json {
        output::print(&format!(
            "{}\n",
            json!({"key": hex(hash), "found": true, "tier": tier, "bytes": bytes.len()})
        ))?;
    }
    Ok(())
}

fn tier_name(tier: Tier) -> &'static str {
    match tier {
        Tier::Hbm => "hbm",
        Tier::Host => "host",
        Tier::Nvme => "nvme",
        Tier::Remote => "remote",
    }
}

pub(super) fn exists(connection: &Connection, keys: &[String], raw: bool, hints: Hints) -> Result<(), Failure> {
    let hashes: Vec<BlockHash> = keys.iter().map(|key| block_hash(key)).collect();
    let namespace = connection.open(NAMESPACE)?.with_hints(hints);
    let tiers = if raw {
        namespace.lookup_raw(&hashes)
    } else {
        namespace.lookup(&hashes)
    };
    let tiers = tiers.map_err(failure)?;
    let tiers: Vec<Option<&str>> = tiers.into_iter().map(|tier| tier.map(tier_name)).collect();
    if connection.json {
        let rows: Vec<Value> = keys
            .iter()
            .zip(&hashes)
            .zip(&tiers)
            .map(|((key, hash), tier)| json!({"key": key, "hash": hex(*hash), "found": tier.is_some(), "tier": tier}))
            .collect();
        output::print(&format!("{}\n", Value::Array(rows)))?;
    } else {
        for (key, tier) in keys.iter().zip(&tiers) {
            output::print(&format!("{key}\t{}\n", tier.unwrap_or("miss")))?;
        }
    }
    answer_with_misses(tiers.iter().filter(|tier| tier.is_none()).count())
}

pub(super) fn delete(connection: &Connection, keys: &[String]) -> Result<(), Failure> {
    let hashes: Vec<BlockHash> = keys.iter().map(|key| block_hash(key)).collect();
    let namespace = connection.open(NAMESPACE)?;
    let removed = namespace.delete(&hashes).map_err(failure)?;
    if connection.json {
        let rows: Vec<Value> = keys
            .iter()
            .zip(&hashes)
            .zip(&removed)
            .map(|((key, hash), removed)| json!({"key": key, "hash": hex(*hash), "deleted": removed}))
            .collect();
        output::print(&format!("{}\n", Value::Array(rows)))?;
    } else {
        for (key, removed) in keys.iter().zip(&removed) {
            output::print(&format!("{key}\t{}\n", if *removed { "deleted" } else { "miss" }))?;
        }
    }
    answer_with_misses(removed.iter().filter(|removed| !**removed).count())
}

fn answer_with_misses(misses: usize) -> Result<(), Failure> {
    if misses == 0 {
        Ok(())
    } else {
        Err(Failure::new(ExitCode::No, ""))
    }
}

pub(super) fn invalidate(connection: &Connection, name: &str) -> Result<(), Failure> {
    let generation = connection.connect()?.invalidate(name).map_err(failure)?;
    if connection.json {
        return output::print(&format!("{}\n", json!({"namespace": name, "generation": generation.0})));
    }
    output::print(&format!(
        "{name} is at generation {}: nothing older can be read\n",
        generation.0
    ))
}

pub(super) fn flush(connection: &Connection) -> Result<(), Failure> {
    let flushed = connection.connect()?.flush().map_err(failure)?;
    if connection.json {
        return output::print(&format!(
            "{}\n",
            json!({"written": flushed.written, "left_out": flushed.left_out})
        ));
    }
    output::print(&format!(
        "{} blocks written, {} left out\n",
        flushed.written, flushed.left_out
    ))
}

pub(super) fn workload(connection: &Connection, workload: &ChatWorkload, target: Option<&Path>) -> Result<(), Failure> {
    let requests = workload.generate();
    let Some(path) = target.filter(|path| *path != Path::new("-")) else {
        let mut text = Vec::new();
        write_trace(&requests, &mut text).map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
        return output::print_bytes(&text);
    };
    let written = File::create(path).and_then(|file| {
        let mut target = BufWriter::new(file);
        write_trace(&requests, &mut target)?;
        target.flush()
    });
    written.map_err(|error| Failure::new(ExitCode::CannotCreate, format!("{}: {error}", path.display())))?;
    let blocks: usize = requests.iter().map(|request| request.hash_ids.len()).sum();
    if connection.json {
        let answer = json!({"file": path, "requests": requests.len(), "blocks": blocks, "seed": workload.seed});
        return output::print(&format!("{answer}\n"));
    }
    output::print(&format!(
        "{}: {} requests of {blocks} blocks\n",
        path.display(),
        requests.len()
    ))
}
