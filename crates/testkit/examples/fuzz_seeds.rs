//! Writes the corpora that the fuzz targets begin with: `fuzz_seeds FOLDER`. They are made, not kept.
//!
//! Images come from the forge; programs of the two servers are those that reach something: a handshake, a request, a
//! kick.

use std::path::Path;
use std::{fs, io};
use testkit::rich;

fn main() -> io::Result<()> {
    let folder = std::env::args_os()
        .nth(1)
        .ok_or(io::ErrorKind::InvalidInput)?;
    let folder = Path::new(&folder);
    let mut images = Vec::new();
    for kind in 0..rich::KINDS as u8 {
        images.push(vec![kind]);
        // A change in each field of the header, in each way.
        for word in 0..14 {
            images.push(vec![kind, word, 0, word << 2, 1, word, 0]);
        }
    }
    // Each edit of each image; there are fewer than so many of them.
    let edits: Vec<Vec<u8>> = (0..24)
        .flat_map(|edit| (0..rich::KINDS as u8).map(move |kind| vec![edit, kind]))
        .collect();
    write(&folder.join("qcow2_edit"), &edits)?;
    // Each way of use, of each image, and a change after some calls.
    let meddled: Vec<Vec<u8>> = (0..32)
        .flat_map(|way| {
            (0..rich::KINDS as u8).map(move |kind| {
                let call = 2 + (way * 5 + kind * 3) % 40;
                vec![way, call, kind, call, way, 16, 1, 0, 0, kind]
            })
        })
        .collect();
    write(&folder.join("qcow2_meddled"), &meddled)?;
    // Each image as it is, with a change in each place of its head, and changed by others while it is in use.
    let others: Vec<Vec<u8>> = (0..16u8)
        .flat_map(|kind| {
            let changed = (0..80).map(move |place| vec![kind, 3, place, 0, place, 5, place, 0]);
            let meddled = (0..8).map(move |way| vec![kind, 1, way, 4 * way, way, 0, 8, 1, 0, 0]);
            changed.chain(meddled).chain([vec![kind, 3]])
        })
        .collect();
    write(&folder.join("other_images"), &others)?;
    // As bytes too: what a program does not reach.
    images.extend((0..rich::KINDS).map(|kind| rich::kind(kind).bytes));
    write(&folder.join("qcow2_open"), &images)?;
    write(&folder.join("qcow2_check"), &images)?;
    write(&folder.join("nbd"), &nbd())?;
    write(&folder.join("vhost_user"), &vhost_user())
}

fn write(folder: &Path, seeds: &[Vec<u8>]) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    for (nth, seed) in seeds.iter().enumerate() {
        fs::write(folder.join(format!("seed-{nth}")), seed)?;
    }
    Ok(())
}

/// See `talk`: the manner, then messages.
fn nbd() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    // Each option after the flags.
    for option in 0..16 {
        seeds.push(vec![2, 1, option, 6, 0, 0, 0, 0, 0, 0, 3]);
        seeds.push(vec![
            2, 1, 8, 0, 1, option, 15, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, b'a', 0, 0,
        ]);
    }
    // Each command at the start and at the end of the disk, without and with flags.
    for manner in 3..6 {
        for command in 0..9 {
            for flags in [0, 129, 160] {
                seeds.push(vec![
                    manner, 4, command, flags, 0, 6, 200, 7, 4, command, flags, 1, 6, 16, 8,
                ]);
            }
        }
    }
    seeds
}

/// See `machine`: the number of queues, then steps.
fn vhost_user() -> Vec<Vec<u8>> {
    let mut seeds = Vec::new();
    for kind in 0..14 {
        let mut seed = vec![1];
        // Header, data and status as a chain of three.
        for (index, place, len, writes, flags, next) in [
            (0u8, 0u8, 1u8, 1u8, 0u8, 1u8),
            (1, 16, 7, kind, 0, 2),
            (2, 8, 0, 0, 130, 0),
        ] {
            seed.extend([0, 0, index, 1, 3, place, len, writes, flags, next]);
        }
        seed.extend([0, 6, 0, kind, 0]);
        seed.extend([0, 10, 0, 0, 13]);
        // Stop and start.
        seed.extend([0, 15, 0, 0, 15, 2, 0, 0]);
        seeds.push(seed);
    }
    for message in 0..46 {
        for payload in 0..5 {
            seeds.push(vec![
                0, 1, 2, message, 8, payload, 3, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1,
            ]);
            seeds.push(vec![
                1, 0, 15, 3, message, 8, payload, 3, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1,
            ]);
        }
    }
    seeds
}
