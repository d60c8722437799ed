//! A guest's memory, mapped. Unsafe code: `mmap` and pointers into it.
//!
//! A front-end shares its guest's memory as regions of file descriptors (vhost-user, "Memory
//! region description"). Each has an address in the guest, by which descriptors name
//! buffers, and one in the front-end, by which it names the rings. Both are translated here, with
//! bounds and overflow checked once; what comes out are plain addresses that stay mapped as long as the
//! [`GuestMemory`] they came from, or any other that holds the same [`Region`], lives.
//!
//! The guest may write to its memory at any time. So nothing here makes a Rust reference to it:
//! small things are copied out (`read`) before they are judged, ring fields are accessed
//! as atomics (see `ring`), and data is only moved by the kernel.
//!
//! A front-end that truncates the file under a mapping would make every access raise SIGBUS.
//! Sizes are checked when a region is mapped; for later truncation see [`super::guard`].

use super::guard;
use block::{Error, ErrorKind, IoVec, Result};
use rustix::{
    fs::{fstat, fstatfs},
    mm::{Advice, MapFlags, ProtFlags, madvise, mmap, munmap},
};
use std::{ffi::c_void, fs::File, ptr, sync::Arc};

/// Regions that a guest's memory may consist of. QEMU uses a handful, and one more for each
/// memory module that is plugged in (up to 256).
pub const REGIONS_MAX: usize = 288;

/// `statfs` type of hugetlbfs, whose mappings start at multiples of its page size.
const HUGETLBFS_MAGIC: u64 = 0x958458f6;

/// A range of a guest's memory that a front-end asked to map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RegionSpec {
    /// First byte in the guest's physical address space.
    pub guest: u64,
    /// First byte in the front-end's address space.
    pub user: u64,
    /// Bytes.
    pub len: u64,
    /// Where the region starts in the file, in bytes.
    pub offset: u64,
}

/// A mapped range of a guest's memory.
#[derive(Debug)]
pub struct Region {
    spec: RegionSpec,
    /// The host's address of the guest's first byte.
    base: *mut u8,
    map: *mut c_void,
    map_len: usize,
}

// SAFETY: a `Region` is an address range; access to the memory behind it is as racy from one
// thread as from many (the guest writes to it too), and all of it goes through raw pointers.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

fn last(start: u64, len: u64) -> Option<u64> {
    start.checked_add(len.checked_sub(1)?)
}

impl Region {
    /// Maps `spec` of `file`.
    ///
    /// # Errors
    ///
    /// When the region is empty, wraps around, is not within the file, or cannot be mapped.
    pub fn map(spec: RegionSpec, file: &File) -> Result<Self> {
        let wrong = |what: &str| {
            Error::invalid(format!(
                "memory region of {:#x} bytes at guest address {:#x}: {what}",
                spec.len, spec.guest
            ))
        };
        if last(spec.guest, spec.len).is_none() || last(spec.user, spec.len).is_none() {
            return Err(wrong("is empty or ends behind the address space"));
        }
        let end = spec
            .offset
            .checked_add(spec.len)
            .ok_or_else(|| wrong("its offset in the file is too large"))?;
        let os = |what, e: rustix::io::Errno| Error::os(wrong(what).to_string(), e.into());
        let stat = fstat(file).map_err(|e| os("fstat", e))?;
        if u64::try_from(stat.st_size).unwrap_or(0) < end {
            return Err(wrong("its file is shorter"));
        }
        let fs = fstatfs(file).map_err(|e| os("fstatfs", e))?;
        let page = if fs.f_type as u64 == HUGETLBFS_MAGIC {
            fs.f_bsize as u64
        } else {
            // SAFETY: only asks for a number, always there.
            let size = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
            u64::try_from(size).unwrap_or(0)
        };
        if !page.is_power_of_two() {
            return Err(wrong("its file system has an odd page size"));
        }
        let start = block::align_down(spec.offset, page);
        let map_len = usize::try_from(block::align_up(end, page) - start)
            .map_err(|_| wrong("it does not fit the address space"))?;
        let skip = (spec.offset - start) as usize;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let map = unsafe {
            mmap(
                ptr::null_mut(),
                map_len,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::NORESERVE,
                file,
                start,
            )
        }
        .map_err(|e| os("mmap", e))?;
        // A crash's core should not hold the guest's memory. Only a wish.
        // SAFETY: the range is the mapping just made; the advice does not change its contents.
        let _ = unsafe { madvise(map, map_len, Advice::LinuxDontDump) };
        let region = Self {
            spec,
            base: map.cast::<u8>().wrapping_add(skip),
            map,
            map_len,
        };
        if !guard::add(map as usize, map_len) {
            return Err(Error::new(
                ErrorKind::NoSpace,
                "too many memory regions are mapped in this process",
            ));
        }
        Ok(region)
    }

