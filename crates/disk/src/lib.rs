//! A served disk: requests in, engine operations out.

pub mod blocking;
