//! An error to inject, in words: `DISK:OP:SKIP:ERRNO[:torn][:lie][:xCOUNT]`.
//!
//! `0:write:12:5:torn` fails the 13th write to the image's file with `EIO` and leaves some of its sectors written. Disk 0
//! is the image's file; then come its data file, if it has one, and the images below.

use io::{Fault, FaultOp};
use std::fmt;
use std::str::FromStr;

/// An error, and the disk that it hits.
#[derive(Clone, Debug)]
pub struct Injection {
    /// The disk's number.
    pub disk: usize,
    /// What fails.
    pub fault: Fault,
}

const OPS: [(&str, FaultOp); 7] = [
    ("read", FaultOp::Read),
    ("write", FaultOp::Write),
    ("sync", FaultOp::Sync),
    ("range", FaultOp::Range),
    ("resize", FaultOp::Resize),
    ("change", FaultOp::Change),
    ("any", FaultOp::Any),
];

impl Injection {
    /// The operation `op` on disk number `disk` fails once, after `skip` that do not.
    pub fn once(disk: usize, op: FaultOp, skip: u64, errno: i32) -> Self {
        let fault = Fault {
            skip,
            count: 1,
            ..Fault::always(op, errno)
        };
        Self { disk, fault }
    }

    /// Whether whoever waits for the operation must be told: what a barrier that failed lost is lost.
    pub fn must_be_told(&self) -> bool {
        self.fault.op == FaultOp::Sync && !self.fault.lie
    }
}

impl fmt::Display for Injection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Fault {
            op,
            skip,
            errno,
            torn,
            lie,
            count,
            ..
        } = &self.fault;
        let name = OPS.iter().find(|(_, other)| other == op);
        let name = name.map_or("any", |(name, _)| *name);
        write!(f, "{}:{name}:{skip}:{errno}", self.disk)?;
        f.write_str(if *torn { ":torn" } else { "" })?;
        f.write_str(if *lie { ":lie" } else { "" })?;
        match count {
            1 => Ok(()),
            count => write!(f, ":x{count}"),
        }
    }
}

impl FromStr for Injection {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("'{text}' is no error to inject: 0:write:12:5:torn would be one");
        let words: Vec<&str> = text.split(':').collect();
        let [disk, op, skip, errno, rest @ ..] = words.as_slice() else {
            return Err(wrong());
        };
        let op = OPS.iter().find(|(name, _)| name == op).ok_or_else(wrong)?.1;
        let disk = disk.parse().map_err(|_| wrong())?;
        let skip = skip.parse().map_err(|_| wrong())?;
        let mut injection = Self::once(disk, op, skip, errno.parse().map_err(|_| wrong())?);
        for word in rest {
            match (*word, word.strip_prefix('x').map(str::parse)) {
                ("torn", _) => injection.fault.torn = true,
                ("lie", _) => injection.fault.lie = true,
                (_, Some(Ok(count))) => injection.fault.count = count,
                _ => return Err(wrong()),
            }
        }
        Ok(injection)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_say_all_of_it() {
        for text in ["0:write:12:5:torn", "1:sync:0:28:lie:x2", "2:read:3:5"] {
            assert_eq!(text.parse::<Injection>().unwrap().to_string(), text);
        }
        for text in [
            "",
            "0:write:1",
            "0:wrote:1:5",
            "a:sync:1:5",
            "0:sync:1:5:no",
        ] {
            assert!(text.parse::<Injection>().is_err(), "{text}");
        }
    }
}
