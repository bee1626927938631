//! Which questions of a connection belong to one prompt.
//!
//! An engine asks for a prompt in pieces: it looks it up, fetches what is there, puts the rest and, later, what it answered, or says how
//! long that was. Pure.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::Duration;

use kvtier_core::{BlockHash, ClientId, NamespaceId, Parent, RealizationId, Time};

use crate::wire::Lineage;

/// A prompt is over when nothing of it was heard for this long, unless its client says how long answers were: a long one takes its time.
const IDLE: Duration = Duration::from_secs(120);
/// A prompt is over after this time whatever is heard of it: those that came later wait for it.
const AGE_MAX: Duration = Duration::from_secs(600);
/// Who asks for the very same within this time asks once more for one prompt.
const RETRY: Duration = Duration::from_secs(1);
/// Prompts that are idle are looked for this often.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// Prompts of one connection at a time; the one heard of longest ago is over when there are more.
const OPEN_MAX: usize = 64;
/// Blocks of a prompt; what comes behind them is left out.
const BLOCKS_MAX: usize = 1 << 16;
/// Blocks of all prompts that are open or wait for those before them, 20 bytes each. When there are more, all are over.
const HELD_MAX: usize = 4 << 20;
/// A block has no more tokens.
const TOKENS_MAX: u32 = u16::MAX as u32;

/// What a client asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Where blocks are.
    Lookup,
    /// To read them.
    Fetch,
    /// To keep them.
    Put,
    /// Nothing: it has answered the prompt that they are of.
    Answered { tokens: u32 },
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
    number: u64,
    at: Time,
    heard: Time,
    hashes: Vec<BlockHash>,
    tokens: Vec<u32>,
    /// Blocks from the front that were looked up, and fetched.
    looked_up: usize,
    fetched: usize,
    put: bool,
    prompt_tokens: Option<u32>,
    /// Of the answer, if the client says so.
    answer_tokens: Option<u32>,
}

type Place = (ClientId, NamespaceId, RealizationId);

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Episodes {
    open: HashMap<Place, Vec<Open>>,
    /// When those came, and their numbers.
    since: BTreeSet<(Time, u64)>,
    /// Who has said how long answers were.
    says: HashSet<ClientId>,
    /// Tokens of a full block.
    block_tokens: HashMap<(NamespaceId, RealizationId), u32>,
    /// By time and number: a trace is in the order in which prompts came.
    finished: BTreeMap<(Time, u64), Prompt>,
    /// Blocks of all of these.
    held: usize,
    number: u64,
    now: Time,
    looked: Time,
}

