use super::Element;

/// Fills `exponents`, half as long as `block`, with the plane of exponents.
pub(super) fn exponents(element: Element, block: &[u8], exponents: &mut [u8]) {
    let numbers = block.chunks_exact(2).map(number);
    match element {
        Element::Fp16 => fill(exponents, numbers.map(|number| ((number >> 8) as u8).rotate_left(1))),
        Element::Bf16 | Element::Bytes => fill(exponents, numbers.map(|number| (number >> 7) as u8)),
    }
}

/// Appends the other plane.
pub(super) fn append_mantissas(element: Element, block: &[u8], target: &mut Vec<u8>) {
    let start = target.len();
    target.resize(start + block.len() / 2, 0);
    let numbers = block.chunks_exact(2).map(number);
    let plane = &mut target[start..];
    match element {
        Element::Fp16 => fill(plane, numbers.map(|number| number as u8)),
        Element::Bf16 | Element::Bytes => {
            fill(
                plane,
                numbers.map(|number| ((number >> 8) as u8 & 0x80) | (number as u8 & 0x7f)),
            );
        }
    }
}

/// Puts the two planes together again. A loop over slices of one length, so that it becomes vector instructions.
pub(super) fn join(element: Element, exponents: &[u8], mantissas: &[u8], block: &mut [u8]) {
    let (pairs, _) = block.as_chunks_mut::<2>();
    let planes = exponents.iter().zip(mantissas);
    match element {
        Element::Fp16 => {
            for (pair, (exponent, mantissa)) in pairs.iter_mut().zip(planes) {
                *pair = [*mantissa, exponent.rotate_right(1)];
            }
        }
        Element::Bf16 | Element::Bytes => {
            for (pair, (exponent, mantissa)) in pairs.iter_mut().zip(planes) {
                *pair = [(mantissa & 0x7f) | (exponent << 7), (mantissa & 0x80) | (exponent >> 1)];
            }
        }
    }
}

fn number(pair: &[u8]) -> u16 {
    u16::from_le_bytes([pair[0], pair[1]])
}

fn fill(plane: &mut [u8], bytes: impl Iterator<Item = u8>) {
    plane.iter_mut().zip(bytes).for_each(|(target, byte)| *target = byte);
}
