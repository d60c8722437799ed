//! The driver on files in memory.

use super::*;
use image::{Null, Raw};
use testkit::memory::Memory;

/// A file with these bytes, on a disk with room for more.
fn with(bytes: &[u8]) -> Arc<Memory> {
    Arc::new(Memory::new(bytes, 1 << 20, 1000))
}

fn raw(file: &Arc<Memory>, read_only: bool) -> Driver {
    let image = Arc::new(Raw::open(&**file).unwrap());
    let files: Vec<Arc<dyn Storage>> = vec![file.clone()];
    Driver::new(vec![Member { image, files }], read_only).unwrap()
}

#[test]
fn raw_reads_what_was_written_and_zeros_behind_the_file() {
    let file = with(&[7; 700]);
    let mut disk = raw(&file, false);
    assert_eq!(disk.size(), 1024);
    let mut buf = [1; 1024];
    disk.read(0, &mut buf).unwrap();
    assert!(buf[..700].iter().all(|b| *b == 7));
    assert!(buf[700..].iter().all(|b| *b == 0));
    disk.write(690, &[9; 20]).unwrap();
    disk.write_zeroes(0, 100, true).unwrap();
    disk.flush().unwrap();
    assert_eq!(file.done().syncs, 1);
    disk.read(0, &mut buf).unwrap();
    assert_eq!(buf[99..101], [0, 7]);
    assert_eq!(buf[689..711], *[&[7][..], &[9; 20], &[0]].concat());
}

#[test]
fn refuses_ranges_outside_and_writes_to_a_read_only_disk() {
    let file = with(&[7; 512]);
    let mut disk = raw(&file, true);
    let mut buf = [0; 2];
    for at in [511, 512, u64::MAX] {
        let error = disk.read(at, &mut buf).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
    }
    for refused in [
        disk.write(0, &[1]),
        disk.write_zeroes(0, 1, false),
        disk.discard(0, 1),
    ] {
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::ReadOnly);
    }
    disk.close().unwrap();
    let mut bytes = vec![0; file.len().unwrap() as usize];
    file.read_at(0, &mut bytes).unwrap();
    assert_eq!(bytes, [7; 512]);
    assert_eq!((file.done().changes, file.done().syncs), (0, 0));
}

/// A disk of `size` bytes in `file`, whatever that has.
fn raw_of(size: u64, file: &Arc<Memory>) -> Driver {
    let image = Arc::new(Raw::with_size(size).unwrap());
    let files: Vec<Arc<dyn Storage>> = vec![file.clone()];
    Driver::new(vec![Member { image, files }], true).unwrap()
}

#[test]
fn what_a_file_is_too_short_for_is_read_as_asked_for() {
    let file = with(&[7; 1000]);
    let mut buf = [1; 4096];
    let mut disk = raw_of(4096, &file);
    let error = disk.read(0, &mut buf).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Corrupt);
    assert!(
        error
            .to_string()
            .contains("guest offset 0x400 are at 0x400"),
        "{error}"
    );
    assert!(disk.read(4000, &mut buf[..1]).is_err());
    // Up to the end of the sector that the file ends in.
    disk.read(0, &mut buf[..1024]).unwrap();
    assert_eq!(
        disk.readable(0, FileId::IMAGE, HostOffset(512), 4096)
            .unwrap(),
        512
    );
    // The file may grow.
    file.set_len(4096).unwrap();
    assert_eq!(
        disk.readable(0, FileId::IMAGE, HostOffset(512), 3584)
            .unwrap(),
        3584
    );
    file.set_len(1000).unwrap();
    let mut disk = raw_of(4096, &file).with_cut_off(CutOff::Zeros);
    disk.read(0, &mut buf).unwrap();
    assert!(buf[..1000] == [7; 1000] && buf[1000..].iter().all(|byte| *byte == 0));
    assert_eq!(
        disk.readable(0, FileId::IMAGE, HostOffset(512), 4096)
            .unwrap(),
        4096
    );
}

/// A disk of two files, each with 4096 bytes of it.
#[derive(Debug)]
struct Halves;

fn half(at: GuestOffset, len: u64) -> (FileId, HostOffset, u64) {
    let within = at.0 % 4096;
    let file = FileId(u16::try_from(at.0 / 4096).unwrap());
    (file, HostOffset(within), len.min(4096 - within))
}

impl Image for Halves {
    fn describe(&self) -> image::Description {
        image::Description::new("halves", self.size(), 1)
    }
    fn size(&self) -> u64 {
        8192
    }
    fn map(&self, at: GuestOffset, len: u64) -> Result<Step<image::Extent>> {
        let (file, offset, len) = half(at, len);
        let kind = ExtentKind::Data { file, offset };
        Ok(Step::Done(image::Extent { len, kind }))
    }
    fn plan_write(&self, at: GuestOffset, len: u64) -> Result<Step<Plan>> {
        let (file, offset, len) = half(at, len);
        Ok(Step::Done(Plan::InPlace { file, offset, len }))
    }
    fn plan_zero(&self, at: GuestOffset, len: u64, _: ZeroMode) -> Result<Step<ZeroPlan>> {
        let (file, offset, len) = half(at, len);
        Ok(Step::Done(ZeroPlan::Host { file, offset, len }))
    }
}

#[test]
fn a_barrier_waits_for_files_that_were_changed() {
    let memory = [with(&[0; 4096]), with(&[0; 4096])];
    let files: Vec<Arc<dyn Storage>> = memory.iter().map(|file| file.clone() as _).collect();
    let image = Arc::new(Halves);
    let mut disk = Driver::new(vec![Member { image, files }], false).unwrap();
    let syncs = || memory.each_ref().map(|file| file.done().syncs);
    let flushed = |disk: &mut Driver| {
        let before = syncs();
        disk.flush().unwrap();
        let after = syncs();
        [after[0] - before[0], after[1] - before[1]]
    };
    // Nobody knows what was done to them before.
    assert_eq!(flushed(&mut disk), [1, 1]);
    assert_eq!(flushed(&mut disk), [0, 0]);
    disk.write(0, &[1; 100]).unwrap();
    assert_eq!(flushed(&mut disk), [1, 0]);
    disk.write_zeroes(5000, 100, true).unwrap();
    assert_eq!(flushed(&mut disk), [0, 1]);
    disk.write(4000, &[1; 200]).unwrap();
    assert_eq!(flushed(&mut disk), [1, 1]);
    // Others write what was placed: it counts when they are done.
    let placed = disk.place(4096, 100).unwrap().unwrap();
    let (file, at) = placed.place().unwrap().unwrap();
    file.write_at(at.0, &[2; 100]).unwrap();
    placed.finish();
    assert_eq!(flushed(&mut disk), [0, 1]);
    disk.preallocate(0, 100, |_, _, _| Ok(())).unwrap();
    assert_eq!(flushed(&mut disk), [1, 0]);
}

#[test]
fn null_forgets() {
    let image = Arc::new(Null::new(4096).unwrap());
    let member = Member {
        image,
        files: Vec::new(),
    };
    let mut disk = Driver::new(vec![member], false).unwrap();
    disk.write(100, &[1; 200]).unwrap();
    let mut buf = [1; 4096];
    disk.read(0, &mut buf).unwrap();
    assert_eq!(buf, [0; 4096]);
    disk.close().unwrap();
}
