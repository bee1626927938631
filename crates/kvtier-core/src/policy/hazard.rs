//! Eviction by reuse hazard: see [`ReuseHazard`].

mod ages;
mod answered;
mod class;
mod duel;
mod ghosts;
mod image;
mod order;
mod tables;
mod tenants;
mod visits;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use self::ages::{BINS, EDGES, SECOND, ticks, width};
use self::class::{Class, Conversation};
use self::duel::{Duel, Rule};
use self::ghosts::{Ghost, Ghosts};
use self::order::{End, LEVELS, Orders};
use self::tables::{Tables, phase};
use self::tenants::{LEVELS_AN_OCTAVE, Tenants};
use self::visits::{NONE, Visits, mark};
use super::{Advice, BlockId, EvictionPolicy, ListId, Use, Verdict};
use crate::{Tier, Time};

pub use self::image::{ImageError, LearnedTables};

const CHUNK: usize = 4096;
/// What is used within this many ticks counts as used once.
const TOGETHER: u32 = 64;
/// A block joins the visit of its parent where that is not older, ticks: a prompt is put when it has been computed.
const SPAN: u32 = 32_768;
/// With more blocks that follow it than this, a block is part of what many conversations share.
const FAN_OUT_OWN: u8 = 3;
/// What was learned is fitted anew after this time at the earliest, ticks.
const FIT_EVERY: u64 = (15.0 * SECOND) as u64;
/// Visits between one fit and the next at least, as a share of those alive: one in so many.
const FIT_SHARE: u64 = 32;
/// Pins at one time at most, and those of one namespace; what comes later is not pinned.
const PINS_MAX: usize = 4096;
const PINS_OF_NAMESPACE_MAX: u16 = 512;
/// What is worth more than one in so many of its list is copied when its place is needed.
const KEPT_PART: usize = 3;
/// What is not worth more than one in so many of what lies on NVMe is not written there.
const ADMITTED_PART: usize = 4;
/// How far one block moves what is usual for all.
const USUAL_SHARE: f64 = 1.0 / 256.0;
const DENSITY_LEVELS_MAX: f64 = 24.0;
const LEVEL_NEXT: u8 = 0;
const LEVEL_PINNED: u8 = LEVELS as u8 - 1;
const LEVEL_EXPECTED: u8 = LEVEL_PINNED - 1;

/// What the policy keeps of a cached block.
#[derive(Clone, Copy, Debug)]
struct Block {
    /// Its last one; [`NONE`] where the block is not cached.
    visit: u32,
    /// Neighbours among the cached blocks of that visit.
    newer: u32,
    older: u32,
    tokens: u16,
    /// Blocks known to follow it, saturating.
    fan_out: u8,
    /// How often it was used, saturating.
    uses: u8,
}

const ABSENT: Block = Block {
    visit: NONE,
    newer: NONE,
    older: NONE,
    tokens: 0,
    fan_out: 0,
    uses: 0,
};

/// Evicts what is least likely to be used soon for the time that it would have to wait, as far as that can be learned.
///
/// Each use of a prefix is a *visit*. A visit has a class (which turn of a conversation it is, the pause before it, how
/// much of the prompt was new, how long it is, how long its answer is where a client says so; or: a prefix that many share;
/// or: an unfinished last block; or: what the next visit took another way from), and from what visits of a class did at each age the policy learns its hazard: returns in a moment among those that could still
/// return. Visits that have not returned count for as long as they were watched, and evicted blocks are watched on as
/// *ghosts*, so what is evicted early is not taken for dead. A block is worth the most that its visit yields over all times
/// to wait, P(return within h) / E[time until then]; the least goes first, leaves before their parents.
///
/// Surprising: it may rule against itself. What a cache would have hit that keeps what was used last is counted beside it,
/// exactly and without a second set of tables; where that is clearly more, recency decides for a while.
///
/// See Aalto, Ayesta, Righter, "On the Gittins index in the M/G/1 queue" (2009) for the index, and Wang et al., "KVCache Cache in
/// the Wild" (USENIX ATC '25) for how differently kinds of requests return.
///
/// Costs 28 bytes a cached block and 12 for each further list, 16 a ghost and 48 a visit, and a constant number of steps a use.
#[derive(Debug)]
pub struct ReuseHazard {
    blocks: Vec<Box<[Block]>>,
    cached: u64,
    orders: Orders,
    visits: Visits,
    ghosts: Ghosts,
    tables: Tables,
    duel: Duel,
    /// Deadline, visit and tag.
    pins: BTreeSet<(u64, u32, u16)>,
    /// The same by visit and tag.
    pinned: BTreeMap<(u32, u16), u64>,
    /// How many of them each namespace has, by its place among the tenants.
    pins_of: Box<[u16; 256]>,
    tenants: Tenants,
    /// How much more the next token of a prompt takes to compute for each token before it, as a share of what the first takes.
    depth_cost: f64,
    /// Logarithm to base 2 of the tokens a byte that blocks have of late.
    usual_density: Option<f64>,
    /// Visits that the next one used some blocks of: when, visit and tag.
    parted: VecDeque<(u64, u32, u16)>,
    now: u64,
    /// When the next visit outgrows its bin.
    next_outgrown: u64,
    next_fit: u64,
    visits_since_fit: u64,
    /// The list of NVMe copies, once room has to be made among them.
    reclaimed: Option<ListId>,
    /// Tokens of the largest block seen.
    tokens_max: u16,
}

