//! Both clients against a peer that counts what it is asked and misbehaves on request.

mod asynchronous;
mod blocking;
mod device;
mod fake_node;
mod submissions;

use kvtier::BlockHash;

fn hash(number: u32) -> BlockHash {
    let mut bytes = [0xa5; 16];
    bytes[..4].copy_from_slice(&number.to_le_bytes());
    BlockHash(bytes)
}

fn bytes(number: u32, length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| (at as u32).wrapping_mul(31).wrapping_add(number) as u8)
        .collect()
}
