//! The routes, asked in memory over something that purges nothing.

mod document;
mod events;
mod fake;
mod hostile;
mod jobs;
mod secured;
mod served;
mod tenants;
