//! vhost-user messages, from the front-end's side (`docs/interop/vhost-user.rst`).

use super::{Ring, feature};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};
use std::{
    io::{self, IoSlice, IoSliceMut, Read},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

/// Numbers of the requests.
#[allow(missing_docs)]
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
}

const VERSION: u32 = 1;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

/// No answer is longer.
const PAYLOAD_BYTES_MAX: usize = 4096;

/// MQ, REPLY_ACK, CONFIG, INFLIGHT_SHMFD, RESET_DEVICE, CONFIGURE_MEM_SLOTS.
const PROTOCOL_FEATURES: u64 = 1 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 13 | 1 << 15;

/// A memory region, as the protocol describes it.
#[derive(Clone, Copy, Debug)]
pub struct RegionSpec {
    /// Guest address.
    pub guest: u64,
    /// Bytes.
    pub len: u64,
    /// This process's address.
    pub user: u64,
    /// Offset in the file.
    pub offset: u64,
}

impl RegionSpec {
    fn bytes(&self) -> Vec<u8> {
        [self.guest, self.len, self.user, self.offset]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect()
    }
}

/// A connection to a vhost-user server.
///
/// # Errors
///
/// Each function fails when the connection does, when the server refuses the message (where it acknowledges), and when
/// its answer is none to the question.
#[derive(Debug)]
pub struct Frontend {
    stream: UnixStream,
    /// The server acknowledges messages that ask for it.
    acks: bool,
}

fn refused(what: &str) -> io::Error {
    io::Error::other(format!("the server refused {what}"))
}

fn nonsense(code: u32) -> io::Error {
    let text = format!("the server's answer to message {code} is not in the protocol");
    io::Error::new(io::ErrorKind::InvalidData, text)
}

/// The `N` bytes at `at` of an answer to `code`.
fn field<const N: usize>(payload: &[u8], at: usize, code: u32) -> io::Result<[u8; N]> {
    let field = payload.get(at..at + N);
    let field = field.and_then(|bytes| bytes.try_into().ok());
    field.ok_or_else(|| nonsense(code))
}

