//! A qcow2 image: opened, mapped, read, also its snapshots and with a passphrase, and written.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::rich;

#[allow(dead_code, reason = "each target does a part of it")]
#[path = "../../crates/tool/tests/hostile/abuse.rs"]
mod abuse;

fuzz_target!(|data: &[u8]| {
    let image = rich::image(data);
    let _ = abuse::open(&image);
    let _ = abuse::written(&image);
});
