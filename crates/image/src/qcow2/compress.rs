//! Unpacking compressed clusters (specification: "Compressed Clusters Descriptor").

use super::header::Compression;
use block::{Error, Result};
use std::io::Read;

/// log2 of the window that QEMU's deflate uses.
const WINDOW_BITS: u8 = 12;

/// Unpacks `input`, which may go on behind the compressed data, into all of `output`.
///
/// Fails with [`block::ErrorKind::Corrupt`] for data that is not what it should be, or too short.
pub(super) fn unpack(compression: Compression, input: &[u8], output: &mut [u8]) -> Result<()> {
    match compression {
        Compression::Zlib => inflate(input, output),
        Compression::Zstd => unzstd(input, output),
    }
}

fn inflate(input: &[u8], output: &mut [u8]) -> Result<()> {
    use flate2::{Decompress, FlushDecompress, Status};
    // A larger window than the writer's is allowed, so 15 would do as well; 12 is what QEMU asks for, and
    // refuses streams that QEMU could not read either.
    let mut stream = Decompress::new_with_window_bits(false, WINDOW_BITS);
    let status = stream
        .decompress(input, output, FlushDecompress::Finish)
        .map_err(|e| Error::corrupt(format!("compressed cluster: {e}")))?;
    // The writer may have ended the stream exactly at the cluster's end, without us having
    // room to see it; the bytes are what counts.
    let _: Status = status;
    check(stream.total_out(), output.len())
}

fn unzstd(input: &[u8], output: &mut [u8]) -> Result<()> {
    let wrong = |e: std::io::Error| Error::corrupt(format!("compressed cluster: {e}"));
    // QEMU writes one frame without a content size; what follows it in the last sector is
    // another cluster's. The decoder's window is bounded by its own limit (128 MiB), but
    // it only ever needs what it puts out.
    let mut decoder = zstd::stream::read::Decoder::with_buffer(input)
        .map_err(wrong)?
        .single_frame();
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(wrong)?;
    let mut done = 0;
    while done < output.len() {
        let Some(rest) = output.get_mut(done..) else {
            break;
        };
        match decoder.read(rest).map_err(wrong)? {
            0 => break,
            n => done += n,
        }
    }
    check(done as u64, output.len())
}

/// log2 of the largest window accepted: four clusters of the largest size. A frame
/// that asks for more is hostile.
const WINDOW_LOG_MAX: u32 = 23;

fn check(done: u64, want: usize) -> Result<()> {
    if done != want as u64 {
        return Err(Error::corrupt(format!(
            "compressed cluster: unpacks to {done} bytes, not {want}"
        )));
    }
    Ok(())
}