/// What is known of a block's visit before this one.
#[derive(Clone, Copy)]
struct Past {
    class: Class,
    turn: u8,
    age: u32,
    visit: u32,
}

impl ReuseHazard {
    /// Knows nothing yet. At most `ghosts_max` evicted blocks are remembered, 16 bytes each; tables for fewer than 512 are not made.
    #[must_use]
    pub fn new(ghosts_max: usize) -> ReuseHazard {
        ReuseHazard {
            blocks: Vec::new(),
            cached: 0,
            orders: Orders::default(),
            visits: Visits::new(),
            ghosts: Ghosts::new(ghosts_max),
            tables: Tables::new(),
            duel: Duel::new(),
            pins: BTreeSet::new(),
            pinned: BTreeMap::new(),
            pins_of: Box::new([0; 256]),
            tenants: Tenants::new(),
            depth_cost: 0.0,
            usual_density: None,
            parted: VecDeque::new(),
            now: 0,
            next_outgrown: 0,
            next_fit: FIT_EVERY,
            visits_since_fit: 0,
            reclaimed: None,
            tokens_max: 0,
        }
    }

    /// The same, where what a miss costs depends on how deep in its prompt it is: the next token takes `depth_cost` times what the first took
    /// longer to compute for each token before it. (`b/a` of [`crate::cost::RecomputeCoefficients`].)
    #[must_use]
    pub fn weighed(ghosts_max: usize, depth_cost: f64) -> ReuseHazard {
        ReuseHazard {
            depth_cost: depth_cost.max(0.0),
            ..ReuseHazard::new(ghosts_max)
        }
    }

    /// Whether recency decides now instead of what was learned.
    #[must_use]
    pub fn is_overruled(&self) -> bool {
        self.duel.rule() == Rule::Recency
    }

    fn block(&self, block: u32) -> Block {
        let chunk = self.blocks.get(block as usize / CHUNK);
        chunk.map_or(ABSENT, |chunk| chunk[block as usize % CHUNK])
    }

    fn block_mut(&mut self, block: u32) -> &mut Block {
        while self.blocks.len() <= block as usize / CHUNK {
            self.blocks.push(vec![ABSENT; CHUNK].into_boxed_slice());
        }
        &mut self.blocks[block as usize / CHUNK][block as usize % CHUNK]
    }

    #[expect(clippy::cast_possible_truncation, reason = "wrapping: only ages are compared")]
    fn clock(&self) -> u32 {
        self.now as u32
    }

    fn age(&self, visit: u32) -> u32 {
        self.clock().wrapping_sub(self.visits.at(visit).time)
    }

    /// When a visit entered the bin that it is in.
    fn entered(&self, visit: u32) -> u64 {
        let entry = self.visits.at(visit);
        let age = self.clock().wrapping_sub(entry.time);
        (self.now + u64::from(EDGES[usize::from(entry.bin)])).saturating_sub(u64::from(age))
    }

