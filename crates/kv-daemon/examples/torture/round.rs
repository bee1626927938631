//! One round after the other on one state directory.

use std::fs;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use kv_daemon::content::Content;
use kv_daemon::exit::{ExitCode, Failure};
use kvtier::Tier;
use kvtier::client::ClientError;
use kvtier::client::blocking::Client;
use kvtier::node::Counters;
use kvtier_sim::Random;

use crate::daemon::{Daemon, Stage, status, system};
use crate::key::{Key, NAMESPACES, WORKERS};
use crate::ledger::{Ledger, Tick};
use crate::plan::{Kind, Plan, Plant};
use crate::report::{Figures, print};
use crate::verify::{lookup, open, read_everything};
use crate::worker::{Arena, Phase, Work, Worker};

/// How often the counters are read between the flush and the kill.
const POLL: Duration = Duration::from_millis(3);

/// How long what gets began goes on after the last of them.
const SETTLED: Duration = Duration::from_millis(30);

/// How long workers may take to finish their last put.
const REST_LIMIT: Duration = Duration::from_secs(30);

/// Runs the rounds and judges them.
pub(crate) fn run(stage: &Stage, rounds: u64, seed: u64, plant: Option<Plant>, json: bool) -> Result<(), Failure> {
    let mut torture = Torture {
        stage,
        ledger: Ledger::default(),
        content: Content::default(),
        plant,
        nvme_bytes: 0,
    };
    let begun = Instant::now();
    let mut total = Figures::default();
    let mut complaint = None;
    for round in 1..=rounds {
        let begun = Instant::now();
        let mut random = Random::new(seed.wrapping_mul(1_000_003).wrapping_add(round));
        let plan = Plan::draw(round, &mut random);
        let figures = torture.round(&plan, &mut random)?;
        let line = describe(round, &plan, &figures, begun.elapsed());
        if json {
            eprintln!("{line}")
        } else {
            println!("{line}")
        }
        complaint = figures.complaint().map(|words| format!("round {round}: {words}"));
        total.add(figures);
        if complaint.is_some() {
            break;
        }
    }
    if complaint.is_none() && total.flushed_blocks == 0 {
        complaint = Some("no block was flushed, so nothing is proved".to_string());
    }
    let mut figures = total.to_json();
    figures["seed"] = seed.into();
    figures["seconds"] = begun.elapsed().as_secs().into();
    print(&figures, json);
    match (plant, complaint) {
        (None, None) => Ok(()),
        (None, Some(words)) => Err(Failure::new(ExitCode::No, words)),
        (Some(plant), Some(words)) => {
            eprintln!("found, as it must be after the harm of {plant:?}: {words}");
            Ok(())
        }
        (Some(plant), None) => {
            let words = format!("the harm of {plant:?} was not found in {rounds} rounds");
            Err(Failure::new(ExitCode::No, words))
        }
    }
}

fn describe(round: u64, plan: &Plan, figures: &Figures, took: Duration) -> String {
    let mib = |bytes: u64| bytes >> 20;
    let Figures { work, check, .. } = figures;
    format!(
        "round {round:>3} {:<5} {:<7} {:<11} {:>4} puts of {:>3} MiB, {:>4} evicted; {:>4} flushed; {:>4} came back in {:>3} ms, {:>3} MiB right, \
         {} wrong, {} lost, {} excused ({} taken back, {} evicted, {} left out), {} shrunk away; {:.1} s",
        plan.kind.name(),
        plan.load.engine,
        plan.load.encryption,
        work.puts,
        mib(work.put_bytes),
        figures.evictions,
        figures.flushed_blocks,
        figures.came_back_blocks,
        figures.ready_after.as_millis(),
        mib(check.verified_bytes),
        figures.wrong_bytes(),
        figures.lost_after_flush,
        figures.excused.total(),
        figures.excused.taken_back,
        figures.excused.evicted,
        figures.excused.left_out,
        figures.shrunk_away,
        took.as_secs_f64(),
    )
}

/// What lives through all rounds.
struct Torture<'a> {
    stage: &'a Stage,
    ledger: Ledger,
    content: Content,
    plant: Option<Plant>,
    /// The NVMe tier's size in the latest run.
    nvme_bytes: u64,
}

/// A block that a finished flush covered, and when that was known.
struct Covered {
    key: Key,
    /// Where it was found: only in host memory can it be one that the flush had no room for.
    tier: Tier,
    sealed_at: Tick,
    at: Tick,
}

/// What was seen before the kill.
#[derive(Default)]
struct Watched {
    covered: Vec<Covered>,
    /// Blocks that the flush had no room for.
    left_out: u64,
    /// Copies on NVMe that were dropped between the flush and the kill.
    evicted: u64,
    last: Counters,
}

