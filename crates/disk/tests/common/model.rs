//! What a disk may hold.

const SECTOR: usize = 512;

/// The bytes of a disk, and for sectors that a discard or a failed request left open, what else
/// they may read as. A sector stays with what it was first seen as.
pub struct Model {
    bytes: Vec<u8>,
    others: Vec<Vec<Box<[u8]>>>,
}

impl Model {
    pub fn new(bytes: Vec<u8>) -> Self {
        let others = vec![Vec::new(); bytes.len().div_ceil(SECTOR)];
        Self { bytes, others }
    }

    pub fn len(&self) -> u64 {
        self.bytes.len() as u64
    }

    pub fn write(&mut self, at: u64, data: &[u8]) {
        let at = at as usize;
        self.bytes[at..at + data.len()].copy_from_slice(data);
        for others in &mut self.others[at / SECTOR..(at + data.len()).div_ceil(SECTOR)] {
            others.clear();
        }
    }

    /// Each sector from `at` on may hold what it held or its part of `data`.
    pub fn perhaps(&mut self, at: u64, data: &[u8]) {
        for (others, sector) in self.others[at as usize / SECTOR..]
            .iter_mut()
            .zip(data.chunks(SECTOR))
        {
            others.push(sector.into());
        }
    }

    /// The first sector of `got`, read at `at`, that is something it must not be.
    pub fn differs(&mut self, at: u64, got: &[u8]) -> Option<u64> {
        for (i, sector) in got.chunks(SECTOR).enumerate() {
            let from = at as usize + i * SECTOR;
            let bytes = &mut self.bytes[from..from + sector.len()];
            let others = std::mem::take(&mut self.others[from / SECTOR]);
            if bytes != sector {
                if !others.iter().any(|o| &**o == sector) {
                    return Some(from as u64);
                }
                bytes.copy_from_slice(sector);
            }
        }
        None
    }
}
