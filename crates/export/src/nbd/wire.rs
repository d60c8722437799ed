//! The socket of a connection: vectored and never blocking.

use rustix::{
    io::{Errno, readv},
    net::{SendAncillaryBuffer, SendFlags, sendmsg},
};
use std::{
    io::{IoSlice, IoSliceMut},
    os::fd::BorrowedFd,
};

/// How a transfer went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Transfer {
    /// So many bytes, never zero.
    Bytes(usize),
    /// None now.
    WouldBlock,
    /// The peer sends no more (receiving only).
    End,
    /// The connection is gone.
    Gone,
}

/// Receives into `pieces`, which hold at least one byte.
pub(crate) fn receive(fd: BorrowedFd<'_>, pieces: &mut [IoSliceMut<'_>]) -> Transfer {
    loop {
        return match readv(fd, pieces) {
            Ok(0) => Transfer::End,
            Ok(bytes) => Transfer::Bytes(bytes),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Transfer::WouldBlock,
            Err(_) => Transfer::Gone,
        };
    }
}

/// Sends from `pieces`, which hold at least one byte.
pub(crate) fn send(fd: BorrowedFd<'_>, pieces: &[IoSlice<'_>]) -> Transfer {
    loop {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        return match sendmsg(fd, pieces, &mut SendAncillaryBuffer::default(), flags) {
            Ok(0) => Transfer::Gone,
            Ok(bytes) => Transfer::Bytes(bytes),
            Err(Errno::INTR) => continue,
            Err(Errno::AGAIN) => Transfer::WouldBlock,
            Err(_) => Transfer::Gone,
        };
    }
}
