//! Headers that lie, and key changes that are cut off.

use super::*;
use crate::{Algorithm, Hash, Ivgen, MasterKey, Mode, Passphrase, SectorCipher, Suite};
use block::{ErrorKind, Range, Result, Storage, Zeroed};
use proptest::prelude::*;
use std::sync::Mutex;
use zeroize::Zeroizing;

/// Where the header is in the tests' storage.
const AT: u64 = 1536;

#[derive(Clone, Debug)]
enum Op {
    Write(u64, Vec<u8>),
    Sync,
}

/// A file in memory, and what was done to it.
#[derive(Debug, Default)]
struct Memory {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<Op>>,
}

impl Memory {
    fn of(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            log: Mutex::default(),
        }
    }

    fn image(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }
}

impl Storage for Memory {
    fn name(&self) -> String {
        "memory".into()
    }
    fn len(&self) -> Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let at = offset as usize;
        buf.copy_from_slice(&self.bytes.lock().unwrap()[at..at + buf.len()]);
        Ok(())
    }
    fn write_at(&self, offset: u64, buf: &[u8]) -> Result<()> {
        let at = offset as usize;
        self.bytes.lock().unwrap()[at..at + buf.len()].copy_from_slice(buf);
        self.log.lock().unwrap().push(Op::Write(offset, buf.into()));
        Ok(())
    }
    fn sync(&self) -> Result<()> {
        self.log.lock().unwrap().push(Op::Sync);
        Ok(())
    }
    fn set_len(&self, _: u64) -> Result<()> {
        unreachable!("key changes do not move the file's end")
    }
    fn allocate(&self, _: u64, _: u64) -> Result<Zeroed> {
        unreachable!("key changes allocate nothing")
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        unreachable!("zeros are not what a key is wiped with")
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        unreachable!("what is discarded is not wiped")
    }
    fn range_at(&self, _: u64) -> Result<Option<Range>> {
        Ok(None)
    }
}

fn words(text: &str) -> Passphrase {
    Passphrase::new(Zeroizing::new(text.as_bytes().to_vec())).unwrap()
}

fn options(suite: Suite) -> FormatOptions {
    FormatOptions {
        suite,
        iter_time_ms: 1,
    }
}

/// A volume that "old" opens.
fn volume() -> (Memory, Header) {
    let suite = Suite {
        algorithm: Algorithm::Aes(128),
        mode: Mode::Cbc,
        ..Suite::default()
    };
    let volume = Volume::format(&options(suite), &words("old")).unwrap();
    let storage = Memory::of(vec![0; (AT + volume.len()) as usize]);
    volume.write(&storage, AT).unwrap();
    storage.log.lock().unwrap().clear();
    let header = Header::read(&storage, AT, volume.len()).unwrap();
    assert_eq!(header, volume.header);
    (storage, header)
}

fn opens(image: &[u8], passphrase: &str) -> Option<usize> {
    let storage = Memory::of(image.to_vec());
    let header = Header::read(&storage, AT, image.len() as u64 - AT).unwrap();
    match header.unlock(&storage, AT, &words(passphrase)) {
        Ok((slot, _)) => Some(slot),
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::Denied);
            assert!(!error.to_string().contains(passphrase), "{error}");
            None
        }
    }
}

#[test]
fn new_volumes_open_with_their_passphrase_only() {
    for suite in [
        Suite::default(),
        Suite {
            algorithm: Algorithm::Twofish(192),
            hash: Hash::Ripemd160,
            ..Suite::default()
        },
        Suite {
            algorithm: Algorithm::Serpent(256),
            mode: Mode::Cbc,
            ivgen: Ivgen::Essiv(Hash::Sha256),
            hash: Hash::Sha512,
        },
    ] {
        let volume = Volume::format(&options(suite), &words("open")).unwrap();
        let storage = Memory::of(vec![0; volume.len() as usize]);
        volume.write(&storage, 0).unwrap();
        let header = Header::read(&storage, 0, volume.len()).unwrap();
        let (slot, key) = header.unlock(&storage, 0, &words("open")).unwrap();
        assert_eq!(slot, 0);
        assert!(SectorCipher::new(&suite, &key).is_ok());
        let error = header.unlock(&storage, 0, &words("opem")).unwrap_err();
        assert!(error.to_string().contains("the one key slot"), "{error}");
        assert_eq!(header.uuid.len(), 36);
        assert_eq!(&header.uuid[14..15], "4");
    }
}

