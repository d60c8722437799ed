//! The NBD server: a disk for every client that speaks the Network Block Device protocol
//! (NetworkBlockDevice/nbd, `doc/proto.md`; the extension `EXTENDED_HEADERS` included).
//!
//! ```text
//!   accept thread          accept.rs      connections, handshakes (handshake.rs, option.rs), deadlines
//!     │ socket, what was agreed on
//!     ▼
//!   worker: a session      session.rs     one per connection: socket watched by the engine, disk queue
//!     └ connection.rs      request.rs ─▶ lend.rs ─▶ disk ─▶ reply.rs, memory from memory.rs, wire.rs
//! ```
//!
//! What holds for every connection, whatever its client does:
//! - at most 128 requests and 32 MiB of payload at a time, taken from nobody else;
//! - what is not a request ends it, after the requests before were answered; others do not notice;
//! - a client that does not read stops being read from, a client that vanishes leaves when its requests
//!   at the disk ended;
//! - all connections share one disk, so a flush on one covers what was answered on any (`CAN_MULTI_CONN`).
//!
//! Reads of 64 KiB and more first ask the disk whether the range is all zeros, where the client can take
//! that for an answer (structured replies): a hole costs neither a read nor the copy through the socket.

mod accept;
mod address;
mod connection;
mod handshake;
mod lend;
mod memory;
mod option;
mod reply;
mod request;
mod server;
mod session;
mod wire;

pub use address::NbdAddress;
pub use server::{Nbd, Options, Server};
