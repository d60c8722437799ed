//! Every operation on the image's file, and on those beside it and below, fails once, in some runs of each kind.
//!
//! The errors go to the requests that they hit: what was reported as done is there, and what a flush
//! covered survives every crash; what failed may be there or not.

use crash::judge::Judge;
use crash::states::Bounds;
use crash::{Case, Injection};
use io::FaultOp;

/// As in errno(3).
const EIO: i32 = 5;
const ENOSPC: i32 = 28;

/// Fails every `stride`th of the operations `op` on the image's file, in the cases whose names contain `filter`.
fn fail_each(filter: &str, op: FaultOp, errno: i32, torn: bool, stride: u64) {
    fail_each_on(0, filter, op, errno, torn, stride);
}

/// As [`fail_each`], on disk number `disk`.
fn fail_each_on(disk: usize, filter: &str, op: FaultOp, errno: i32, torn: bool, stride: u64) {
    let judge = Judge::default();
    let cases = Case::all();
    let mut failed = 0;
    for case in cases.iter().filter(|c| c.to_string().contains(filter)) {
        for skip in (0..).step_by(stride as usize) {
            let mut injection = Injection::once(disk, op, skip, errno);
            injection.fault.torn = torn;
            match case.fail(1, injection, None, &Bounds::FEW, &judge) {
                Ok(Some(_)) => failed += 1,
                Ok(None) => break,
                Err(what) => panic!("{what}"),
            }
        }
    }
    println!("{filter}: {failed} operations failed, one in each run");
    assert!(failed > 0, "{filter}: nothing of {op:?} to fail");
}

#[test]
fn each_write_fails_once() {
    fail_each("allocate/4k/", FaultOp::Write, EIO, true, 5);
    fail_each("copy-on-write/16k", FaultOp::Write, EIO, true, 17);
    fail_each(
        "refcounts/1k,size=512k,refcount_bits=1/",
        FaultOp::Write,
        EIO,
        true,
        19,
    );
}

#[test]
fn each_sync_fails_once() {
    fail_each("allocate/4k/", FaultOp::Sync, EIO, false, 1);
    fail_each("discard/4k,size=512k/", FaultOp::Sync, EIO, false, 3);
}

#[test]
fn the_disk_is_full_at_each_step() {
    fail_each("allocate/64k", FaultOp::Range, ENOSPC, false, 3);
    fail_each("discard/16k", FaultOp::Range, ENOSPC, false, 5);
    fail_each(
        "copy-on-write/4k,backing/",
        FaultOp::Write,
        ENOSPC,
        true,
        17,
    );
    fail_each("table-growth", FaultOp::Range, ENOSPC, false, 24);
}

#[test]
fn each_change_of_the_size_fails_once() {
    fail_each("copy-on-write/4k,backing/", FaultOp::Resize, EIO, false, 1);
}

#[test]
fn reads_fail_wherever_they_go() {
    fail_each("copy-on-write/4k,backing/", FaultOp::Read, EIO, false, 89);
    fail_each("snapshots/4k,", FaultOp::Read, EIO, false, 127);
    fail_each_on(
        1,
        "copy-on-write/4k,backing/",
        FaultOp::Read,
        EIO,
        false,
        17,
    );
    fail_each_on(1, "chain/4k,over,16k", FaultOp::Read, EIO, false, 59);
    fail_each_on(2, "chain/4k,over,16k", FaultOp::Read, EIO, false, 47);
}

#[test]
fn what_happens_to_a_data_file_fails() {
    let filter = "data-file/4k,data_file/";
    fail_each_on(1, filter, FaultOp::Write, EIO, true, 13);
    fail_each_on(1, filter, FaultOp::Sync, EIO, false, 3);
    fail_each_on(1, filter, FaultOp::Range, ENOSPC, false, 5);
    fail_each_on(
        1,
        "resize/4k,size=512k,data_file/",
        FaultOp::Resize,
        ENOSPC,
        false,
        1,
    );
}

#[test]
fn what_happens_to_the_parts_of_an_image_fails() {
    let filter = "vmdk/vmdk=split,4k";
    fail_each_on(0, filter, FaultOp::Write, EIO, true, 1);
    fail_each_on(1, filter, FaultOp::Write, EIO, true, 23);
    fail_each_on(2, filter, FaultOp::Sync, EIO, false, 13);
    fail_each_on(3, filter, FaultOp::Range, ENOSPC, false, 3);
}

#[test]
fn operations_on_whole_images_fail_at_each_step() {
    for filter in ["convert/4k/", "repair/4k,size=512k/"] {
        fail_each(filter, FaultOp::Change, EIO, true, 61);
        fail_each(filter, FaultOp::Sync, EIO, false, 17);
    }
}
