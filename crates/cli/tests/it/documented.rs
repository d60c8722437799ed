//! What is written about the program is true of it: every command and option is there, no other, and links lead somewhere.

use crate::common;

use common::good;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

/// Said once for all commands, at the head of the page.
const SHARED: [&str; 13] = [
    "--help",
    "--format",
    "--image-opts",
    "--force-share",
    "--allow-backing",
    "--data-file",
    "--key-file",
    "--key-fd",
    "--key-secret",
    "--object",
    "--nbd-timeout",
    "--json",
    "--quiet",
];

/// The folder of the repository.
fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn page(name: &str) -> String {
    fs::read_to_string(root().join(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
}

/// Each option in what a synopsis, or a line of help, says.
fn options(text: &str) -> BTreeSet<String> {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || c == '-'))
        .filter(|word| word.len() > 1 && word.starts_with('-') && *word != "--")
        .map(str::to_owned)
        .collect()
}

/// The synopsis of each command: "bench load" and its lines.
fn synopses(page: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::<String, String>::new();
    let mut current = None;
    for line in page.lines() {
        if let Some(rest) = line.strip_prefix("    diskplane ") {
            let words = rest.split(' ').take(2).collect::<Vec<_>>();
            current = Some(match words[0] {
                "bench" | "trace" => words.join(" "),
                _ => words[0].to_owned(),
            });
        } else if !line.starts_with("        ") {
            current = None;
        }
        if let Some(command) = &current {
            *found.entry(command.clone()).or_default() += line;
        }
    }
    found
}

/// The names of the commands that the help of `of` lists.
fn commands(of: &[&str]) -> Vec<String> {
    let help = good(&root(), &[of, &["--help"]].concat());
    let list = help.split("Commands:\n").nth(1).expect("has commands");
    list.lines()
        .take_while(|line| !line.is_empty())
        .filter_map(|line| line.strip_prefix("  ")?.split(' ').next())
        .filter(|name| !name.is_empty() && *name != "help" && *name != "qemu-img")
        .map(str::to_owned)
        .collect()
}

#[test]
fn every_option_is_in_the_synopses_and_no_other() {
    let page = page("docs/commands.md");
    let said = synopses(&page);
    let mut all = Vec::new();
    for command in commands(&[]) {
        match command.as_str() {
            "bench" | "trace" => {
                let below = commands(&[&command]);
                all.extend(below.into_iter().map(|name| format!("{command} {name}")));
            }
            _ => all.push(command),
        }
    }
    for command in &all {
        let synopsis = said
            .get(command)
            .unwrap_or_else(|| panic!("{command}: no synopsis"));
        let said = options(synopsis);
        let mut args = command.split(' ').collect::<Vec<_>>();
        args.push("--help");
        let help = good(&root(), &args);
        let mut has = BTreeSet::new();
        let list = help
            .split("Options:\n")
            .nth(1)
            .unwrap()
            .lines()
            .take_while(|line| line.is_empty() || line.starts_with("  "));
        for line in list.filter(|line| line.trim_start().starts_with('-')) {
            // "-f, --format <FMT>  What it is for": its names come before the explanation.
            let names = line.trim_start().split("  ").next().unwrap();
            let names = options(names.split('<').next().unwrap());
            if names.is_empty() {
                continue; // "- leaks: …": what a value means
            }
            let known = names.iter().any(|name| said.contains(name));
            let shared = names.iter().any(|name| SHARED.contains(&name.as_str()));
            assert!(
                known || shared,
                "{command}: {names:?} is not in its synopsis"
            );
            has.extend(names);
        }
        let unknown = said.difference(&has).collect::<Vec<_>>();
        assert!(unknown.is_empty(), "{command} has no {unknown:?}");
    }
    assert_eq!(said.len(), all.len(), "synopses of what is no command");
}

/// The name that a heading has in links: GitHub's rule.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn links_between_the_pages_lead_somewhere() {
    let mut pages = ["README.md", "ARCHITECTURE.md", "BENCHMARKS.md"]
        .map(PathBuf::from)
        .to_vec();
    for entry in fs::read_dir(root().join("docs")).unwrap() {
        pages.push(Path::new("docs").join(entry.unwrap().file_name()));
    }
    let mut links = 0;
    for name in pages {
        let text = page(name.to_str().unwrap());
        for rest in text.split("](").skip(1) {
            let target = rest.split(')').next().unwrap();
            if target.contains("://") {
                continue;
            }
            let (file, place) = target.split_once('#').unwrap_or((target, ""));
            let to = match file {
                "" => name.clone(),
                _ => name.parent().unwrap().join(file),
            };
            assert!(root().join(&to).exists(), "{name:?}: no {target}");
            let leads = || {
                let text = page(to.to_str().unwrap());
                text.lines()
                    .any(|line| line.starts_with('#') && anchor(line) == place)
            };
            assert!(place.is_empty() || leads(), "{name:?}: no {target}");
            links += 1;
        }
    }
    assert!(links > 30, "{links} links");
}
