//! Encrypted images: every cipher against QEMU in both directions, and many requests in flight.

use crate::common;
use crate::peer;

use block::{GuestError, Op};
use common::{Rig, model::Model, storm::Storm};
use crypto::{Algorithm, Hash, Ivgen, Mode, Passphrase, Suite, luks};
use disk::{Chain, ChainOptions, Disk, DiskOptions};
use image::{Format, qcow2};
use io::{Cache, EngineKind};
use peer::{LUKS, PASSPHRASE, check_as, qemu_img, qemu_io, qemu_reads};
use std::{path::Path, sync::Arc};

fn words(text: &str) -> Arc<Passphrase> {
    Arc::new(Passphrase::new(text.as_bytes().to_vec().into()).unwrap())
}

fn options(passphrases: &[&str], read_only: bool) -> ChainOptions {
    ChainOptions {
        format: Some(Format::Qcow2),
        read_only,
        passphrases: passphrases.iter().map(|text| words(text)).collect(),
        ..ChainOptions::default()
    }
}

fn open(path: &Path, cache: Cache) -> Chain {
    let options = ChainOptions {
        cache,
        ..options(&[PASSPHRASE], false)
    };
    peer::open_chain(path, &options).unwrap_or_else(|e| panic!("{e}"))
}

fn create(path: &Path, suite: Suite, size: u64) {
    let options = luks::FormatOptions {
        suite,
        iter_time_ms: 1,
    };
    let file = io::File::create_new(path, &io::OpenOptions::default()).unwrap();
    let options = qcow2::CreateOptions {
        size,
        encryption: Some(luks::Volume::format(&options, &words(PASSPHRASE)).unwrap()),
        ..qcow2::CreateOptions::default()
    };
    qcow2::create(&*file, &options).unwrap();
}

#[test]
fn every_cipher_mode_and_hash_is_qemus() {
    let scratch = tempfile::tempdir().unwrap();
    let dir = scratch.path();
    let essiv = Ivgen::Essiv(Hash::Sha256);
    let suite = |name: &str, mode, ivgen, hash| Suite {
        algorithm: Algorithm::parse(name).unwrap(),
        mode,
        ivgen,
        hash,
    };
    for (index, suite) in [
        suite("aes-256", Mode::Xts, Ivgen::Plain64, Hash::Sha256),
        suite("aes-192", Mode::Xts, Ivgen::Plain, Hash::Sha1),
        suite("aes-128", Mode::Cbc, essiv, Hash::Sha512),
        suite("aes-256", Mode::Ctr, Ivgen::Plain64, Hash::Ripemd160),
        suite("serpent-256", Mode::Xts, essiv, Hash::Sha224),
        suite("serpent-128", Mode::Cbc, Ivgen::Plain64, Hash::Sha384),
        suite("twofish-256", Mode::Xts, Ivgen::Plain64, Hash::Sha256),
        suite("twofish-128", Mode::Ecb, Ivgen::Plain64, Hash::Sha256),
    ]
    .into_iter()
    .enumerate()
    {
        // Made by us and by QEMU in turns; written and read by both.
        let name = format!("{index}.qcow2");
        let path = dir.join(&name);
        let size = 1 << 20;
        if index % 2 == 0 {
            create(&path, suite, size);
        } else {
            let hash = match suite.ivgen {
                Ivgen::Essiv(hash) => format!(",encrypt.ivgen-hash-alg={hash}"),
                _ => String::new(),
            };
            let options = format!(
                "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=1,encrypt.cipher-alg={},\
                 encrypt.cipher-mode={},encrypt.ivgen-alg={},encrypt.hash-alg={}{hash}",
                suite.algorithm,
                suite.mode.name(),
                suite.ivgen.name(),
                suite.hash
            );
            let args = [
                "create",
                "-q",
                "--object",
                peer::SECRET,
                "-f",
                "qcow2",
                "-o",
            ];
            qemu_img(dir, &[&args[..], &[&options, &name, "1M"]].concat());
        }
        let mut model = peer::Model::new(size);
        qemu_io(dir, LUKS, &name, "write -q -P 90 61440 200704\n");
        model.apply(peer::Op::Write {
            at: 61440,
            len: 200704,
            pattern: 90,
        });
        let mut driver = open(&path, Cache::Writeback).driver().unwrap();
        driver.write(130_000, &[7; 5000]).unwrap();
        driver.write(600_000, &[8; 100]).unwrap();
        for (at, len, pattern) in [(130_000, 5000, 7), (600_000, 100, 8)] {
            model.apply(peer::Op::Write { at, len, pattern });
        }
        let mut all = vec![0; size as usize];
        driver.read(0, &mut all).unwrap();
        driver.close().unwrap();
        model
            .check(0, &all)
            .unwrap_or_else(|e| panic!("{suite:?}: {e}"));
        check_as(dir, LUKS, &name);
        qemu_reads(dir, LUKS, &name, &mut model);
        // What the guest wrote is nowhere in the file.
        let file = std::fs::read(&path).unwrap();
        assert!(!file.chunks(64).any(|w| w == [90; 64]), "{suite:?}");
    }
}

