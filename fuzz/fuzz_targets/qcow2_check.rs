//! A qcow2 image: checked and repaired.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::rich;

#[allow(dead_code, reason = "each target does a part of it")]
#[path = "../../crates/tool/tests/hostile/abuse.rs"]
mod abuse;

fuzz_target!(|data: &[u8]| {
    let image = rich::image(data);
    let _ = abuse::checked(&image);
    abuse::repaired(&image, abuse::open(&image).is_ok());
});
