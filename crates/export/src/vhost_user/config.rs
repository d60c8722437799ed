//! The device's features and configuration space (virtio 1.2 §5.2.3, §5.2.4).

use super::{
    Options,
    request::{Limits, SEGMENTS_MAX},
    spec::{ID_BYTES, SECTOR_BYTES, feature},
};
use disk::Disk;

/// Bytes of `struct virtio_blk_config` that mean something here: up to write zeroes.
const USED_BYTES: usize = 60;

/// Bytes of configuration space that can be asked for (QEMU: at most 256).
pub const CONFIG_BYTES: usize = 256;

/// Where the writeback switch is: the only field that a driver writes.
pub const WRITEBACK_OFFSET: u32 = 32;

/// Most that one discard takes: 1 GiB for each segment, so that trimming a disk takes few
/// requests, yet each ends soon.
const DISCARD_SECTORS: u32 = (1 << 30) / SECTOR_BYTES as u32;
/// Most that one write zeroes takes: 64 MiB, since it may have to be written as data.
const ZEROES_SECTORS: u32 = (64 << 20) / SECTOR_BYTES as u32;
const DISCARD_SEGMENTS: u32 = 32;
const ZEROES_SEGMENTS: u32 = 16;
const _: () =
    assert!(DISCARD_SEGMENTS as usize <= SEGMENTS_MAX && ZEROES_SEGMENTS as usize <= SEGMENTS_MAX);

/// Feature bits that are offered for `disk`.
pub fn features(disk: &Disk) -> u64 {
    let mut bits = feature::SEG_MAX
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE
        | feature::MQ
        | feature::RING_INDIRECT_DESC
        | feature::RING_EVENT_IDX
        | feature::PROTOCOL_FEATURES
        | feature::VERSION_1
        | feature::RING_PACKED;
    if disk.read_only() {
        bits |= feature::RO;
    } else {
        bits |= feature::WRITE_ZEROES;
        if disk.can_discard() {
            bits |= feature::DISCARD;
        }
    }
    bits
}

/// What requests are held to, for a driver that accepted `features`.
pub fn limits(disk: &Disk, serial: &str, features: u64) -> Limits {
    let mut id = [0; ID_BYTES];
    let len = serial.len().min(ID_BYTES);
    id[..len].copy_from_slice(&serial.as_bytes()[..len]);
    Limits {
        features,
        disk_bytes: disk.size(),
        discard_segments: DISCARD_SEGMENTS,
        discard_sectors: DISCARD_SECTORS,
        zeroes_segments: ZEROES_SEGMENTS,
        zeroes_sectors: ZEROES_SECTORS,
        id,
    }
}

/// The configuration space; the disk's end is rounded down to a whole sector.
pub fn space(disk: &Disk, options: &Options) -> [u8; CONFIG_BYTES] {
    let block = disk.logical_block_size();
    // I/O that suits the image: whole clusters (§5.2.4, in logical blocks; zero for no opinion).
    let cluster_blocks = (disk.cluster_size() / block.max(1)).max(1);
    let min_io = u16::try_from(cluster_blocks).unwrap_or(u16::MAX);
    let opt_io = if cluster_blocks > 1 {
        cluster_blocks
    } else {
        0
    };
    let alignment = disk.cluster_size() / SECTOR_BYTES as u32;
    let (discard_sectors, discard_segments) = if disk.can_discard() {
        (DISCARD_SECTORS, DISCARD_SEGMENTS)
    } else {
        (0, 0)
    };
    let (zeroes_sectors, zeroes_segments) = if disk.read_only() {
        (0, 0)
    } else {
        (ZEROES_SECTORS, ZEROES_SEGMENTS)
    };

    let mut space = [0; CONFIG_BYTES];
    let mut at = 0;
    let mut put = |bytes: &[u8]| {
        space[at..at + bytes.len()].copy_from_slice(bytes);
        at += bytes.len();
    };
    put(&(disk.size() / SECTOR_BYTES).to_le_bytes()); //  0 capacity
    put(&0u32.to_le_bytes()); //  8 size_max: not offered
    put(&u32::from(options.seg_max).to_le_bytes()); // 12 seg_max
    put(&[0; 4]); // 16 geometry: not offered
    put(&block.to_le_bytes()); // 20 blk_size
    put(&[0, 0]); // 24 physical_block_exp, alignment_offset
    put(&min_io.to_le_bytes()); // 26 min_io_size
    put(&opt_io.to_le_bytes()); // 28 opt_io_size
    put(&[u8::from(disk.writeback()), 0]); // 32 writeback, unused
    put(&options.queues.to_le_bytes()); // 34 num_queues
    put(&discard_sectors.to_le_bytes()); // 36 max_discard_sectors
    put(&discard_segments.to_le_bytes()); // 40 max_discard_seg
    put(&alignment.to_le_bytes()); // 44 discard_sector_alignment
    put(&zeroes_sectors.to_le_bytes()); // 48 max_write_zeroes_sectors
    put(&zeroes_segments.to_le_bytes()); // 52 max_write_zeroes_seg
    put(&[u8::from(disk.can_discard()), 0, 0, 0]); // 56 write_zeroes_may_unmap
    debug_assert_eq!(at, USED_BYTES);
    space
}