#[test]
fn many_requests_on_an_encrypted_disk() {
    let dir = common::dir();
    let name = "disk.qcow2";
    let path = dir.path().join(name);
    let size = 4 << 20;
    create(&path, Suite::default(), size);
    let mut model = Model::new(vec![0; size as usize]);
    for (seed, kind) in [EngineKind::Threads, EngineKind::Native, EngineKind::IoUring]
        .into_iter()
        .enumerate()
    {
        let cache = match kind {
            EngineKind::Native => Cache::None,
            _ => Cache::Writeback,
        };
        let disk = Disk::new(open(&path, cache), DiskOptions::default()).unwrap();
        assert_eq!(disk.write_unit(), 512);
        let mut rig = Rig::new(&disk, kind, 64);
        let storm = Storm {
            seed: seed as u64 + 70,
            len_max: 300 << 10,
            ..Storm::default()
        };
        storm.run(&mut rig, &mut model);
        // Parts of sectors: read, but not written.
        let part = rig.one(Op::Read, 1000, vec![], 700).unwrap();
        assert_eq!(model.differs(1000, &part), None);
        let write = Op::Write { fua: false };
        for (at, len) in [(1, 512), (512, 100)] {
            let refused = rig.one(write, at, vec![1; len], len as u64);
            assert_eq!(refused, Err(GuestError::Invalid));
        }
        rig.detach();
        disk.close().unwrap();
        drop(disk);
        check_as(dir.path(), LUKS, name);
        let args = peer::qemu_args(LUKS, name);
        let args: Vec<&str> = args.iter().map(String::as_str).collect();
        let convert = [&["convert", "-O", "raw"], &args[..], &["flat"]].concat();
        qemu_img(dir.path(), &convert);
        let flat = std::fs::read(dir.path().join("flat")).unwrap();
        assert_eq!(model.differs(0, &flat), None, "{kind}");
    }
}

#[test]
fn without_the_passphrase_nothing_is_read_or_written() {
    let scratch = tempfile::tempdir().unwrap();
    let path = scratch.path().join("disk.qcow2");
    create(&path, Suite::default(), 1 << 20);
    let spec = path.to_str().unwrap();
    let before = std::fs::read(&path).unwrap();
    for (passphrases, why) in [(&[][..], "--key-file"), (&["sesame"], "wrong passphrase")] {
        let error = Chain::open(spec, &options(passphrases, false)).unwrap_err();
        assert_eq!(error.kind(), block::ErrorKind::Denied);
        assert!(error.to_string().contains(why), "{error}");
        assert!(!error.to_string().contains("sesame"), "{error}");
    }
    let locked = ChainOptions {
        allow_locked: true,
        ..options(&[], true)
    };
    let chain = Chain::open(spec, &locked).unwrap();
    let mut driver = chain.driver().unwrap();
    assert_eq!(driver.extent_at(0, 1 << 20).unwrap().len, 1 << 20);
    let error = Disk::new(chain, DiskOptions::default()).unwrap_err();
    assert!(error.to_string().contains("is encrypted"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), before);
}
