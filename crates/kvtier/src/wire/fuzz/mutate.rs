use super::generate::Random;
use crate::wire::HEADER_BYTES;

/// Changes a valid message in one or several ways. `other` is another valid message to splice from.
pub(super) fn mutate(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    for _ in 0..1 + random.below(3) {
        match random.below(11) {
            0 => flip(random, input),
            1 => truncate(random, input),
            2 => splice(random, input, other),
            3 => lie_about_length(random, input),
            4 => lie_about_a_count(random, input),
            5 => duplicate(random, input),
            6 => lie_about_an_extension(random, input),
            7 => grow_body(random, input),
            8 => {
                // Two messages in one read, which a stream must tell apart.
                input.extend_from_slice(other);
            }
            9 => overwrite(random, input),
            // Ids, times and hashes may be anything: the message stays whole.
            _ => change_an_id(random, input),
        }
    }
}

fn flip(random: &mut Random, input: &mut [u8]) {
    for _ in 0..1 + random.below(4) {
        let at = random.below(input.len().max(1));
        if let Some(byte) = input.get_mut(at) {
            *byte ^= 1 << random.below(8);
        }
    }
}

fn truncate(random: &mut Random, input: &mut Vec<u8>) {
    input.truncate(random.below(input.len() + 1));
    if random.below(2) == 0 {
        mend_length(input);
    }
}

fn splice(random: &mut Random, input: &mut Vec<u8>, other: &[u8]) {
    input.truncate(random.below(input.len() + 1));
    input.extend_from_slice(&other[random.below(other.len() + 1)..]);
    if random.below(2) == 0 {
        mend_length(input);
    }
}

fn lie_about_length(random: &mut Random, input: &mut [u8]) {
    let lie = random.interesting();
    if let Some(length) = input.get_mut(..4) {
        length.copy_from_slice(&lie.to_le_bytes());
    }
}

/// Counts lie at multiples of four behind the header; the number of leases lies in it.
fn lie_about_a_count(random: &mut Random, input: &mut [u8]) {
    let at = if random.below(4) == 0 {
        32
    } else {
        HEADER_BYTES + 4 * random.below(12)
    };
    let lie = match input
        .get(at..at + 4)
        .map(|count| u32::from_le_bytes([count[0], count[1], count[2], count[3]]))
    {
        Some(count) if random.below(2) == 0 => count.wrapping_add(1),
        Some(count) if random.below(2) == 0 => count.wrapping_sub(1),
        _ => random.interesting(),
    };
    if let Some(count) = input.get_mut(at..at + 4) {
        count.copy_from_slice(&lie.to_le_bytes());
    }
}

fn duplicate(random: &mut Random, input: &mut Vec<u8>) {
    if input.len() <= HEADER_BYTES {
        return;
    }
    let from = HEADER_BYTES + random.below(input.len() - HEADER_BYTES);
    let length = random.below((input.len() - from).min(256) + 1);
    let copy = input[from..from + length].to_vec();
    let at = from + length;
    input.splice(at..at, copy);
    mend_length(input);
}

/// Makes the last bytes look like an extension, often one that is known, with a length that may not fit it.
fn lie_about_an_extension(random: &mut Random, input: &mut Vec<u8>) {
    let tag = 1 + random.below(9);
    let length = [0, 1, 4, 7, 8, 9, 16][random.below(7)];
    let Ok(tag) = u16::try_from(tag) else { return };
    let Ok(field) = u16::try_from(length) else { return };
    input.extend_from_slice(&tag.to_le_bytes());
    input.extend_from_slice(&field.to_le_bytes());
    let value = random.next();
    input.extend(std::iter::repeat_n(value.to_le_bytes(), 2).flatten().take(length));
    mend_length(input);
}

fn grow_body(random: &mut Random, input: &mut Vec<u8>) {
    let more = 1 + random.below(40);
    let byte = [0, 0xff, 1][random.below(3)];
    input.extend(std::iter::repeat_n(byte, more));
    mend_length(input);
}

fn overwrite(random: &mut Random, input: &mut [u8]) {
    let at = random.below(input.len().max(1));
    let value = random.next().to_le_bytes();
    for (target, source) in input.iter_mut().skip(at).zip(value) {
        *target = source;
    }
}

fn change_an_id(random: &mut Random, input: &mut [u8]) {
    let value = random.next().to_le_bytes();
    if let Some(id) = input.get_mut(8..16) {
        id.copy_from_slice(&value);
    }
}

/// Says the length that the message now has, so that what was changed is looked at.
fn mend_length(input: &mut [u8]) {
    let Some(length) = input
        .len()
        .checked_sub(HEADER_BYTES)
        .and_then(|length| u32::try_from(length).ok())
    else {
        return;
    };
    input[..4].copy_from_slice(&length.to_le_bytes());
}
