//! An image of another format than qcow2. Its first byte says which, the second how it is made: of bytes as they are, sound and
//! changed by somebody else while it is in use, or with changes.
#![no_main]

use libfuzzer_sys::fuzz_target;
use testkit::rich;

#[path = "../../crates/tool/tests/hostile/kinds.rs"]
mod kinds;

fuzz_target!(|data: &[u8]| {
    let Some(([kind, how], data)) = data.split_first_chunk::<2>() else {
        return;
    };
    let kind = kinds::KINDS[usize::from(*kind) % kinds::KINDS.len()];
    match how % 8 {
        0 => drop(kinds::abuse(kind, data)),
        1 => {
            if let Some([way, call, change @ ..]) = data.first_chunk::<8>() {
                let meddling = rich::meddling(*change, how & 8 != 0);
                kinds::meddled(kind, (*way).into(), (*call).into(), meddling);
            }
        }
        how => {
            let changes = data.as_chunks::<6>().0.iter().take(16);
            let changes: Vec<kinds::Change> = changes
                .map(|[lo, hi, how, a, b, c]| {
                    let number = u32::from_le_bytes([*a, *b, *c, 0]);
                    (u16::from_le_bytes([*lo, *hi]), *how, number)
                })
                .collect();
            kinds::abuse(kind, &kinds::damaged(kind, &changes, how != 2));
        }
    }
});
