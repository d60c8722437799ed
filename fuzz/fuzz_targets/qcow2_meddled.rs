//! A qcow2 image that somebody else changes while it is in use: how it is used, before which call, what is changed.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::rich;

#[allow(dead_code, reason = "each target does a part of it")]
#[path = "../../crates/tool/tests/hostile/abuse.rs"]
mod abuse;

fuzz_target!(|data: &[u8]| {
    let Some(([way, call, cut, change @ ..], data)) = data.split_first_chunk::<9>() else {
        return;
    };
    let meddling = rich::meddling(*change, cut % 4 == 0);
    abuse::meddled(&rich::image(data), *way, (*call).into(), meddling);
});
