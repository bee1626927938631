use std::io;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// One CPU core of this machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Core(pub(crate) usize);

impl Core {
    fn only(self) -> CpuSet {
        let mut set = CpuSet::new();
        set.set(self.0);
        set
    }

    /// Keeps the calling thread, and the threads that it starts later, on this core.
    pub(crate) fn pin_this_thread(self) -> io::Result<()> {
        Ok(sched_setaffinity(None, &self.only())?)
    }

    /// Keeps every thread of a process on this core.
    pub(crate) fn pin_process(self, process: u32) -> io::Result<()> {
        // A thread that is started between the two passes inherits the placement of its starter, which the first pass may
        // not have reached yet.
        for _ in 0..2 {
            for task in std::fs::read_dir(format!("/proc/{process}/task"))? {
                let task = task?
                    .file_name()
                    .to_str()
                    .and_then(|name| name.parse().ok())
                    .and_then(Pid::from_raw);
                match sched_setaffinity(task, &self.only()) {
                    // The thread ended since it was listed.
                    Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        Ok(())
    }
}

/// Which core the client and which its counterpart (daemon, echo server) run on. Put back when dropped.
pub(crate) struct Placement {
    pub(crate) client: Option<Core>,
    pub(crate) other: Option<Core>,
    before: Option<CpuSet>,
}

impl Placement {
    /// Pins the calling thread to the first core it may use; its counterpart belongs on the next one that is no sibling
    /// of it, or on the same when there is no other.
    pub(crate) fn take() -> Placement {
        let Ok(before) = sched_getaffinity(None) else {
            return Placement {
                client: None,
                other: None,
                before: None,
            };
        };
        let cores: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|&core| before.is_set(core)).collect();
        let client = Core(cores.first().copied().unwrap_or(0));
        let siblings = siblings(client);
        let other = cores
            .iter()
            .copied()
            .find(|core| !siblings.contains(core))
            .or(cores.get(1).copied())
            .map_or(client, Core);
        match client.pin_this_thread() {
            Ok(()) => Placement {
                client: Some(client),
                other: Some(other),
                before: Some(before),
            },
            Err(_) => Placement {
                client: None,
                other: None,
                before: None,
            },
        }
    }

    /// Runs `start` on the counterpart's core: threads that it starts stay there.
    pub(crate) fn at_the_other<T>(&self, start: impl FnOnce() -> T) -> io::Result<T> {
        if let Some(other) = self.other {
            other.pin_this_thread()?;
        }
        let started = start();
        if let Some(client) = self.client {
            client.pin_this_thread()?;
        }
        Ok(started)
    }

    /// For the rows and for people.
    pub(crate) fn describe(&self, daemon_is_ours: bool) -> String {
        match (self.client, self.other) {
            (Some(client), Some(other)) if daemon_is_ours => format!(
                "client on core {}, daemon and echo server on core {}",
                client.0, other.0
            ),
            (Some(client), Some(other)) => format!(
                "client on core {}, echo server on core {}, daemon as it was found",
                client.0, other.0
            ),
            _ => "not pinned (the system refused)".to_owned(),
        }
    }
}

impl Drop for Placement {
    fn drop(&mut self) {
        if let Some(before) = &self.before {
            let _ = sched_setaffinity(None, before);
        }
    }
}

fn siblings(core: Core) -> Vec<usize> {
    let path = format!("/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list", core.0);
    std::fs::read_to_string(path).map_or_else(|_| vec![core.0], |list| parse_list(list.trim()))
}

/// The kernel's list format: `0,4` or `0-1,8`.
fn parse_list(list: &str) -> Vec<usize> {
    let mut cores = Vec::new();
    for part in list.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.parse::<usize>(), last.parse::<usize>()) {
            cores.extend(first..=last);
        }
    }
    cores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sibling_list_is_read_in_both_of_its_forms() {
        assert_eq!(parse_list("0,4"), [0, 4]);
        assert_eq!(parse_list("0-2,8"), [0, 1, 2, 8]);
        assert_eq!(parse_list("nonsense"), Vec::<usize>::new());
    }

    #[test]
    fn threads_started_at_the_other_stay_on_its_core_and_this_one_comes_back() {
        let placement = Placement::take();
        let (Some(client), Some(other)) = (placement.client, placement.other) else {
            return;
        };
        let started = placement.at_the_other(|| std::thread::spawn(|| sched_getaffinity(None).expect("an affinity")));
        let of_thread = started.expect("pinned").join().expect("no panic");
        assert_eq!(of_thread, other.only());
        assert_eq!(sched_getaffinity(None).expect("an affinity"), client.only());
    }

    #[test]
    fn a_placement_pins_this_thread_to_one_core_and_puts_it_back() {
        let before = sched_getaffinity(None).expect("an affinity");
        let placement = Placement::take();
        if placement.client.is_some() {
            assert_eq!(sched_getaffinity(None).expect("an affinity").count(), 1);
        }
        drop(placement);
        assert_eq!(sched_getaffinity(None).expect("an affinity"), before);
    }
}
