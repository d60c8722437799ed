//! How far a command is, with `-p`, or once for each SIGUSR1 on stderr: as qemu-img writes it.

use std::io::Write as _;

/// Percent between two lines.
const STEP: f64 = 1.0;

/// Writes `    (12.34/100%)` over itself.
#[derive(Debug)]
pub struct Progress {
    shown: Option<f64>,
    wanted: bool,
    bytes: u64,
}

impl Progress {
    /// Of a disk of `bytes` bytes; nothing is shown unless it is `wanted`.
    pub fn new(bytes: u64, wanted: bool) -> Self {
        let mut progress = Self {
            shown: None,
            wanted,
            bytes,
        };
        progress.show(0.0);
        progress
    }

    /// So many bytes are done.
    pub fn set(&mut self, done: u64) {
        let percent = match self.bytes {
            0 => 100.0,
            bytes => done.min(bytes) as f64 * 100.0 / bytes as f64,
        };
        if crate::signals::progress_wanted() {
            eprintln!("    ({percent:.2}/100%)");
        }
        if self.shown.is_none_or(|shown| percent - shown >= STEP) {
            self.show(percent);
        }
    }

    /// All is done.
    pub fn end(mut self) {
        self.show(100.0);
        if self.wanted {
            println!();
        }
    }

    fn show(&mut self, percent: f64) {
        self.shown = Some(percent);
        if self.wanted {
            let mut out = std::io::stdout().lock();
            // Whoever reads may have gone: the work goes on.
            let _ = write!(out, "    ({percent:.2}/100%)\r").and_then(|()| out.flush());
        }
    }
}
