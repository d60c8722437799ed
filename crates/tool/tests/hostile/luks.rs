//! LUKS headers, with the passphrase that would open them.

use super::{ALLOCATOR, MEASURING, plain};
use block::{Result, Storage};
use crypto::luks::{FormatOptions, HEADER_LEN, Volume};
use crypto::{Algorithm, Ivgen, Mode, Passphrase, Suite};
use image::luks;
use image::qcow2::{OpenOptions, Qcow2};
use std::sync::{Arc, PoisonError};
use testkit::forge::{extension, field};
use testkit::memory::Memory;

/// Bytes of memory for opening: a slot's material, twice, and the tables of a small image.
const BYTES_MAX: u64 = 4 << 20;

fn passphrase() -> Passphrase {
    Passphrase::new(b"secret".to_vec().into()).expect("a passphrase")
}

/// A LUKS header that the passphrase opens, of the shortest keys.
fn volume() -> Volume {
    let suite = Suite {
        algorithm: Algorithm::Aes(128),
        mode: Mode::Cbc,
        ivgen: Ivgen::Plain64,
        ..Suite::default()
    };
    let options = FormatOptions {
        suite,
        iter_time_ms: 1,
    };
    Volume::format(&options, &passphrase()).expect("a volume")
}

/// Opens an image with that header, in which `bytes` are at `at`, and which has `len` bytes.
fn open(volume: &Volume, at: u64, bytes: &[u8], len: u64) -> Result<()> {
    let mut image = plain().put_u32(field::CRYPT_METHOD, 2);
    let clusters = volume.len().div_ceil(image.cluster());
    let header = image.allocate(clusters);
    let place = [header.to_be_bytes(), len.to_be_bytes()].concat();
    let image = image.extension(extension::CRYPTO_HEADER, &place);
    let file = Memory::new(&image.bytes, 8 << 20, 10_000);
    volume.write(&file, header)?;
    file.write_at(header + at, bytes)?;
    let changes = file.done().changes;
    let options = OpenOptions {
        read_only: true,
        passphrase: Some(Arc::new(passphrase())),
        ..OpenOptions::default()
    };
    let opened = Qcow2::open(&file, &options).map(drop);
    assert_eq!(file.done().changes, changes, "opening wrote");
    // The same header, of a volume of its own.
    let file = Memory::new(&[], 8 << 20, 10_000);
    volume.write(&file, 0)?;
    file.set_len(volume.len() + 4096)?;
    file.write_at(at, bytes)?;
    let changes = file.done().changes;
    let options = luks::OpenOptions {
        read_only: true,
        passphrase: options.passphrase,
    };
    let own = luks::Luks::open(&file, &options).map(drop);
    assert_eq!(file.done().changes, changes, "opening wrote");
    assert!(
        own.is_ok() || len != volume.len() || opened.is_err(),
        "a volume: {own:?}"
    );
    opened
}

#[test]
fn hostile_headers_and_the_right_passphrase() {
    let _one = MEASURING.lock().unwrap_or_else(PoisonError::into_inner);
    let volume = volume();
    let len = volume.len();
    const STRIPES: usize = 208 + 44;
    const ITERATIONS: usize = 208 + 4;
    const PLACE: usize = 208 + 40;
    let none = &[][..];
    let huge = &[0xff; 4][..];
    let cases: &[(&str, usize, &[u8], u64, &str)] = &[
        ("as it was made", 0, none, len, "ok"),
        ("another digest", 112, &[0; 20], len, "wrong passphrase"),
        ("another salt", 132, &[7; 32], len, "wrong passphrase"),
        (
            "another slot's salt",
            216,
            &[7; 32],
            len,
            "wrong passphrase",
        ),
        (
            "other iterations",
            ITERATIONS,
            &[0, 0, 0, 1],
            len,
            "wrong passphrase",
        ),
        (
            "2^32-1 iterations",
            ITERATIONS,
            huge,
            len,
            "the most is 536870912",
        ),
        (
            "2^32-1 iterations of the digest",
            164,
            huge,
            len,
            "the most is 536870912",
        ),
        (
            "no iterations",
            ITERATIONS,
            &[0; 4],
            len,
            "iterations at byte 212 is 0",
        ),
        (
            "no slot",
            208,
            &[0, 0, 0xde, 0xad],
            len,
            "none of its 8 key slots",
        ),
        ("2^32-1 stripes", STRIPES, huge, len, "stripes at byte 252"),
        ("no stripes", STRIPES, &[0; 4], len, "stripes at byte 252"),
        ("keys of no bytes", 108, &[0; 4], len, "key of 0 bytes"),
        (
            "keys of 2^32-1 bytes",
            108,
            huge,
            len,
            "key of 4294967295 bytes",
        ),
        // Larger materials than there is room for.
        (
            "keys of 32 bytes",
            108,
            &[0, 0, 0, 32],
            len,
            "material's offset",
        ),
        (
            "a cipher without an end",
            8,
            &[b'a'; 32],
            len,
            "cipher name at byte 8",
        ),
        (
            "a mode without an end",
            40,
            &[b'a'; 32],
            len,
            "cipher mode at byte 40",
        ),
        (
            "a hash without an end",
            72,
            &[b'a'; 32],
            len,
            "hash at byte 72",
        ),
        (
            "a uuid without an end",
            168,
            &[b'a'; 40],
            len,
            "uuid at byte 168",
        ),
        ("a cipher that steers", 8, b"\x1b[2J\0", len, "\\u{1b}"),
        (
            "a material at 2 TiB",
            PLACE,
            huge,
            len,
            "material's offset at byte 248",
        ),
        (
            "a material on the header",
            PLACE,
            &[0; 4],
            len,
            "inside the header",
        ),
        (
            "the next slot's material",
            PLACE,
            &[0, 0, 0, 136],
            len,
            "overlaps",
        ),
        (
            "no payload offset",
            104,
            &[0; 4],
            len,
            "payload offset at byte 104",
        ),
        (
            "a header that is cut",
            0,
            none,
            HEADER_LEN as u64 - 1,
            "592 are needed",
        ),
        (
            "materials that are cut",
            0,
            none,
            len - 4096,
            "ends behind the header's",
        ),
        (
            "a header behind the end",
            0,
            none,
            64 << 20,
            "end behind the file's end",
        ),
        (
            "a header beyond all bounds",
            0,
            none,
            (64 << 20) + 1,
            "more than 67108864 bytes",
        ),
    ];
    let mut wrong = Vec::new();
    for (name, at, bytes, len, says) in cases {
        let (opened, peak) = ALLOCATOR.peak_bytes(|| open(&volume, *at as u64, bytes, *len));
        let said = opened.map_or_else(|error| error.to_string(), |()| "ok".into());
        if !said.contains(says) || said.contains("secret") {
            wrong.push(format!("{name}: says '{said}', not '{says}'"));
        }
        if peak > BYTES_MAX {
            wrong.push(format!("{name}: took {peak} bytes of memory"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
