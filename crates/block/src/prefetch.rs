/// Asks the processor to fetch the cache line at `at`, which may be any address: a hint for what will be read in some
/// hundred cycles.
#[inline]
pub fn prefetch<T>(at: *const T) {
    // SAFETY: a hint, which no address makes a fault.
    #[cfg(target_arch = "x86_64")]
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
