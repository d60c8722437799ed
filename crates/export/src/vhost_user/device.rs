//! One client's device: what its vhost-user messages set up (QEMU, `docs/interop/vhost-user.rst`).
//!
//! Messages come one at a time on the server's control thread. A ring runs on a worker while it
//! has a kick, addresses, memory and is enabled; whatever changes one of these takes it off the
//! worker first, which ends everything in flight, and starts it again where it was. So no
//! mapping is given up while a request uses it, and the answer to a message means that it is done.

use super::{
    Options, config, inflight,
    memory::{GuestMemory, REGIONS_MAX, Region, RegionSpec},
    queue::{self, Running, Setup, Stopped},
    ring::{Packed, Place, RingAddresses},
    spec::feature,
};
use crate::worker::WorkerHandle;
use block::limits::QUEUE_DEPTH_MAX;
use disk::Disk;
use io::EventFd;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use std::{
    fs::File,
    os::fd::AsFd,
    sync::{Arc, mpsc},
};
use vhost::{
    VhostUserMemoryRegionBase,
    vhost_user::{Error, Result, VhostUserBackendReqHandlerMut, message::*},
};

#[derive(Default)]
struct Vring {
    size: u16,
    addresses: Option<RingAddresses>,
    /// Where the ring goes on, as [`Stopped`] or the client says; `None` for a new one.
    base: Option<u32>,
    kick: Option<EventFd>,
    call: Option<EventFd>,
    err: Option<EventFd>,
    enabled: bool,
    running: Option<Running>,
}

/// A device as one client has set it up.
pub(super) struct Device {
    disk: Arc<Disk>,
    options: Options,
    /// Which worker each queue runs on.
    workers: Vec<WorkerHandle>,
    features: u64,
    memory: Arc<GuestMemory>,
    /// The file in which requests in flight are noted, and the size of the rings it is for.
    inflight: Option<(Arc<Region>, u16)>,
    vrings: Vec<Vring>,
    /// How the write cache was before this client came.
    writeback: bool,
}

/// Logs what a client did wrong, and turns it into what the message layer answers with.
fn refuse(error: impl std::fmt::Display) -> Error {
    tracing::warn!("vhost-user client: {error}");
    Error::InvalidParam
}

fn copy(fd: &Option<EventFd>) -> Result<Option<EventFd>> {
    fd.as_ref()
        .map(|fd| fd.as_fd().try_clone_to_owned().map(EventFd::from_fd))
        .transpose()
        .map_err(refuse)
}

impl Device {
    /// A device that nothing was said to yet. Queue `i` runs on `workers[i]`.
    pub fn new(disk: Arc<Disk>, options: Options, workers: Vec<WorkerHandle>) -> Self {
        let vrings = workers.iter().map(|_| Vring::default()).collect();
        let writeback = disk.writeback();
        Self {
            disk,
            options,
            workers,
            features: 0,
            memory: Arc::default(),
            inflight: None,
            vrings,
            writeback,
        }
    }

    /// Whether its rings are packed.
    fn packed(&self) -> bool {
        self.features & feature::RING_PACKED != 0
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let count = self.vrings.len();
        self.vrings
            .get_mut(index as usize)
            .ok_or_else(|| refuse(format!("queue {index} does not exist, there are {count}")))
    }

    /// Starts a ring that has all it needs and does not run.
    fn start(&mut self, index: usize) -> Result<()> {
        let vring = &mut self.vrings[index];
        // Without protocol features there is no enabling: a ring with a kick runs.
        let enabled = vring.enabled || self.features & feature::PROTOCOL_FEATURES == 0;
        let (Some(addresses), true) = (vring.addresses, vring.running.is_none()) else {
            return Ok(());
        };
        if !enabled || vring.size == 0 || self.memory.is_empty() {
            return Ok(());
        }
        let Some(kick) = copy(&vring.kick)? else {
            return Ok(());
        };
        let inflight = match &self.inflight {
            Some((region, size)) if vring.size <= *size => Some(inflight::File {
                region: region.clone(),
                index,
                size: *size,
            }),
            _ => None,
        };
        let setup = Setup {
            index,
            disk: self.disk.clone(),
            ring: Place {
                memory: self.memory.clone(),
                at: addresses,
                size: vring.size,
                base: vring.base,
                event_idx: self.features & feature::RING_EVENT_IDX != 0,
                inflight,
            },
            limits: config::limits(&self.disk, &self.options.serial, self.features),
            kick,
            call: copy(&vring.call)?,
            err: copy(&vring.err)?,
        };
        let running = self.workers[index]
            .call_wait(move |cx| Running::start(setup, cx))
            .and_then(|started| started)
            .map_err(|error| refuse(error.within(format_args!("queue {index}"))))?;
        vring.running = Some(running);
        Ok(())
    }

