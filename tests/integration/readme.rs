use std::collections::BTreeMap;
use std::path::Path;

use rustix::process::Signal;

use crate::checkout::{BINARY, Checkout, PORTS, root};
use crate::support::{Process, exclusive, program, read_text, wait_for};

fn readme() -> String {
    std::fs::read_to_string(root().join("README.md")).unwrap()
}

/// What one line of `--help`, or one row of the README's table, says of a flag.
#[derive(Debug, PartialEq, Eq)]
struct Flag {
    value: String,
    default: String,
}

/// `--name VALUE` without the signs that one of the two forms has and the other has not.
fn split_flag(text: &str) -> (String, String) {
    let text = text.replace(['<', '>', '`'], "");
    let (name, value) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    (name.to_owned(), value.to_owned())
}

#[test]
fn the_flags_are_those_of_the_help() {
    let help = String::from_utf8(program().arg("--help").output().unwrap().stdout).unwrap();
    let mut helped = BTreeMap::new();
    for line in help.lines().filter(|line| line.trim_start().starts_with("--")) {
        let (flag, text) = line.trim().split_once("  ").unwrap();
        let (name, value) = split_flag(flag);
        let variable = format!("[env: RAFTEXAMPLE_{}]", name[2..].replace('-', "_").to_uppercase());
        assert!(text.contains(&variable), "{variable} is missing in: {line}");
        let default = text.split_once("[default: ").map_or("", |(_, rest)| rest.split_once(']').unwrap().0);
        helped.insert(name, Flag { value, default: default.to_owned() });
    }
    let mut written = BTreeMap::new();
    for line in readme().lines().filter(|line| line.starts_with("| `--")) {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let (name, value) = split_flag(cells[0]);
        let default = if cells[1] == "off" { String::new() } else { cells[1].replace('`', "") };
        written.insert(name, Flag { value, default });
    }
    assert!(helped.len() > 10, "{help}");
    assert_eq!(written, helped, "left: README, right: --help");
}

#[test]
fn the_procfile_starts_what_make_starts() {
    let procfile = std::fs::read_to_string(root().join("Procfile")).unwrap();
    let peers: Vec<String> = PORTS[4..7].iter().map(|port| format!("http://127.0.0.1:{port}")).collect();
    let lines = PORTS[..3].iter().enumerate().map(|(index, port)| {
        let (id, peers) = (index + 1, peers.join(","));
        format!(
            "raftexample{id}: exec {BINARY} --id {id} --cluster {peers} --port {port} --data-dir .cluster/node-{id}\n"
        )
    });
    assert_eq!(procfile, lines.collect::<String>());
}

/// A command of the README, and what it printed there.
#[derive(Debug)]
struct Step {
    command: String,
    expected: Vec<String>,
    /// Stays in the foreground of a terminal of its own until the end of the section.
    background: bool,
}

/// The commands of all `console` blocks, section by section. Behind `> ` a command goes on. A comment `<!-- in a terminal of its own -->` before a
/// block marks one whose command does not end.
fn walk(text: &str) -> Vec<(String, Vec<Step>)> {
    let mut sections: Vec<(String, Vec<Step>)> = Vec::new();
    let mut in_block = false;
    let mut background = false;
    for line in text.lines() {
        if !in_block && line.starts_with("## ") {
            sections.push((line[3..].to_owned(), Vec::new()));
        } else if line == "<!-- in a terminal of its own -->" {
            background = true;
        } else if line == "```console" {
            in_block = true;
        } else if line.starts_with("```") {
            background &= !in_block;
            in_block = false;
        } else if in_block {
            let steps = &mut sections.last_mut().expect("blocks stand in sections").1;
            if let Some(command) = line.strip_prefix("$ ") {
                steps.push(Step { command: command.to_owned(), expected: Vec::new(), background });
                continue;
            }
            let step = steps.last_mut().expect("a block begins with a command");
            match line.strip_prefix("> ") {
                Some(more) => step.command.extend(["\n", more]),
                None => step.expected.push(line.to_owned()),
            }
        }
    }
    sections.retain(|(_, steps)| !steps.is_empty());
    sections
}

impl Checkout {
    /// Waits until something listens where `command` was told to.
    #[track_caller]
    fn wait_listening(&self, log: &Path, process: &mut Process) {
        let port: u16 = self.ports[0].1.parse().unwrap();
        wait_for("the program to listen", || {
            assert_eq!(process.exit_status(), None, "it has ended: {}", read_text(log));
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok().then_some(())
        });
    }

    #[track_caller]
    fn take(&self, step: &Step) {
        let (status, output) = self.run(&mut self.command(&step.command));
        println!("$ {}\n{output}", step.command);
        assert_eq!(status, Some(0), "$ {}", step.command);
        let found: Vec<String> = output.lines().map(|line| self.stable(line)).collect();
        let expected: Vec<String> = step.expected.iter().map(|line| self.stable(line)).collect();
        assert!(
            matches(&expected, &found),
            "$ {}\nexpected (numbers aside):\n{}\nfound:\n{}",
            step.command,
            expected.join("\n"),
            found.join("\n")
        );
    }

    /// A line without what differs between two runs: numbers, who leads, where it ran. A status line keeps its number.
    fn stable(&self, line: &str) -> String {
        let line = line.trim_end().replace(&self.path().display().to_string(), "/home/you/raftexample");
        if line.starts_with("HTTP/") {
            return line;
        }
        let mut text = String::new();
        for c in line.chars() {
            match c {
                '0'..='9' if text.ends_with('#') => {}
                '0'..='9' => text.push('#'),
                c => text.push(c),
            }
        }
        let words: Vec<&str> = text.split_whitespace().map(|w| if w == "follower" { "leader" } else { w }).collect();
        words.join(" ")
    }
}

/// Whether the lines are the expected ones, where an expected `...` stands for any number of lines.
fn matches(expected: &[String], found: &[String]) -> bool {
    match expected.split_first() {
        None => found.is_empty(),
        Some((first, rest)) if first == "..." => (0..=found.len()).any(|skip| matches(rest, &found[skip..])),
        Some((first, rest)) => found.first() == Some(first) && matches(rest, &found[1..]),
    }
}

#[test]
fn the_walk_goes_as_written() {
    let _exclusive = exclusive();
    let sections = walk(&readme());
    assert!(sections.iter().map(|(_, steps)| steps.len()).sum::<usize>() > 10, "{sections:?}");
    let checkout = Checkout::new();
    for (section, steps) in sections {
        println!("## {section}");
        let log = checkout.path().join("terminal.log");
        let mut terminals: Vec<Process> = Vec::new();
        for step in &steps {
            if step.background {
                let command = format!("exec {}", step.command);
                let mut process = Process::spawn(&mut checkout.command(&command), &log);
                checkout.wait_listening(&log, &mut process);
                terminals.push(process);
            } else {
                checkout.take(step);
            }
        }
        for mut process in terminals {
            process.signal(Signal::INT);
            assert_eq!(process.wait().code(), Some(0), "{}", read_text(&log));
        }
    }
}
