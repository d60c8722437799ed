//! Reports and pictures in headless Chromium.

use std::{
    path::Path,
    process::{Command, Stdio},
};

/// Opens a page or an SVG as `scripts/report-chromium.sh` does; `None` where there is no Chromium, and otherwise what it says, or what
/// is wrong.
pub fn look(page: &Path) -> Option<Result<String, String>> {
    let script = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../scripts/report-chromium.sh"
    );
    let output = Command::new("bash")
        .arg(script)
        .arg(page)
        .stdin(Stdio::null())
        .output()
        .expect("bash runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    match output.status.code() {
        // As the script says it.
        Some(77) => {
            eprintln!("not tested: {}", text(&output.stderr));
            None
        }
        Some(0) => Some(Ok(text(&output.stdout))),
        _ => Some(Err(text(&output.stdout) + &text(&output.stderr))),
    }
}
