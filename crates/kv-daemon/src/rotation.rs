//! `kv-daemon rotate-master-key`: another key for the keys, without touching what they protect; and
//! `kv-daemon rotate-receipt-key`: another key that signs receipts.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use kvtier::keys::{Rotation, rotate_master_key};
use kvtier::purge::rotate_signing_key;
use serde_json::json;

use crate::configuration::Sources;
use crate::exit::{ExitCode, Failure};
use crate::output;
use crate::serve::key_code;

/// Which keys, and of which state directory.
#[derive(Clone, Debug, Args)]
pub struct Options {
    /// Settings file, for the state directory and the key in use [default: /etc/kvtier/kv-daemon.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The state directory; its daemon must be stopped
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// File of the key in use [default: master.key in the state directory]
    #[arg(long, value_name = "FILE")]
    master_key_file: Option<String>,
    /// File of the new key, drawn if there is none [default: drawn, and put in the place of master.key]
    #[arg(long, value_name = "FILE")]
    new_master_key_file: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs it.
///
/// # Errors
/// In words: what was in the way, and what to do.
pub fn run(options: Options) -> Result<(), Failure> {
    let mut sources = Sources::of_this_process();
    sources.file = options.config;
    let given = [
        ("state_dir", "--state-dir", options.state_dir),
        ("master_key_file", "--master-key-file", options.master_key_file),
    ];
    sources.flags = given
        .into_iter()
        .filter_map(|(field, flag, text)| Some((field, flag, text?)))
        .collect();
    let settings = sources.load()?.node;
    if options
        .new_master_key_file
        .as_ref()
        .is_some_and(|path| path.as_os_str().is_empty())
    {
        return Err(Failure::new(
            ExitCode::Usage,
            "--new-master-key-file: name a file, or leave it out",
        ));
    }
    let rotation = rotate_master_key(
        &settings.state_dir,
        settings.master_key_file.as_deref(),
        options.new_master_key_file.as_deref(),
    )
    .map_err(|error| Failure::new(key_code(&error), error.to_string()))?;
    if options.json {
        let Rotation { from, to, .. } = &rotation;
        let answer = json!({
            "from": from.map(|id| id.to_string()),
            "to": to.to_string(),
            "rewrapped": rotation.rewrapped,
            "key_file": rotation.key_file,
            "must_be_named": rotation.must_be_named,
        });
        return output::print(&format!("{answer}\n"));
    }
    let next = if rotation.must_be_named {
        format!("start with --master-key-file {}", rotation.key_file.display())
    } else if settings.master_key_file.is_some() {
        "start without --master-key-file".to_string()
    } else {
        "start as before".to_string()
    };
    output::print(&format!(
        "{} keys wrapped anew by master key {}, which lies in {}: {next}\n",
        rotation.rewrapped,
        rotation.to,
        rotation.key_file.display()
    ))
}

/// Of which state directory.
#[derive(Clone, Debug, Args)]
pub struct ReceiptKeyOptions {
    /// Settings file, for the state directory [default: /etc/kvtier/kv-daemon.toml if it exists]
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// The state directory; its daemon must be stopped
    #[arg(long, value_name = "DIR")]
    state_dir: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the old key sign that a new one takes over.
///
/// # Errors
/// In words: what was in the way, and what to do.
pub fn rotate_receipt_key(options: ReceiptKeyOptions) -> Result<(), Failure> {
    let mut sources = Sources::of_this_process();
    sources.file = options.config;
    let state_dir = options.state_dir.map(|text| ("state_dir", "--state-dir", text));
    sources.flags = state_dir.into_iter().collect();
    let settings = sources.load()?.node;
    let (from, to) = rotate_signing_key(&settings.state_dir, SystemTime::now())
        .map_err(|error| Failure::new(key_code(&error), error.to_string()))?;
    if options.json {
        return output::print(&format!("{}\n", json!({ "from": from, "to": to })));
    }
    output::print(&format!(
        "receipts are signed by key {to} from now on; {from} said so in the chain, and is destroyed\n"
    ))
}
