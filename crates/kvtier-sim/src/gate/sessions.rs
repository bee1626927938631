use std::collections::{BTreeMap, BTreeSet};

use crate::TraceRequest;

/// A block after which more than this many different blocks came is shared by sessions, not a turn of one.
const TURNS_MAX: usize = 3;

/// To which session a request belongs, and which turn of it is its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Turn {
    pub(super) session: u32,
    pub(super) turn: u32,
}

struct Seen {
    session: u32,
    after: BTreeSet<u64>,
}

/// Sessions as far as a trace shows them: a prompt continues the session that its deepest known block belongs to, unless many
/// different prompts go on from that block.
pub(super) fn turns(requests: &[TraceRequest]) -> Vec<Turn> {
    let mut seen: BTreeMap<u64, Seen> = BTreeMap::new();
    let mut turns_of: Vec<u32> = Vec::new();
    let mut turns = Vec::with_capacity(requests.len());
    for request in requests {
        let ids = &request.hash_ids;
        let known = ids.iter().take_while(|id| seen.contains_key(id)).count();
        let deepest = known.checked_sub(1).and_then(|last| seen.get(&ids[last]));
        let session = match deepest {
            Some(deepest) if deepest.after.len() <= TURNS_MAX => deepest.session,
            _ => {
                turns_of.push(0);
                (turns_of.len() - 1) as u32
            }
        };
        let turn = turns_of[session as usize];
        turns_of[session as usize] += 1;
        for (place, id) in ids.iter().enumerate() {
            let seen = seen.entry(*id).or_insert_with(|| Seen {
                session,
                after: BTreeSet::new(),
            });
            if let Some(next) = ids.get(place + 1)
                && seen.after.len() <= TURNS_MAX
            {
                seen.after.insert(*next);
            }
        }
        turns.push(Turn { session, turn });
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::{Turn, turns};
    use crate::TraceRequest;

    fn of(prompts: &[&[u64]]) -> Vec<(u32, u32)> {
        let requests: Vec<TraceRequest> = prompts
            .iter()
            .map(|ids| TraceRequest {
                hash_ids: ids.to_vec(),
                ..TraceRequest::default()
            })
            .collect();
        let turns = turns(&requests);
        turns.iter().map(|Turn { session, turn }| (*session, *turn)).collect()
    }

    #[test]
    fn a_prompt_that_goes_on_from_another_is_its_next_turn() {
        let seen = of(&[&[1, 2, 3], &[7, 8], &[1, 2, 4, 5], &[7, 9, 10], &[1, 2, 4, 6]]);
        assert_eq!(seen, [(0, 0), (1, 0), (0, 1), (1, 1), (0, 2)]);
    }

    #[test]
    fn what_many_begin_with_makes_no_session_of_them() {
        let prompts: Vec<Vec<u64>> = (0..10).map(|number| vec![0, 100 + number, 200 + number]).collect();
        let mut prompts: Vec<&[u64]> = prompts.iter().map(Vec::as_slice).collect();
        prompts.push(&[0, 109, 300]);
        let seen = of(&prompts);
        let sessions: std::collections::BTreeSet<u32> = seen[4..10].iter().map(|(session, _)| *session).collect();
        assert_eq!(sessions.len(), 6, "{seen:?}");
        assert_eq!((seen[10].0, seen[10].1), (seen[9].0, 1));
    }
}