    /// Takes the visit's weight out of the tables, to be put back changed.
    fn unweigh(&mut self, visit: u32) {
        let entered = self.entered(visit);
        let entry = self.visits.at(visit);
        if entry.size > 0 {
            let (class, bin, share) = (entry.class, usize::from(entry.bin), entry.share());
            self.tables.withdraw(class, bin, share, entered);
        }
    }

    fn weigh(&mut self, visit: u32) {
        let entered = self.entered(visit);
        let entry = self.visits.at(visit);
        let (class, bin, share) = (entry.class, usize::from(entry.bin), entry.share());
        self.tables.enter(class, bin, share, entered);
    }

    fn advance(&mut self, now: Time) {
        // Time never goes back.
        self.now = self.now.max(ticks(now));
        if self.now >= self.next_outgrown {
            for bin in 0..BINS - 1 {
                while let Some(visit) = self.visits.outgrown(bin, self.clock()) {
                    self.outgrow(visit, bin);
                }
            }
            self.next_outgrown = self.now + u64::from(self.visits.next_outgrown(self.clock())).max(1);
        }
        while let Some(&(since, visit, tag)) = self.parted.front()
            && self.now - since > u64::from(SPAN)
        {
            self.parted.pop_front();
            self.leave_behind(visit, tag);
        }
        while let Some(&(deadline, visit, tag)) = self.pins.first().filter(|pin| pin.0 <= self.now) {
            self.pins.remove(&(deadline, visit, tag));
            self.pinned.remove(&(visit, tag));
            self.pins_of[usize::from(self.visits.at(visit).tenant)] -= 1;
            if self.visits.is_live(visit, tag) {
                self.visits.at_mut(visit).marks &= !(mark::PINNED | mark::EXPECTED);
                self.level(visit);
            }
        }
        if self.now >= self.next_fit && self.visits_since_fit > self.visits.live as u64 / FIT_SHARE {
            self.next_fit = self.now + FIT_EVERY;
            self.visits_since_fit = 0;
            self.tables.fit(self.now);
            self.tenants.fit();
            self.level_all();
        }
    }

    fn outgrow(&mut self, visit: u32, bin: usize) {
        self.unweigh(visit);
        let entry = self.visits.at(visit);
        let (class, share, tenant) = (entry.class, entry.share(), entry.tenant);
        self.learn_from(tenant, class, bin, share, width(bin), false);
        self.visits.grow_older(visit);
        self.weigh(visit);
        self.level(visit);
    }

    /// Some blocks of a visit were used again. Once the others had their time, they are what was left behind.
    fn part(&mut self, visit: u32) {
        let entry = self.visits.at_mut(visit);
        if entry.size > 0 && entry.class.is_conversation() && !entry.is(mark::PARTED) {
            entry.marks |= mark::PARTED;
            self.parted.push_back((self.now, visit, entry.tag));
        }
    }

    fn leave_behind(&mut self, visit: u32, tag: u16) {
        if self.visits.is_live(visit, tag) {
            self.unweigh(visit);
            self.visits.at_mut(visit).class = Class::LEFT;
            self.weigh(visit);
            self.level(visit);
        }
    }

    /// Puts the blocks of a visit on the level where they belong now.
    fn level(&mut self, visit: u32) {
        let rises = self.rises(visit);
        let level = self.level_of(visit);
        let entry = self.visits.at_mut(visit);
        if std::mem::replace(&mut entry.level, level) == level {
            return;
        }
        // Who falls is worth more than those on the level, who rises is worth less; and the deepest block goes first.
        let mut block = entry.newest_block;
        if rises {
            while block != NONE && self.block(block).older != NONE {
                block = self.block(block).older;
            }
        }
        while block != NONE {
            let Block { newer, older, .. } = self.block(block);
            let (end, next) = if rises {
                (End::Oldest, newer)
            } else {
                (End::Newest, older)
            };
            self.orders.move_to(BlockId(block), level, end);
            block = next;
        }
    }

    /// Whether it is to join a higher level from below. Where recency decides, the newest is above all others wherever it comes from.
    fn rises(&mut self, visit: u32) -> bool {
        self.duel.rule() == Rule::Hazard && self.level_of(visit) > self.visits.at(visit).level
    }

