//! A qcow2 image that nobody has open: its first byte says what is done to it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::rich;

#[allow(dead_code, reason = "each target does a part of it")]
#[path = "../../crates/tool/tests/hostile/abuse.rs"]
mod abuse;

fuzz_target!(|data: &[u8]| {
    let (which, data) = data.split_first().unwrap_or((&0, &[]));
    let image = rich::image(data);
    let edit = &abuse::EDITS[usize::from(*which) % abuse::EDITS.len()];
    let sound = abuse::checked(&image).as_ref().is_ok_and(abuse::sound);
    abuse::edited(&image, edit, sound);
});
