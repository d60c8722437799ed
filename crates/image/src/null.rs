//! Null: `null:SIZE` reads as zeros and forgets what is written.
//!
//! There is no file below it. It measures everything that a request passes
//! through but the storage itself. With `null:SIZE?read-zeroes=off` reads leave their memory as it is, as
//! QEMU's `null-co` and SPDK's null bdev do: then not even the filling is measured. What an NBD
//! client reads then are bytes of earlier requests; it is nothing to serve to strangers.

use crate::{
    contract::{Description, Extent, ExtentKind, Image, Plan, Step, ZeroMode, ZeroPlan},
    raw::Raw,
};
use block::{Error, GuestOffset, Result, size};

/// A disk of zeros without a file.
#[derive(Debug)]
pub struct Null {
    size: u64,
    read_zeroes: bool,
}

impl Null {
    /// What names of such disks begin with.
    pub const PREFIX: &'static str = "null:";

    /// A disk of `bytes`, rounded up to whole sectors of 512 bytes.
    pub fn new(bytes: u64) -> Result<Self> {
        Ok(Self {
            size: Raw::with_size(bytes)?.size(),
            read_zeroes: true,
        })
    }

    /// The disk that `spec` names: `null:20G`, `null:20G?read-zeroes=off`. `None` when it names something else.
    pub fn parse(spec: &str) -> Option<Result<Self>> {
        let text = spec.strip_prefix(Self::PREFIX)?;
        let (text, read_zeroes) = match text.split_once('?') {
            None | Some((_, "read-zeroes=on")) => (text.split('?').next().unwrap_or(text), true),
            Some((text, "read-zeroes=off")) => (text, false),
            Some((_, option)) => {
                return Some(Err(Error::invalid(format!(
                    "{spec}: '{option}' is not an option of null: read-zeroes=on or read-zeroes=off"
                ))));
            }
        };
        let disk = size::parse(text).and_then(Self::new);
        Some(
            disk.map(|disk| Self {
                read_zeroes,
                ..disk
            })
            .map_err(|e| e.within(spec)),
        )
    }
}

impl Image for Null {
    fn describe(&self) -> Description {
        Description::new("null", self.size, 1)
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, _: GuestOffset, len: u64) -> Result<Step<Extent>> {
        Ok(Step::Done(Extent {
            len,
            kind: match self.read_zeroes {
                true => ExtentKind::Zero { host: None },
                false => ExtentKind::Untouched,
            },
        }))
    }

    fn plan_write(&self, _: GuestOffset, len: u64) -> Result<Step<Plan>> {
        Ok(Step::Done(Plan::Drop { len }))
    }

    fn plan_zero(&self, _: GuestOffset, len: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        Ok(Step::Done(ZeroPlan::Skip { len }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_name_gives_its_size() {
        assert_eq!(Null::parse("null:64K").unwrap().unwrap().size(), 65536);
        assert!(Null::parse("disk.raw").is_none());
        let error = Null::parse("null:big").unwrap().unwrap_err().to_string();
        assert!(
            error.starts_with("null:big: 'big' is not a size"),
            "{error}"
        );
    }

    #[test]
    fn reads_may_leave_memory_alone() {
        let kind = |spec| {
            let null = Null::parse(spec).unwrap()?;
            match null.map(GuestOffset(0), 512)? {
                Step::Done(extent) => Ok(extent.kind),
                other => panic!("{other:?}"),
            }
        };
        let zeros = ExtentKind::Zero { host: None };
        assert_eq!(kind("null:1M?read-zeroes=on").unwrap(), zeros);
        assert_eq!(
            kind("null:1M?read-zeroes=off").unwrap(),
            ExtentKind::Untouched
        );
        let error: block::Error = kind("null:1M?read=1").unwrap_err();
        assert!(
            error.to_string().contains("'read=1' is not an option"),
            "{error}"
        );
    }

    #[test]
    fn reads_zeros_and_forgets_writes() {
        let null = Null::new(4096).unwrap();
        assert_eq!(
            null.map(GuestOffset(512), 100).unwrap(),
            Step::Done(Extent {
                len: 100,
                kind: ExtentKind::Zero { host: None }
            })
        );
        assert_eq!(
            null.plan_write(GuestOffset(0), 4096).unwrap(),
            Step::Done(Plan::Drop { len: 4096 })
        );
    }
}