impl Torture<'_> {
    fn round(&mut self, plan: &Plan, random: &mut Random) -> Result<Figures, Failure> {
        let mut figures = Figures {
            rounds: 1,
            ..Figures::default()
        };
        let register = self.stage.state().join("register");
        let earlier_register = match self.plant {
            Some(Plant::Register) => fs::read(&register).ok(),
            _ => None,
        };
        let daemon = self.stage.start(&plan.load)?;
        figures.ready_after = daemon.ready_after;
        self.look_after_resizing(&daemon, plan.load.nvme_bytes, &mut figures)?;
        let (watched, work) = self.load(daemon, plan, random)?;
        figures.work = work;
        figures.flushed_blocks = watched.covered.len() as u64;
        figures.evictions = watched.last.evictions_nvme;
        figures.relocations = watched.last.relocations;
        figures.corrupt = watched.last.corrupt;
        match self.plant {
            Some(Plant::Segment) => self.lose_a_segment()?,
            Some(Plant::Register) => {
                if let Some(bytes) = earlier_register {
                    fs::write(&register, bytes).map_err(|error| system("the register", &error))?;
                }
            }
            None => {}
        }

        let daemon = self.stage.start(&plan.check)?;
        self.nvme_bytes = plan.check.nvme_bytes;
        figures.ready_after = figures.ready_after.max(daemon.ready_after);
        let check = read_everything(&daemon, &self.ledger, &self.content, random)?;
        figures.came_back_blocks = check.comparison.hits;
        figures.undeleted = check.undeleted;
        figures.deletes_undone = check.deletes_undone;
        figures.first_lost = figures.first_lost.or(check.first_undone);
        figures.generations_undone = check.generations_undone;
        figures.corrupt += check.corrupt;
        figures.check = check.comparison;
        self.judge_losses(&watched, &mut figures);
        if plan.kill_again {
            daemon.kill()?
        } else {
            daemon.stop()?
        }
        Ok(figures)
    }

    /// What was there after the latest restart is there again, unless the tier has less room now.
    fn look_after_resizing(&self, daemon: &Daemon, nvme_bytes: u64, figures: &mut Figures) -> Result<(), Failure> {
        let keys = self.ledger.keys().into_iter().filter(|(_, state)| state.present);
        let keys: Vec<Key> = keys.map(|(key, _)| key).collect();
        let found = lookup(daemon, &keys)?;
        let missing = found.iter().filter(|found| found.is_none()).count() as u64;
        if nvme_bytes < self.nvme_bytes {
            figures.shrunk_away += missing;
        } else {
            figures.lost_again += missing;
            let first = keys
                .iter()
                .zip(&found)
                .find(|(_, found)| found.is_none())
                .map(|(key, _)| *key);
            figures.first_lost = first.map(|key| self.describe(key));
        }
        Ok(())
    }

    /// Everything at once, then the kill.
    fn load(&self, daemon: Daemon, plan: &Plan, random: &mut Random) -> Result<(Watched, Work), Failure> {
        let arena = Arena::new(&self.ledger, &self.content, plan.put_bytes);
        let mut workers = Vec::new();
        for index in 0..WORKERS {
            let client = daemon.connect()?;
            let worker = Worker::new(&arena, index, &client, random.next_u64());
            workers.push(worker.map_err(|error| daemon.failure(&format!("opens no namespace: {error}")))?);
        }
        let client = daemon.connect()?;
        let opens_none = |error: ClientError| daemon.failure(&format!("opens no namespace: {error}"));
        for (namespace, open) in open(&client, random).map_err(opens_none)?.iter().enumerate() {
            let generation = open.generation().map_err(opens_none)?;
            self.ledger.acknowledge(namespace, generation.0);
        }
        let arena = &arena;
        thread::scope(|scope| {
            let workers: Vec<_> = workers.into_iter().map(|worker| scope.spawn(|| worker.run())).collect();
            let operator = scope.spawn(|| invalidate(arena, &client, plan));
            let watched = self.watch(&daemon, plan, arena);
            let failure = daemon.failure("failed a client while it was not being killed");
            arena.ending.store(true, Ordering::SeqCst);
            daemon.kill()?;
            let broken = |error: ClientError| Failure::new(ExitCode::No, format!("{error}: {failure}"));
            let mut total = Work::default();
            for worker in workers {
                total.add(
                    worker
                        .join()
                        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
                        .map_err(broken)?,
                );
            }
            let invalidated = operator.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            invalidated.map_err(broken)?;
            Ok((watched?, total))
        })
    }

    /// Flushes at the planned moment, finds out what that covered, and watches the counters until the kill is due.
    fn watch(&self, daemon: &Daemon, plan: &Plan, arena: &Arena<'_>) -> Result<Watched, Failure> {
        let client = daemon.connect()?;
        thread::sleep(plan.flush_after);
        if plan.kind == Kind::Quiet {
            arena.set_phase(Phase::Gets);
            let asked = Instant::now();
            while arena.resting.load(Ordering::SeqCst) < WORKERS + 1 {
                if asked.elapsed() > REST_LIMIT {
                    return Err(daemon.failure("does not answer a put"));
                }
                thread::sleep(Duration::from_millis(1));
            }
            // What gets evict between the end of the flush and the first look at the counters nobody would know of.
            arena.set_phase(Phase::Rest);
            thread::sleep(SETTLED);
        }
        // What the flush itself drops to make room, and what reclaim drops before the counters can be read again, is evicted.
        let before_flush = status(&client)?.counters;
        let begun = self.ledger.tick();
        let flushed = client
            .flush()
            .map_err(|error| daemon.failure(&format!("does not flush: {error}")))?;
        self.ledger.flushed(begun);
        let after_flush = status(&client)?.counters;
        let bytes = i64::try_from(plan.put_bytes_after).unwrap_or(i64::MAX);
        arena.put_bytes.store(bytes, Ordering::Relaxed);
        let covered = self.covered(daemon, begun)?;
        if plan.kind == Kind::Quiet {
            arena.set_phase(Phase::Gets);
        }
        let mut last = after_flush.clone();
        let mut most = 0;
        let known = Instant::now();
        while known.elapsed() < plan.kill_after {
            thread::sleep(POLL);
            let counters = status(&client)?.counters;
            most = most.max(counters.evictions_nvme - last.evictions_nvme);
            last = counters;
        }
        if plan.kind == Kind::Quiet {
            // Nothing moves any more once the gets have ended, so that the counters tell all that went before the kill.
            arena.set_phase(Phase::Rest);
            thread::sleep(SETTLED);
            last = status(&client)?.counters;
        }
        let evicted = last.evictions_nvme - before_flush.evictions_nvme;
        // While reclaim goes on, the counters are behind by what happened since they were read.
        let unseen = if plan.kind == Kind::Churn { most + 64 } else { 0 };
        Ok(Watched {
            covered,
            left_out: flushed.left_out,
            evicted: evicted + unseen,
            last,
        })
    }

    /// Blocks that were sealed before the flush began and are found now that it has ended.
    fn covered(&self, daemon: &Daemon, begun: Tick) -> Result<Vec<Covered>, Failure> {
        let counts = |key: &Key| {
            let state = self.ledger.state(*key);
            let sealed = state.is_sealed_under(self.ledger.generation(key.namespace)) && state.sealed_at < begun;
            (sealed && !self.ledger.invalidated_after(key.namespace, begun)).then_some(state.sealed_at)
        };
        let keys = self.ledger.keys().into_iter().map(|(key, _)| key);
        let keys: Vec<Key> = keys.filter(|key| counts(key).is_some()).collect();
        let at = self.ledger.tick();
        let found = lookup(daemon, &keys)?;
        let found = keys.into_iter().zip(found);
        // Once more: it may have been deleted, or put anew, while it was looked up.
        let covered = found.filter_map(|(key, tier)| {
            Some(Covered {
                key,
                tier: tier?,
                sealed_at: counts(&key)?,
                at,
            })
        });
        Ok(covered.collect())
    }

    fn judge_losses(&self, watched: &Watched, figures: &mut Figures) {
        let (mut unexplained, mut in_host, mut first) = (0, 0, None);
        for Covered {
            key,
            tier,
            sealed_at,
            at,
        } in &watched.covered
        {
            let state = self.ledger.state(*key);
            if state.present {
                continue;
            }
            if state.doomed_at > *sealed_at || self.ledger.invalidated_after(key.namespace, *at) {
                figures.excused.taken_back += 1;
            } else {
                unexplained += 1;
                in_host += u64::from(*tier == Tier::Host);
                first = first.or(Some(*key));
            }
        }
        figures.excused.left_out = watched.left_out.min(in_host);
        figures.excused.evicted = watched.evicted.min(unexplained - figures.excused.left_out);
        figures.lost_after_flush = unexplained - figures.excused.left_out - figures.excused.evicted;
        if let Some(key) = first.filter(|_| figures.lost_after_flush > 0) {
            figures.first_lost.get_or_insert_with(|| self.describe(key));
        }
    }

    fn describe(&self, key: Key) -> String {
        let words = crate::key::describe(key.id(0));
        format!("{words}, {} bytes, {:?}", key.length(), self.ledger.state(key))
    }

    fn lose_a_segment(&self) -> Result<(), Failure> {
        let directory = self.stage.state().join("nvme");
        let files = fs::read_dir(&directory).map_err(|error| system(&directory.display().to_string(), &error))?;
        let mut files: Vec<_> = files.flatten().map(|entry| entry.path()).collect();
        files.sort();
        match files.get(files.len() / 2) {
            Some(file) => fs::remove_file(file).map_err(|error| system(&file.display().to_string(), &error)),
            None => Ok(()),
        }
    }
}

/// Raises generations at the planned moments.
fn invalidate(arena: &Arena<'_>, client: &Client, plan: &Plan) -> Result<(), ClientError> {
    let begun = Instant::now();
    for (at, namespace) in &plan.invalidations {
        thread::sleep(at.saturating_sub(begun.elapsed()));
        if arena.ending.load(Ordering::SeqCst) {
            break;
        }
        let raised = arena.ledger.invalidating(*namespace, || {
            client.invalidate(NAMESPACES[*namespace]).map(|generation| generation.0)
        });
        match raised {
            Err(error) if arena.excuses(&error) => break,
            raised => raised?,
        }
    }
    arena.resting.fetch_add(1, Ordering::SeqCst);
    Ok(())
}
