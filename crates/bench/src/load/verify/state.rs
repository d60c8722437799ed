//! What a load knows of the disk, in a file: so that a later one, after a restart of the server, knows what must be there.
//!
//! ```text
//!    0  "dpstate\0"
//!    8  version      1, u32
//!   12  open         1: a load uses it, or was killed while it did, u32
//!   16  run          what the sectors carry, u64
//!   24  block        bytes, u64
//!   32  stride       bytes, u64
//!   40  start        bytes, u64
//!   48  count        of blocks, u64
//!   56  checksum     CRC32C of the 56 bytes before and of the blocks, u32
//!   64  for each block: lowest and highest generation that may be there, u32 each
//! ```
//!
//! All numbers are little-endian.

use super::ledger::BLOCKS_MAX;
use crate::load::Spec;
use block::{Context, Error, Result};
use crc32c::{crc32c, crc32c_append};
use std::{
    fs::{self, File},
    io::{ErrorKind, Read, Write},
    path::{Path, PathBuf},
};

const MAGIC: &[u8; 8] = b"dpstate\0";
const VERSION: u32 = 1;
const HEAD: usize = 64;

/// What a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub run: u64,
    pub generations: Vec<(u32, u32)>,
}

/// A file of states.
#[derive(Clone, Debug)]
pub(super) struct State<'a> {
    path: &'a Path,
    places: [u64; 3],
}

impl<'a> State<'a> {
    /// That of a load.
    pub(super) fn of(path: &'a Path, spec: &Spec) -> Self {
        let stride = spec.stride_bytes.unwrap_or(spec.block_bytes);
        Self {
            path,
            places: [spec.block_bytes, stride, spec.start_bytes],
        }
    }

    /// Reads it; `None` where there is none yet.
    ///
    /// # Errors
    ///
    /// It is of another load, damaged, no such file, or the load that had it did not come to its end.
    pub(super) fn read(&self) -> Result<Option<Known>> {
        let named = || self.path.display().to_string();
        let wrong = |what: &str| Err(Error::invalid(format!("{}: {what}", named())));
        let file = match File::open(self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error).context(named),
        };
        let mut bytes = Vec::new();
        let limit = HEAD as u64 + BLOCKS_MAX * 8 + 1;
        file.take(limit).read_to_end(&mut bytes).context(named)?;
        if !bytes.starts_with(MAGIC) || bytes.len() < HEAD {
            return wrong("it is no state of bench load --verify: give another --state");
        }
        let word = |at: usize| {
            let bytes = bytes.get(at..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        };
        if word(8) as u32 != VERSION {
            return wrong(&format!(
                "version {} at offset 8 is not known",
                word(8) as u32
            ));
        }
        if word(8) >> 32 != 0 {
            return wrong(
                "the load that used it did not come to its end, so nobody knows what is on the disk: remove it to begin anew",
            );
        }
        let count = word(48);
        if count > BLOCKS_MAX || bytes.len() as u64 != HEAD as u64 + count * 8 {
            return wrong(&format!(
                "{count} blocks at offset 48 do not fit its {} bytes",
                bytes.len()
            ));
        }
        if checksum(&bytes) != word(56) as u32 {
            return wrong("the checksum at offset 56 does not fit: it is damaged");
        }
        if [word(24), word(32), word(40)] != self.places {
            return wrong(&format!(
                "it is of --bs {} --stride {} --start {}: give the same",
                word(24),
                word(32),
                word(40)
            ));
        }
        let generations = bytes[HEAD..].chunks_exact(8).map(|pair| {
            let of = |at: usize| {
                let bytes = pair[at..].first_chunk();
                bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
            };
            (of(0), of(4))
        });
        let generations: Vec<(u32, u32)> = generations.collect();
        if let Some(n) = generations.iter().position(|(low, high)| low > high) {
            return wrong(&format!(
                "block {n}: its lowest generation is above its highest"
            ));
        }
        Ok(Some(Known {
            run: word(16),
            generations,
        }))
    }

    /// Writes it; `open` where a load is at it.
    ///
    /// # Errors
    ///
    /// It cannot be written.
    pub(super) fn write(&self, known: &Known, open: bool) -> Result<()> {
        let named = || self.path.display().to_string();
        let mut bytes = Vec::with_capacity(HEAD + known.generations.len() * 8);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend(u32::from(open).to_le_bytes());
        bytes.extend(known.run.to_le_bytes());
        for number in self.places {
            bytes.extend(number.to_le_bytes());
        }
        bytes.extend((known.generations.len() as u64).to_le_bytes());
        bytes.extend([0; 8]);
        for (low, high) in &known.generations {
            bytes.extend(low.to_le_bytes());
            bytes.extend(high.to_le_bytes());
        }
        let sum = checksum(&bytes).to_le_bytes();
        bytes[56..60].copy_from_slice(&sum);
        // Under another name first: what is there stays whole.
        let mut name = self.path.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        let write = || {
            let mut file = File::create(&new)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&new, self.path)
        };
        write().context(named)
    }
}

fn checksum(bytes: &[u8]) -> u32 {
    crc32c_append(crc32c(&bytes[..56]), &bytes[HEAD..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Target;

    #[test]
    fn a_state_is_read_back_and_what_is_none_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        let spec = Spec::new(Target::VhostUser("s".into()));
        let state = State::of(&path, &spec);
        assert_eq!(state.read().unwrap(), None);
        let known = Known {
            run: 5,
            generations: vec![(0, 0), (1, 1), (2, 7)],
        };
        state.write(&known, false).unwrap();
        assert_eq!(state.read().unwrap(), Some(known.clone()));
        let refused = |change: &dyn Fn(&mut Vec<u8>)| {
            state.write(&known, false).unwrap();
            let mut bytes = fs::read(&path).unwrap();
            change(&mut bytes);
            fs::write(&path, bytes).unwrap();
            state.read().unwrap_err().to_string()
        };
        assert!(refused(&|b| b[0] = 0).contains("no state"));
        assert!(refused(&|b| b.truncate(40)).contains("no state"));
        assert!(refused(&|b| b[8] = 9).contains("version 9"));
        assert!(refused(&|b| b[48] = 9).contains("9 blocks at offset 48"));
        assert!(refused(&|b| b[55] = 9).contains("at offset 48"));
        assert!(refused(&|b| b.truncate(80)).contains("at offset 48"));
        assert!(refused(&|b| b[70] ^= 1).contains("checksum"));
        state.write(&known, true).unwrap();
        let error = state.read().unwrap_err().to_string();
        assert!(error.contains("did not come to its end"), "{error}");
        state.write(&known, false).unwrap();
        let other = Spec {
            block_bytes: 8192,
            ..spec
        };
        let error = State::of(&path, &other).read().unwrap_err().to_string();
        assert!(error.contains("--bs 4096"), "{error}");
    }
}