    fn level_of(&mut self, visit: u32) -> u8 {
        let entry = self.visits.at(visit);
        if entry.is(mark::PINNED) {
            return LEVEL_PINNED;
        }
        if entry.is(mark::EXPECTED) {
            return LEVEL_EXPECTED;
        }
        if entry.is(mark::CLOSED) {
            return LEVEL_NEXT;
        }
        let (class, bin) = (entry.class, usize::from(entry.bin));
        match self.duel.rule() {
            Rule::Hazard => self.worth_level(visit, class, bin),
            Rule::Recency => LEVEL_PINNED - 1 - 3 * entry.bin,
        }
    }

    /// Its blocks stay until then, where there is room for one more such promise. What was said last counts; a deadline that has passed
    /// ends it.
    fn hold(&mut self, visit: u32, until: u64, mark: u8) {
        self.let_go(visit);
        let tag = self.visits.at(visit).tag;
        let tenant = usize::from(self.visits.at(visit).tenant);
        let has_room = self.pins.len() < PINS_MAX && self.pins_of[tenant] < PINS_OF_NAMESPACE_MAX;
        let held = until > self.now && has_room;
        if held {
            self.pins_of[tenant] += 1;
            self.pins.insert((until, visit, tag));
            self.pinned.insert((visit, tag), until);
        }
        let entry = self.visits.at_mut(visit);
        entry.marks &= !(mark::PINNED | mark::EXPECTED);
        if held {
            entry.marks = (entry.marks | mark) & !mark::CLOSED;
        }
    }

    /// Takes back what was promised of a visit, whose marks the caller sees to. Until when it would have held.
    fn let_go(&mut self, visit: u32) -> Option<u64> {
        let tag = self.visits.at(visit).tag;
        let until = self.pinned.remove(&(visit, tag))?;
        self.pins.remove(&(until, visit, tag));
        self.pins_of[usize::from(self.visits.at(visit).tenant)] -= 1;
        Some(until)
    }

    /// Until when a visit is pinned.
    fn pinned_until(&self, visit: u32) -> Option<u64> {
        let entry = self.visits.at(visit);
        let tag = entry.is(mark::PINNED).then_some(entry.tag)?;
        self.pinned.get(&(visit, tag)).copied()
    }

    /// What was seen of a share of a visit, which is taken out of the tables meanwhile.
    fn learn_from(&mut self, tenant: u8, class: Class, bin: usize, share: f32, ticks: f64, returned: bool) {
        if class.is_conversation() {
            let expected = self.tables.hazard(class, bin) * f64::from(share) * ticks;
            let returns = if returned { share } else { 0.0 };
            self.tenants.observe(tenant, phase(bin), returns, expected as f32);
        }
        self.tables.observe(class, bin, share, ticks, returned);
    }

    /// The level of what the model says of a class, with what is known of the namespace and of what a miss costs.
    fn worth_level(&mut self, visit: u32, class: Class, bin: usize) -> u8 {
        let mut level = i32::from(self.tables.level(class, bin));
        let entry = self.visits.at(visit);
        if class.is_conversation() {
            level += self.tenants.levels(entry.tenant, phase(bin));
        }
        level += i32::from(entry.density);
        if self.depth_cost > 0.0 {
            level += (LEVELS_AN_OCTAVE * (1.0 + self.depth_cost * f64::from(entry.tokens)).log2()).round() as i32;
        }
        level.clamp(1, i32::from(LEVEL_EXPECTED) - 1) as u8
    }

    /// How much more a byte of a block spares than one of blocks of late, in levels. Clients say how many tokens a block has, so it
    /// decides no more than three octaves.
    fn density(&mut self, usage: &Use) -> i8 {
        if usage.bytes == 0 || usage.tokens == 0 {
            return 0;
        }
        let density = (f64::from(usage.tokens) / f64::from(usage.bytes)).log2();
        let usual = self.usual_density.get_or_insert(density);
        let levels = LEVELS_AN_OCTAVE * (density - *usual);
        *usual += (density - *usual).clamp(-3.0, 3.0) * USUAL_SHARE;
        levels.round().clamp(-DENSITY_LEVELS_MAX, DENSITY_LEVELS_MAX) as i8
    }

    fn level_all(&mut self) {
        let visits: Vec<u32> = self.visits.iter().collect();
        for visit in &visits {
            if !self.rises(*visit) {
                self.level(*visit);
            }
        }
        for visit in visits.into_iter().rev() {
            self.level(visit);
        }
    }

