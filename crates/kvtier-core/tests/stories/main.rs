//! Stories told through public commands, over a tiny driver that carries out actions in memory.

mod admission;
mod destroy;
mod durability;
mod eviction;
mod failure;
mod generation;
mod hbm;
mod labels;
mod leases;
mod memory;
mod prefetch;
mod prefix;
mod quota;
mod random;
mod reclaim;
mod restore;
mod world;
