//! Whether those that are compared are equal in all but what they are compared in: the same files, open in the same way, with as
//! many queues, and flushes that reach the file as often.
//!
//! What a server does with flushes cannot be seen at its files. So a server of each configuration is started once more, on a file
//! of a file system of ours (FUSE) that counts them; a client writes and flushes in turn, and has one request at a time, so that no two
//! flushes become one:
//!
//! ```text
//!   client      write · flush      write · flush …        pairs: `asked`
//!   server      as the side's: engine, cache mode, format
//!   file        write · fsync …    write …                pairs in which at least one fsync came: `reached`
//! ```
//!
//! A flush may take several of the file's, which make up for none of another.

use crate::{
    machine::process::{self, Process},
    peer::{self, Programs, Seen, Setup},
    simulated::{self, Model, Mounted},
    single::{self, Single},
};
use block::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};
use trace::Operation;

/// Pairs of a write and a flush.
const PAIRS: u64 = 16;
/// Bytes of a write, and from one to the next.
const BLOCK: u64 = 4 << 10;
const STRIDE: u64 = 128 << 10;
/// Bytes of the disk that they go to, and of the file at most.
const DISK: u64 = 8 << 20;
const FILE: u64 = 64 << 20;
/// How long making an image may take.
const LIMIT: Duration = Duration::from_secs(60);

/// What came of a server's flushes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Flushed {
    /// Flushes that were asked for, one at a time, each after a write.
    pub asked: u64,
    /// Those by whose answer the file had been flushed since the write before was asked for.
    pub reached: u64,
}

impl Flushed {
    /// Each of them reached the file.
    pub fn all(self) -> bool {
        self.reached >= self.asked
    }

    /// In words.
    pub fn words(self) -> String {
        match self.reached {
            0 => format!(
                "flushes are dropped (none of {} reached the file)",
                self.asked
            ),
            _ if self.all() => "flushes reach the file".to_owned(),
            n => format!(
                "some flushes are dropped ({n} of {} reached the file)",
                self.asked
            ),
        }
    }
}

/// Looks at what servers do with flushes, once for each way in which they are started.
#[derive(Debug)]
pub(crate) struct Probe {
    work: PathBuf,
    known: BTreeMap<String, std::result::Result<Flushed, String>>,
}

impl Probe {
    /// One that works below `work`.
    pub(crate) fn new(work: &Path) -> Self {
        Self {
            work: work.join("flushes"),
            known: BTreeMap::new(),
        }
    }

    /// What a server that is started so does with flushes; nothing of one without a file.
    ///
    /// # Errors
    ///
    /// Why that cannot be seen.
    pub(crate) fn look(
        &mut self,
        programs: &Programs,
        setup: &Setup<'_>,
    ) -> std::result::Result<Option<Flushed>, String> {
        if setup.files.is_empty() {
            return Ok(None);
        }
        let how = format!(
            "{:?} {} {} {} {} {}",
            setup.server,
            setup.format,
            setup.engine,
            setup.direct,
            setup.drops_flushes,
            setup.writethrough
        );
        let work = &self.work;
        let known = self.known.entry(how).or_insert_with(|| {
            let looked = look(programs, work, setup);
            looked.map_err(|error| {
                process::goes_on();
                error.to_string()
            })
        });
        known.clone().map(Some)
    }
}

fn look(programs: &Programs, work: &Path, setup: &Setup<'_>) -> Result<Flushed> {
    fs::create_dir_all(work).context(|| work.display().to_string())?;
    let member = work.join("member");
    let _ = fs::remove_file(&member); // of the configuration before
    image(programs, work, setup.format, &member)?;
    let device = simulated::Setup {
        model: Model::Flash {
            read: Duration::ZERO,
            write: Duration::ZERO,
            channels: 32,
        },
        grows: true,
        ..simulated::Setup::new(FILE)
    };
    let mounted = Mounted::start(work, device, std::slice::from_ref(&member))?;
    let files = [mounted.path().to_owned()];
    let alone = Setup {
        files: &files,
        backing: None,
        queues: 1,
        io_threads: 1,
        read_only: false,
        shared: false,
        ..setup.clone()
    };
    let server = peer::start(programs, work, &alone)?;
    let Some(target) = server.targets.first() else {
        return Err(Error::invalid("no target"));
    };
    let outcome = single::connect(target, BLOCK)
        .and_then(|mut client| count(&mut *client, &|| mounted.flushes()));
    let flushed = match outcome {
        Ok(flushed) => flushed,
        Err(error) => return Err(server.failed(&error)),
    };
    server.stop()?;
    drop(mounted);
    Ok(flushed)
}

/// Asks for pairs of a write, in a cluster of its own, and a flush; `flushes` counts those of the file.
fn count(client: &mut dyn Single, flushes: &dyn Fn() -> u64) -> Result<Flushed> {
    let mut flushed = Flushed::default();
    for pair in 0..PAIRS {
        let before = flushes();
        client.request(Operation::Write, pair * STRIDE)?;
        client.request(Operation::Flush, 0)?;
        flushed.asked += 1;
        flushed.reached += u64::from(flushes() > before);
    }
    Ok(flushed)
}

