//! Which questions of a connection belong to one prompt.
//!
//! An engine asks for a prompt in pieces: it looks it up, fetches what is there, puts the rest and, later, what it answered. Pure.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use kvtier_core::{BlockHash, ClientId, NamespaceId, Parent, RealizationId, Time};

use crate::wire::Lineage;

/// A prompt is over when nothing of it was heard for this long.
const IDLE: Duration = Duration::from_secs(30);
/// Prompts of one connection at a time; the one heard of longest ago is over when there are more.
const OPEN_MAX: usize = 64;
/// Blocks of a prompt; what comes behind them is left out.
const BLOCKS_MAX: usize = 1 << 16;

/// What a client asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Where blocks are.
    Lookup,
    /// To read them.
    Fetch,
    /// To keep them.
    Put,
    /// Nothing: it is gone.
    Gone,
}

/// One message of a client.
#[derive(Clone, Debug)]
pub(crate) struct Sight {
    pub(crate) client: ClientId,
    pub(crate) scope: (NamespaceId, RealizationId),
    pub(crate) kind: Kind,
    pub(crate) at: Time,
    pub(crate) lineage: Lineage,
    pub(crate) hashes: Vec<BlockHash>,
    /// Of each block, as far as they are known; 0 where they are not.
    pub(crate) tokens: Vec<u32>,
    /// Of the whole prompt, if the client says so.
    pub(crate) prompt_tokens: Option<u32>,
}

/// A prompt that is over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Prompt {
    pub(super) scope: (NamespaceId, RealizationId),
    pub(super) at_ms: u64,
    pub(super) hashes: Vec<BlockHash>,
    pub(super) input_tokens: u64,
    pub(super) output_tokens: u64,
    /// Of a full block; 0 where that is not known.
    pub(super) block_tokens: u32,
}

#[derive(Debug)]
struct Open {
    at: Time,
    heard: Time,
    hashes: Vec<BlockHash>,
    tokens: Vec<u32>,
    /// Blocks from the front that were looked up, and fetched.
    looked_up: usize,
    fetched: usize,
    put: bool,
    prompt_tokens: Option<u32>,
}

type Place = (ClientId, NamespaceId, RealizationId);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Episodes {
    open: HashMap<Place, Vec<Open>>,
    /// Largest block of each realization.
    block_tokens: HashMap<RealizationId, u32>,
    /// By time and number: a trace is in the order in which prompts came.
    finished: BTreeMap<(Time, u64), Prompt>,
    number: u64,
    now: Time,
}

impl Episodes {
    pub(super) fn see(&mut self, sight: Sight) {
        self.now = self.now.max(sight.at);
        self.end_idle();
        let place = (sight.client, sight.scope.0, sight.scope.1);
        if sight.kind == Kind::Gone {
            let gone: Vec<Place> = self
                .open
                .keys()
                .filter(|place| place.0 == sight.client)
                .copied()
                .collect();
            for place in gone {
                for open in self.open.remove(&place).unwrap_or_default() {
                    self.finish(place, open);
                }
            }
            return;
        }
        if sight.hashes.is_empty() {
            return;
        }
        let largest = self.block_tokens.entry(sight.scope.1).or_default();
        *largest = sight.tokens.iter().copied().max().unwrap_or(0).max(*largest);
        let open = self.open.entry(place).or_default();
        // The one heard of last is at the end.
        let fitting = (0..open.len()).rev().find(|&index| open[index].fits(&sight).is_some());
        if let Some(index) = fitting {
            let mut continued = open.remove(index);
            continued.go_on(&sight);
            open.push(continued);
            return;
        }
        let before = match sight.lineage {
            Lineage::Chain(Parent::Block(parent)) => {
                let known = open.iter().rev().find_map(|open| open.front_up_to(parent));
                // What goes on with a prompt that is over says nothing of how that began.
                let Some(known) = known else { return };
                known
            }
            _ => (Vec::new(), Vec::new()),
        };
        open.push(Open::begin(before, &sight));
        if open.len() > OPEN_MAX {
            let oldest = open.remove(0);
            self.finish(place, oldest);
        }
    }

