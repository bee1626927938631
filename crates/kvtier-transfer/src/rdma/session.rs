//! The side of a handshake that was asked: it makes the queue pairs through which one peer reaches this node's memory.

use std::collections::HashMap;
use std::sync::Arc;

use parking_lot::Mutex;

use super::VerbsSettings;
use super::nic::Nic;
use super::notices::{self, Credit, Notices, Receiving};
use super::verbs::QueuePair;
use super::wire::{Answer, End, Question};

/// Queue pairs that one peer may have here.
const LANES_MAX: usize = 1024;

/// Answers one peer's questions, and owns the queue pairs it made for it: dropping it cuts that peer off.
pub struct Session {
    nics: Vec<Arc<Nic>>,
    settings: VerbsSettings,
    notices: Arc<Notices>,
    credit: Arc<Credit>,
    lanes: Mutex<HashMap<u32, Lane>>,
}

/// What a peer has here.
enum Lane {
    /// It reads and writes over it.
    Serving { _pair: Arc<QueuePair> },
    /// It sends notices over it.
    Noticing(Arc<Receiving>),
}

impl Drop for Lane {
    fn drop(&mut self) {
        if let Lane::Noticing(receiving) = self {
            receiving.end();
        }
    }
}

impl Session {
    pub(super) fn new(nics: &[Arc<Nic>], settings: &VerbsSettings, notices: &Arc<Notices>) -> Session {
        Session {
            nics: nics.to_vec(),
            settings: settings.clone(),
            notices: Arc::clone(notices),
            credit: Arc::default(),
            lanes: Mutex::default(),
        }
    }

    /// Answers a question that came over the owner's channel.
    #[must_use]
    pub fn answer(&self, question: &[u8]) -> Vec<u8> {
        let answer = match Question::decode(question) {
            None => Answer::Refused("a question of another version, or none".to_owned()),
            Some(Question::Describe) => Answer::Described(self.nics.iter().map(|nic| nic.end(0, 0)).collect()),
            Some(Question::Connect { nic, lane, end }) => match self.connect(nic, lane, &end) {
                Ok(end) => Answer::Connected(end),
                Err(why) => Answer::Refused(why),
            },
        };
        answer.encode()
    }

    fn connect(&self, nic: u16, lane: u32, peer: &End) -> Result<End, String> {
        let nic = self.nics.get(usize::from(nic)).ok_or("no such NIC")?;
        nic.check_active()?;
        {
            let mut lanes = self.lanes.lock();
            // The old one first: what it was still asked for must not arrive after its successor was.
            lanes.remove(&lane);
            if lanes.len() >= LANES_MAX {
                return Err(format!("this peer has {LANES_MAX} queue pairs here already"));
            }
        }
        if lane == notices::LANE {
            if !self.settings.notices {
                return Err("it takes no notices".to_owned());
            }
            let (receiving, pair) = Receiving::new(nic, &self.notices, &self.credit)?;
            let receiving = Lane::Noticing(receiving);
            let end = nic.accept(&pair, peer, &self.settings)?;
            self.lanes.lock().insert(lane, receiving);
            return Ok(end);
        }
        let refused = |error: std::io::Error| format!("{}: {error}", nic.name());
        // It posts nothing: the peer reads and writes by itself.
        let pair = Arc::new(nic.queue_pair(2).map_err(refused)?);
        let end = nic.accept(&pair, peer, &self.settings)?;
        self.lanes.lock().insert(lane, Lane::Serving { _pair: pair });
        Ok(end)
    }
}
