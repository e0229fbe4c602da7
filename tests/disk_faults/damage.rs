use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::cases::{Bench, chosen, run_all};
use crate::node::{End, Node, Promises, Script};
use crate::places::{Place, of_segment, of_small_file, of_snapshot};

/// Of how many damages `make test` takes one.
const STRIDE: usize = 23;

const LOG: &str = ".log";
const SNAPSHOT: &str = ".snapshot";

/// A data directory in memory: of each file its length, and its bytes up to the last that is not zero.
struct Image {
    files: BTreeMap<String, (u64, Vec<u8>)>,
    promises: Promises,
}

#[derive(Clone, Debug)]
enum Damage {
    /// One bit is another one.
    Flip { place: Place, bit: u8 },
    /// The file has another length.
    Length(u64),
    /// The sector that begins here is empty.
    Zeroed(u64),
    /// The file is not there.
    Gone,
}

#[derive(Clone, Debug)]
struct Case {
    file: String,
    damage: Damage,
}

fn read_directory(directory: &Path) -> BTreeMap<String, (u64, Vec<u8>)> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let mut bytes = std::fs::read(entry.path()).unwrap();
        let len = bytes.len() as u64;
        bytes.truncate(bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1));
        (entry.file_name().into_string().unwrap(), (len, bytes))
    };
    std::fs::read_dir(directory).unwrap().map(read).collect()
}

/// What a node leaves behind that was killed, after writes of all kinds.
fn image() -> Image {
    let bench = Bench::new();
    let mut node = Node::new(&bench);
    let mut promises = Promises::default();
    node.start(&["--snapshot-catchup-entries", "0"], &[]);
    assert!(node.wait_ready(), "{}", node.log());
    let mut script = Script::new(&node, &mut promises);
    for round in 0..2 {
        assert_eq!(script.put("a", &[round; 10]).unwrap(), End::Whole);
        assert_eq!(script.put("long", &[7 + round; 3000]).unwrap(), End::Whole);
        assert_eq!(script.put_with(&format!("token{round}"), b"once", Some(&format!("t{round}"))).unwrap(), End::Whole);
        assert_eq!(script.put("deleted", b"value").unwrap(), End::Whole);
        assert_eq!(script.delete("deleted").unwrap(), End::Whole);
        if round == 0 {
            assert_eq!(script.snapshot().unwrap(), (End::Whole, 0));
        }
    }
    // The last batch, behind which nothing says that it was durable, has several sectors.
    assert_eq!(script.put("last", &[5; 1200]).unwrap(), End::Whole);
    node.kill();
    Image { files: read_directory(&node.data_dir), promises }
}

fn cases(image: &Image) -> Vec<Case> {
    let mut cases = Vec::new();
    for (file, (len, bytes)) in &image.files {
        let mut add = |damage| cases.push(Case { file: file.clone(), damage });
        let mut padded = bytes.clone();
        padded.resize(bytes.len().next_multiple_of(512).min(*len as usize), 0);
        let places = match file {
            _ if file.ends_with(LOG) => of_segment(&padded, *len as usize),
            _ if file.ends_with(SNAPSHOT) => of_snapshot(&padded),
            _ => of_small_file(&padded),
        };
        for place in places {
            // Of each place two bits, and with the places' number all of them.
            for bit in [place.offset % 8, (place.offset * 3 + 5) % 8] {
                add(Damage::Flip { place: place.clone(), bit: bit as u8 });
            }
        }
        let used = padded.len() as u64;
        let mut lengths = vec![0, 1, 4, 5, used / 2, used - used.min(1), used, len - len.min(&1), len + 1, len + 512];
        lengths.extend([511, 512, 513, 1024]);
        lengths.retain(|new| new != len);
        lengths.sort_unstable();
        lengths.dedup();
        lengths.into_iter().for_each(|new| add(Damage::Length(new)));
        add(Damage::Gone);
        if file.ends_with(LOG) {
            // Not of the last batch, which has sectors that nothing else in this directory tells of.
            let last = (512..used).step_by(512).filter(|at| padded[*at as usize] == 0xB6).last().unwrap();
            (0..last).step_by(512).for_each(|at| add(Damage::Zeroed(at)));
        }
    }
    cases
}