    /// No client drives the time on while none asks.
    pub(super) fn let_time_pass(&mut self, time: Duration) {
        self.now = self.now.after(time);
        self.end_idle();
    }

    /// Nothing more will be heard.
    pub(super) fn end(&mut self) {
        for (place, opens) in std::mem::take(&mut self.open) {
            for open in opens {
                self.finish(place, open);
            }
        }
    }

    /// The next prompt that is over and before which none is open.
    pub(super) fn next_finished(&mut self) -> Option<Prompt> {
        let (&(at, number), _) = self.finished.first_key_value()?;
        let earliest = self.open.values().flatten().map(|open| open.at).min();
        if earliest.is_some_and(|earliest| earliest < at) {
            return None;
        }
        self.finished.remove(&(at, number))
    }

    fn end_idle(&mut self) {
        let now = self.now;
        let idle = |open: &Open| open.heard.after(IDLE) < now;
        let places: Vec<Place> = self
            .open
            .iter()
            .filter(|(_, opens)| opens.first().is_none_or(idle))
            .map(|(place, _)| *place)
            .collect();
        for place in places {
            let opens = self.open.remove(&place).unwrap_or_default();
            let (over, on): (Vec<Open>, Vec<Open>) = opens.into_iter().partition(idle);
            for open in over {
                self.finish(place, open);
            }
            if !on.is_empty() {
                self.open.insert(place, on);
            }
        }
    }

    fn finish(&mut self, (_, namespace, realization): Place, open: Open) {
        let block_tokens = self.block_tokens.get(&realization).copied().unwrap_or(0);
        let tokens = |range: &[u32]| -> u64 {
            let known = |tokens: &u32| u64::from(if *tokens == 0 { block_tokens } else { *tokens });
            range.iter().map(known).sum()
        };
        // What was looked up is the prompt, and what was put behind it the answer. Who looks nothing up puts the prompt.
        let prompt = if open.looked_up > 0 {
            open.looked_up
        } else {
            open.hashes.len()
        };
        let counted = tokens(&open.tokens[..prompt]);
        let each = u64::from(block_tokens);
        let said = open.prompt_tokens.map(u64::from);
        // A prompt's last tokens may fill no block. What is far from what its blocks cover is another prompt's.
        let input_tokens = said
            .filter(|said| (counted..counted + each).contains(said))
            .unwrap_or(counted);
        let prompt = Prompt {
            scope: (namespace, realization),
            at_ms: open.at.0 / 1_000_000,
            output_tokens: tokens(&open.tokens[prompt..]),
            hashes: open.hashes[..prompt].to_vec(),
            input_tokens,
            block_tokens,
        };
        self.number += 1;
        self.finished.insert((open.at, self.number), prompt);
    }
}

impl Open {
    fn begin((hashes, tokens): (Vec<BlockHash>, Vec<u32>), sight: &Sight) -> Open {
        let mut open = Open {
            at: sight.at,
            heard: sight.at,
            hashes,
            tokens,
            looked_up: 0,
            fetched: 0,
            put: false,
            prompt_tokens: None,
        };
        let start = open.hashes.len();
        open.extend(start, sight);
        open
    }

    /// Where the keys begin among this prompt's, if they go on with it.
    fn fits(&self, sight: &Sight) -> Option<usize> {
        let start = match sight.lineage {
            Lineage::Chain(Parent::Block(parent)) => self.hashes.iter().rposition(|hash| *hash == parent)? + 1,
            _ => self.hashes.iter().position(|hash| *hash == sight.hashes[0])?,
        };
        let known = &self.hashes[start..];
        if known.iter().zip(&sight.hashes).any(|(known, asked)| known != asked) {
            return None;
        }
        // Who asks again asks for another prompt, though it begins alike.
        let goes_on = match sight.kind {
            Kind::Lookup => start >= self.looked_up && self.fetched == 0 && !self.put,
            Kind::Fetch => start >= self.fetched && !self.put,
            Kind::Put | Kind::Gone => true,
        };
        goes_on.then_some(start)
    }

