//! Load on a file by plain system calls, as a program makes them that knows of no engine, and fio's `psync`: one request at a time, made
//! by the thread that asks. An engine's threads would add the time of two awakenings to each.

use super::{
    Spec,
    drive::{Client, Ended},
    file::place,
    fill,
    plan::{Kind, Request},
};
use block::{Error, ErrorKind, Result};
use io::{File, memory::AlignedBuf};
use rustix::io::Errno;
use std::sync::Arc;

/// What a target's engine is called that makes requests so.
pub(crate) const NAME: &str = "psync";

pub(super) struct Psync {
    files: Vec<Arc<File>>,
    /// Bytes from a file's first to the next one's, where they are several.
    span: u64,
    block: usize,
    data: AlignedBuf,
    /// The request that was made, which nobody was told of yet.
    ended: Option<Ended>,
    calls: u64,
}

impl Psync {
    /// [`Spec::depth`] is 1 ([`Spec::check`]).
    pub(super) fn new(spec: &Spec, files: Vec<Arc<File>>, span: u64, queue: u32) -> Self {
        let block = spec.block_bytes as usize;
        let mut data = AlignedBuf::new(block.next_multiple_of(4096), 4096);
        fill(&mut data[..block], spec.seed, queue, 0);
        Self {
            files,
            span,
            block,
            data,
            ended: None,
            calls: 0,
        }
    }

    fn make(&mut self, request: Request) -> Result<(), Errno> {
        let (file, mut at) = place(request.offset, self.span, self.files.len());
        let file = self.files.get(file).ok_or(Errno::INVAL)?;
        let len = (request.bytes as usize).min(self.block);
        let mut rest = &mut self.data[..len];
        if request.kind == Kind::Flush {
            self.calls += 1;
            return rustix::fs::fdatasync(file);
        }
        while !rest.is_empty() {
            self.calls += 1;
            let done = match request.kind {
                Kind::Read => rustix::io::pread(file, &mut *rest, at),
                _ => rustix::io::pwrite(file, rest, at),
            };
            match done {
                // The file became shorter.
                Ok(0) => return Err(Errno::IO),
                Ok(n) => {
                    at += n as u64;
                    rest = &mut rest[n..];
                }
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

impl Client for Psync {
    fn submit(&mut self, slot: usize, request: Request) -> Result<()> {
        if self.ended.is_some() {
            return Err(Error::new(ErrorKind::Io, "psync has one request at a time"));
        }
        let ok = self.make(request).is_ok();
        self.ended = Some(Ended { slot, ok });
        Ok(())
    }

    fn send(&mut self) -> Result<()> {
        Ok(())
    }

    fn reap(&mut self, ended: &mut Vec<Ended>) -> Result<()> {
        ended.extend(self.ended.take());
        Ok(())
    }

    fn put(&mut self, _: usize, block: &[u8]) {
        self.data[..block.len()].copy_from_slice(block);
    }

    fn get(&mut self, _: usize, block: &mut [u8]) {
        block.copy_from_slice(&self.data[..block.len()]);
    }

    /// A call submits and waits: nobody is told of its end.
    fn notifications(&self) -> (u64, u64) {
        (self.calls, 0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::{Flushes, Pattern, Target, Verify, run};
    use io::OpenOptions;
    use std::path::Path;

    fn spec(path: &Path) -> Spec {
        Spec {
            depth: 1,
            queues: 2,
            ios_max: Some(300),
            duration: std::time::Duration::ZERO,
            ..Spec::new(Target::File {
                path: path.to_owned(),
                engine: NAME.to_owned(),
                direct: false,
            })
        }
    }

    #[test]
    fn each_request_is_one_call_and_its_bytes_are_where_they_belong() {
        let dir = tempfile::tempdir().unwrap();
        let files = ["a", "b"].map(|name| dir.path().join(name));
        for file in &files {
            std::fs::write(file, vec![0; 1 << 20]).unwrap();
        }
        let mut verifying = spec(&files[0]);
        verifying.pattern = Pattern::RandRw;
        verifying.flushes = Flushes::Every(4);
        verifying.verify = Some(Verify::default());
        let report = run(&verifying).unwrap();
        let verified = report.verify.unwrap();
        assert_eq!((report.reads + report.writes, report.errors), (300, 0));
        assert!(report.flushes > 0 && verified.written == report.writes);
        assert_eq!(verified.bad(), 0, "{verified:?}");
        assert_eq!((report.kicks_per_io, report.calls_per_io), (1.0, 0.0));

        // All of two files, once.
        let mut both = spec(&files[0]);
        both.shape.more_files = vec![files[1].clone()];
        both.pattern = Pattern::Write;
        (both.queues, both.ios_max) = (1, Some(512));
        assert_eq!(run(&both).unwrap().bytes, 2 << 20);
        for file in &files {
            let bytes = std::fs::read(file).unwrap();
            assert!(
                bytes.len() == 1 << 20 && bytes.chunks(4096).all(|b| b.iter().any(|b| *b != 0))
            );
        }
    }

    #[test]
    fn more_at_a_time_is_refused_and_what_fails_is_counted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, vec![1; 1 << 20]).unwrap();
        let deep = Spec {
            depth: 2,
            ..spec(&path)
        };
        let error = run(&deep).unwrap_err().to_string();
        assert!(
            error.contains("--engine psync") && error.contains("--depth 1"),
            "{error}"
        );
        let file = File::open(&path, &OpenOptions::default()).unwrap();
        let mut psync = Psync::new(&spec(&path), vec![file], 1 << 20, 0);
        let mut read = |offset| {
            let request = Request {
                kind: Kind::Read,
                offset,
                bytes: 4096,
            };
            psync.submit(0, request).unwrap();
            assert!(psync.submit(0, request).is_err());
            let mut ended = Vec::new();
            psync.reap(&mut ended).unwrap();
            psync.reap(&mut ended).unwrap();
            ended
        };
        assert_eq!(read(0), [Ended { slot: 0, ok: true }]);
        // The file ends within a block, and before another.
        std::fs::write(&path, [1; 6000]).unwrap();
        assert_eq!(read(4096), [Ended { slot: 0, ok: false }]);
        assert_eq!(read(8192), [Ended { slot: 0, ok: false }]);
    }
}