    /// A block was used again, of this many tokens: what there is to learn from it.
    fn observe_return(&mut self, visit: u32, tokens: u16, cached: bool) -> Past {
        let age = self.age(visit);
        let entry = self.visits.at(visit);
        let past = Past {
            class: entry.class,
            turn: entry.turn,
            age,
            visit,
        };
        self.duel.judge(u32::from(tokens), cached, entry.is(mark::RECENT));
        let (bin, tenant) = (usize::from(entry.bin), entry.tenant);
        let share = 1.0 / entry.size as f32;
        self.unweigh(visit);
        let spent = f64::from(age.saturating_sub(EDGES[bin])).min(width(bin));
        self.learn_from(tenant, past.class, bin, share, spent, true);
        self.lose(visit);
        past
    }

    /// One block less of a visit whose weight is out of the tables.
    fn lose(&mut self, visit: u32) {
        if self.visits.at(visit).left == 1 {
            self.let_go(visit);
        }
        if !self.visits.lose(visit) {
            self.weigh(visit);
        }
    }

    fn unchain(&mut self, block: u32) {
        let Block {
            visit, newer, older, ..
        } = self.block(block);
        if newer == NONE {
            self.visits.at_mut(visit).newest_block = older;
        } else {
            self.block_mut(newer).older = older;
        }
        if older != NONE {
            self.block_mut(older).newer = newer;
        }
    }

    /// The block joins the visit that its parent is in, or begins one.
    fn join(&mut self, block: u32, usage: Use, past: Option<Past>) {
        let parent = usage.parent.map(|BlockId(parent)| self.block(parent));
        let parent = parent.filter(|parent| parent.visit != NONE);
        let full = parent.map_or(self.tokens_max, |parent| parent.tokens);
        let Block { fan_out, uses, .. } = self.block(block);
        let kind = if usage.tokens < full {
            Class::PARTIAL
        } else if fan_out > FAN_OUT_OWN {
            Class::shared(uses)
        } else {
            Class::conversation(Conversation::default())
        };
        let near = parent.map(|parent| parent.visit).filter(|visit| {
            self.age(*visit) <= SPAN && past.is_none_or(|past| past.visit != *visit || self.age(*visit) <= TOGETHER)
        });
        let same = near.filter(|visit| {
            let class = self.visits.at(*visit).class;
            kind != Class::PARTIAL
                && class.is_conversation() == kind.is_conversation()
                && class.is_shared() == kind.is_shared()
        });
        if kind == Class::PARTIAL
            && let Some(near) = near.filter(|near| self.visits.at(*near).class.is_conversation())
        {
            // It is no part of that visit, but says how long the prompt is.
            self.unweigh(near);
            let class = self.visits.at(near).class;
            self.describe(near, class, usage, past.filter(|past| past.class == Class::PARTIAL));
            self.weigh(near);
        }
        let visit = if let Some(visit) = same {
            self.unweigh(visit);
            visit
        } else {
            self.begin(kind, near)
        };
        self.visits.gain(visit);
        let density = self.density(&usage);
        let entry = self.visits.at_mut(visit);
        entry.density = density;
        if entry.size == 1 {
            entry.tenant = Tenants::slot(usage.namespace.0);
        }
        self.describe(visit, kind, usage, past);
        self.weigh(visit);
        let older = std::mem::replace(&mut self.visits.at_mut(visit).newest_block, block);
        if older != NONE {
            self.block_mut(older).newer = block;
        }
        *self.block_mut(block) = Block {
            visit,
            newer: NONE,
            older,
            tokens: usage.tokens,
            fan_out,
            uses,
        };
        self.tokens_max = self.tokens_max.max(usage.tokens);
        self.visits.keep_recent(self.cached);
        let level = self.level_of(visit);
        if self.visits.at(visit).size == 1 {
            self.visits.at_mut(visit).level = level;
        }
        self.orders
            .move_to(BlockId(block), self.visits.at(visit).level, End::Newest);
        if self.duel.decide(self.cached) {
            self.level_all();
        }
    }