#[test]
fn keys_come_and_go_and_the_last_stays() {
    let (storage, mut header) = volume();
    let (_, key) = header.unlock(&storage, AT, &words("old")).unwrap();
    let add = |header: &mut Header, text: &str, slot| {
        header.add_key(&storage, AT, &key, &words(text), slot, 1)
    };
    assert_eq!(add(&mut header, "new", None).unwrap(), 1);
    assert_eq!(add(&mut header, "same", Some(7)).unwrap(), 7);
    assert_eq!(add(&mut header, "same", None).unwrap(), 2);
    let refused = add(&mut header, "late", Some(1)).unwrap_err();
    assert!(refused.to_string().contains("erase it first"), "{refused}");
    assert!(add(&mut header, "late", Some(8)).is_err());
    let wrong = MasterKey::random(16).unwrap();
    assert!(
        header
            .add_key(&storage, AT, &wrong, &words("late"), None, 1)
            .is_err()
    );
    assert_eq!(opens(&storage.image(), "new"), Some(1));
    assert_eq!(opens(&storage.image(), "late"), None);

    let same = words("same");
    let mut erase = |which, force| header.erase_keys(&storage, AT, which, force);
    assert_eq!(erase(Erase::Opened(&same), false).unwrap(), [2, 7]);
    assert!(erase(Erase::Opened(&same), true).is_err());
    assert!(erase(Erase::Slot(7), false).is_err());
    assert_eq!(erase(Erase::Slot(0), false).unwrap(), [0]);
    assert_eq!(opens(&storage.image(), "old"), None);
    let last = erase(Erase::Slot(1), false).unwrap_err();
    assert!(last.to_string().contains("--force"), "{last}");
    assert_eq!(opens(&storage.image(), "new"), Some(1));
    assert_eq!(erase(Erase::Slot(1), true).unwrap(), [1]);
    assert_eq!(opens(&storage.image(), "new"), None);
}

#[test]
fn all_eight_slots_are_used_before_it_is_full() {
    let (storage, mut header) = volume();
    let (_, key) = header.unlock(&storage, AT, &words("old")).unwrap();
    for n in 1..SLOTS {
        let words = words(&n.to_string());
        let slot = header.add_key(&storage, AT, &key, &words, None, 1);
        assert_eq!(slot.unwrap(), n);
        assert_eq!(opens(&storage.image(), &n.to_string()), Some(n));
    }
    let full = header.add_key(&storage, AT, &key, &words("9"), None, 1);
    assert!(full.unwrap_err().to_string().contains("all 8"));
}

/// Each file that a crash may leave: all up to a barrier, and of what came after it any sectors.
fn crashes(before: &[u8], log: &[Op]) -> Vec<Vec<u8>> {
    let mut states = Vec::new();
    let mut durable = before.to_vec();
    let mut loose: Vec<(usize, Vec<u8>)> = Vec::new();
    let mut seed = 1u64;
    for op in log {
        match op {
            Op::Write(at, bytes) => {
                // Sector by sector of the file.
                let (mut at, mut rest) = (*at as usize, &bytes[..]);
                while !rest.is_empty() {
                    let len = rest.len().min(512 - at % 512);
                    loose.push((at, rest[..len].to_vec()));
                    (at, rest) = (at + len, &rest[len..]);
                }
            }
            Op::Sync => {
                for (at, bytes) in loose.drain(..) {
                    durable[at..at + bytes.len()].copy_from_slice(&bytes);
                }
            }
        }
        for round in 0..4 {
            let mut state = durable.clone();
            for (at, bytes) in &loose {
                seed = seed.wrapping_mul(6364136223846793005).wrapping_add(1);
                if round == 0 || seed >> 63 == 1 {
                    state[*at..*at + bytes.len()].copy_from_slice(bytes);
                }
            }
            states.push(state);
        }
    }
    states
}

