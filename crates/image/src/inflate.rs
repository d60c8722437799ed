//! Whole streams of other programs, unpacked into just the bytes that they must have.

use block::{Error, Result};
use flate2::{Decompress, FlushDecompress, Status};

/// Unpacks the zlib stream in `input`, which may go on behind it, into all of `output`.
///
/// # Errors
///
/// [`block::ErrorKind::Corrupt`] for data that are not what they should be, too short or too long.
pub(crate) fn zlib(input: &[u8], output: &mut [u8]) -> Result<()> {
    let mut stream = Decompress::new(true);
    let status = stream
        .decompress(input, output, FlushDecompress::Finish)
        .map_err(|error| Error::corrupt(format!("zlib stream: {error}")))?;
    ended(
        "zlib",
        status == Status::StreamEnd,
        stream.total_out(),
        output,
    )
}

/// As [`zlib`], of a bzip2 stream.
///
/// # Errors
///
/// Likewise.
pub(crate) fn bzip2(input: &[u8], output: &mut [u8]) -> Result<()> {
    let mut stream = bzip2::Decompress::new(false);
    loop {
        let before = (stream.total_in(), stream.total_out());
        // Both are within the slices.
        let rest = input.get(before.0 as usize..).unwrap_or_default();
        let room = output.get_mut(before.1 as usize..).unwrap_or_default();
        let status = stream
            .decompress(rest, room)
            .map_err(|error| Error::corrupt(format!("bzip2 stream: {error}")))?;
        let done = status == bzip2::Status::StreamEnd;
        if done || (stream.total_in(), stream.total_out()) == before {
            return ended("bzip2", done, stream.total_out(), output);
        }
    }
}

fn ended(what: &str, ended: bool, len: u64, output: &[u8]) -> Result<()> {
    let want = output.len();
    match (ended, len == want as u64) {
        (true, true) => Ok(()),
        (true, false) => Err(Error::corrupt(format!(
            "{what} stream: unpacks to {len} bytes, not {want}"
        ))),
        (false, true) => Err(Error::corrupt(format!(
            "{what} stream: unpacks to more than {want} bytes"
        ))),
        (false, false) => Err(Error::corrupt(format!(
            "{what} stream: ends after {len} bytes of {want}"
        ))),
    }
}