    /// The host's address of `len` bytes at `skip` bytes from its start, if it is so long.
    pub fn range(&self, skip: u64, len: u64) -> Option<*mut u8> {
        let end = skip.checked_add(len)?;
        (end <= self.spec.len).then(|| self.base.wrapping_add(skip as usize))
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        guard::remove(self.map as usize);
        // SAFETY: the mapping was made by `map` with this length, and whoever uses an address in
        // it holds the region.
        let _ = unsafe { munmap(self.map, self.map_len) };
    }
}

/// All of a guest's memory. Never changes: a change is a new one that shares regions.
#[derive(Debug, Default)]
pub struct GuestMemory {
    /// By guest address; they do not overlap.
    regions: Vec<Arc<Region>>,
}

impl GuestMemory {
    /// The memory that consists of `regions`.
    ///
    /// # Errors
    ///
    /// When two of them overlap, in the guest or in the front-end, or there are too many.
    pub fn new(mut regions: Vec<Arc<Region>>) -> Result<Self> {
        if regions.len() > REGIONS_MAX {
            return Err(Error::invalid(format!(
                "{} memory regions, at most {REGIONS_MAX} are supported",
                regions.len()
            )));
        }
        let overlap = |regions: &[Arc<Region>], start: fn(&RegionSpec) -> u64| {
            regions.windows(2).find_map(|pair| {
                let (a, b) = (&pair[0].spec, &pair[1].spec);
                // `map` checked that the last byte exists.
                (last(start(a), a.len)? >= start(b)).then_some(start(b))
            })
        };
        regions.sort_by_key(|r| r.spec.user);
        if let Some(at) = overlap(&regions, |s| s.user) {
            return Err(Error::invalid(format!(
                "memory regions overlap at front-end address {at:#x}"
            )));
        }
        regions.sort_by_key(|r| r.spec.guest);
        if let Some(at) = overlap(&regions, |s| s.guest) {
            return Err(Error::invalid(format!(
                "memory regions overlap at guest address {at:#x}"
            )));
        }
        Ok(Self { regions })
    }

    /// This memory and one region more.
    pub fn with(&self, region: Arc<Region>) -> Result<Self> {
        let mut regions = self.regions.clone();
        regions.push(region);
        Self::new(regions)
    }

    /// This memory without the region that lies at the given addresses; `None` when there is none.
    pub fn without(&self, guest: u64, user: u64, len: u64) -> Option<Self> {
        let at = self
            .regions
            .iter()
            .position(|r| (r.spec.guest, r.spec.user, r.spec.len) == (guest, user, len))?;
        let mut regions = self.regions.clone();
        regions.remove(at);
        Some(Self { regions })
    }

    /// Whether there is no memory at all.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// The address of guest address `at`, and how many bytes of its region start there.
    #[inline]
    fn find(&self, at: u64) -> Option<(*mut u8, u64)> {
        let behind = self.regions.partition_point(|r| r.spec.guest <= at);
        let region = self.regions.get(behind.checked_sub(1)?)?;
        let skip = at - region.spec.guest;
        let left = region.spec.len.checked_sub(skip).filter(|left| *left > 0)?;
        // `skip` is below the region's length, which is mapped and so fits usize.
        Some((region.base.wrapping_add(skip as usize), left))
    }

    /// The host's address of `len` bytes at guest address `at`, when they lie in one region.
    #[inline]
    pub fn range(&self, at: u64, len: u64) -> Option<*mut u8> {
        let (base, left) = self.find(at)?;
        (len <= left).then_some(base)
    }

    /// The host's address of `len` bytes at the front-end's address `at`, when they lie in one region.
    pub fn user_range(&self, at: u64, len: u64) -> Option<*mut u8> {
        // Rings only, so a search of all will do.
        self.regions.iter().find_map(|r| {
            let skip = at.checked_sub(r.spec.user)?;
            let end = skip.checked_add(len)?;
            (end <= r.spec.len).then(|| r.base.wrapping_add(skip as usize))
        })
    }