impl AsFd for Frontend {
    /// Hangs up when the server does.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl Frontend {
    /// Connects. A server that does not answer a message within 20 seconds fails it.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        Ok(Self {
            stream,
            acks: false,
        })
    }

    /// Writes bytes as they are.
    pub fn send_raw(&self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(fds));
        }
        let flags = SendFlags::NOSIGNAL;
        let sent = sendmsg(&self.stream, &[IoSlice::new(bytes)], &mut ancillary, flags)?;
        // The socket blocks and messages are short.
        if sent == bytes.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Sends a message.
    pub fn send(
        &self,
        code: u32,
        flags: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut bytes = Vec::new();
        bytes.extend(code.to_le_bytes());
        bytes.extend((VERSION | flags).to_le_bytes());
        bytes.extend((payload.len() as u32).to_le_bytes());
        bytes.extend(payload);
        self.send_raw(&bytes, fds)
    }

    /// The payload of the answer to `code`.
    pub fn receive(&mut self, code: u32) -> io::Result<Vec<u8>> {
        Ok(self.receive_fds(code)?.0)
    }

    /// The payload of the answer to `code`, and the descriptors that came with it.
    pub fn receive_fds(&mut self, code: u32) -> io::Result<(Vec<u8>, Vec<OwnedFd>)> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut into = [IoSliceMut::new(&mut header)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        // A receive with a time limit is not restarted after a signal.
        let got = loop {
            match recvmsg(&self.stream, &mut into, &mut ancillary, flags) {
                Err(rustix::io::Errno::INTR) => {}
                got => break got?.bytes,
            }
        };
        if got == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let fds = ancillary.drain().flat_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => fds.collect(),
            _ => Vec::new(),
        });
        let fds = fds.collect();
        self.stream.read_exact(&mut header[got..])?;
        let word = |at: usize| field(&header, at, code).map(u32::from_le_bytes);
        let (answers, flags, len) = (word(0)?, word(4)?, word(8)? as usize);
        if (answers, flags) != (code, VERSION | REPLY) || len > PAYLOAD_BYTES_MAX {
            return Err(nonsense(code));
        }
        let mut payload = vec![0; len];
        self.stream.read_exact(&mut payload)?;
        Ok((payload, fds))
    }

    /// A message that is acknowledged, once that is negotiated.
    pub fn tell(&mut self, code: u32, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        let flags = if self.acks { NEED_REPLY } else { 0 };
        self.send(code, flags, payload, fds)?;
        if self.acks && self.receive(code)? != 0u64.to_le_bytes() {
            return Err(refused(&format!("message {code}")));
        }
        Ok(())
    }

    fn ask_u64(&mut self, code: u32) -> io::Result<u64> {
        self.send(code, 0, &[], &[])?;
        let payload = self.receive(code)?;
        field(&payload, 0, code).map(u64::from_le_bytes)
    }

    /// The features that the server offers.
    pub fn get_features(&mut self) -> io::Result<u64> {
        self.ask_u64(code::GET_FEATURES)
    }

    /// The protocol features that it offers.
    pub fn get_protocol_features(&mut self) -> io::Result<u64> {
        self.ask_u64(code::GET_PROTOCOL_FEATURES)
    }

    /// How many queues it has.
    pub fn get_queue_num(&mut self) -> io::Result<u64> {
        self.ask_u64(code::GET_QUEUE_NUM)
    }

    /// How many memory regions it takes.
    pub fn get_max_mem_slots(&mut self) -> io::Result<u64> {
        self.ask_u64(code::GET_MAX_MEM_SLOTS)
    }

    /// Accepts what is offered of `wanted`; returns the features.
    pub fn negotiate(&mut self, wanted: u64) -> io::Result<u64> {
        let features = self.get_features()? & wanted;
        if features & feature::PROTOCOL != 0 {
            let protocol = self.get_protocol_features()? & PROTOCOL_FEATURES;
            self.tell(code::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes(), &[])?;
            self.acks = protocol & 1 << 3 != 0;
        }
        self.tell(code::SET_OWNER, &[], &[])?;
        self.tell(code::SET_FEATURES, &features.to_le_bytes(), &[])?;
        Ok(features)
    }

    /// `len` bytes of the configuration space at `offset`.
    pub fn get_config(&mut self, offset: u32, len: u32) -> io::Result<Vec<u8>> {
        let mut payload: Vec<u8> = [offset, len, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        payload.resize(12 + len as usize, 0);
        self.send(code::GET_CONFIG, 0, &payload, &[])?;
        let answer = self.receive(code::GET_CONFIG)?;
        if answer.len() != payload.len() {
            return Err(refused("a part of the configuration space"));
        }
        Ok(answer[12..].to_vec())
    }

    /// Writes to the configuration space at `offset`.
    pub fn set_config(&mut self, offset: u32, bytes: &[u8]) -> io::Result<()> {
        let mut payload: Vec<u8> = [offset, bytes.len() as u32, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        payload.extend(bytes);
        self.tell(code::SET_CONFIG, &payload, &[])
    }

    /// Says what all of the memory is.
    pub fn set_mem_table(
        &mut self,
        regions: &[RegionSpec],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut payload = (regions.len() as u64).to_le_bytes().to_vec();
        regions.iter().for_each(|r| payload.extend(r.bytes()));
        self.tell(code::SET_MEM_TABLE, &payload, fds)
    }

    /// Adds a memory region.
    pub fn add_mem_region(&mut self, region: RegionSpec, fd: BorrowedFd<'_>) -> io::Result<()> {
        let mut payload = vec![0; 8];
        payload.extend(region.bytes());
        self.tell(code::ADD_MEM_REG, &payload, &[fd])
    }

    /// Takes a memory region back.
    pub fn remove_mem_region(&mut self, region: RegionSpec) -> io::Result<()> {
        let mut payload = vec![0; 8];
        payload.extend(region.bytes());
        self.tell(code::REM_MEM_REG, &payload, &[])
    }

    /// A file to note requests in flight: its description as the server gave it, and itself.
    pub fn get_inflight(&mut self, queues: u16, size: u16) -> io::Result<(Vec<u8>, OwnedFd)> {
        let mut payload = vec![0; 24];
        payload[16..18].copy_from_slice(&queues.to_le_bytes());
        payload[18..20].copy_from_slice(&size.to_le_bytes());
        self.send(code::GET_INFLIGHT_FD, 0, &payload, &[])?;
        let (payload, mut fds) = self.receive_fds(code::GET_INFLIGHT_FD)?;
        let fd = fds.pop().ok_or_else(|| nonsense(code::GET_INFLIGHT_FD))?;
        Ok((payload, fd))
    }

    /// Hands over the file to note requests in flight in.
    pub fn set_inflight(&mut self, description: &[u8], fd: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(code::SET_INFLIGHT_FD, description, &[fd])
    }

    /// Sends a message that carries a queue and a number.
    pub fn vring(&mut self, code: u32, index: u32, value: u32) -> io::Result<()> {
        let payload = [index.to_le_bytes(), value.to_le_bytes()].concat();
        self.tell(code, &payload, &[])
    }

    /// Sends a message that carries a queue's descriptor.
    pub fn vring_fd(&mut self, code: u32, index: u32, fd: BorrowedFd<'_>) -> io::Result<()> {
        self.tell(code, &u64::from(index).to_le_bytes(), &[fd])
    }

    /// Says where a queue's rings lie, by this process's addresses.
    pub fn vring_addr(
        &mut self,
        index: u32,
        descriptors: u64,
        used: u64,
        available: u64,
    ) -> io::Result<()> {
        let mut payload = u64::from(index).to_le_bytes().to_vec();
        for word in [descriptors, used, available, 0] {
            payload.extend(word.to_le_bytes());
        }
        self.tell(code::SET_VRING_ADDR, &payload, &[])
    }

    /// Stops a queue; where it would have gone on: of a split ring the entry of the available ring, of a packed one two times index
    /// and wrap counter.
    pub fn get_vring_base(&mut self, index: u32) -> io::Result<u32> {
        let payload = u64::from(index).to_le_bytes();
        self.send(code::GET_VRING_BASE, 0, &payload, &[])?;
        let answer = self.receive(code::GET_VRING_BASE)?;
        field(&answer, 4, code::GET_VRING_BASE).map(u32::from_le_bytes)
    }

    /// Sets up and enables a queue from `base` on, as [`Frontend::get_vring_base`] gives it.
    pub fn start_queue(&mut self, queue: &Ring, base: u32) -> io::Result<()> {
        let index = queue.index();
        self.vring(code::SET_VRING_NUM, index, queue.size().into())?;
        let (descriptors, available, used) = queue.user_addresses();
        self.vring_addr(index, descriptors, used, available)?;
        self.vring(code::SET_VRING_BASE, index, base)?;
        self.vring_fd(code::SET_VRING_CALL, index, queue.call_fd())?;
        self.vring_fd(code::SET_VRING_ERR, index, queue.err_fd())?;
        self.vring_fd(code::SET_VRING_KICK, index, queue.kick_fd())?;
        if self.acks {
            self.vring(code::SET_VRING_ENABLE, index, 1)?;
        }
        Ok(())
    }

    /// Whether the server has closed the connection.
    pub fn closed(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(count) => count == 0,
            Err(e) => e.kind() == io::ErrorKind::ConnectionReset,
        }
    }
}
