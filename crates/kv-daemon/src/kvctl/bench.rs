//! The commands that measure.

use std::path::Path;

use kvtier_bench::{BenchError, gpu, nvme, purge, transfer};

use super::{BenchOptions, Connection, GpuBenchOptions, NvmeBenchOptions, PurgeBenchOptions, TransferBenchOptions};
use crate::exit::{ExitCode, Failure};
use crate::output;

pub(super) fn client(connection: &Connection, options: BenchOptions) -> Result<(), Failure> {
    let program = std::env::current_exe().map_err(|error| {
        Failure::new(
            ExitCode::Unavailable,
            format!("this program cannot find its own file: {error}"),
        )
    })?;
    let daemon = program.with_file_name("kv-daemon");
    let socket = connection.named_socket();
    if socket.is_none() && !daemon.exists() {
        let words = format!("{} is not there: name a running daemon with --socket", daemon.display());
        return Err(Failure::new(ExitCode::Unavailable, words));
    }
    let options = kvtier_bench::client::Options {
        socket,
        token: connection.token()?,
        daemon: Some(daemon),
        echo_command: vec![program.to_string_lossy().into_owned(), "echo-server".to_string()],
        quick: options.quick,
        rounds: options.rounds,
        cases: options.cases,
        working_set_bytes: options.working_set_bytes,
        lookup_blocks: options.lookup_blocks,
    };
    let rows = kvtier_bench::client::run(options, &mut |words| eprintln!("{words}")).map_err(ended)?;
    if connection.json {
        return print_json(&rows);
    }
    let mut text = format!(
        "{:<13}{:>10}{:>7}{:>9}{:>9}{:>11}{:>11}{:>10}{:>9}\n",
        "case", "bytes", "batch", "GB/s", "ratio", "p50 µs", "p99 µs", "CPU s/GB", "echo µs"
    );
    for row in &rows {
        text.push_str(&format!(
            "{:<13}{:>10}{:>7}{:>9}{:>9}{:>11}{:>11}{:>10}{:>9}\n",
            row.direction
                .map_or_else(|| row.case.to_string(), |way| format!("{} {way}", row.case)),
            row.bytes,
            row.batch,
            shown(row.gbps, 2),
            shown(row.ratio_to_memcpy, 2),
            shown(row.p50_us, 1),
            shown(row.p99_us, 1),
            shown(row.cpu_s_per_gb, 3),
            shown(row.echo_p50_us, 1),
        ));
    }
    output::print(&text)
}

pub(super) fn nvme(connection: &Connection, options: NvmeBenchOptions) -> Result<(), Failure> {
    let options = nvme::Options {
        directory: options.dir,
        quick: options.quick,
        rounds: options.rounds,
        file_bytes: options.file_bytes,
        cases: options.cases,
        reopen_blocks: options.reopen_blocks,
    };
    let rows = nvme::run(&options, &mut |words| eprintln!("{words}")).map_err(ended)?;
    if connection.json {
        return print_json(&rows);
    }
    let mut text = format!(
        "{:<7}{:>9}{:>6} {:<12}{:>7}{:>7}{:>7}{:>10}{:>10}{:>10}{:>9}{:>9}{:>9}{:>9}\n",
        "case",
        "bytes",
        "depth",
        "encryption",
        "GB/s",
        "raw",
        "ratio",
        "p50 µs",
        "raw",
        "p99 µs",
        "CPU s/GB",
        "raw",
        "check",
        "page KiB"
    );
    for row in &rows {
        text.push_str(&match row {
            nvme::Row::Transfer(row) => format!(
                "{:<7}{:>9}{:>6} {:<12}{:>7.2}{:>7.2}{:>7.2}{:>10.1}{:>10.1}{:>10.1}{:>9.3}{:>9.3}{:>9.3}{:>9}\n",
                row.case,
                row.bytes,
                row.depth,
                row.encryption,
                row.gbps,
                row.raw_gbps,
                row.ratio_to_raw,
                row.p50_us,
                row.raw_p50_us,
                row.p99_us,
                row.cpu_s_per_gb,
                row.raw_cpu_s_per_gb,
                row.check_cpu_s_per_gb,
                row.page_kib
            ),
            nvme::Row::Reopen(row) => format!(
                "{:<7}{} blocks in {:.2} s, {:.1} bytes read a block\n",
                row.case, row.blocks, row.seconds, row.bytes_per_block
            ),
        });
    }
    output::print(&text)
}

