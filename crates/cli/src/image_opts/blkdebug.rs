//! Options of QEMU's driver `blkdebug` (`BlockdevOptionsBlkdebug` of its QAPI; `block/blkdebug.c`): accesses that fail on
//! purpose.
//!
//! ```text
//!   driver=blkdebug,image.driver=file,image.filename=a.qcow2,inject-error.0.event=write_aio,inject-error.0.errno=28,…
//!   blkdebug:rules.conf:a.qcow2     with rules.conf:   [inject-error]
//!                                                      event = "write_aio"
//!                                                      errno = "28"
//! ```

use super::node::{Node, size, switch};
use anyhow::{Result, anyhow, bail};
use block::faults::{Action, Event, Faults, IoType, Rule};
use disk::chain::FileFaults;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What a name of QEMU's for a file with faults begins with.
const PREFIX: &str = "blkdebug:";
/// Rules at most: each event looks at them all.
const RULES_MAX: usize = 1024;
/// Bytes of a file of rules, at most.
const CONFIG_BYTES_MAX: u64 = 1 << 20;
/// What an option says of a byte.
const SECTOR: u64 = 512;

/// What the rule of a group says.
type Said = BTreeMap<String, String>;

/// The file of rules (empty: none) and the image's file that `blkdebug:RULES:FILE` names.
pub fn split_name(name: &str) -> Option<Result<(&str, &str)>> {
    let rest = name.strip_prefix(PREFIX)?;
    let parts = rest.split_once(':');
    Some(parts.ok_or_else(|| anyhow!("blkdebug requires both config file and image path")))
}

/// The faults that the file `config` says (empty: none).
pub fn of_config(config: &str) -> Result<FileFaults> {
    let mut options = BTreeMap::new();
    if !config.is_empty() {
        options.insert("config".to_owned(), config.to_owned());
    }
    Node(options).blkdebug()
}

impl Node {
    /// Takes what says which accesses fail, all but the `image`, which has them.
    pub fn blkdebug(&mut self) -> Result<FileFaults> {
        let (mut inject, mut set) = (Vec::new(), Vec::new());
        if let Some(config) = self.take("config") {
            read_config(&config, &mut inject, &mut set)?;
        }
        inject.extend(self.list("inject-error")?);
        set.extend(self.list("set-state")?);
        // Which other users of the image are let in is for QEMU's jobs.
        self.child("take-child-perms");
        self.child("unshare-child-perms");
        let mut rules = Vec::new();
        for said in inject {
            rules.push(injection(said)?);
        }
        for said in set {
            rules.push(change(said)?);
        }
        if rules.len() > RULES_MAX {
            bail!("{} rules: at most {RULES_MAX} are possible", rules.len());
        }
        let align = self.limits()?;
        self.look_at_all()?;
        Ok(FileFaults {
            rules: Arc::new(Faults::new(rules)),
            align,
        })
    }

    /// Takes the limits, which must make sense together: no request here is too long for one. Returns the alignment.
    fn limits(&mut self) -> Result<u32> {
        let mut take = |key: &str, unit: u64| {
            let bytes = self.number(key)?.unwrap_or(0);
            match bytes == 0 || bytes < i32::MAX as u64 && bytes.is_multiple_of(unit) {
                true => Ok(bytes),
                false => Err(anyhow!("Cannot meet constraints with {key} {bytes}")),
            }
        };
        let align = take("align", 1)?;
        if align != 0 && !align.is_power_of_two() {
            bail!("Cannot meet constraints with align {align}");
        }
        let unit = align.max(1);
        take("max-transfer", unit)?;
        for (best, most) in [
            ("opt-write-zero", "max-write-zero"),
            ("opt-discard", "max-discard"),
        ] {
            let best = take(best, unit)?;
            take(most, best.max(unit))?;
        }
        u32::try_from(unit).map_err(|_| anyhow!("Cannot meet constraints with align {align}"))
    }