fn put_in_place(image: &Image, case: &Case, directory: &Path) {
    let _ = std::fs::remove_dir_all(directory);
    std::fs::create_dir(directory).unwrap();
    for (name, (len, bytes)) in &image.files {
        let file = File::create_new(directory.join(name)).unwrap();
        file.write_all_at(bytes, 0).unwrap();
        file.set_len(*len).unwrap();
    }
    let path = directory.join(&case.file);
    let file = OpenOptions::new().read(true).write(true).open(&path).unwrap();
    match &case.damage {
        Damage::Flip { place, bit } => {
            let mut byte = [0];
            file.read_exact_at(&mut byte, place.offset as u64).unwrap();
            file.write_all_at(&[byte[0] ^ (1 << bit)], place.offset as u64).unwrap();
        }
        Damage::Length(len) => file.set_len(*len).unwrap(),
        Damage::Zeroed(at) => file.write_all_at(&[0; 512], *at).unwrap(),
        Damage::Gone => std::fs::remove_file(&path).unwrap(),
    }
}

fn run(image: &Image, bench: &Bench, case: &Case) -> Result<(), String> {
    let mut node = Node::new(bench);
    put_in_place(image, case, &node.data_dir);
    let damaged = read_directory(&node.data_dir);
    node.start(&["--snapshot-catchup-entries", "0"], &[]);
    if node.wait_ready() {
        let may_serve = may_serve(case);
        let found = image.promises.check(&node);
        node.kill();
        return if may_serve { found } else { Err(format!("it serves, and: {found:?}")) };
    }
    let words = node.last_words()?;
    // What is gone is called by its name or its kind, and so is what tells that it is.
    let mut names = vec![case.file.as_str()];
    if matches!(case.damage, Damage::Gone) {
        names.extend(["the log is missing", "no file 'identity'"]);
    }
    let is_named = names.iter().any(|name| words.contains(name));
    if !(is_named || case.file == "boot" && words.contains("list of starts")) {
        return Err(format!("it does not name the file: {words}"));
    }
    let offset = number_behind(&words, "at offset ").or(number_behind(&words, "at byte "));
    if let Damage::Flip { place, .. } = &case.damage
        && (case.file.ends_with(LOG) || case.file.ends_with(SNAPSHOT))
    {
        let is_preamble = ["magic", "version"].iter().any(|field| place.part.ends_with(field));
        if !offset.map_or(is_preamble, |offset| offset <= place.offset) {
            return Err(format!("it names another offset: {words}"));
        }
    }
    if case.file.ends_with(LOG) && read_directory(&node.data_dir) != damaged {
        return Err("it refuses the log, and has changed the directory".to_owned());
    }
    Ok(())
}

/// Whether nothing depends on what is damaged: the file that is locked, whatever it holds.
fn may_serve(case: &Case) -> bool {
    case.file == "LOCK" || matches!(&case.damage, Damage::Flip { place, .. } if place.part == "segment header: padding")
}

fn number_behind(text: &str, words: &str) -> Option<usize> {
    let (_, rest) = text.split_once(words)?;
    rest[..rest.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(rest.len())].parse().ok()
}

#[test]
fn no_damage_is_served() {
    let image = image();
    let all = cases(&image);
    println!("{} damages of {:?}", all.len(), image.files.keys());
    run_all("damage", chosen(all, STRIDE), |bench, case| run(&image, bench, case));
}

#[test]
fn the_directory_without_damage_is_served() {
    let image = image();
    let bench = Bench::new();
    let mut node = Node::new(&bench);
    // Of no effect: it has this length.
    let (len, _) = image.files["boot"];
    put_in_place(&image, &Case { file: "boot".to_owned(), damage: Damage::Length(len) }, &node.data_dir);
    node.start(&[], &[]);
    assert!(node.wait_ready(), "{}", node.log());
    image.promises.check(&node).unwrap();
}