    fn begin(&mut self, kind: Class, near: Option<u32>) -> u32 {
        let tokens = near.map_or(0, |near| self.visits.at(near).tokens);
        let visit = self.visits.open(self.clock(), kind);
        self.visits.at_mut(visit).tokens = tokens;
        self.visits_since_fit += 1;
        self.next_outgrown = self.next_outgrown.min(self.now + u64::from(EDGES[1]));
        visit
    }

    /// What the visit is known to be, with this block.
    fn describe(&mut self, visit: u32, kind: Class, usage: Use, past: Option<Past>) {
        let entry = self.visits.at_mut(visit);
        entry.tokens = entry.tokens.saturating_add(u32::from(usage.tokens));
        match past {
            None => entry.fresh_tokens = entry.fresh_tokens.saturating_add(u32::from(usage.tokens)),
            Some(past) if past.class.is_conversation() && kind.is_conversation() => {
                entry.turn = past.turn.saturating_add(1);
                entry.pause = past.age;
            }
            Some(_) => {}
        }
        entry.class = if kind.is_conversation() {
            entry.conversation()
        } else {
            kind
        };
    }
}

impl EvictionPolicy for ReuseHazard {
    fn appeared(&mut self, block: BlockId, usage: Use, now: Time) {
        self.advance(now);
        assert_eq!(self.block(block.0).visit, NONE, "block {} appears once", block.0);
        self.cached += 1;
        let ghost = self.ghosts.take(usage.fingerprint);
        let known = ghost.filter(|ghost| self.visits.is_live(ghost.visit, ghost.tag));
        let past = known.map(|ghost| self.observe_return(ghost.visit, usage.tokens, false));
        if past.is_none() {
            self.duel.judge(u32::from(usage.tokens), false, false);
        }
        let entry = self.block_mut(block.0);
        entry.fan_out = ghost.map_or(0, |ghost| ghost.fan_out);
        entry.uses = ghost.map_or(0, |ghost| ghost.uses).saturating_add(1);
        if let Some(BlockId(parent)) = usage.parent.filter(|_| ghost.is_none())
            && self.block(parent).visit != NONE
        {
            let parent = self.block_mut(parent);
            parent.fan_out = parent.fan_out.saturating_add(1);
        }
        self.join(block.0, usage, past);
    }

    fn used(&mut self, block: BlockId, usage: Use, now: Time) {
        self.advance(now);
        let visit = self.block(block.0).visit;
        assert_ne!(visit, NONE, "block {} is cached", block.0);
        if self.age(visit) <= TOGETHER {
            return;
        }
        // Whoever uses a prefix uses it from the front.
        let is_front = self.block(block.0).older == NONE;
        self.unchain(block.0);
        let pinned_until = self.pinned_until(visit);
        let past = self.observe_return(visit, usage.tokens, true);
        if is_front {
            self.part(visit);
        }
        let entry = self.block_mut(block.0);
        entry.uses = entry.uses.saturating_add(1);
        self.join(block.0, usage, Some(past));
        // What is pinned stays so when it is used; what was expected has come.
        let visit = self.block(block.0).visit;
        if let Some(until) = pinned_until
            && self.pinned_until(visit).is_none_or(|held| held < until)
        {
            self.hold(visit, until, mark::PINNED);
            self.level(visit);
        }
    }

    fn forgotten(&mut self, block: BlockId, fingerprint: u64) {
        let entry = self.block(block.0);
        let tag = self.visits.at(entry.visit).tag;
        self.unchain(block.0);
        *self.block_mut(block.0) = ABSENT;
        self.cached -= 1;
        let ghost = Ghost {
            fingerprint,
            visit: entry.visit,
            tag,
            fan_out: entry.fan_out,
            uses: entry.uses.max(1),
        };
        let (visits, clock) = (&self.visits, self.clock());
        let gone = self.ghosts.put(ghost, |ghost| {
            let live = visits.is_live(ghost.visit, ghost.tag);
            live.then(|| clock.wrapping_sub(visits.at(ghost.visit).time))
        });
        if let Some(gone) = gone {
            let entry = self.visits.at(gone.visit);
            let (class, tenant) = (entry.class, entry.tenant);
            let (bin, share) = (usize::from(entry.bin), 1.0 / entry.size as f32);
            let spent = f64::from(self.age(gone.visit).saturating_sub(EDGES[bin])).min(width(bin));
            self.unweigh(gone.visit);
            self.learn_from(tenant, class, bin, share, spent, false);
            self.tables.lose(share);
            self.lose(gone.visit);
        }
    }