    /// Takes `key.0.…`, `key.1.…`, and so on.
    fn list(&mut self, key: &str) -> Result<Vec<Said>> {
        let mut rules: BTreeMap<u64, Said> = BTreeMap::new();
        for (name, value) in self.child(key).0 {
            let Some((Ok(nth), field)) = (name.split_once('.')).map(|(n, f)| (n.parse(), f)) else {
                bail!("'{key}.{name}': say {key}.NUMBER.OPTION");
            };
            let rule = rules.entry(nth).or_default();
            rule.insert(field.to_owned(), value);
        }
        Ok(rules.into_values().collect())
    }
}

/// Reads a file of rules, as QEMU reads its configurations.
fn read_config(path: &str, inject: &mut Vec<Said>, set: &mut Vec<Said>) -> Result<()> {
    use std::io::Read as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let failed = |error| anyhow!("Could not read blkdebug config file: {error}");
    let mut text = String::new();
    // A name may be an image's, and a FIFO's: its other end may never be opened.
    let flags = rustix::fs::OFlags::NONBLOCK.bits() as i32;
    let mut options = std::fs::File::options();
    let file = options.read(true).custom_flags(flags).open(path);
    let file = file.map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        bail!("{path}: rules are read from regular files");
    }
    let mut file = file.take(CONFIG_BYTES_MAX + 1);
    file.read_to_string(&mut text).map_err(failed)?;
    if text.len() as u64 > CONFIG_BYTES_MAX {
        bail!("{path}: rules have {CONFIG_BYTES_MAX} bytes at most");
    }
    // Which of the two the lines are for.
    let mut group: Option<&mut Vec<Said>> = None;
    for (nth, line) in text.lines().map(str::trim).enumerate() {
        let at = || format!("{path}:{}", nth + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(name) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            let list = match name.split_whitespace().next() {
                Some("inject-error") => &mut *inject,
                Some("set-state") => &mut *set,
                _ => bail!("{}: There is no option group '{name}'", at()),
            };
            list.push(Said::new());
            group = Some(list);
            continue;
        }
        let value = line.split_once('=').and_then(|(key, value)| {
            let value = value.trim().strip_prefix('"')?.strip_suffix('"')?;
            (!value.contains('"')).then_some((key.trim(), value))
        });
        match (value, group.as_mut().and_then(|list| list.last_mut())) {
            (None, _) => bail!("{}: parse error: a line is key = \"value\"", at()),
            (Some(_), None) => bail!("{}: no group defined", at()),
            (Some((key, value)), Some(rule)) => rule.insert(key.to_owned(), value.to_owned()),
        };
    }
    Ok(())
}

fn injection(mut said: Said) -> Result<Rule> {
    let (event, state) = place(&mut said)?;
    let errno = match number(&mut said, "errno")? {
        Some(errno) => i32::try_from(errno).map_err(|_| anyhow!("'{errno}' is no errno"))?,
        None => libc::EIO,
    };
    let io = said.remove("iotype").map(|text| {
        text.parse::<IoType>()
            .map_err(|text| anyhow!("invalid parameter value: {text}"))
    });
    let byte = number(&mut said, "sector")?.map(|sector| {
        let byte = sector.checked_mul(SECTOR);
        byte.ok_or_else(|| anyhow!("sector {sector}: no disk has that many"))
    });
    let once = flag(&mut said, "once")?;
    // Before other requests or not: here one comes after the other.
    flag(&mut said, "immediately")?;
    finish(&said)?;
    let (io, offset) = (io.transpose()?, byte.transpose()?);
    let action = Action::Inject {
        errno,
        io,
        offset,
        once,
    };
    Ok(Rule {
        event,
        state,
        action,
    })
}

fn change(mut said: Said) -> Result<Rule> {
    let (event, state) = place(&mut said)?;
    let new = number(&mut said, "new_state")?.unwrap_or(0);
    finish(&said)?;
    let action = Action::SetState(new);
    Ok(Rule {
        event,
        state,
        action,
    })
}

