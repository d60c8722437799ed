//! Bytes as a program: each decides what is done next. The fuzz targets and the property tests run the same.

/// Reads a program; behind its end there are zeros.
pub struct Program<'a>(&'a [u8]);

impl<'a> Program<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn at_end(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        let Some((byte, rest)) = self.0.split_first() else {
            return 0;
        };
        self.0 = rest;
        *byte
    }

    pub fn u16(&mut self) -> u16 {
        u16::from_le_bytes([self.byte(), self.byte()])
    }

    pub fn u32(&mut self) -> u32 {
        u32::from(self.u16()) | u32::from(self.u16()) << 16
    }

    pub fn u64(&mut self) -> u64 {
        u64::from(self.u32()) | u64::from(self.u32()) << 32
    }

    /// Up to `max` bytes as they are.
    pub fn bytes(&mut self, max: usize) -> &'a [u8] {
        let len = usize::from(self.byte()).min(max).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }

    /// A number that means something where `size` does: within, at the edges, or anything.
    pub fn number(&mut self, size: u64) -> u64 {
        match self.byte() % 8 {
            0 => 0,
            1 => size,
            2 => size.wrapping_sub(u64::from(self.byte())),
            3 => size.wrapping_add(u64::from(self.byte())),
            4 => self.u64(),
            5 => u64::MAX - u64::from(self.byte()),
            6 => u64::from(self.byte()),
            _ => (u64::from(self.u32()) % size.max(1)) & !511,
        }
    }
}