impl Episodes {
    pub(super) fn see(&mut self, sight: Sight) {
        self.now = self.now.max(sight.at);
        self.end_idle();
        let place = (sight.client, sight.scope.0, sight.scope.1);
        if sight.kind == Kind::Gone {
            self.says.remove(&sight.client);
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
        if let Kind::Answered { tokens } = sight.kind {
            self.answered(place, &sight, tokens);
            return;
        }
        let open = self.open.entry(place).or_default();
        // The one heard of last is at the end.
        let fitting = (0..open.len())
            .rev()
            .find_map(|index| Some((index, open[index].fits(&sight)?)));
        if let Some((index, start)) = fitting {
            let mut continued = open.remove(index);
            let before = continued.hashes.len();
            continued.extend(start, &sight);
            self.held += continued.hashes.len() - before;
            let full = continued.full_block();
            open.push(continued);
            self.learn(sight.scope, full);
            self.keep_bounded();
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
        self.number += 1;
        let begun = Open::begin(self.number, before, &sight);
        self.since.insert((begun.at, begun.number));
        self.held += begun.hashes.len();
        let full = begun.full_block();
        open.push(begun);
        let oldest = (open.len() > OPEN_MAX).then(|| open.remove(0));
        self.learn(sight.scope, full);
        if let Some(oldest) = oldest {
            self.finish(place, oldest);
        }
        self.keep_bounded();
    }

    /// The open prompt that was answered, if there is any: one of just these blocks, or one that put the last of them; and of several the
    /// one heard of longest ago of whose answer nothing was heard yet.
    fn answered(&mut self, place: Place, sight: &Sight, tokens: u32) {
        self.says.insert(place.0);
        let Some(opens) = self.open.get_mut(&place) else { return };
        let ends = opens
            .iter()
            .enumerate()
            .rev()
            .filter_map(|(index, open)| Some((index, open.told_up_to(&sight.hashes)?)));
        let rank = |&(index, end): &(usize, usize)| {
            let open: &Open = &opens[index];
            (end == open.prompt_blocks(), open.answer_tokens.is_none())
        };
        if let Some((index, _)) = ends.max_by_key(rank) {
            // The one heard of last is at the end.
            let mut open = opens.remove(index);
            open.answer_tokens = Some(tokens);
            open.heard = sight.at;
            opens.push(open);
        }
    }

    /// How many tokens a block has that another follows.
    fn learn(&mut self, scope: (NamespaceId, RealizationId), tokens: u32) {
        if tokens > 0 {
            let known = self.block_tokens.entry(scope).or_default();
            *known = tokens.min(TOKENS_MAX).max(*known);
        }
    }

    fn keep_bounded(&mut self) {
        if self.held > HELD_MAX {
            self.end();
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
        let (&(at, _), _) = self.finished.first_key_value()?;
        if self.since.first().is_some_and(|(earliest, _)| *earliest < at) {
            return None;
        }
        let (_, prompt) = self.finished.pop_first()?;
        self.held -= prompt.hashes.len();
        Some(prompt)
    }

    fn end_idle(&mut self) {
        let now = self.now;
        if now < self.looked.after(LOOK_EVERY) {
            return;
        }
        self.looked = now;
        let says = &self.says;
        let idle = |place: &Place, open: &Open| {
            let awaits = open.answer_tokens.is_none() && says.contains(&place.0);
            (open.heard.after(IDLE) < now && !awaits) || open.at.after(AGE_MAX) < now
        };
        let places: Vec<Place> = self
            .open
            .iter()
            .filter(|(place, opens)| opens.is_empty() || opens.iter().any(|open| idle(place, open)))
            .map(|(place, _)| *place)
            .collect();
        let mut ended = Vec::new();
        for place in places {
            let opens = self.open.remove(&place).unwrap_or_default();
            let (over, on): (Vec<Open>, Vec<Open>) = opens.into_iter().partition(|open| idle(&place, open));
            if !on.is_empty() {
                self.open.insert(place, on);
            }
            ended.extend(over.into_iter().map(|open| (place, open)));
        }
        for (place, open) in ended {
            self.finish(place, open);
        }
    }

    fn finish(&mut self, (_, namespace, realization): Place, open: Open) {
        self.since.remove(&(open.at, open.number));
        let block_tokens = self.block_tokens.get(&(namespace, realization)).copied().unwrap_or(0);
        let tokens = |range: &[u32]| -> u64 {
            let known = |tokens: &u32| u64::from(if *tokens == 0 { block_tokens } else { *tokens });
            range.iter().map(known).sum()
        };
        let prompt = open.prompt_blocks();
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
            output_tokens: open
                .answer_tokens
                .map_or_else(|| tokens(&open.tokens[prompt..]), u64::from),
            hashes: open.hashes[..prompt].to_vec(),
            input_tokens,
            block_tokens,
        };
        self.held -= open.hashes.len() - prompt.hashes.len();
        self.finished.insert((open.at, open.number), prompt);
    }
}

impl Open {
    fn begin(number: u64, (hashes, tokens): (Vec<BlockHash>, Vec<u32>), sight: &Sight) -> Open {
        let mut open = Open {
            number,
            at: sight.at,
            heard: sight.at,
            hashes,
            tokens,
            looked_up: 0,
            fetched: 0,
            put: false,
            prompt_tokens: None,
            answer_tokens: None,
        };
        let start = open.hashes.len();
        open.extend(start, sight);
        open
    }

    /// What was looked up is the prompt, and what was put behind it the answer. Who looks nothing up puts the prompt.
    fn prompt_blocks(&self) -> usize {
        if self.looked_up > 0 {
            self.looked_up
        } else {
            self.hashes.len()
        }
    }

    /// Where these keys end among this prompt's, if they are its own up to there: those of the prompt, and perhaps of what was put behind it.
    fn told_up_to(&self, said: &[BlockHash]) -> Option<usize> {
        // Of a long prompt only the end may have been named.
        let start = self.hashes.iter().position(|hash| *hash == said[0])?;
        let own = self.hashes.get(start..start + said.len())? == said;
        let end = start + said.len();
        (own && (end == self.prompt_blocks() || self.looked_up == 0 || end > self.looked_up)).then_some(end)
    }

    /// Where the keys begin among this prompt's, if they go on with it.
    fn fits(&self, sight: &Sight) -> Option<usize> {
        let start = match sight.lineage {
            Lineage::Chain(Parent::Block(parent)) => self.hashes.iter().rposition(|hash| *hash == parent)? + 1,
            _ if self.hashes.first() == sight.hashes.first() => 0,
            _ => self.hashes.iter().position(|hash| *hash == sight.hashes[0])?,
        };
        let known = &self.hashes[start..];
        if known.iter().zip(&sight.hashes).any(|(known, asked)| known != asked) {
            return None;
        }
        // Who asks again asks for another prompt, though it begins alike; but for one who tries again what was not answered well.
        let end = start + sight.hashes.len();
        let tries_again = |asked: usize| end == asked && sight.at <= self.heard.after(RETRY);
        let goes_on = match sight.kind {
            Kind::Lookup => (start >= self.looked_up || tries_again(self.looked_up)) && self.fetched == 0 && !self.put,
            Kind::Fetch => (start >= self.fetched || tries_again(self.fetched)) && !self.put,
            Kind::Put | Kind::Answered { .. } | Kind::Gone => true,
        };
        goes_on.then_some(start)
    }

    /// The most tokens of a block that another follows; 0 where none is known.
    fn full_block(&self) -> u32 {
        let followed = self.tokens.len().saturating_sub(1);
        self.tokens[..followed].iter().copied().max().unwrap_or(0)
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
            Kind::Lookup => self.looked_up = end.min(self.hashes.len()),
            Kind::Fetch => self.fetched = end.min(self.hashes.len()),
            Kind::Put | Kind::Answered { .. } | Kind::Gone => self.put = true,
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

    /// What is put has blocks of 256 tokens.
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
    fn who_says_how_long_an_answer_was_need_not_put_it() {
        let answered = |at_s, tokens, numbers: &[u64]| sight(Kind::Answered { tokens }, at_s, Parent::Unknown, numbers);
        let sights = [
            sight(Kind::Lookup, 1, Parent::Root, &[1, 2]),
            sight(Kind::Lookup, 1, Parent::Root, &[1, 3]),
            sight(Kind::Put, 2, Parent::Root, &[1, 2]),
            sight(Kind::Put, 2, Parent::Block(hash(2)), &[4]),
            answered(3, 9, &[1, 2]),
            answered(3, 70, &[1, 3]),
            answered(3, 5, &[8]),
            sight(Kind::Lookup, 4, Parent::Root, &[1, 2, 4, 5]),
            answered(5, 10, &[1, 2]),
        ];
        let expected = [
            (1000, vec![1, 2], 512, 10),
            (1000, vec![1, 3], 512, 70),
            (4000, vec![1, 2, 4, 5], 1024, 0),
        ];
        assert_eq!(
            recorded(sights),
            expected,
            "whoever went on from there is not answered yet"
        );
    }

    #[test]
    fn an_answer_is_that_of_a_prompt_of_just_these_blocks_and_what_was_put_behind_them() {
        let answered = |at_s, tokens, numbers: &[u64]| sight(Kind::Answered { tokens }, at_s, Parent::Unknown, numbers);
        let lookup = |at_s, numbers: &[u64]| sight(Kind::Lookup, at_s, Parent::Root, numbers);
        let sights = [
            // Named with what was put of the answer.
            lookup(1, &[1, 2]),
            sight(Kind::Put, 1, Parent::Root, &[1, 2]),
            sight(Kind::Put, 2, Parent::Block(hash(2)), &[4]),
            answered(3, 300, &[1, 2, 4]),
            // The very same twice.
            lookup(10, &[7, 8]),
            lookup(13, &[7, 8]),
            answered(14, 11, &[7, 8]),
            answered(15, 12, &[7, 8]),
            // By its end.
            lookup(20, &[30, 31, 32]),
            answered(21, 40, &[31, 32]),
            // Not one that begins alike, or goes on.
            lookup(30, &[9]),
            lookup(31, &[9, 10, 11]),
            answered(32, 80, &[9, 10]),
            // Who looks nothing up.
            sight(Kind::Put, 40, Parent::Root, &[50, 51]),
            answered(41, 3, &[50, 51]),
        ];
        let expected = [
            (1000, vec![1, 2], 512, 300),
            (10_000, vec![7, 8], 512, 11),
            (13_000, vec![7, 8], 512, 12),
            (20_000, vec![30, 31, 32], 768, 40),
            (30_000, vec![9], 256, 0),
            (31_000, vec![9, 10, 11], 768, 0),
            (40_000, vec![50, 51], 512, 3),
        ];
        assert_eq!(recorded(sights), expected);
    }

    #[test]
    fn who_says_how_long_answers_were_has_time_for_a_long_one() {
        let answered = |at_s, tokens, numbers: &[u64]| sight(Kind::Answered { tokens }, at_s, Parent::Unknown, numbers);
        let lookup = |at_s, numbers: &[u64]| sight(Kind::Lookup, at_s, Parent::Root, numbers);
        let mut episodes = Episodes::default();
        episodes.see(lookup(1, &[1, 2]));
        episodes.see(answered(2, 5, &[1, 2]));
        episodes.see(lookup(10, &[3, 4]));
        episodes.see(lookup(10, &[5, 6]));
        episodes.let_time_pass(Duration::from_secs(400));
        assert_eq!(episodes.next_finished().expect("answered and idle").output_tokens, 5);
        assert_eq!(episodes.next_finished(), None);
        episodes.see(answered(420, 9000, &[3, 4]));
        episodes.let_time_pass(Duration::from_secs(250));
        assert_eq!(episodes.next_finished().expect("answered late").output_tokens, 9000);
        assert_eq!(episodes.next_finished().expect("given up").output_tokens, 0);
        episodes.see(Sight {
            kind: Kind::Gone,
            ..lookup(700, &[])
        });
        assert!(episodes.says.is_empty());
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
    fn who_tries_again_at_once_asks_once_and_who_is_quick_to_ask_for_less_does_not() {
        let lookup = |at_s, numbers: &[u64]| sight(Kind::Lookup, at_s, Parent::Unknown, numbers);
        let put = sight(Kind::Put, 3, Parent::Root, &[1, 2]);
        let tried = [lookup(1, &[1, 2]), lookup(2, &[1, 2]), lookup(3, &[1, 2]), put.clone()];
        assert_eq!(recorded(tried), [(1000, vec![1, 2], 512, 0)]);
        let other = recorded([lookup(1, &[1, 2, 3]), lookup(1, &[1, 2]), put]);
        assert_eq!(other.len(), 2, "{other:?}");
        let later = recorded([lookup(1, &[1, 2]), lookup(9, &[1, 2])]);
        assert_eq!(later.len(), 2, "{later:?}");
    }

    #[test]
    fn a_prompt_of_which_something_is_always_heard_holds_others_up_for_a_while_only() {
        let mut episodes = Episodes::default();
        episodes.see(sight(Kind::Put, 0, Parent::Root, &[1, 2]));
        for at_s in (20..=620).step_by(20) {
            episodes.see(sight(Kind::Put, at_s, Parent::Block(hash(1)), &[2]));
            episodes.see(sight(Kind::Put, at_s, Parent::Root, &[at_s + 1000]));
        }
        let first = episodes.next_finished().expect("it is over");
        assert_eq!(first.at_ms, 0);
        assert!(episodes.next_finished().is_some());
    }

    #[test]
    fn all_that_is_held_is_bounded() {
        let mut episodes = Episodes::default();
        let many: Vec<u64> = (0..BLOCKS_MAX as u64).collect();
        for client in 0..80 {
            episodes.see(Sight {
                client: ClientId(client),
                ..sight(Kind::Put, 1, Parent::Root, &many)
            });
            assert!(episodes.held <= HELD_MAX + BLOCKS_MAX);
            if episodes.open.is_empty() {
                while episodes.next_finished().is_some() {}
                assert_eq!(episodes.held, 0);
            }
        }
        episodes.end();
        while episodes.next_finished().is_some() {}
        assert_eq!((episodes.held, episodes.since.len()), (0, 0));
    }

    #[test]
    fn a_blocks_size_is_that_of_blocks_that_others_follow() {
        let mut episodes = Episodes::default();
        let mut odd = sight(Kind::Put, 1, Parent::Root, &[1]);
        odd.tokens = vec![u32::MAX];
        episodes.see(odd);
        let mut chain = sight(Kind::Put, 2, Parent::Root, &[5, 6]);
        chain.tokens = vec![16, 7];
        episodes.see(chain);
        episodes.end();
        let sizes: Vec<u32> = std::iter::from_fn(|| episodes.next_finished())
            .map(|prompt| prompt.block_tokens)
            .collect();
        assert_eq!(sizes, [16, 16]);
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
            sight(Kind::Put, 1, Parent::Block(hash(2)), &[3, 4]),
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
            ..sight(Kind::Put, 2, Parent::Root, &[5, 6])
        });
        episodes.see(Sight {
            client: ClientId(2),
            ..sight(Kind::Gone, 3, Parent::Unknown, &[])
        });
        assert_eq!(episodes.next_finished(), None, "an earlier one is open");
        episodes.let_time_pass(Duration::from_secs(130));
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