    /// Hands `take` the pieces of memory behind `len` bytes at guest address `at`: one, unless
    /// regions meet in between. `false` when not all of it is the guest's memory.
    #[inline]
    pub fn pieces(&self, at: u64, len: u32, mut take: impl FnMut(IoVec)) -> bool {
        let (mut at, mut left) = (at, u64::from(len));
        while left > 0 {
            let Some((base, here)) = self.find(at) else {
                return false;
            };
            let size = left.min(here);
            take(IoVec::new(base, size as usize));
            left -= size;
            let Some(next) = at.checked_add(size) else {
                return left == 0;
            };
            at = next;
        }
        true
    }
}

/// Copies `out.len()` bytes of guest memory at `from`.
///
/// # Safety
///
/// So many bytes must be mapped there. The guest may change them meanwhile; any mixture
/// of old and new may come out.
#[inline]
pub unsafe fn read(from: *const u8, out: &mut [u8]) {
    // SAFETY: the source is mapped (the caller's promise) and cannot overlap `out`, which is
    // this process's own memory.
    unsafe { ptr::copy_nonoverlapping(from, out.as_mut_ptr(), out.len()) }
}

/// Copies `bytes` to guest memory at `to`.
///
/// # Safety
///
/// So many bytes must be mapped there.
#[inline]
pub unsafe fn write(to: *mut u8, bytes: &[u8]) {
    // SAFETY: as in `read`.
    unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len()) }
}

/// Copies from the start of `iov` until `out` is full or `iov` ends; returns the bytes copied.
///
/// # Safety
///
/// The pieces must be mapped guest memory.
pub unsafe fn gather(iov: &[IoVec], out: &mut [u8]) -> usize {
    let mut done = 0;
    for piece in iov {
        let size = piece.len().min(out.len() - done);
        // SAFETY: `size` is at most the piece's length.
        unsafe { read(piece.base(), &mut out[done..done + size]) };
        done += size;
        if done == out.len() {
            break;
        }
    }
    done
}