    /// Takes a ring off its worker when nothing of it is in flight any more.
    fn stop(&mut self, index: usize) {
        let vring = &mut self.vrings[index];
        let Some(running) = vring.running.take() else {
            return;
        };
        let (sender, drained) = mpsc::sync_channel::<Stopped>(1);
        let asked = self.workers[index].call(Box::new(move |cx| {
            // A queue that is gone drops the sender, which ends the wait.
            running.with(cx, |queue| queue.drain(sender));
        }));
        if let Err(error) = asked {
            tracing::warn!(queue = index, %error, "cannot stop a queue");
        }
        if let Ok(stopped) = drained.recv() {
            vring.base = Some(stopped.base);
        }
    }

    /// Makes a change that no ring may run through.
    fn change(&mut self, change: impl FnOnce(&mut Self)) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.stop(index);
        }
        change(self);
        for index in 0..self.vrings.len() {
            // A ring whose memory went away waits for new addresses.
            if self.start(index).is_err() {
                self.vrings[index].addresses = None;
            }
        }
        Ok(())
    }

    /// Ends everything of this client: what is in flight finishes, its memory is given up.
    pub fn reset(&mut self) {
        for index in 0..self.vrings.len() {
            self.stop(index);
            self.vrings[index] = Vring::default();
        }
        self.features = 0;
        self.inflight = None;
        self.memory = Arc::default();
        self.disk.set_writeback(self.writeback);
    }

    /// Queues and ring size of an inflight file, if they are possible.
    fn check_inflight(&self, inflight: &VhostUserInflight) -> Result<(u16, u16)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        if usize::from(queues) > self.vrings.len() || size > self.options.queue_size_max {
            return Err(refuse(format!(
                "an inflight file for {queues} queues of {size} entries: there are {} of at most {}",
                self.vrings.len(),
                self.options.queue_size_max
            )));
        }
        Ok((queues, size))
    }

    fn take_eventfd(file: Option<File>) -> Result<Option<EventFd>> {
        file.map(queue::eventfd).transpose().map_err(refuse)
    }
}

