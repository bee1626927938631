//! Running a program under a time limit: its lines as they come, and a sign of life while it is silent.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use crate::outcome::Failure;

/// Silence after which a line says that the program is still running.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// Which stream a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Output,
    Error,
}

/// Runs `command` without standard input; `on_line` gets every line of both streams. Past `limit` the program and all
/// its descendants are killed, and the run fails.
pub(crate) fn stream(
    command: &mut Command,
    name: &str,
    limit: Duration,
    mut on_line: impl FnMut(Stream, &str),
) -> Result<ExitStatus, Failure> {
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| Failure::new(format!("{name}: cannot start {:?}: {error}", command.get_program())))?;
    let (sender, lines) = mpsc::channel();
    forward(child.stdout.take(), Stream::Output, sender.clone());
    forward(child.stderr.take(), Stream::Error, sender);
    let mut beat = Instant::now();
    loop {
        let left = limit.saturating_sub(started.elapsed());
        match lines.recv_timeout(left.min(Duration::from_secs(1))) {
            Ok((stream, line)) => {
                beat = Instant::now();
                on_line(stream, &line);
            }
            Err(RecvTimeoutError::Timeout) => {
                if left.is_zero() {
                    kill_tree(&mut child);
                    return Err(Failure::new(format!("{name}: killed after {} s", limit.as_secs())));
                }
                // A grandchild may keep the pipes open after the program itself has ended.
                if let Some(status) = child.try_wait()? {
                    lines.try_iter().for_each(|(stream, line)| on_line(stream, &line));
                    return Ok(status);
                }
                if beat.elapsed() >= HEARTBEAT {
                    beat = Instant::now();
                    eprintln!("… {name}: still running after {} s", started.elapsed().as_secs());
                }
            }
            Err(RecvTimeoutError::Disconnected) => return Ok(child.wait()?),
        }
    }
}

/// Runs `command` with its output on the terminal; fails unless it succeeds.
pub(crate) fn succeed(command: &mut Command, name: &str, limit: Duration) -> Result<(), Failure> {
    let status = stream(command, name, limit, |_, line| println!("{line}"))?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!("{name}: {status}")))
    }
}

/// The same, silent unless it fails.
pub(crate) fn succeed_quietly(command: &mut Command, name: &str, limit: Duration) -> Result<(), Failure> {
    let mut said = String::new();
    let status = stream(command, name, limit, |_, line| {
        said.push_str(line);
        said.push('\n');
    })?;
    if status.success() {
        Ok(())
    } else {
        Err(Failure::new(format!("{said}{name}: {status}")))
    }
}

/// Becomes `command` as far as the caller can tell: same terminal, and its exit status is ours.
pub(crate) fn hand_over(command: &mut Command, name: &str) -> Result<(), Failure> {
    let status = command
        .status()
        .map_err(|error| Failure::new(format!("{name}: {error}")))?;
    match status.code() {
        Some(0) => Ok(()),
        Some(code) => Err(Failure {
            message: format!("{name}: {status}"),
            code: u8::try_from(code).unwrap_or(1),
        }),
        None => Err(Failure::new(format!("{name}: {status}"))),
    }
}

/// Kills a child and everything below it, as far as the process table shows.
pub(crate) fn kill_tree(child: &mut Child) {
    let root = i32::try_from(child.id()).unwrap_or_default();
    let parents = process_parents();
    let mut doomed = vec![root];
    let mut next = 0;
    while let Some(&parent) = doomed.get(next) {
        doomed.extend(
            parents
                .iter()
                .filter(|(_, of)| *of == parent)
                .map(|(process, _)| *process),
        );
        next += 1;
    }
    for process in doomed.into_iter().filter_map(Pid::from_raw) {
        // It may have ended by itself since the table was read.
        kill_process(process, Signal::KILL).ok();
    }
    child.wait().ok();
}

fn forward(pipe: Option<impl Read + Send + 'static>, stream: Stream, sender: Sender<(Stream, String)>) {
    let Some(pipe) = pipe else { return };
    thread::spawn(move || {
        let mut reader = BufReader::new(pipe);
        let mut line = Vec::new();
        while reader.read_until(b'\n', &mut line).is_ok_and(|bytes| bytes > 0) {
            let text = String::from_utf8_lossy(&line);
            if sender
                .send((stream, text.trim_end_matches(['\n', '\r']).to_owned()))
                .is_err()
            {
                return;
            }
            line.clear();
        }
    });
}

/// Every process with its parent, from `/proc/PID/stat`: `PID (NAME) STATE PARENT …`, where NAME may hold anything.
fn process_parents() -> Vec<(i32, i32)> {
    let Ok(entries) = std::fs::read_dir("/proc") else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| {
            let process = entry.file_name().to_str()?.parse().ok()?;
            let stat = std::fs::read_to_string(entry.path().join("stat")).ok()?;
            let parent = stat.rsplit_once(')')?.1.split_whitespace().nth(1)?.parse().ok()?;
            Some((process, parent))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[test]
    fn both_streams_arrive_line_by_line_with_the_exit_status() {
        let mut seen = Vec::new();
        let status = stream(
            &mut shell("echo out; echo err >&2; exit 3"),
            "t",
            Duration::from_secs(60),
            |from, line| {
                seen.push((from, line.to_owned()));
            },
        )
        .expect("the shell runs");
        assert_eq!(status.code(), Some(3));
        assert!(seen.contains(&(Stream::Output, "out".to_owned())));
        assert!(seen.contains(&(Stream::Error, "err".to_owned())));
    }

    #[test]
    fn a_program_past_its_limit_is_killed_with_its_children() {
        let mut child = 0;
        let failure = stream(
            &mut shell("sleep 600 & echo $!; wait"),
            "t",
            Duration::from_secs(1),
            |_, line| {
                child = line.parse().expect("the shell prints its child's number");
            },
        )
        .expect_err("it sleeps far longer than its limit");
        assert!(failure.message.contains("killed after 1 s"), "{}", failure.message);
        let gone = (0..100).any(|_| {
            thread::sleep(Duration::from_millis(20));
            // A killed process that nobody has waited for yet is still listed, as a zombie.
            std::fs::read_to_string(format!("/proc/{child}/stat")).map_or(true, |stat| {
                stat.rsplit_once(')').is_some_and(|(_, rest)| rest.starts_with(" Z"))
            })
        });
        assert!(gone, "process {child} outlived its parent's limit");
    }
}