    fn advise(&mut self, blocks: &[BlockId], advice: Advice, now: Time) {
        self.advance(now);
        if let Advice::Answered(tokens) = advice {
            self.answered(blocks, tokens);
            return;
        }
        let named: BTreeSet<u32> = blocks.iter().map(|block| block.0).collect();
        let visits: BTreeSet<u32> = named.iter().map(|block| self.block(*block).visit).collect();
        for visit in visits.into_iter().filter(|visit| *visit != NONE) {
            let entry = self.visits.at(visit);
            // Another session that begins alike and went on from here is not over with this one.
            let is_own = named.contains(&entry.newest_block) && !entry.class.is_shared();
            match advice {
                Advice::Closed if is_own => {
                    self.let_go(visit);
                    let entry = self.visits.at_mut(visit);
                    entry.marks = (entry.marks | mark::CLOSED) & !(mark::PINNED | mark::EXPECTED);
                }
                Advice::Closed => continue,
                Advice::PinnedUntil(until) | Advice::ExpectedBy(until) if ticks(until) <= self.now && !is_own => {
                    continue;
                }
                Advice::PinnedUntil(until) => self.hold(visit, ticks(until), mark::PINNED),
                Advice::ExpectedBy(until) => self.hold(visit, ticks(until), mark::EXPECTED),
                Advice::Answered(_) => continue,
            }
            self.level(visit);
        }
    }

    fn return_share(&mut self, block: BlockId, within: Duration) -> Option<f64> {
        let visit = self.block(block.0).visit;
        if visit == NONE || self.duel.rule() == Rule::Recency {
            return None;
        }
        let entry = self.visits.at(visit);
        if entry.is(mark::CLOSED) {
            return Some(0.0);
        }
        let (class, bin, tenant) = (entry.class, usize::from(entry.bin), entry.tenant);
        let ticks = u32::try_from(within.as_nanos() >> 20).unwrap_or(u32::MAX);
        let factor = match class.is_conversation() {
            true => self.tenants.factor(tenant, phase(bin)),
            false => 1.0,
        };
        Some(self.tables.return_share(class, bin, ticks, factor))
    }

    fn learned(&self) -> Option<LearnedTables> {
        Some(LearnedTables::of(&self.tables))
    }

    fn learn(&mut self, learned: &LearnedTables) {
        learned.add_to(&mut self.tables);
        self.tables.fit(self.now);
        self.level_all();
    }

    fn insert(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time) {
        self.advance(now);
        let level = self.current_level(block);
        self.orders.insert_beside(list, block, level, beside);
    }

    fn insert_oldest(&mut self, list: ListId, block: BlockId) {
        self.orders.insert(list, block, LEVEL_NEXT, End::Oldest);
    }

    fn touch(&mut self, list: ListId, block: BlockId, beside: Option<BlockId>, now: Time) {
        self.orders.remove(list, block);
        self.insert(list, block, beside, now);
    }

    fn is_recent(&self, block: BlockId, now: Time) -> bool {
        let visit = self.block(block.0).visit;
        visit != NONE && {
            let clock = ticks(now).max(self.now) as u32;
            clock.wrapping_sub(self.visits.at(visit).time) <= SPAN
        }
    }

    fn remove(&mut self, list: ListId, block: BlockId) {
        self.orders.remove(list, block);
    }

    fn shelve(&mut self, list: ListId, block: BlockId) {
        self.orders.shelve(list, block);
    }

    fn unpark(&mut self, list: ListId, block: BlockId) {
        let level = self.current_level(block);
        self.orders.unpark(list, block, level);
    }

    fn victim(&mut self, list: ListId, parked: bool, judge: &mut dyn FnMut(BlockId) -> Verdict) -> Option<BlockId> {
        self.orders.victim(list, parked, judge)
    }

    fn goes_by_age(&self) -> bool {
        false
    }

    fn age(&self, list: ListId, now: Time) -> Option<u32> {
        let BlockId(block) = self.orders.next(list)?;
        let visit = self.block(block).visit;
        if visit == NONE {
            return Some(u32::MAX);
        }
        let clock = ticks(now).max(self.now) as u32;
        Some(clock.wrapping_sub(self.visits.at(visit).time))
    }

