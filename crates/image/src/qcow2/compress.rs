//! Packing and unpacking compressed clusters (specification: "Compressed Clusters Descriptor").

use super::header::Compression;
use block::{Error, Result};
use std::io::Read;

/// log2 of the window that QEMU's deflate uses.
const WINDOW_BITS: u8 = 12;
/// Levels of compression: what makes files of the size that QEMU's have.
const ZLIB_LEVEL: u32 = 6;
const ZSTD_LEVEL: i32 = 3;

/// Packs clusters, one after the other, as QEMU does: raw deflate with a window of 4 KiB, or one Zstandard frame.
/// What it gives depends on its input alone, so that several of them may share the work of an image.
pub struct Compressor(Method);

enum Method {
    Zlib(Box<flate2::Compress>),
    Zstd(Box<zstd::bulk::Compressor<'static>>),
}

impl std::fmt::Debug for Compressor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Method::Zlib(_) => "Compressor(zlib)",
            Method::Zstd(_) => "Compressor(zstd)",
        })
    }
}

impl Compressor {
    /// For images of this compression type. Takes some 300 KiB of memory, or 1 MiB and more for Zstandard.
    pub fn new(compression: Compression) -> Result<Self> {
        Ok(Self(match compression {
            Compression::Zlib => {
                let level = flate2::Compression::new(ZLIB_LEVEL);
                let stream = flate2::Compress::new_with_window_bits(level, false, WINDOW_BITS);
                Method::Zlib(Box::new(stream))
            }
            Compression::Zstd => {
                let stream = zstd::bulk::Compressor::new(ZSTD_LEVEL)
                    .map_err(|e| Error::invalid(format!("zstd: {e}")))?;
                Method::Zstd(Box::new(stream))
            }
        }))
    }

    /// Packs `cluster` into `out`, whose contents are lost. `false` when that would not make it smaller: it is to be
    /// stored as it is then.
    pub fn pack(&mut self, cluster: &[u8], out: &mut Vec<u8>) -> bool {
        out.clear();
        // An entry can describe no more: the sectors of less than a cluster.
        let most = cluster.len().saturating_sub(1);
        let len = match &mut self.0 {
            Method::Zlib(stream) => {
                // A stream that does not end for want of room is not quite new after its reset (zlib-rs 0.6.8): what
                // it held back takes room in it for good. So there is room for whatever becomes of it.
                out.resize(deflated_len_max(cluster.len()), 0);
                stream.reset();
                let status = stream.compress(cluster, out, flate2::FlushCompress::Finish);
                match status {
                    Ok(flate2::Status::StreamEnd) => usize::try_from(stream.total_out()).ok(),
                    _ => None,
                }
            }
            // It fails where the room does not suffice.
            Method::Zstd(stream) => {
                out.resize(most, 0);
                stream.compress_to_buffer(cluster, out.as_mut_slice()).ok()
            }
        };
        let len = len.filter(|len| *len <= most);
        out.truncate(len.unwrap_or(0));
        len.is_some()
    }
}

/// Bytes that deflate makes of `len` at most, whatever its window and level.
fn deflated_len_max(len: usize) -> usize {
    len + len.div_ceil(8) + len.div_ceil(64) + 64
}

/// Unpacks `input`, which may go on behind the compressed data, into all of `output`.
///
/// Fails with [`block::ErrorKind::Corrupt`] for data that is not what it should be, or too short.
pub(crate) fn unpack(compression: Compression, input: &[u8], output: &mut [u8]) -> Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What a stream held back when its room was full stayed in it, and after 64 KiB of that it panicked.
    #[test]
    fn what_does_not_get_smaller_harms_no_later_cluster() {
        let mut word = 1u64;
        let mut random = || {
            word = word.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            (word >> 56) as u8
        };
        for compression in [Compression::Zlib, Compression::Zstd] {
            for len in [512, 4096, 65536] {
                let mut packer = Compressor::new(compression).unwrap();
                let mut packed = Vec::new();
                for _ in 0..(512 << 10) / len {
                    let cluster: Vec<u8> = (0..len).map(|_| random()).collect();
                    assert!(!packer.pack(&cluster, &mut packed));
                }
                let mut cluster = vec![7; len];
                cluster.iter_mut().take(len / 2).for_each(|b| *b = random());
                assert!(packer.pack(&cluster, &mut packed));
                let mut unpacked = vec![0; len];
                unpack(compression, &packed, &mut unpacked).unwrap();
                assert!(unpacked == cluster, "{compression:?} {len}");
            }
        }
    }
}