/// The event and the state of a rule.
fn place(said: &mut Said) -> Result<(Event, u64)> {
    let Some(event) = said.remove("event") else {
        bail!("Missing event name for rule");
    };
    let event = event.parse().map_err(|name| {
        let known: Vec<&str> = Event::ALL.iter().map(|(_, name)| *name).collect();
        anyhow!(
            "blkdebug event '{name}': diskplane comes to no such place; there are {}",
            known.join(", ")
        )
    })?;
    Ok((event, number(said, "state")?.unwrap_or(0)))
}

fn number(said: &mut Said, key: &str) -> Result<Option<u64>> {
    said.remove(key).map(|text| size(key, &text)).transpose()
}

fn flag(said: &mut Said, key: &str) -> Result<bool> {
    said.remove(key)
        .map_or(Ok(false), |text| switch(key, &text))
}

fn finish(said: &Said) -> Result<()> {
    match said.keys().next() {
        Some(key) => Err(anyhow!("Invalid parameter '{key}'")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(text: &str) -> Node {
        let pairs = text.split(',').filter_map(|pair| pair.split_once('='));
        Node(pairs.map(|(k, v)| (k.to_owned(), v.to_owned())).collect())
    }

    #[test]
    fn rules_come_from_options_and_from_a_file() {
        let mut options = node(
            "inject-error.1.event=none,inject-error.1.iotype=read,inject-error.1.sector=2,align=4k,max-transfer=64k,\
             set-state.0.event=write_aio,set-state.0.new_state=2,image.filename=a",
        );
        let said = options.blkdebug().unwrap();
        assert_eq!(said.align, 4096);
        assert!(said.rules.check(IoType::Read, 0, 1024).is_ok());
        let error = said.rules.check(IoType::Read, 0, 1025).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
        // What it is of is left.
        assert_eq!(options.0.keys().collect::<Vec<_>>(), ["image.filename"]);

        let dir = testkit::TempDir::new();
        let path = dir.path("rules");
        std::fs::write(
            &path,
            "# comment\n[inject-error]\n event = \"read_aio\"\nerrno=\"28\"\nonce =\"on\"\n",
        )
        .unwrap();
        let name = format!("blkdebug:{}:b:c", path.display());
        let (config, file) = split_name(&name).unwrap().unwrap();
        assert_eq!(file, "b:c");
        let said = of_config(config).unwrap();
        said.rules.event(Event::ReadAio);
        let error = said.rules.check(IoType::Write, 0, 1).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert!(said.rules.check(IoType::Write, 0, 1).is_ok());
        for (text, why) in [
            ("event = \"none\"", "rules:1: no group defined"),
            ("\n[inject-error]\nevent = none", "rules:3: parse error"),
            ("[fail]", "rules:1: There is no option group 'fail'"),
            ("[inject-error]", "Missing event name for rule"),
        ] {
            std::fs::write(&path, text).unwrap();
            let error = of_config(config).unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
        assert!(split_name("blkdebug:a").unwrap().is_err());
        assert!(split_name("a:b").is_none());
    }

    #[test]
    fn what_makes_no_sense_is_refused() {
        for (text, why) in [
            (
                "inject-error.0.event=l1_update",
                "event 'l1_update': diskplane comes to no such place; there are none, read_aio",
            ),
            (
                "inject-error.0.event=none,inject-error.0.iotype=x",
                "invalid parameter value: x",
            ),
            (
                "inject-error.0.event=none,inject-error.0.new_state=1",
                "Invalid parameter 'new_state'",
            ),
            ("inject-error.a=1", "say inject-error.NUMBER.OPTION"),
            ("align=3k", "Cannot meet constraints with align 3072"),
            (
                "align=4k,max-transfer=512",
                "Cannot meet constraints with max-transfer 512",
            ),
            (
                "opt-discard=1M,max-discard=512k",
                "Cannot meet constraints with max-discard 524288",
            ),
        ] {
            let error = node(text).blkdebug().unwrap_err().to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