/// Copies `bytes` to the start of `iov` until either ends; returns the bytes copied.
///
/// # Safety
///
/// The pieces must be mapped guest memory.
pub unsafe fn scatter(bytes: &[u8], iov: &[IoVec]) -> usize {
    let mut done = 0;
    for piece in iov {
        let size = piece.len().min(bytes.len() - done);
        // SAFETY: `size` is at most the piece's length.
        unsafe { write(piece.base(), &bytes[done..done + size]) };
        done += size;
        if done == bytes.len() {
            break;
        }
    }
    done
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

    /// A file of `len` bytes to map.
    pub fn memfd(len: u64) -> File {
        let fd = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&fd, len).unwrap();
        File::from(fd)
    }

    pub fn region(guest: u64, user: u64, len: u64) -> Arc<Region> {
        let spec = RegionSpec {
            guest,
            user,
            len,
            offset: 0,
        };
        Arc::new(Region::map(spec, &memfd(len)).unwrap())
    }

    /// Regions [0, 64K), [64K, 128K) (adjacent), [1M, 1M+64K); user addresses elsewhere.
    fn three() -> GuestMemory {
        GuestMemory::new(vec![
            region(0x10000, 0x7000_0000, 0x10000),
            region(0, 0x7f00_0000, 0x10000),
            region(0x100000, 0x1000_0000, 0x10000),
        ])
        .unwrap()
    }

    #[test]
    fn translates_within_bounds_only() {
        let memory = three();
        for (at, len, found) in [
            (0, 1, true),
            (0, 0x10000, true),
            (0, 0x10001, false), // spans two regions
            (0xffff, 1, true),
            (0xffff, 2, false),
            (0x20000, 1, false),
            (0xfffff, 1, false),
            (0x100000, 0x10000, true),
            (0x10ffff, 2, false),
            (u64::MAX, 1, false),
            (u64::MAX, u64::MAX, false),
            (0, u64::MAX, false),
        ] {
            assert_eq!(memory.range(at, len).is_some(), found, "{at:#x}+{len:#x}");
        }
        for (at, len, found) in [
            (0x7000_0000, 0x10000, true),
            (0x7000_0001, 0x10000, false),
            (0x6fff_ffff, 2, false),
            (0x7f00_ffff, 1, true),
            (u64::MAX, 2, false),
        ] {
            assert_eq!(
                memory.user_range(at, len).is_some(),
                found,
                "{at:#x}+{len:#x}"
            );
        }
    }

    #[test]
    fn splits_buffers_where_regions_meet() {
        let memory = three();
        let pieces = |at, len| {
            let mut out = Vec::new();
            memory.pieces(at, len, |v| out.push(v.len())).then_some(out)
        };
        assert_eq!(pieces(0xf000, 0x2000), Some(vec![0x1000, 0x1000]));
        assert_eq!(pieces(0, 0x20000), Some(vec![0x10000, 0x10000]));
        assert_eq!(pieces(0x1f000, 0x1001), None);
        assert_eq!(pieces(u64::MAX, 2), None);
        assert_eq!(pieces(0, 0), Some(vec![]));
    }

    #[test]
    fn copies_across_pieces() {
        let memory = three();
        let mut iov = Vec::new();
        assert!(memory.pieces(0xfffe, 6, |v| iov.push(v)));
        // SAFETY: the pieces come from `pieces`.
        unsafe {
            assert_eq!(scatter(b"abcdef", &iov), 6);
            let mut out = [0; 8];
            assert_eq!(gather(&iov, &mut out), 6);
            assert_eq!(&out, b"abcdef\0\0");
            let mut two = [0; 2];
            read(memory.range(0x10000, 2).unwrap(), &mut two);
            assert_eq!(&two, b"cd");
        }
    }

    #[test]
    fn the_end_of_the_address_space_is_no_trap() {
        let top = u64::MAX - 0xffff;
        let memory = GuestMemory::new(vec![region(top, top, 0x10000)]).unwrap();
        assert!(memory.range(u64::MAX, 1).is_some());
        assert!(memory.range(u64::MAX, 2).is_none());
        assert!(memory.pieces(u64::MAX, 1, |_| ()));
        assert!(!memory.pieces(u64::MAX, 2, |_| ()));
        assert!(memory.user_range(u64::MAX, 1).is_some());
        assert!(memory.user_range(u64::MAX, 2).is_none());
    }

    #[test]
    fn refuses_impossible_regions() {
        let spec = RegionSpec {
            guest: 0,
            user: 0,
            len: 0x1000,
            offset: 0,
        };
        for (what, spec, file_len) in [
            ("empty", RegionSpec { len: 0, ..spec }, 0x1000),
            ("short file", spec, 0xfff),
            (
                "offset behind the end",
                RegionSpec { offset: 1, ..spec },
                0x1000,
            ),
            (
                "wraps in the guest",
                RegionSpec {
                    guest: u64::MAX,
                    ..spec
                },
                0x1000,
            ),
            (
                "wraps in the front-end",
                RegionSpec {
                    user: u64::MAX - 1,
                    ..spec
                },
                0x1000,
            ),
            (
                "offset wraps",
                RegionSpec {
                    offset: u64::MAX,
                    ..spec
                },
                0x1000,
            ),
            (
                "huge",
                RegionSpec {
                    len: u64::MAX,
                    ..spec
                },
                0x1000,
            ),
        ] {
            assert!(Region::map(spec, &memfd(file_len)).is_err(), "{what}");
        }
        assert!(
            GuestMemory::new(vec![region(0, 0, 0x2000), region(0x1000, 0x8000, 0x1000)]).is_err()
        );
        assert!(
            GuestMemory::new(vec![region(0, 0, 0x2000), region(0x8000, 0x1fff, 0x1000)]).is_err()
        );
    }

    #[test]
    fn an_unaligned_offset_maps_the_right_bytes() {
        let file = memfd(0x3000);
        std::os::unix::fs::FileExt::write_all_at(&file, b"here", 0x1234).unwrap();
        let spec = RegionSpec {
            guest: 0x5000,
            user: 0,
            len: 0x1000,
            offset: 0x1234,
        };
        let memory = GuestMemory::new(vec![Arc::new(Region::map(spec, &file).unwrap())]).unwrap();
        let mut out = [0; 4];
        // SAFETY: `range` vouches for the four bytes.
        unsafe { read(memory.range(0x5000, 4).unwrap(), &mut out) };
        assert_eq!(&out, b"here");
    }

    #[test]
    fn regions_come_and_go_by_address() {
        let memory = three();
        assert!(memory.without(0, 0, 0x10000).is_none());
        let less = memory.without(0, 0x7f00_0000, 0x10000).unwrap();
        assert!(less.range(0, 1).is_none());
        assert!(memory.range(0, 1).is_some(), "the old table still has it");
        assert!(
            less.with(region(0x8000, 0, 0x1000))
                .unwrap()
                .range(0x8000, 1)
                .is_some()
        );
        assert!(memory.with(region(0x8000, 0, 0x1000)).is_err());
    }
}
