//! Writes a seeded chat workload as a trace that `kvctl replay` reads: `chat_trace [SEED] > chat.jsonl`.
#![forbid(unsafe_code)]

use std::io::{self, BufWriter, Write};

use kvtier_sim::trace::write_trace;
use kvtier_sim::workload::ChatWorkload;

fn main() -> io::Result<()> {
    let seed = match std::env::args().nth(1).map(|seed| seed.parse()) {
        None => 1,
        Some(Ok(seed)) => seed,
        Some(Err(error)) => return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("the seed: {error}"))),
    };
    let mut output = BufWriter::new(io::stdout().lock());
    write_trace(&ChatWorkload { seed, ..ChatWorkload::default() }.generate(), &mut output)?;
    output.flush()
}
