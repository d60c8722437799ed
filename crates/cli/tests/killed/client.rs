//! What the clients of the two exports have in common.

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Read,
    Write,
    Zero,
    Discard,
    Flush,
}

/// A request.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    pub kind: Kind,
    /// Its own; that of a write is the version it writes.
    pub number: u32,
    pub first: u64,
    pub sectors: u64,
}

/// A connection to a server that keeps many requests in flight.
pub trait Client {
    /// Prepares a request in the slot, which is free; `data` is what a write writes.
    fn submit(&mut self, slot: usize, request: &Request, data: &[u8]);

    /// Sends what was prepared.
    fn send(&mut self);

    /// The slot of the next answer and whether it is success; `data` becomes what was read. `None` once the server is
    /// gone and, without `wait`, when there is no more to be had.
    fn next(&mut self, wait: bool, data: &mut Vec<u8>) -> Option<(usize, bool)>;
}
