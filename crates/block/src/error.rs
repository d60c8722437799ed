//! What went wrong: in full for people, as a small code for guests.

use std::{fmt, io};

/// `Result` with diskplane's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The classes of failure that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The file's bytes contradict its format.
    Corrupt,
    /// The format is right, but needs something that this code lacks.
    Unsupported,
    /// The user asked for something impossible or contradictory.
    Invalid,
    /// The policy forbids it (a backing file outside the allowed directories, say).
    Denied,
    /// Another process uses the image.
    Locked,
    /// There is no such file.
    NotFound,
    /// The host has no space left.
    NoSpace,
    /// A write to something opened read-only.
    ReadOnly,
    /// The host failed to read or write.
    Io,
    /// Somebody asked for the work to be stopped.
    Interrupted,
}

impl ErrorKind {
    /// The kind that an OS error belongs to.
    pub fn of(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(code) => Self::of_errno(code),
            None => match error.get_ref().and_then(|own| own.downcast_ref::<Error>()) {
                // One of ours on its way.
                Some(error) => error.kind(),
                None if error.kind() == io::ErrorKind::NotFound => ErrorKind::NotFound,
                None => ErrorKind::Io,
            },
        }
    }

    /// The kind that an errno value belongs to.
    pub fn of_errno(errno: i32) -> Self {
        match errno {
            libc::ENOSPC | libc::EDQUOT | libc::EFBIG => ErrorKind::NoSpace,
            libc::ENOENT => ErrorKind::NotFound,
            libc::EROFS => ErrorKind::ReadOnly,
            libc::EOPNOTSUPP | libc::ENOSYS => ErrorKind::Unsupported,
            libc::EACCES | libc::EPERM => ErrorKind::Denied,
            _ => ErrorKind::Io,
        }
    }

    /// The errno value that says most of it.
    pub fn errno(self) -> i32 {
        match self {
            ErrorKind::NoSpace => libc::ENOSPC,
            ErrorKind::NotFound => libc::ENOENT,
            ErrorKind::ReadOnly => libc::EROFS,
            ErrorKind::Unsupported => libc::EOPNOTSUPP,
            ErrorKind::Denied => libc::EACCES,
            ErrorKind::Invalid => libc::EINVAL,
            _ => libc::EIO,
        }
    }
}

/// For calls that have errors of the system, and pass on one of ours.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        io::Error::other(error)
    }
}

/// An error for people: what was wrong, where, and what caused it.
///
/// The context names the file, the offset and the field where there are any:
/// `base.qcow2: header: refcount_order at byte 96 is 9, the highest is 6`.
#[derive(Debug)]
pub struct Error(Box<Inner>);

#[derive(Debug)]
struct Inner {
    kind: ErrorKind,
    message: String,
    source: Option<Box<dyn std::error::Error + Send + Sync>>,
}

impl Error {
    /// An error of `kind` that says `message`.
    #[cold]
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            message: message.into(),
            source: None,
        }))
    }

    /// An error caused by the operating system while doing `what`.
    #[cold]
    pub fn os(what: impl Into<String>, source: io::Error) -> Self {
        Self(Box::new(Inner {
            kind: ErrorKind::of(&source),
            message: what.into(),
            source: Some(Box::new(source)),
        }))
    }

    /// [`ErrorKind::Corrupt`] with a message.
    #[cold]
    pub fn corrupt(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Corrupt, message)
    }

    /// [`ErrorKind::Unsupported`] with a message.
    #[cold]
    pub fn unsupported(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Unsupported, message)
    }

    /// [`ErrorKind::Invalid`] with a message.
    #[cold]
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorKind::Invalid, message)
    }

    /// The class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The errno of the system call that failed, where that is the cause.
    pub fn os_errno(&self) -> Option<i32> {
        let source = self.0.source.as_ref()?.downcast_ref::<io::Error>()?;
        let inner = || source.get_ref()?.downcast_ref::<Error>()?.os_errno();
        source.raw_os_error().or_else(inner)
    }

    /// The same error, with `prefix` (a file's name, an operation) before its message, unless that begins with it:
    /// a file is named once, however many layers name it.
    #[must_use]
    pub fn within(mut self, prefix: impl fmt::Display) -> Self {
        let prefix = prefix.to_string();
        let rest = self.0.message.strip_prefix(&prefix);
        if !rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(": ")) {
            self.0.message = format!("{prefix}: {}", self.0.message);
        }
        self
    }

    /// What a guest is told of it.
    pub fn for_guest(&self) -> GuestError {
        GuestError::from(self.0.kind)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        match &self.0.source {
            Some(source) => write!(f, ": {source}"),
            None => Ok(()),
        }
    }
}