#[test]
fn a_cut_off_change_leaves_a_key_that_opens() {
    // Slot 6 lies across two sectors of the file.
    for slot in [6, 7] {
        let (storage, mut header) = volume();
        let (_, key) = header.unlock(&storage, AT, &words("old")).unwrap();
        let before = storage.image();
        let new = words("new");
        header
            .add_key(&storage, AT, &key, &new, Some(slot), 1)
            .unwrap();
        let added = std::mem::take(&mut *storage.log.lock().unwrap());
        let mut seen = [false; 2];
        for state in crashes(&before, &added) {
            assert_eq!(opens(&state, "old"), Some(0));
            let opened = opens(&state, "new");
            assert!(opened.is_none() || opened == Some(slot));
            // An active slot opens.
            let there = Memory::of(state);
            let len = there.len().unwrap() - AT;
            let active = Header::read(&there, AT, len).unwrap().slots[slot].active;
            assert_eq!(active, opened.is_some());
            seen[usize::from(active)] = true;
        }
        assert_eq!(seen, [true; 2]);

        let before = storage.image();
        header
            .erase_keys(&storage, AT, Erase::Slot(0), false)
            .unwrap();
        let erased = std::mem::take(&mut *storage.log.lock().unwrap());
        for state in crashes(&before, &erased) {
            assert_eq!(opens(&state, "new"), Some(slot));
        }
        // Nothing of the old material is left, and it was written more than once.
        let (first, after) = (header.slots[0].key_offset + AT, storage.image());
        let range = first as usize..first as usize + header.material_len();
        let kept = before[range.clone()].iter().zip(&after[range]);
        let kept = kept.filter(|(a, b)| a == b).count();
        assert!(kept < header.material_len() / 64, "{kept}");
        let wipes = erased
            .iter()
            .filter(|op| matches!(op, Op::Write(at, _) if *at == first))
            .count();
        assert_eq!(wipes, 8);
    }
}

#[test]
fn what_lies_is_refused_by_field() {
    let (_, header) = volume();
    let good = header.encode();
    for (at, change, why) in [
        (0, &b"LUKS"[..], None),
        (0, b"luks", Some("magic at byte 0")),
        (6, &[0, 2], Some("version at byte 6 is 2")),
        (8, &[b'x'; 32], Some("cipher name at byte 8 is not ended")),
        (8, b"\xff", Some("cipher name at byte 8 is no text")),
        (8, b"des", Some("cipher 'des'")),
        (72, b"md5\0", Some("hash 'md5' is not supported")),
        (104, &[0, 0, 0, 7], Some("payload offset at byte 104")),
        (104, &[0, 0, 0, 16], Some("reach into the payload")),
        (108, &[0xff; 4], Some("key of 4294967295 bytes")),
        (164, &[0; 4], Some("master key iterations at byte 164 is 0")),
        (164, &[0x20, 0, 0, 0], Some("the most is 536870912")),
        (208, &[1; 4], Some("key slot 0: state at byte 208")),
        (212, &[0; 4], Some("key slot 0: iterations")),
        (212, &[0xff; 4], Some("iterations of PBKDF2")),
        (248, &[0, 0, 0, 7], Some("inside the header")),
        (248, &[0, 0, 0, 9], None),
        (248, &[0xff; 4], Some("reach into the payload")),
        (
            248 + 48,
            &[0, 0, 0, 8],
            Some("it overlaps that of key slot 0"),
        ),
        (252, &[0, 0, 0, 1], Some("key slot 0: stripes at byte 252")),
        (252 + 7 * 48, &[0xff; 4], Some("key slot 7: stripes")),
    ] {
        let mut bytes = good;
        bytes[at..at + change.len()].copy_from_slice(change);
        match (Header::parse(&bytes), why) {
            (Ok(_), None) => {}
            (Ok(_), Some(why)) => panic!("byte {at}: accepted, though {why}"),
            (Err(error), why) => {
                let text = error.to_string();
                assert!(why.is_some_and(|why| text.contains(why)), "{at}: {text}");
                assert!(text.starts_with("LUKS header"), "{text}");
            }
        }
    }
}

#[test]
fn materials_and_header_lie_inside_the_file() {
    let (storage, header) = volume();
    let len = header.payload_offset;
    for (offset, len) in [
        (AT + 1, len),
        (AT, len + 1),
        (u64::MAX, len),
        (AT, u64::MAX),
        (AT, 0),
        (AT, 591),
        (AT, 4096),
        (AT, len - 4096),
    ] {
        let error = Header::read(&storage, offset, len).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    }
    assert!(Header::read(&storage, AT, len).is_ok());
}

proptest! {
    /// Whatever the bytes: an answer, and what was accepted reads back.
    #[test]
    fn any_header_is_answered(changes in prop::collection::vec((0..HEADER_LEN, any::<u8>()), 0..4)) {
        thread_local!(static GOOD: [u8; HEADER_LEN] = volume().1.encode());
        let mut bytes = GOOD.with(|good| *good);
        for (at, byte) in changes {
            bytes[at] = byte;
        }
        if let Ok(header) = Header::parse(&bytes) {
            prop_assert_eq!(Header::parse(&header.encode()).unwrap(), header);
        }
    }
}
