//! Cylinders, heads and sectors (specification: appendix "CHS Calculation").

use block::{Error, Result};

/// Sectors of the largest disk: 2040 GiB, as QEMU and Virtual PC have it. Behind come the sectors that the block
/// allocation table cannot name.
pub const MAX_SECTORS: u64 = 0xff00_0000;

/// A disk's geometry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Cylinders.
    pub cylinders: u16,
    /// Heads.
    pub heads: u8,
    /// Sectors to a track.
    pub sectors_per_track: u8,
}

impl Geometry {
    /// The largest, of about 127.5 GiB: it says nothing of a disk's size.
    pub const MAX: Self = Self {
        cylinders: 65535,
        heads: 16,
        sectors_per_track: 255,
    };

    /// From the footer's field.
    pub(super) fn of(raw: u32) -> Self {
        let [high, low, heads, sectors_per_track] = raw.to_be_bytes();
        Self {
            cylinders: u16::from_be_bytes([high, low]),
            heads,
            sectors_per_track,
        }
    }

    /// As the footer has it.
    pub(super) fn raw(self) -> u32 {
        let [high, low] = self.cylinders.to_be_bytes();
        u32::from_be_bytes([high, low, self.heads, self.sectors_per_track])
    }

    /// Sectors that it has.
    pub fn sectors(self) -> u64 {
        u64::from(self.cylinders) * u64::from(self.heads) * u64::from(self.sectors_per_track)
    }

    /// The geometry that the specification gives a disk of so many sectors: as large or a little smaller.
    pub fn below(sectors: u64) -> Self {
        let sectors = sectors.min(Self::MAX.sectors());
        let (track, heads);
        if sectors >= 65535 * 16 * 63 {
            (track, heads) = (255, 16);
        } else {
            let tracks = sectors / 17;
            let few = tracks.div_ceil(1024).max(4);
            if few <= 16 && tracks < few * 1024 {
                (track, heads) = (17, few);
            } else if sectors / 31 < 16 * 1024 {
                (track, heads) = (31, 16);
            } else {
                (track, heads) = (63, 16);
            }
        }
        let cylinders = sectors / track / heads;
        // They fit: the disk is no larger than the largest geometry.
        Self {
            cylinders: cylinders.min(65535) as u16,
            heads: heads as u8,
            sectors_per_track: track as u8,
        }
    }

    /// The smallest geometry that holds `sectors`, as QEMU looks for it: [`Geometry::below`] of more and more of them.
    /// [`Geometry::MAX`] where none is large enough.
    pub fn holding(sectors: u64) -> Self {
        let wanted = sectors.min(Self::MAX.sectors());
        if wanted == 0 {
            return Self::of(0);
        }
        // No geometry is smaller than asked for by more than a cylinder.
        let more = (0..=u64::from(u8::MAX) * 16).map(|more| Self::below(wanted + more));
        more.into_iter()
            .find(|geometry| geometry.sectors() >= wanted)
            .unwrap_or(Self::MAX)
    }
}

/// The geometry and the bytes of a new disk of at least `bytes`.
///
/// Without `force_size` the disk gets the size of its geometry, which all programs agree on, as far as geometries
/// go (about 127.5 GiB).
///
/// # Errors
///
/// [`block::ErrorKind::Unsupported`] above 2040 GiB.
pub fn size_of_new(bytes: u64, force_size: bool) -> Result<(Geometry, u64)> {
    let sectors = bytes.div_ceil(512);
    if sectors > MAX_SECTORS {
        return Err(Error::unsupported(format!(
            "a disk of {bytes} bytes is too large for a VHD image: the most is 2040 GiB ({} bytes), since its \
             table of blocks names sectors of the file in 32 bits",
            MAX_SECTORS * 512
        )));
    }
    let geometry = match force_size {
        true => Geometry::MAX,
        false => Geometry::holding(sectors),
    };
    let sectors = match geometry {
        Geometry::MAX => sectors,
        smaller => smaller.sectors(),
    };
    Ok((geometry, sectors * 512))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_the_geometry() {
        for (bytes, geometry, size) in [
            (10 << 20, (302, 4, 17), 10_514_432),
            (0, (0, 0, 0), 0),
            (1, (1, 4, 17), 34_816),
            (127 << 30, (65_279, 16, 255), 136_365_219_840),
            (200 << 30, (65535, 16, 255), 200 << 30),
        ] {
            let (found, found_size) = size_of_new(bytes, false).unwrap();
            let found = (found.cylinders, found.heads, found.sectors_per_track);
            assert_eq!((found, found_size), (geometry, size), "{bytes}");
        }
        assert_eq!(size_of_new(1000, true).unwrap(), (Geometry::MAX, 1024));
        assert_eq!(size_of_new(2040 << 30, false).unwrap().1, 2040 << 30);
        let error = size_of_new((2040 << 30) + 1, true).unwrap_err();
        assert!(error.to_string().contains("2040 GiB"), "{error}");
    }
}
