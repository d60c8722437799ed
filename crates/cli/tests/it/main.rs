//! The program as its users call it.
//!
//! One program: the linker takes longer than most of the tests.

#[path = "../common/beside.rs"]
mod beside;
#[path = "../common/mod.rs"]
mod common;
#[path = "../../../disk/tests/peer/mod.rs"]
mod peer;

mod advise;
mod bench_compare;
mod bench_device;
mod bench_load;
mod bench_run;
mod bench_versus;
mod bitmap;
mod chains;
mod changing;
mod check;
mod command_line;
mod compare;
mod convert;
mod convert_corners;
mod convert_options;
mod cut_off;
mod dirty;
mod documented;
mod encryption;
mod foreign;
mod full_disk;
mod headers;
mod hostile_names;
mod image_opts;
mod interrupted;
mod luks;
mod names;
mod nbd;
mod overlays;
mod parallels;
mod qcow;
mod qed;
mod qemu_img;
mod qemu_img_blkdebug;
mod qemu_img_headers;
mod qemu_img_maps;
mod qemu_img_options;
mod qemu_img_refusals;
mod qemu_img_repairs;
mod qemu_img_words;
mod served;
mod snapshot;
mod trace;
mod vdi;
mod vhd;
mod vhdx;
mod vmdk;