impl VhostUserBackendReqHandlerMut for Device {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..self.vrings.len() {
            self.stop(index);
            let vring = &mut self.vrings[index];
            vring.enabled = false;
            vring.base = None;
        }
        self.disk.set_writeback(self.writeback);
        // Where a packed ring stood is in the file too, and means nothing to the next driver.
        self.inflight = None;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(config::features(&self.disk))
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !config::features(&self.disk);
        if unknown != 0 {
            return Err(refuse(format!(
                "accepts features that were not offered: {unknown:#x}"
            )));
        }
        let switch = |features| features & feature::CONFIG_WCE != 0;
        if !switch(features) {
            // §5.2.5.1: without the switch, a driver that can flush gets a write cache, and one
            // that cannot must not.
            let flush = features & feature::FLUSH != 0;
            self.disk.set_writeback(self.writeback && flush);
        } else if !switch(self.features) {
            // The firmware's driver may have been one without; this one finds it as it was.
            self.disk.set_writeback(self.writeback);
        }
        if features != self.features {
            let before = self.features;
            let other_ring = (features ^ before) & feature::RING_PACKED != 0;
            self.change(|device| {
                device.features = features;
                if other_ring {
                    // Where a ring of the other layout stood means nothing in this one.
                    for vring in &mut device.vrings {
                        vring.base = None;
                    }
                    // Nor do the notes of one, where there was one before: a front-end that reconnects sends the file first.
                    if before != 0 {
                        device.inflight = None;
                    }
                }
            })?;
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        if regions.len() != files.len() {
            return Err(refuse("memory regions and descriptors differ in number"));
        }
        let regions = regions.iter().zip(&files).map(|(region, file)| {
            let spec = RegionSpec {
                guest: region.guest_phys_addr,
                user: region.user_addr,
                len: region.memory_size,
                offset: region.mmap_offset,
            };
            Region::map(spec, file).map(Arc::new)
        });
        let regions = regions.collect::<block::Result<_>>().map_err(refuse)?;
        let memory = GuestMemory::new(regions).map_err(refuse)?;
        self.change(|device| device.memory = Arc::new(memory))?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let limit = self.options.queue_size_max;
        let packed = self.packed();
        let size = u16::try_from(num)
            .ok()
            .filter(|size| (packed || size.is_power_of_two()) && (1..=limit).contains(size))
            .ok_or_else(|| {
                let any = if packed {
                    "any number"
                } else {
                    "a power of two"
                };
                refuse(format!(
                    "queue {index} of {num} entries: {any} up to {limit} is possible"
                ))
            })?;
        self.vring(index)?;
        self.stop(index as usize);
        self.vring(index)?.size = size;
        self.start(index as usize)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptors: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = RingAddresses {
            descriptors,
            available,
            used,
        };
        if self.vring(index)?.addresses != Some(addresses) {
            self.stop(index as usize);
            self.vring(index)?.addresses = Some(addresses);
        }
        self.start(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        if !self.packed() && u16::try_from(base).is_err() {
            return Err(refuse(format!("queue {index}: base {base} is not 16 bits")));
        }
        self.vring(index)?;
        self.stop(index as usize);
        self.vring(index)?.base = Some(base);
        self.start(index as usize)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize);
        let vring = self.vring(index)?;
        // "The ring is stopped": it starts again with the next kick descriptor.
        vring.kick = None;
        let base = vring.base;
        let base = base.unwrap_or(if self.packed() { Packed::START } else { 0 });
        Ok(VhostUserVringState::new(index, base))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let kick = Self::take_eventfd(fd)?;
        if kick.is_none() {
            // Polling for ever instead would burn a core for one client's wish.
            return Err(refuse(format!(
                "queue {index}: a kick descriptor is needed"
            )));
        }
        self.vring(index.into())?;
        self.stop(index.into());
        self.vring(index.into())?.kick = kick;
        self.start(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let call = Self::take_eventfd(fd)?;
        let vring = self.vring(index.into())?;
        vring.call = call;
        let (call, running) = (copy(&vring.call)?, vring.running);
        if let Some(running) = running {
            let replaced = self.workers[usize::from(index)]
                .call_wait(move |cx| running.with(cx, |queue| queue.set_call(call)));
            replaced.map_err(refuse)?;
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let err = Self::take_eventfd(fd)?;
        let vring = self.vring(index.into())?;
        vring.err = err;
        let (err, running) = (copy(&vring.err)?, vring.running);
        if let Some(running) = running {
            let replaced = self.workers[usize::from(index)]
                .call_wait(move |cx| running.with(cx, |queue| queue.set_err(err)));
            replaced.map_err(refuse)?;
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::INFLIGHT_SHMFD
            | VhostUserProtocolFeatures::RESET_DEVICE)
    }

    fn set_protocol_features(&mut self, _features: u64) -> Result<()> {
        // None of them changes what we do; the message layer keeps those that change what it does.
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.vring(index)?.enabled = enable;
        if enable {
            self.start(index as usize)
        } else {
            self.stop(index as usize);
            Ok(())
        }
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        let space = config::space(&self.disk, &self.options);
        let start = offset as usize;
        let bytes = start
            .checked_add(size as usize)
            .and_then(|end| space.get(start..end))
            .ok_or_else(|| refuse(format!("config bytes {offset}+{size} do not exist")))?;
        Ok(bytes.to_vec())
    }

    fn set_config(&mut self, offset: u32, buf: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        let switchable = self.features & feature::CONFIG_WCE != 0;
        match (offset, buf) {
            (config::WRITEBACK_OFFSET, [on @ (0 | 1)]) if switchable => {
                self.disk.set_writeback(*on == 1);
                Ok(())
            }
            _ => Err(refuse(format!(
                "writes {} config bytes at {offset}: only the write cache (byte {}) can be set",
                buf.len(),
                config::WRITEBACK_OFFSET
            ))),
        }
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(REGIONS_MAX as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let spec = RegionSpec {
            guest: region.guest_phys_addr,
            user: region.user_addr,
            len: region.memory_size,
            offset: region.mmap_offset,
        };
        let region = Region::map(spec, &file).map_err(refuse)?;
        let memory = self.memory.with(Arc::new(region)).map_err(refuse)?;
        self.change(|device| device.memory = Arc::new(memory))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let memory = self
            .memory
            .without(region.guest_phys_addr, region.user_addr, region.memory_size)
            .ok_or_else(|| refuse("removes a memory region that is not there"))?;
        self.change(|device| device.memory = Arc::new(memory))
    }

    fn get_inflight_fd(
        &mut self,
        inflight: &VhostUserInflight,
    ) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = self.check_inflight(inflight)?;
        let len = inflight::file_bytes(self.packed(), queues, size);
        let make = || -> std::io::Result<File> {
            let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
            let file = File::from(memfd_create("vhost-user-inflight", flags)?);
            file.set_len(len)?;
            fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)?;
            Ok(file)
        };
        let file = make().map_err(refuse)?;
        let answer = VhostUserInflight {
            mmap_size: len,
            mmap_offset: 0,
            num_queues: queues,
            queue_size: size,
        };
        Ok((answer, file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let (queues, size) = self.check_inflight(inflight)?;
        if inflight.mmap_size < inflight::file_bytes(self.packed(), queues, size) {
            return Err(refuse("the inflight file is too small"));
        }
        let spec = RegionSpec {
            guest: 0,
            user: 0,
            len: inflight.mmap_size,
            offset: inflight.mmap_offset,
        };
        let region = Arc::new(Region::map(spec, &file).map_err(refuse)?);
        self.change(|device| device.inflight = Some((region, size)))
    }

    // What was not offered; the message layer refuses most of these itself.

    fn set_gpu_socket(&mut self, _gpu_backend: vhost::vhost_user::GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("no GPU"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("no shared objects"))
    }

    fn set_device_state_fd(
        &mut self,
        _: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("no device state"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("no shared memory"))
    }

    fn set_log_base(&mut self, _: &VhostUserLog, _: File) -> Result<()> {
        Err(Error::InvalidOperation("no dirty log"))
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        self.reset();
    }
}

const _: () = assert!(QUEUE_DEPTH_MAX.is_power_of_two());