/// Makes a file with an image of that format.
fn image(programs: &Programs, work: &Path, format: &str, path: &Path) -> Result<()> {
    let mut create = Command::new(&programs.diskplane);
    create.args(["create", "-q", "-f", format]).arg(path);
    create.arg(DISK.to_string());
    let mut process = Process::start("create", &mut create, work)?;
    match process.wait(LIMIT)? {
        status if status.success() => Ok(()),
        status => Err(process.failed(&format!("failed ({status})"))),
    }
}

/// Where a side does with flushes what it was not asked for, or does not do it.
pub(crate) fn differs(side: &str, drops: bool, flushes: Option<Flushed>) -> Option<String> {
    let flushed = flushes?;
    let is_asked_for = match drops {
        true => flushed.reached == 0,
        false => flushed.all(),
    };
    (!is_asked_for).then(|| format!("not as asked for: {side}: {}", flushed.words()))
}

/// Those that are equal, and in what, in a line each; who has no server has nothing to be seen.
pub(crate) fn lines(seen: &[(&str, &Seen)]) -> Vec<String> {
    let mut groups: Vec<(&Seen, Vec<&str>)> = Vec::new();
    for (name, seen) in seen {
        match groups.iter_mut().find(|(other, _)| other.is_like(seen)) {
            Some((_, names)) => names.push(name),
            None => groups.push((seen, vec![name])),
        }
    }
    let line =
        |(seen, names): (&Seen, Vec<&str>)| format!("{}: {}", names.join(" = "), seen.words());
    groups.into_iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::Cell, rc::Rc};

    fn seen(file: &str, reached: Option<u64>) -> Seen {
        Seen {
            files: vec![file.to_owned()],
            bytes: vec![5],
            direct: true,
            queues: 1,
            servers: 1,
            flushes: reached.map(|reached| Flushed { asked: 16, reached }),
        }
    }

    /// A server on whose every so-manieth flush the file is flushed, so many times.
    struct Server {
        every: u64,
        barriers: u64,
        asked: u64,
        flushes: Rc<Cell<u64>>,
    }

    impl Single for Server {
        fn capacity(&self) -> u64 {
            DISK
        }

        fn writes(&self) -> bool {
            true
        }

        fn request(&mut self, operation: Operation, at: u64) -> Result<(u64, u64)> {
            assert!(at + BLOCK <= DISK);
            if operation == Operation::Flush {
                self.asked += 1;
                let reaches = self.every > 0 && self.asked.is_multiple_of(self.every);
                let more = if reaches { self.barriers } else { 0 };
                self.flushes.set(self.flushes.get() + more);
            }
            Ok((0, 0))
        }
    }

    #[test]
    fn no_flush_makes_up_for_another() {
        for (every, barriers, reached) in [(1, 1, 16), (1, 3, 16), (2, 1, 8), (2, 2, 8), (0, 1, 0)]
        {
            let flushes = Rc::new(Cell::new(7));
            let mut server = Server {
                every,
                barriers,
                asked: 0,
                flushes: Rc::clone(&flushes),
            };
            let flushed = count(&mut server, &|| flushes.get()).unwrap();
            let expected = Flushed { asked: 16, reached };
            assert_eq!(flushed, expected, "{every} {barriers}");
        }
    }

    #[test]
    fn who_is_equal_stands_in_one_line() {
        let (a, b, c) = (seen("x", Some(16)), seen("x", Some(16)), seen("x", Some(0)));
        let (d, e) = (seen("y", Some(5)), seen("x", None));
        let all = [("a", &a), ("b", &b), ("c", &c), ("d", &d), ("e", &e)];
        assert_eq!(
            lines(&all),
            [
                "a = b: x, O_DIRECT, 1 queue, flushes reach the file",
                "c: x, O_DIRECT, 1 queue, flushes are dropped (none of 16 reached the file)",
                "d: y, O_DIRECT, 1 queue, some flushes are dropped (5 of 16 reached the file)",
                "e: x, O_DIRECT, 1 queue, flushes not looked at",
            ]
        );
        let of = |drops, reached| differs("qsd", drops, Some(Flushed { asked: 16, reached }));
        assert_eq!(
            (of(false, 16), of(true, 0), differs("qsd", true, None)),
            (None, None, None)
        );
        for (drops, reached, says) in [
            (false, 0, "not as asked for: qsd: flushes are dropped"),
            (
                false,
                15,
                "not as asked for: qsd: some flushes are dropped (15 of 16",
            ),
            (true, 16, "not as asked for: qsd: flushes reach the file"),
        ] {
            let said = of(drops, reached).unwrap();
            assert!(said.starts_with(says), "{said}");
        }
        let several = Seen {
            files: vec!["a".into(), "b".into()],
            direct: false,
            queues: 2,
            ..seen("x", None)
        };
        assert_eq!(
            several.words(),
            "2 files, buffered, 2 queues, flushes not looked at"
        );
        let four = Seen {
            servers: 4,
            ..several
        };
        assert_eq!(
            four.words(),
            "2 files in 4 servers, buffered, 2 queues, flushes not looked at"
        );
        let none = Seen::default();
        assert_eq!(none.words(), "no file, 0 queues");
    }
}