// The source is part of what `Display` prints, so `source()` stays empty: a
// chain printer would otherwise show it twice.
impl std::error::Error for Error {}

/// Adds where and while doing what to a failure.
pub trait Context<T> {
    /// Puts `what` before the message of a failure.
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T>;
}

impl<T> Context<T> for Result<T, io::Error> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| Error::os(what().to_string(), e))
    }
}

impl<T> Context<T> for Result<T, Error> {
    fn context<D: fmt::Display>(self, what: impl FnOnce() -> D) -> Result<T> {
        self.map_err(|e| e.within(what()))
    }
}

/// The outcome of a failed request, as its guest can be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum GuestError {
    /// The host failed to read or write.
    Io,
    /// The host has no space left for the write.
    NoSpace,
    /// The operation is not supported here (write zeroes that would not be fast, say).
    Unsupported,
    /// The disk is read-only.
    ReadOnly,
    /// The range lies outside the disk or is not aligned.
    Invalid,
}

impl From<ErrorKind> for GuestError {
    fn from(kind: ErrorKind) -> Self {
        match kind {
            ErrorKind::NoSpace => GuestError::NoSpace,
            ErrorKind::Unsupported => GuestError::Unsupported,
            ErrorKind::ReadOnly => GuestError::ReadOnly,
            ErrorKind::Invalid => GuestError::Invalid,
            _ => GuestError::Io,
        }
    }
}

impl GuestError {
    /// What a guest is told of the errno `code` of a failed system call.
    pub fn of_errno(code: i32) -> Self {
        match ErrorKind::of_errno(code) {
            ErrorKind::NoSpace => GuestError::NoSpace,
            ErrorKind::Unsupported => GuestError::Unsupported,
            _ => GuestError::Io,
        }
    }
}

impl fmt::Display for GuestError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            GuestError::Io => "I/O error",
            GuestError::NoSpace => "no space left",
            GuestError::Unsupported => "not supported",
            GuestError::ReadOnly => "disk is read-only",
            GuestError::Invalid => "range is outside the disk or not aligned",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn context_reads_from_the_outside_in() {
        let error: Result<()> = Err(io::Error::from_raw_os_error(libc::ENOSPC))
            .context(|| "write 512 bytes at 0x1000")
            .context(|| "disk.qcow2");
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.os_errno(), Some(libc::ENOSPC));
        let passed_on: Result<()> = Err(io::Error::from(Error::os(
            "writing",
            io::Error::from_raw_os_error(5),
        )))
        .context(|| "x");
        assert_eq!(passed_on.unwrap_err().os_errno(), Some(5));
        assert_eq!(Error::invalid("x").os_errno(), None);
        assert_eq!(error.for_guest(), GuestError::NoSpace);
        let text = error.to_string();
        assert!(
            text.starts_with("disk.qcow2: write 512 bytes at 0x1000: No space"),
            "{text}"
        );
    }

    #[test]
    fn a_file_is_named_once() {
        let error = Error::invalid("disk: allocating")
            .within("disk")
            .within("disk");
        assert_eq!(error.to_string(), "disk: allocating");
        // Another whose name begins so.
        let error = Error::invalid("disk.raw: allocating").within("disk");
        assert_eq!(error.to_string(), "disk: disk.raw: allocating");
    }
}
