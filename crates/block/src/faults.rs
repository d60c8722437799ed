//! Faults on purpose: rules that say which accesses to a file or disk fail, as those of QEMU's driver `blkdebug`
//! (docs/devel/testing/blkdebug.rst there).
//!
//! ```text
//!   event ──▶ rules of that event whose state is the present one (or any):
//!               inject   becomes active; the first that does puts out those that were
//!               set      names the next state, which counts from the next event on
//!   access ─▶ the first active rule whose kind and byte it has: fails with its errno; a rule for once is gone then
//! ```
//!
//! What accesses a disk raises events ([`crate::Storage::event`]); [`Event::None`] is raised when it is opened.

use std::fmt;
use std::io;
use std::str::FromStr;
use std::sync::{Mutex, PoisonError};

macro_rules! words {
    ($(#[$doc:meta])* $name:ident { $($(#[$of:meta])* $variant:ident = $word:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name {
            $($(#[$of])* $variant,)*
        }

        impl $name {
            /// All, with their names.
            pub const ALL: &[($name, &str)] = &[$(($name::$variant, $word),)*];
        }

        impl FromStr for $name {
            type Err = String;

            fn from_str(text: &str) -> Result<Self, String> {
                let found = Self::ALL.iter().find(|(_, word)| *word == text);
                found.map(|(one, _)| *one).ok_or_else(|| text.to_owned())
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let found = Self::ALL.iter().find(|(one, _)| one == self);
                f.write_str(found.map_or("", |(_, word)| word))
            }
        }
    };
}

words! {
    /// A place that work on an image comes to, by QEMU's name for it.
    Event {
        /// The disk was opened.
        None = "none",
        /// Data of the guest are read from the file of the active image.
        ReadAio = "read_aio",
        /// From that of one below.
        ReadBackingAio = "read_backing_aio",
        /// A compressed cluster is read.
        ReadCompressed = "read_compressed",
        /// Data of the guest are written.
        WriteAio = "write_aio",
        /// A compressed cluster is written.
        WriteCompressed = "write_compressed",
        /// What a new cluster needs around the guest's data is read,
        CowRead = "cow_read",
        /// and written.
        CowWrite = "cow_write",
        /// New clusters were given to a write.
        ClusterAlloc = "cluster_alloc",
        /// Clusters that nothing refers to any more are given back.
        ClusterFree = "cluster_free",
        /// A flush writes the format's tables.
        FlushToOs = "flush_to_os",
        /// A flush has the host make all durable.
        FlushToDisk = "flush_to_disk",
    }
}

words! {
    /// A kind of access.
    IoType {
        /// Bytes are read.
        Read = "read",
        /// Bytes are written.
        Write = "write",
        /// A range is made zeros.
        WriteZeroes = "write-zeroes",
        /// A range is given up.
        Discard = "discard",
        /// What was written is made durable.
        Flush = "flush",
        /// What a range is made of is asked for.
        BlockStatus = "block-status",
    }
}

impl IoType {
    fn bit(self) -> u8 {
        1 << self as u8
    }
}

/// What a rule does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// Accesses fail.
    Inject {
        /// With this errno; 0: they do not, nor by rules behind this one.
        errno: i32,
        /// Only of this kind; absent: of all but block status.
        io: Option<IoType>,
        /// Only those of this byte.
        offset: Option<u64>,
        /// Only the first.
        once: bool,
    },
    /// The state becomes this.
    SetState(u64),
}

/// What is done at an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rule {
    /// Which.
    pub event: Event,
    /// Only in this state; 0: in any.
    pub state: u64,
    /// What.
    pub action: Action,
}

/// The rules of one file or disk, and how things stand. The state is 1 at first.
#[derive(Debug)]
pub struct Faults(Mutex<State>);

#[derive(Debug)]
struct State {
    state: u64,
    rules: Vec<Rule>,
    /// Numbers of active rules, the last one first.
    active: Vec<usize>,
    /// Those for once that have had their access.
    gone: Vec<usize>,
}

impl Faults {
    /// Starts with `rules`, by raising [`Event::None`].
    pub fn new(rules: Vec<Rule>) -> Self {
        let faults = Self(Mutex::new(State {
            state: 1,
            rules,
            active: Vec::new(),
            gone: Vec::new(),
        }));
        faults.event(Event::None);
        faults
    }

    /// Work has come to `event`.
    pub fn event(&self, event: Event) {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        let (mut next, mut injected) = (state.state, false);
        // The last one that was added comes first.
        for (nth, rule) in state.rules.iter().enumerate().rev() {
            let counts = rule.state == 0 || rule.state == state.state;
            if rule.event != event || !counts || state.gone.contains(&nth) {
                continue;
            }
            match rule.action {
                Action::Inject { .. } => {
                    if !injected {
                        state.active.clear();
                        injected = true;
                    }
                    state.active.insert(0, nth);
                }
                Action::SetState(new) => next = new,
            }
        }
        state.state = next;
    }

