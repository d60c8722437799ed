//! Bounds on everything that comes from outside. One place, so that a reader
//! sees at a glance how much a file, a ring or a socket can make us do.

/// Requests that may be in flight on one queue of a disk.
pub const QUEUE_DEPTH_MAX: u16 = 1024;

/// Pieces of memory (`iovec`s) of one request: what Linux accepts in one call (`UIO_MAXIOV`).
pub const REQUEST_SEGMENTS_MAX: usize = 1024;

/// Bytes of one read or write request. QEMU's `BDRV_REQUEST_MAX_BYTES` is just
/// below 2 GiB; guests send at most a few MiB, NBD clients up to 32 MiB.
pub const REQUEST_BYTES_MAX: u64 = 64 << 20;

/// Images of a backing chain, the active one included.
pub const CHAIN_LENGTH_MAX: usize = 200;

/// Bytes of a file name stored in an image (qcow2: 1023).
pub const FILE_NAME_BYTES_MAX: usize = 1023;

/// Largest virtual disk: what a signed 64-bit file offset can address.
pub const DISK_BYTES_MAX: u64 = i64::MAX as u64 & !511;