    fn admit(&mut self, block: BlockId, tier: Tier) -> bool {
        let Some(list) = self
            .reclaimed
            .filter(|_| tier == Tier::Nvme && self.duel.rule() == Rule::Hazard)
        else {
            return true;
        };
        // What is pinned or expected says nothing of what is worth writing.
        // Among equals it is as good as what is there.
        let below = self.orders.below(list, self.current_level(block).saturating_add(1));
        below * ADMITTED_PART >= self.orders.below(list, LEVEL_EXPECTED)
    }

    fn keep(&mut self, list: ListId, block: BlockId, _again: bool) -> bool {
        self.reclaimed = Some(list);
        let level = self.current_level(block);
        let (below, with) = (
            self.orders.below(list, level),
            self.orders.below(list, level.saturating_add(1)),
        );
        usize::midpoint(below, with) * KEPT_PART >= self.orders.below(list, LEVEL_EXPECTED)
    }

    fn contains(&self, list: ListId, block: BlockId) -> bool {
        self.orders.contains(list, block)
    }

    fn length(&self, list: ListId) -> usize {
        self.orders.length(list)
    }

    fn memory_bytes(&self) -> u64 {
        let chunks =
            self.blocks.len() * CHUNK * size_of::<Block>() + self.blocks.capacity() * size_of::<Box<[Block]>>();
        chunks as u64
            + self.orders.memory_bytes()
            + self.visits.memory_bytes()
            + self.ghosts.memory_bytes()
            + self.tables.memory_bytes()
            + self.tenants.memory_bytes()
            + (self.parted.capacity() * size_of::<(u64, u32, u16)>()) as u64
    }

    fn check_invariants(&self) {
        self.orders.check_invariants();
        self.visits.check_invariants();
        let pins = self.pins.iter().map(|&(until, visit, tag)| ((visit, tag), until));
        assert_eq!(
            pins.collect::<BTreeMap<_, _>>(),
            self.pinned,
            "pins by deadline and by visit"
        );
        let mut pins_of = [0; 256];
        for (visit, tag) in self.pinned.keys() {
            assert!(self.visits.is_live(*visit, *tag), "a pin of a visit that is over");
            pins_of[usize::from(self.visits.at(*visit).tenant)] += 1;
        }
        assert_eq!(pins_of, *self.pins_of, "pins by namespace");
        self.check_blocks();
    }
}

impl ReuseHazard {
    fn current_level(&self, block: BlockId) -> u8 {
        match self.block(block.0).visit {
            NONE => LEVEL_NEXT,
            visit => self.visits.at(visit).level,
        }
    }

    /// The blocks of each visit are chained from it, and each is in one.
    fn check_blocks(&self) {
        let mut chained = 0;
        for visit in self.visits.iter() {
            let (mut block, mut newer, mut blocks) = (self.visits.at(visit).newest_block, NONE, 0);
            while block != NONE {
                let entry = self.block(block);
                assert_eq!((entry.visit, entry.newer), (visit, newer), "chain of block {block}");
                blocks += 1;
                newer = block;
                block = entry.older;
            }
            assert!(blocks <= self.visits.at(visit).left, "a visit's cached blocks are left");
            chained += u64::from(blocks);
        }
        assert_eq!(chained, self.cached, "cached blocks are chained");
        let blocks = || (0..).zip(self.blocks.iter().flat_map(|chunk| chunk.iter()));
        let cached = blocks().filter(|(_, block)| block.visit != NONE).count() as u64;
        assert_eq!(cached, self.cached, "cached blocks");
        for (place, _) in blocks().filter(|(_, block)| block.visit == NONE) {
            assert!(
                !self.orders.is_listed(BlockId(place)),
                "block {place} is listed but not cached"
            );
        }
        let watched: u64 = self
            .visits
            .iter()
            .map(|visit| u64::from(self.visits.at(visit).left))
            .sum();
        let live = |ghost: &&Ghost| self.visits.is_live(ghost.visit, ghost.tag);
        let ghosts = self.ghosts.iter().filter(live).count() as u64;
        assert_eq!(
            watched,
            self.cached + ghosts,
            "what a visit counts is cached or remembered"
        );
    }
}

#[cfg(test)]
mod tests;