    /// Whether an access of `len` bytes at `offset` is to go on.
    ///
    /// # Errors
    ///
    /// The errno of the rule that it falls under.
    pub fn check(&self, io: IoType, offset: u64, len: u64) -> io::Result<()> {
        let mut guard = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &mut *guard;
        let end = offset.saturating_add(len);
        let hit = state.active.iter().enumerate().find_map(|(at, nth)| {
            let Action::Inject {
                errno,
                io: only,
                offset: byte,
                once,
            } = state.rules.get(*nth)?.action
            else {
                return None;
            };
            let all_kinds = !IoType::BlockStatus.bit();
            let kinds = only.map_or(all_kinds, IoType::bit);
            let falls =
                kinds & io.bit() != 0 && byte.is_none_or(|byte| (offset..end).contains(&byte));
            falls.then_some((at, *nth, errno, once))
        });
        match hit {
            None | Some((_, _, 0, _)) => Ok(()),
            Some((at, nth, errno, once)) => {
                if once {
                    state.active.remove(at);
                    state.gone.push(nth);
                }
                Err(io::Error::from_raw_os_error(errno))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inject(event: Event, state: u64, errno: i32, once: bool) -> Rule {
        let (io, offset) = (None, None);
        Rule {
            event,
            state,
            action: Action::Inject {
                errno,
                io,
                offset,
                once,
            },
        }
    }

    fn errno(faults: &Faults, io: IoType, offset: u64, len: u64) -> i32 {
        let checked = faults.check(io, offset, len);
        checked.map_or_else(|error| error.raw_os_error().unwrap(), |()| 0)
    }

    #[test]
    fn an_event_makes_accesses_fail_until_another_one_does() {
        let faults = Faults::new(vec![
            inject(Event::ReadAio, 0, 5, false),
            inject(Event::WriteAio, 0, 28, true),
        ]);
        let read = || errno(&faults, IoType::Read, 0, 512);
        assert_eq!(read(), 0);
        faults.event(Event::ReadAio);
        assert_eq!((read(), read()), (5, 5));
        assert_eq!(errno(&faults, IoType::Flush, 0, 0), 5);
        assert_eq!(errno(&faults, IoType::BlockStatus, 0, 512), 0);
        faults.event(Event::WriteAio);
        assert_eq!((read(), read()), (28, 0));
        // It was for once.
        faults.event(Event::WriteAio);
        assert_eq!(read(), 0);
    }

    #[test]
    fn rules_are_for_a_byte_a_kind_and_a_state() {
        let at = |io, sector: u64| Rule {
            event: Event::None,
            state: 0,
            action: Action::Inject {
                errno: 5,
                io: Some(io),
                offset: Some(sector * 512),
                once: false,
            },
        };
        let faults = Faults::new(vec![at(IoType::Read, 2), at(IoType::BlockStatus, 4)]);
        for (io, offset, len, want) in [
            (IoType::Read, 0, 1024, 0),
            (IoType::Read, 0, 1025, 5),
            (IoType::Read, 1024, 1, 5),
            (IoType::Read, 1025, 512, 0),
            (IoType::Read, 1024, 0, 0),
            (IoType::Write, 1024, 512, 0),
            (IoType::Read, 2048, 512, 0),
            (IoType::BlockStatus, 2048, 512, 5),
            (IoType::Read, u64::MAX, 2, 0),
        ] {
            assert_eq!(errno(&faults, io, offset, len), want, "{io} {offset} {len}");
        }
        let to = |event, state, new| Rule {
            event,
            state,
            action: Action::SetState(new),
        };
        let faults = Faults::new(vec![
            to(Event::FlushToOs, 1, 2),
            to(Event::FlushToOs, 2, 3),
            inject(Event::ReadAio, 3, 5, false),
        ]);
        for want in [0, 0, 5] {
            faults.event(Event::ReadAio);
            assert_eq!(errno(&faults, IoType::Read, 0, 1), want);
            faults.event(Event::FlushToOs);
        }
    }

    #[test]
    fn an_errno_of_0_shadows_rules_of_the_same_event() {
        // The first of the rules is the last that becomes active, and so the first that is asked.
        let rules = [0, 5].map(|errno| inject(Event::None, 0, errno, false));
        assert_eq!(errno(&Faults::new(rules.to_vec()), IoType::Read, 0, 1), 0);
        let rules = [5, 0].map(|errno| inject(Event::None, 0, errno, false));
        assert_eq!(errno(&Faults::new(rules.to_vec()), IoType::Read, 0, 1), 5);
    }
}
