//! Files and the engines that move bytes between them and memory.
//!
//! [`Engine`] is the contract; [`File`] is what it works on.

mod engine;

pub use engine::{
    Aio, Cache, Completion, Counters, Engine, EngineKind, Events, FileSlot, Io, IoOp, Token, Wait,
};

/// An open image file or device.
#[derive(Debug)]
pub struct File;
