use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{BLOCK_BYTES, Options, Row, Stand};
use crate::BenchError;
use crate::ranks::{percentile, rounded};

#[derive(Default)]
struct Times {
    purges: Vec<f64>,
    invalidations: Vec<f64>,
    syncs: Vec<f64>,
}

/// A row for each stand, with what acknowledgements cost.
pub(super) fn measure(options: &Options, directory: &Path, stands: &[Stand]) -> Result<Vec<Row>, BenchError> {
    let path = directory.join("overwritten");
    let file = File::create_new(&path).map_err(BenchError::system(path.display().to_string()))?;
    let mut page = vec![0; BLOCK_BYTES];
    // The first writes change what the file system knows of the file; overwrites do not.
    for _ in 0..8 {
        overwrite(&file, &mut page)?;
    }
    let mut times: Vec<Times> = stands.iter().map(|_| Times::default()).collect();
    for _ in 0..options.acknowledgements() {
        for (stand, times) in stands.iter().zip(&mut times) {
            stand.fill_probe()?;
            times.syncs.push(milliseconds(overwrite(&file, &mut page)?));
            times.purges.push(milliseconds(stand.purge_probe()?));
            stand.fill_probe()?;
            times.syncs.push(milliseconds(overwrite(&file, &mut page)?));
            times.invalidations.push(milliseconds(stand.invalidate_probe()?));
        }
    }
    let of = |values: &[f64], share: f64| rounded(percentile(values.to_vec(), share));
    let rows = stands.iter().zip(times).map(|(stand, times)| Row {
        blocks: stand.blocks,
        ack_p50_ms: of(&times.purges, 0.5),
        ack_p99_ms: of(&times.purges, 0.99),
        invalidate_p50_ms: of(&times.invalidations, 0.5),
        invalidate_p99_ms: of(&times.invalidations, 0.99),
        fdatasync_p50_ms: of(&times.syncs, 0.5),
        fdatasync_p99_ms: of(&times.syncs, 0.99),
        acknowledgements: options.acknowledgements(),
        ..Row::default()
    });
    Ok(rows.collect())
}

fn overwrite(file: &File, page: &mut [u8]) -> Result<Duration, BenchError> {
    page[0] = page[0].wrapping_add(1);
    let begun = Instant::now();
    file.write_all_at(page, 0)
        .and_then(|()| file.sync_data())
        .map_err(BenchError::system("an overwrite"))?;
    Ok(begun.elapsed())
}

pub(super) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
