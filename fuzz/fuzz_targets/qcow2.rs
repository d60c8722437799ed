//! A qcow2 image, as bytes or as damage to a sound one: opened, mapped, read, written, checked, repaired.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::rich;

#[path = "../../crates/tool/tests/hostile/abuse.rs"]
mod abuse;

fuzz_target!(|data: &[u8]| {
    if data.starts_with(b"QFI\xfb") {
        abuse::abuse(data);
    } else {
        abuse::abuse(&rich::damaged(data));
    }
});
