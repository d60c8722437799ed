//! Offsets as types, so that a guest's address is never used as a file's.

use std::fmt;

macro_rules! offset {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
        #[repr(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The offset `bytes` further on; `None` when it does not fit 64 bits.
            #[inline]
            pub fn checked_add(self, bytes: u64) -> Option<Self> {
                self.0.checked_add(bytes).map(Self)
            }

            /// The offset `bytes` further on. For offsets that were validated at the
            /// edge to lie within a disk or file; saturates otherwise.
            #[inline]
            #[must_use]
            pub fn plus(self, bytes: u64) -> Self {
                Self(self.0.saturating_add(bytes))
            }

            /// How many bytes `self` lies behind `start`; zero when it lies before.
            #[inline]
            pub fn since(self, start: Self) -> u64 {
                self.0.saturating_sub(start.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:#x})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:#x}", self.0)
            }
        }
    };
}

offset! {
    /// A byte offset in a virtual disk, as its guest counts.
    GuestOffset
}
offset! {
    /// A byte offset in an image file or device on the host.
    HostOffset
}

/// `value` rounded down to a multiple of `align`, a power of two.
#[inline]
pub const fn align_down(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    value & !(align - 1)
}

/// `value` rounded up to a multiple of `align`, a power of two; saturates at
/// the highest such multiple.
#[inline]
pub const fn align_up(value: u64, align: u64) -> u64 {
    debug_assert!(align.is_power_of_two());
    align_down(value.saturating_add(align - 1), align)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_to_powers_of_two() {
        for (value, align, down, up) in [
            (0, 512, 0, 0),
            (1, 512, 0, 512),
            (512, 512, 512, 512),
            (u64::MAX, 4096, u64::MAX - 4095, u64::MAX - 4095),
        ] {
            assert_eq!(align_down(value, align), down);
            assert_eq!(align_up(value, align), up);
        }
    }

    #[test]
    fn offsets_do_not_wrap() {
        assert_eq!(GuestOffset(u64::MAX).checked_add(1), None);
        assert_eq!(GuestOffset(u64::MAX).plus(1), GuestOffset(u64::MAX));
        assert_eq!(HostOffset(3).since(HostOffset(5)), 0);
    }
}
