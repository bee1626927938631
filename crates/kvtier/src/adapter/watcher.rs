use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvtier_core::Generation;
use parking_lot::Mutex;
use tokio::runtime::Handle;

use super::engine::Engine;
use crate::ErrorKind;
use crate::client::ClientOptions;
use crate::client::blocking::Client;

/// One watch. Short, so that closing waits for no longer and a confirmation goes out soon.
const WATCH: Duration = Duration::from_millis(200);
const RETRY: Duration = Duration::from_millis(200);

/// The thread that hears of invalidations, so that they are acted on while nobody asks the node for anything, and that
/// confirms them once LMCache's memory is purged.
pub(super) struct Watcher {
    shared: Arc<Shared>,
    thread: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    processor: Mutex<Option<String>>,
}

impl Watcher {
    pub(super) fn start(engine: &Arc<Engine>, tasks: Handle) -> io::Result<Watcher> {
        let shared = Arc::new(Shared::default());
        let (watching, engine) = (Arc::clone(&shared), Arc::downgrade(engine));
        let thread = thread::Builder::new().name("kvtier-watcher".into()).spawn(move || {
            let _context = tasks.enter();
            watch(&watching, &engine);
        })?;
        Ok(Watcher { shared, thread })
    }

    pub(super) fn confirm_as(&self, processor: &str) {
        *self.shared.processor.lock() = Some(processor.to_owned());
    }

    pub(super) fn stop(self) {
        self.shared.stop.store(true, Ordering::Release);
        let _ = self.thread.join();
    }
}

fn watch(shared: &Shared, engine: &Weak<Engine>) {
    let mut connected: Option<Connected> = None;
    while !shared.stop.load(Ordering::Acquire) {
        let Some(engine) = engine.upgrade() else { return };
        if !engine.is_up() {
            connected = None;
            thread::sleep(RETRY);
            continue;
        }
        if connected.is_none() {
            connected = connect(&engine);
        }
        match connected.as_mut().map(|connected| connected.round(shared, &engine)) {
            Some(Ok(())) => continue,
            // While LMCache asks for nothing, this is how a node that is gone is noticed.
            Some(Err(_)) if !shared.stop.load(Ordering::Acquire) => engine.stalled(),
            _ => {}
        }
        connected = None;
        thread::sleep(RETRY);
    }
}

fn connect(engine: &Engine) -> Option<Connected> {
    let mut options = ClientOptions::new(&engine.settings.socket).with_timeout(Duration::from_secs(1));
    options.token = engine.settings.token.as_ref().map(|token| token.clone().into_bytes());
    let client = Client::connect(options).ok()?;
    Some(Connected {
        client,
        sequence: 0,
        confirmed: HashMap::new(),
    })
}

struct Connected {
    client: Client,
    sequence: u64,
    /// What this connection's node was told.
    confirmed: HashMap<String, Generation>,
}

impl Connected {
    fn round(&mut self, shared: &Shared, engine: &Engine) -> Result<(), crate::client::ClientError> {
        let all = self.sequence == 0 || engine.generations.lock().take_doubt();
        let watched = self.client.watch(if all { 0 } else { self.sequence }, WATCH)?;
        self.sequence = watched.sequence;
        if all {
            engine.rebase(&watched.namespaces);
        }
        for (name, generation) in watched.namespaces {
            // A namespace that this process has not used cannot have anything of it in LMCache's memory.
            if engine.generations.lock().knows(&name) {
                engine.observe(&name, generation);
            }
        }
        let Some(processor) = shared.processor.lock().clone() else {
            return Ok(());
        };
        let used = engine.generations.lock().used();
        for (name, clean) in used {
            if self.confirmed.get(&name) != Some(&clean) {
                match self.client.confirm(&name, clean, &processor) {
                    Ok(_) => drop(self.confirmed.insert(name, clean)),
                    // A namespace that the node has lost or not opened yet, or too many: the next round tries again.
                    Err(error) if matches!(error.kind, ErrorKind::Invalid | ErrorKind::Busy) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        Ok(())
    }
}