pub(super) fn purge(connection: &Connection, options: PurgeBenchOptions) -> Result<(), Failure> {
    let options = purge::Options {
        directory: options.dir,
        quick: options.quick,
        rounds: options.rounds,
        acknowledgements: options.acknowledgements,
        blocks: options.blocks,
    };
    let rows = purge::run(&options, &mut |words| eprintln!("{words}")).map_err(ended)?;
    if connection.json {
        return print_json(&rows);
    }
    let mut text = format!(
        "{:>9}{:>9}{:>9}{:>9}{:>9}{:>11}{:>9}{:>9}{:>9}{:>9}{:>9}\n",
        "blocks",
        "ack p50",
        "p99 ms",
        "first",
        "fastest",
        "sync p50",
        "p99 ms",
        "key ms",
        "all s",
        "get p99",
        "verified"
    );
    for row in &rows {
        text.push_str(&format!(
            "{:>9}{:>9.2}{:>9.2}{:>9.2}{:>9.2}{:>11.2}{:>9.2}{:>9.2}{:>9.2}{:>9.2}{:>9}\n",
            row.blocks,
            row.ack_p50_ms,
            row.ack_p99_ms,
            row.first_ack_ms,
            row.first_ack_min_ms,
            row.fdatasync_p50_ms,
            row.fdatasync_p99_ms,
            row.key_destroyed_ms,
            row.physical_seconds,
            row.foreground_p99_ratio,
            row.verified
        ));
    }
    output::print(&text)
}

pub(super) fn transfer(connection: &Connection, options: TransferBenchOptions) -> Result<(), Failure> {
    let bytes = options
        .bytes
        .iter()
        .map(|bytes| usize::try_from(*bytes).unwrap_or(usize::MAX));
    let options = transfer::Options {
        quick: options.quick,
        rounds: options.rounds,
        transports: options.transports,
        bytes: bytes.collect(),
    };
    let rows = transfer::run(&options, &mut |words| eprintln!("{words}")).map_err(ended)?;
    if connection.json {
        return print_json(&rows);
    }
    let mut text = format!(
        "{:<9}{:<9}{:>9}{:>6}{:>6}{:>7}{:>7}{:>7}{:>10}{:>10}{:>10}{:>9}{:>9}\n",
        "case",
        "transport",
        "bytes",
        "batch",
        "conn",
        "GB/s",
        "raw",
        "ratio",
        "p50 µs",
        "raw",
        "p99 µs",
        "CPU s/GB",
        "raw"
    );
    for row in &rows {
        text.push_str(&format!(
            "{:<9}{:<9}{:>9}{:>6}{:>6}{:>7.2}{:>7.2}{:>7.2}{:>10.1}{:>10.1}{:>10.1}{:>9.3}{:>9.3}\n",
            row.case,
            row.transport,
            row.bytes,
            row.batch,
            row.connections,
            row.gbps,
            row.raw_gbps,
            row.ratio_to_raw,
            row.p50_us,
            row.raw_p50_us,
            row.p99_us,
            row.cpu_s_per_gb,
            row.raw_cpu_s_per_gb
        ));
    }
    for bar in transfer::meets(&rows) {
        text.push_str(&format!("{bar}\n"));
    }
    output::print(&text)
}

/// A measurement that could not be made, as the end of the process.
pub(super) fn gpu(connection: &Connection, options: GpuBenchOptions) -> Result<(), Failure> {
    let options = gpu::Options {
        device: options.device,
        library: options.library,
        quick: options.quick,
        rounds: options.rounds,
    };
    let rows = gpu::run(&options, &mut |words| eprintln!("{words}")).map_err(ended)?;
    if connection.json {
        return print_json(&rows);
    }
    let mut text = format!(
        "{:<9}{:>10}{:>10}{:>8}{:>8}{:>7}\n",
        "case", "bytes", "pieces", "GB/s", "bare", "ratio"
    );
    for row in &rows {
        text.push_str(&format!(
            "{:<9}{:>10}{:>10}{:>8.2}{:>8.2}{:>7.2}\n",
            row.case, row.bytes, row.piece_bytes, row.gbps, row.bare_gbps, row.ratio
        ));
    }
    output::print(&text)
}

fn ended(error: BenchError) -> Failure {
    let code = match error {
        BenchError::Options(_) => ExitCode::Usage,
        BenchError::WrongBytes { .. } => ExitCode::No,
        _ => ExitCode::Unavailable,
    };
    Failure::new(code, error.to_string())
}

fn print_json(rows: &impl serde::Serialize) -> Result<(), Failure> {
    let text =
        serde_json::to_string_pretty(rows).map_err(|error| Failure::new(ExitCode::Internal, error.to_string()))?;
    output::print(&format!("{text}\n"))
}

fn shown(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "–".to_string(), |value| format!("{value:.digits$}"))
}

pub(super) fn echo_server(socket: &Path) -> Result<(), Failure> {
    kvtier_bench::echo_server_main(socket).map_err(|error| {
        Failure::new(
            ExitCode::Unavailable,
            format!("echo server at {}: {error}", socket.display()),
        )
    })
}
