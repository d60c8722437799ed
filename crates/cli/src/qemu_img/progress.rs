//! How far a command is, with `-p`, or once for each SIGUSR1 on stderr: as qemu-img writes it.

use anyhow::Result;
use std::io::Write as _;
use tool::source::Source;

/// Percent between two lines.
const STEP: f64 = 1.0;
/// Bytes that qemu-img copies at once.
pub const CHUNK_BYTES: u64 = 2 << 20;

/// How far a copy is, as qemu-img counts: of the source's data, in the pieces that it would copy.
#[derive(Debug)]
pub struct Steps<'a> {
    source: Source<'a>,
    /// Bytes of a piece at most.
    chunk: u64,
    /// Zeros are written, too.
    zeros: bool,
    /// Up to here the data are counted.
    at: u64,
    done: u64,
    total: u64,
}

impl<'a> Steps<'a> {
    /// Counts the data of `source`, whose map is looked through for that, and with `zeros` the zeros. A piece has `chunk`
    /// bytes at most.
    ///
    /// # Errors
    ///
    /// What reading its tables fails with.
    pub fn new(mut source: Source<'a>, chunk: u64, zeros: bool) -> Result<Self> {
        let (mut at, mut total) = (0, 0);
        while at < source.size() {
            let run = source.run(at, source.size() - at)?;
            at += run.len;
            total += if run.zero && !zeros { 0 } else { run.len };
        }
        Ok(Self {
            source,
            chunk,
            zeros,
            at: 0,
            done: 0,
            total,
        })
    }

    /// All before `end` is copied: tells `progress` of each piece.
    pub fn reached(&mut self, end: u64, progress: &mut Progress) {
        while self.at < end {
            let left = self.source.size() - self.at;
            // Whoever copies finds out why it cannot be read.
            let Ok(run) = self.source.run(self.at, left) else {
                return;
            };
            let counts = !run.zero || self.zeros;
            let len = match counts {
                true => run.len.min(self.chunk),
                false => run.len,
            };
            if self.at + len > end {
                return;
            }
            self.at += len;
            if counts {
                self.done += len;
                progress.percent(self.done as f64 * 100.0 / self.total.max(1) as f64);
            }
        }
    }
}

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
        self.percent(percent);
    }

    fn percent(&mut self, percent: f64) {
        if crate::signals::progress_wanted() {
            eprintln!("    ({percent:.2}/100%)");
        }
        // All is shown, also where that was shown before.
        if percent >= 100.0 || self.shown.is_none_or(|shown| percent - shown > STEP) {
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
