//! Memory that another process allocated.

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use kvtier_transfer::gpu::{IpcHandle, Place};

use crate::{Kind, MIB, copy, filled, gpu, host, pattern, run};

const CHILD: &str = "KVTIER_GPU_TEST_OWNER";
const OFFSET: usize = 4096;
const LENGTH: usize = 100_000;

/// No test: the owner of the memory, in a process of its own. It tells a handle, waits for a line, and tells whether its memory was
/// written meanwhile.
#[test]
fn as_a_child_this_binary_owns_memory() {
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let gpu = gpu(Kind::Well).expect("there on both kinds");
    let stream = gpu.stream().expect("a stream");
    // Not the first allocation, so that offsets matter.
    let _before = gpu.allocate(12_345).expect("memory");
    let region = gpu.allocate(MIB).expect("memory");
    let there = || Place::Device(region.slice(OFFSET, LENGTH).expect("inside"));
    run(&stream, vec![copy(Place::Host(filled(1, LENGTH)), there())]);
    let handle = region.ipc_handle().expect("a handle");
    let own = gpu
        .open_ipc(&handle, 0, MIB)
        .expect_err("a process has its own already");
    assert!(own.to_string().starts_with("cuIpcOpenMemHandle: "), "{own}");
    let shared = gpu.share(gpu.share_bytes().expect("a unit")).expect("memory").0;
    assert!(shared.ipc_handle().is_err(), "it is passed as a descriptor");
    let digits: String = handle.0.iter().map(|byte| format!("{byte:02x}")).collect();
    println!("\nhandle {digits}");
    std::io::stdout().flush().expect("told");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).expect("a line");
    let target = host(LENGTH);
    run(&stream, vec![copy(there(), Place::Host(target.clone()))]);
    println!("\nwritten {}", target.to_vec() == pattern(2, LENGTH));
    std::io::stdout().flush().expect("told");
    let _ = std::io::stdin().read_line(&mut line);
}

struct Owner {
    process: Child,
    to: ChildStdin,
    from: BufReader<ChildStdout>,
}

impl Owner {
    fn start() -> Owner {
        let mut process = Command::new(std::env::current_exe().expect("a program"))
            .args([
                "--exact",
                "processes::as_a_child_this_binary_owns_memory",
                "--nocapture",
            ])
            .env(CHILD, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("started");
        let to = process.stdin.take().expect("piped");
        let from = BufReader::new(process.stdout.take().expect("piped"));
        Owner { process, to, from }
    }

    /// What follows a word at the beginning of a line.
    fn hear(&mut self, word: &str) -> String {
        let mut line = String::new();
        loop {
            line.clear();
            assert!(
                self.from.read_line(&mut line).expect("a line") > 0,
                "it ended before {word}"
            );
            if let Some(rest) = line.trim_end().strip_prefix(word) {
                return rest.trim().to_owned();
            }
        }
    }

    fn handle(&mut self) -> IpcHandle {
        let digits = self.hear("handle");
        let mut bytes = [0; IpcHandle::BYTES];
        for (at, byte) in bytes.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&digits[2 * at..2 * at + 2], 16).expect("two digits");
        }
        IpcHandle(bytes)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn memory_of_another_process_is_read_and_written_and_that_of_a_dead_one_is_an_error() {
    let mut owner = Owner::start();
    let handle = owner.handle();
    let gpu = gpu(Kind::Well).expect("there on both kinds");
    let stream = gpu.stream().expect("a stream");
    {
        let region = gpu.open_ipc(&handle, OFFSET, LENGTH).expect("opened");
        let there = || Place::Device(region.slice(0, LENGTH).expect("inside"));
        let target = host(LENGTH);
        run(&stream, vec![copy(there(), Place::Host(target.clone()))]);
        assert!(target.to_vec() == pattern(1, LENGTH));
        run(&stream, vec![copy(Place::Host(filled(2, LENGTH)), there())]);
    }
    let outside = gpu.open_ipc(&handle, OFFSET, 64 * MIB).expect_err("it has one MiB");
    assert!(outside.to_string().contains("not in the allocation"), "{outside}");
    assert!(gpu.open_ipc(&handle, usize::MAX, 1).is_err());
    writeln!(owner.to).expect("it listens");
    assert_eq!(owner.hear("written"), "true");
    // Twice is one mapping, which stays until both are closed.
    let (one, other) = (gpu.open_ipc(&handle, 0, MIB), gpu.open_ipc(&handle, 0, MIB));
    drop(one.expect("it still lives"));
    let other = other.expect("and this of it");
    let target = host(64);
    let there = other.slice(OFFSET, 64).expect("inside");
    run(
        &stream,
        vec![copy(Place::Device(there.clone()), Place::Host(target.clone()))],
    );
    assert!(target.to_vec() == pattern(2, 64));
    drop((there, other));
    drop(owner);
    let dead = gpu.open_ipc(&handle, 0, MIB).expect_err("its owner is gone");
    assert!(dead.to_string().starts_with("cuIpcOpenMemHandle: "), "{dead}");
    assert!(!gpu.is_lost(), "and nothing else is broken");
    assert!(
        !format!("{handle:?}").contains(char::is_numeric),
        "who reads a log cannot open it"
    );
}
