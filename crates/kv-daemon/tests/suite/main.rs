//! The two binaries as their users see them: started, asked, lied to, killed.
//!
//! One binary for all of it, so that it is linked once; filter by module, such as `hostile::`.

mod admin;
mod administration;
mod advice;
mod bucket;
mod commands;
mod daemon;
mod demo;
mod domains;
mod gate;
mod hbm;
mod hostile;
mod learned;
mod peers;
mod purge;
mod raw;
mod receipts;
mod recording;
mod redis;
mod remote;
mod restart;
mod settings;
