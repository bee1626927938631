//! The routes, asked in memory over something that purges nothing.

mod document;
mod events;
pub(crate) mod fake;
mod hostile;
mod jobs;
pub(crate) mod served;
mod tenants;
