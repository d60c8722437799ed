//! Numbers of the standards: virtio 1.2 §2.7 and §2.8 (split and packed virtqueues), §5.2 (block device), §6
//! (reserved feature bits), and vhost-user.

/// A descriptor continues at its `next` (virtio 1.2 §2.7.5).
pub const DESC_F_NEXT: u16 = 1;
/// A descriptor's buffer is written by the device.
pub const DESC_F_WRITE: u16 = 2;
/// A descriptor's buffer is a table of descriptors (§2.7.5.3).
pub const DESC_F_INDIRECT: u16 = 4;
/// In a packed ring: the driver's wrap counter (§2.8.1).
pub const DESC_F_AVAIL: u16 = 1 << 7;
/// In a packed ring: the device's wrap counter.
pub const DESC_F_USED: u16 = 1 << 15;
/// Bytes of a descriptor.
pub const DESC_BYTES: u64 = 16;

/// In `avail.flags`: no notification wanted (§2.7.6).
pub const AVAIL_F_NO_INTERRUPT: u16 = 1;
/// In `used.flags`: no notification wanted (§2.7.8).
pub const USED_F_NO_NOTIFY: u16 = 1;

/// In the flags of an event suppression structure of a packed ring: all notifications are wanted (§2.8.10).
pub const EVENT_F_ENABLE: u16 = 0;
/// None is wanted.
pub const EVENT_F_DISABLE: u16 = 1;
/// The one for a descriptor is wanted; with [`feature::RING_EVENT_IDX`].
pub const EVENT_F_DESC: u16 = 2;

/// Feature bits of the block device (§5.2.3), as masks.
pub mod feature {
    /// `seg_max` is valid.
    pub const SEG_MAX: u64 = 1 << 2;
    /// The disk is read-only.
    pub const RO: u64 = 1 << 5;
    /// `blk_size` is valid.
    pub const BLK_SIZE: u64 = 1 << 6;
    /// The flush command exists.
    pub const FLUSH: u64 = 1 << 9;
    /// The topology fields are valid.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// `writeback` can be read and changed.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several request queues.
    pub const MQ: u64 = 1 << 12;
    /// The discard command exists.
    pub const DISCARD: u64 = 1 << 13;
    /// The write-zeroes command exists.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Indirect descriptors (§6).
    pub const RING_INDIRECT_DESC: u64 = 1 << 28;
    /// `used_event` and `avail_event` (§6).
    pub const RING_EVENT_IDX: u64 = 1 << 29;
    /// vhost-user: protocol features can be negotiated.
    pub const PROTOCOL_FEATURES: u64 = 1 << 30;
    /// The device conforms to virtio 1.0 or later (§6).
    pub const VERSION_1: u64 = 1 << 32;
    /// Packed virtqueues (§6).
    pub const RING_PACKED: u64 = 1 << 34;
}

/// Types of requests (§5.2.6).
pub mod request {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// The disk's serial number.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Bytes of the header of a request (§5.2.6): type, reserved, sector.
pub const HEADER_BYTES: usize = 16;
/// Where in it the sector is.
pub const HEADER_SECTOR: usize = 8;
/// Bytes of a segment of discard and write zeroes: sector, count, flags.
pub const SEGMENT_BYTES: usize = 16;
/// In a segment's flags: give the space back.
pub const SEGMENT_F_UNMAP: u32 = 1;
/// Bytes of the answer to [`request::GET_ID`].
pub const ID_BYTES: usize = 20;
/// Bytes of a sector, whatever the disk's block size.
pub const SECTOR_BYTES: u64 = 512;

/// The last byte of a request: how it ended (§5.2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoErr = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupp = 2,
}
