//! Chains of any shape on a [`Ring`], for tests: what goes wrong panics, since that is a test's failure.

use super::{Chain, Piece, Ram, Ring, feature, wait_readable};
use std::{
    ops::{Deref, DerefMut},
    sync::Arc,
};

/// Descriptors of one indirect table.
const TABLE_MAX: usize = 64;

/// A virtqueue that adds chains where there is room and waits for their end.
#[derive(Debug)]
pub struct DriverQueue {
    ring: Ring,
    indirect: bool,
    free: Vec<u16>,
    /// Descriptors of the chain at each head; of a packed ring the head alone, which is its number.
    chain: Vec<Vec<u16>>,
}

impl Deref for DriverQueue {
    type Target = Ring;

    fn deref(&self) -> &Ring {
        &self.ring
    }
}

impl DerefMut for DriverQueue {
    fn deref_mut(&mut self) -> &mut Ring {
        &mut self.ring
    }
}

impl DriverQueue {
    /// A queue whose rings lie at guest address `at`, in 256 KiB, as agreed on in `features`.
    ///
    /// # Errors
    ///
    /// As [`Ring::new`].
    pub fn new(
        ram: Arc<Ram>,
        at: u64,
        index: u32,
        size: u16,
        features: u64,
    ) -> std::io::Result<Self> {
        let ring = Ring::new(ram, at, index, size, features)?;
        let indirect = features & feature::INDIRECT != 0;
        let room = u64::from(size) * 16 * TABLE_MAX as u64 <= ring.tables().1;
        Ok(Self {
            ring,
            indirect: indirect && room,
            free: (0..size).rev().collect(),
            chain: (0..size).map(|_| Vec::with_capacity(8)).collect(),
        })
    }

    /// The rings alone, for a driver that knows which descriptors are free.
    pub fn into_ring(self) -> Ring {
        self.ring
    }

    /// Puts a chain in the available ring, without telling; `None` when there is no room.
    pub fn add(&mut self, pieces: &[Piece]) -> Option<u16> {
        if self.indirect && pieces.len() <= TABLE_MAX {
            let head = self.free.pop()?;
            let table = self.ring.tables().0 + u64::from(head) * 16 * TABLE_MAX as u64;
            self.ring.write_table(table, pieces);
            let chain = Chain::Table(table, pieces.len() as u32);
            self.ring.offer(head, chain, false);
            self.chain[usize::from(head)].push(head);
            return Some(head);
        }
        if let Some(room) = self.ring.free() {
            let head = *self
                .free
                .last()
                .filter(|_| pieces.len() <= usize::from(room))?;
            self.free.pop();
            self.ring.offer(head, Chain::Pieces(pieces), false);
            self.chain[usize::from(head)].push(head);
            return Some(head);
        }
        let first = self.free.len().checked_sub(pieces.len())?;
        let own = &self.free[first..];
        let head = *own.first()?;
        self.ring.write_chain(pieces, |i| own[i]);
        self.chain[usize::from(head)].extend_from_slice(own);
        self.free.truncate(first);
        self.ring.make_available(head);
        Some(head)
    }

    /// Kicks, if the device wants it.
    ///
    /// # Panics
    ///
    /// When the eventfd cannot be written.
    pub fn kick(&mut self) {
        self.ring.kick().expect("kick");
    }

    /// Kicks, whether the device wants it or not.
    ///
    /// # Panics
    ///
    /// When the eventfd cannot be written.
    pub fn kick_always(&mut self) {
        self.ring.kick_always().expect("kick");
    }

    /// The next chain that the device is done with, and the bytes it wrote.
    ///
    /// # Panics
    ///
    /// When the device says so of a chain that was not in flight.
    pub fn pop(&mut self) -> Option<(u16, u32)> {
        let (id, written) = self.ring.pop_used()?;
        let head = u16::try_from(id).unwrap_or(u16::MAX);
        let chain = self.chain.get_mut(usize::from(head));
        let chain = chain.filter(|chain| !chain.is_empty());
        let chain = chain.unwrap_or_else(|| panic!("used entry {id} was not in flight"));
        self.free.extend(chain.drain(..).rev());
        Some((head, written))
    }

    /// The next chain that is done, sleeping until the device calls.
    ///
    /// # Panics
    ///
    /// When no call comes for a time that only a failure needs.
    pub fn wait(&mut self) -> (u16, u32) {
        loop {
            if let Some(done) = self.pop() {
                return done;
            }
            if self.ring.enable_call() {
                assert!(
                    wait_readable(self.ring.call_fd()),
                    "no call from the device"
                );
                self.ring.wait_call().expect("a readable eventfd");
            }
        }
    }
}