    fn go_on(&mut self, sight: &Sight) {
        if let Some(start) = self.fits(sight) {
            self.extend(start, sight);
        }
    }

    fn extend(&mut self, start: usize, sight: &Sight) {
        let end = (start + sight.hashes.len()).min(BLOCKS_MAX);
        for (position, (hash, tokens)) in (start..end).zip(sight.hashes.iter().zip(&sight.tokens)) {
            if position == self.hashes.len() {
                self.hashes.push(*hash);
                self.tokens.push(*tokens);
            } else if *tokens != 0 {
                self.tokens[position] = *tokens;
            }
        }
        match sight.kind {
            Kind::Lookup => self.looked_up = end,
            Kind::Fetch => self.fetched = end,
            Kind::Put | Kind::Gone => self.put = true,
        }
        self.prompt_tokens = sight.prompt_tokens.or(self.prompt_tokens);
        self.heard = sight.at;
    }

    fn front_up_to(&self, parent: BlockHash) -> Option<(Vec<BlockHash>, Vec<u32>)> {
        let end = self.hashes.iter().rposition(|hash| *hash == parent)? + 1;
        Some((self.hashes[..end].to_vec(), self.tokens[..end].to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn hash(number: u64) -> BlockHash {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        BlockHash(bytes)
    }

    fn sight(kind: Kind, at_s: u64, lineage: Parent, numbers: &[u64]) -> Sight {
        Sight {
            client: ClientId(1),
            scope: (NamespaceId(1), RealizationId(2)),
            kind,
            at: Time(at_s * SECOND),
            lineage: lineage.into(),
            hashes: numbers.iter().map(|number| hash(*number)).collect(),
            tokens: vec![if kind == Kind::Put { 256 } else { 0 }; numbers.len()],
            prompt_tokens: None,
        }
    }

    fn recorded(sights: impl IntoIterator<Item = Sight>) -> Vec<(u64, Vec<u64>, u64, u64)> {
        let mut episodes = Episodes::default();
        for sight in sights {
            episodes.see(sight);
        }
        episodes.end();
        let number = |hash: &BlockHash| u64::from_le_bytes(hash.0[..8].try_into().unwrap());
        std::iter::from_fn(|| episodes.next_finished())
            .map(|prompt| {
                let ids = prompt.hashes.iter().map(number).collect();
                (prompt.at_ms, ids, prompt.input_tokens, prompt.output_tokens)
            })
            .collect()
    }

    #[test]
    fn what_is_looked_up_is_the_prompt_and_what_is_put_behind_it_the_answer() {
        let sights = [
            sight(Kind::Lookup, 1, Parent::Root, &[1, 2, 3]),
            sight(Kind::Fetch, 1, Parent::Root, &[1]),
            sight(Kind::Put, 2, Parent::Block(hash(1)), &[2, 3]),
            sight(Kind::Put, 9, Parent::Block(hash(3)), &[4]),
        ];
        assert_eq!(recorded(sights), [(1000, vec![1, 2, 3], 768, 256)]);
    }

    #[test]
    fn who_looks_nothing_up_asks_in_pieces_and_puts_the_rest() {
        let sights = [
            sight(Kind::Fetch, 1, Parent::Root, &[1, 2]),
            sight(Kind::Fetch, 1, Parent::Block(hash(2)), &[3, 4]),
            sight(Kind::Put, 1, Parent::Block(hash(3)), &[4]),
            sight(Kind::Put, 1, Parent::Block(hash(4)), &[5]),
        ];
        assert_eq!(recorded(sights), [(1000, vec![1, 2, 3, 4, 5], 1280, 0)]);
    }

    #[test]
    fn who_asks_again_asks_for_another_prompt() {
        let sights = [
            sight(Kind::Lookup, 1, Parent::Unknown, &[1, 2]),
            sight(Kind::Put, 1, Parent::Root, &[1, 2]),
            sight(Kind::Lookup, 5, Parent::Unknown, &[1, 2]),
            sight(Kind::Lookup, 9, Parent::Unknown, &[1, 2, 3]),
            sight(Kind::Lookup, 9, Parent::Unknown, &[1, 7]),
        ];
        let expected = [
            (1000, vec![1, 2], 512, 0),
            (5000, vec![1, 2], 512, 0),
            (9000, vec![1, 2, 3], 768, 0),
            (9000, vec![1, 7], 512, 0),
        ];
        assert_eq!(recorded(sights), expected);
    }

    #[test]
    fn prompts_of_one_connection_may_be_under_way_at_once() {
        let sights = [
            sight(Kind::Lookup, 1, Parent::Unknown, &[1, 2]),
            sight(Kind::Lookup, 2, Parent::Unknown, &[8, 9]),
            sight(Kind::Put, 3, Parent::Block(hash(1)), &[2]),
            sight(Kind::Put, 3, Parent::Root, &[8, 9]),
            sight(Kind::Put, 4, Parent::Block(hash(2)), &[3]),
        ];
        assert_eq!(
            recorded(sights),
            [(1000, vec![1, 2], 512, 256), (2000, vec![8, 9], 512, 0)]
        );
    }

    #[test]
    fn a_prompt_that_leaves_another_has_what_came_before() {
        let sights = [
            sight(Kind::Fetch, 1, Parent::Root, &[1, 2, 3]),
            sight(Kind::Put, 1, Parent::Block(hash(3)), &[4]),
            sight(Kind::Put, 2, Parent::Block(hash(2)), &[9]),
            sight(Kind::Put, 2, Parent::Block(hash(77)), &[78]),
        ];
        assert_eq!(
            recorded(sights),
            [(1000, vec![1, 2, 3, 4], 1024, 0), (2000, vec![1, 2, 9], 768, 0)],
            "and nothing is known of what follows a block that nobody asked for"
        );
    }

    #[test]
    fn prompts_end_when_they_are_idle_or_their_client_goes_and_come_out_in_their_order() {
        let mut episodes = Episodes::default();
        episodes.see(sight(Kind::Lookup, 1, Parent::Root, &[1]));
        episodes.see(Sight {
            client: ClientId(2),
            ..sight(Kind::Put, 2, Parent::Root, &[5])
        });
        episodes.see(Sight {
            client: ClientId(2),
            ..sight(Kind::Gone, 3, Parent::Unknown, &[])
        });
        assert_eq!(episodes.next_finished(), None, "an earlier one is open");
        episodes.let_time_pass(Duration::from_secs(40));
        let first = episodes.next_finished().expect("idle");
        assert_eq!(
            (first.at_ms, first.block_tokens),
            (1000, 256),
            "as large as blocks of this form are"
        );
        assert_eq!(episodes.next_finished().expect("the other").at_ms, 2000);
        assert!(episodes.open.is_empty());
    }

    #[test]
    fn the_length_that_a_client_says_counts_where_its_blocks_can_have_it() {
        for (said, expected) in [(600, 600), (512, 512), (5000, 512), (3, 512)] {
            let mut put = sight(Kind::Put, 1, Parent::Root, &[1, 2]);
            put.prompt_tokens = Some(said);
            assert_eq!(recorded([put]), [(1000, vec![1, 2], expected, 0)]);
        }
    }

    #[test]
    fn prompts_of_a_connection_and_their_blocks_are_bounded() {
        let mut episodes = Episodes::default();
        for number in 0..2 * OPEN_MAX as u64 {
            episodes.see(sight(Kind::Lookup, 1, Parent::Root, &[number]));
        }
        let open: usize = episodes.open.values().map(Vec::len).sum();
        assert_eq!(open, OPEN_MAX);
        let many: Vec<u64> = (0..BLOCKS_MAX as u64 + 9).collect();
        assert_eq!(
            recorded([sight(Kind::Put, 1, Parent::Root, &many)])[0].1.len(),
            BLOCKS_MAX
        );
    }
}
