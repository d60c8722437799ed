//! LUKS volumes, driven by the blocking driver and by QEMU in turns: both must read what a model says.

use crate::peer;

use crypto::luks::{FormatOptions, Volume};
use crypto::{Algorithm, Hash, Ivgen, Mode, Suite};
use image::{Format, luks};
use io::{File, OpenOptions};
use peer::{SECRET, Turns, passphrase, qemu_img};

const DISK: &str = "disk.luks";

#[test]
fn volumes_are_changed_in_turns_with_qemu() {
    let suite = |name: &str, mode, ivgen, hash| Suite {
        algorithm: Algorithm::parse(name).unwrap(),
        mode,
        ivgen,
        hash,
    };
    // Plain64 and its like number the sectors of the disk, wherever the payload begins.
    let essiv = Ivgen::Essiv(Hash::Sha256);
    for (seed, (suite, by_qemu)) in [
        (Suite::default(), false),
        // QEMU takes seconds to find out how fast the machine is.
        (suite("aes-128", Mode::Cbc, essiv, Hash::Sha1), true),
    ]
    .into_iter()
    .enumerate()
    {
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        let size = (1 << 20) + 512 * seed as u64;
        if by_qemu {
            let ivgen = suite.ivgen.name();
            let words = format!(
                "key-secret=key,iter-time=10,cipher-alg={},cipher-mode={},ivgen-alg={ivgen},hash-alg={}",
                suite.algorithm,
                suite.mode.name(),
                suite.hash
            );
            let size = size.to_string();
            let args = [
                "create", "-q", "--object", SECRET, "-f", "luks", "-o", &words, DISK, &size,
            ];
            qemu_img(dir, &args);
        } else {
            let file = File::create_new(&dir.join(DISK), &OpenOptions::default()).unwrap();
            let options = FormatOptions {
                suite,
                iter_time_ms: 1,
            };
            let volume = Volume::format(&options, &passphrase()).unwrap();
            luks::create(&*file, &volume, size).unwrap();
        }
        let turns = Turns {
            dir,
            image: DISK,
            format: Format::Luks,
            size,
            unit: 64 << 10,
            seed: seed as u64 + 60,
        };
        turns.take();
    }
}
