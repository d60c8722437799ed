//! A raw disk of which half is data: what `convert` is measured with.
//!
//! Whole MiB are data or hole; a hash of their place decides, so that runs have any length. Of each 4 KiB of data
//! half cannot be compressed and half is text: together they shrink to a little more than a half, as an installed
//! system does.

use block::{Context, Result};
use std::{
    fs::File,
    io::{BufWriter, Seek, SeekFrom, Write},
    path::Path,
};

/// Bytes that are alike: data or a hole.
const RUN: u64 = 1 << 20;
const PAGE: usize = 4096;

/// Writes a disk of `bytes`, a multiple of 2 MiB, to a new file.
///
/// # Errors
///
/// What writing fails with; the file exists already.
pub(super) fn create(path: &Path, bytes: u64) -> Result<()> {
    let named = || path.display().to_string();
    let file = File::create_new(path).context(named)?;
    write(&file, bytes).context(named)
}

fn write(file: &File, bytes: u64) -> std::io::Result<()> {
    file.set_len(bytes)?;
    let mut out = BufWriter::with_capacity(RUN as usize, file);
    let mut page = [0; PAGE];
    for run in (0..bytes / RUN).filter(|run| is_data(*run)) {
        out.seek(SeekFrom::Start(run * RUN))?;
        for nth in 0..RUN / PAGE as u64 {
            fill(&mut page, run * (RUN / PAGE as u64) + nth);
            out.write_all(&page)?;
        }
    }
    out.flush()?;
    drop(out);
    file.sync_all()
}

/// Of two neighbours one is data.
fn is_data(run: u64) -> bool {
    mixed(run / 2) & 1 == run & 1
}

fn fill(page: &mut [u8; PAGE], nth: u64) {
    let (noise, text) = page.split_at_mut(PAGE / 2);
    let mut state = mixed(nth);
    for word in noise.chunks_exact_mut(8) {
        state = mixed(state);
        word.copy_from_slice(&state.to_le_bytes());
    }
    for (line, to) in (0u64..).zip(text.chunks_exact_mut(32)) {
        let text = format!(
            "{:<24}{:>7}\n",
            "option.of.some.program",
            state % 1000 * line
        );
        to.copy_from_slice(&text.as_bytes()[..32]);
    }
}

/// Spreads the bits of a number over all (the finaliser of splitmix64).
fn mixed(number: u64) -> u64 {
    let mut x = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn half_of_it_is_data_in_runs_of_several_lengths() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("half");
        create(&path, 16 << 20).unwrap();
        let meta = std::fs::metadata(&path).unwrap();
        assert_eq!(meta.len(), 16 << 20);
        // And a little for the file system's tables.
        assert!((8 << 20..9 << 20).contains(&(meta.blocks() * 512)));
        let bytes = std::fs::read(&path).unwrap();
        let runs: Vec<bool> = bytes
            .chunks(RUN as usize)
            .map(|run| run.iter().any(|byte| *byte != 0))
            .collect();
        let lengths: Vec<usize> = runs.chunk_by(|a, b| a == b).map(<[bool]>::len).collect();
        assert!(lengths.contains(&1) && lengths.contains(&2), "{lengths:?}");
        // No page is zeros, none is like another.
        let pages: std::collections::BTreeSet<&[u8]> = bytes.chunks(PAGE).collect();
        assert_eq!(pages.len(), (8 << 20) / PAGE + 1);
        assert!(create(&path, 1 << 21).is_err(), "it overwrites");
    }
}
