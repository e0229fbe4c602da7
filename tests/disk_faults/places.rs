//! Written from the descriptions in `raft_log/segment.rs`, `raft_log/batch.rs`, `snapshot.rs` and `data_dir.rs`, and not
//! with their code: a change of a format that is none in its description is noticed here.

const SECTOR: usize = 512;
const FIRST: u8 = 0xB6;

/// A byte of a file, and what it is part of.
#[derive(Clone, Debug)]
pub(crate) struct Place {
    pub(crate) part: String,
    pub(crate) offset: usize,
}

/// Fields one behind the other from `offset` on: the first and the last byte of each.
fn fields(places: &mut Vec<Place>, what: &str, mut offset: usize, fields: &[(&str, usize)]) {
    for (field, len) in fields {
        for at in [offset, offset + len - 1].into_iter().take(*len) {
            places.push(Place { part: format!("{what}: {field}"), offset: at });
        }
        offset += len;
    }
}

fn number(bytes: &[u8], offset: usize) -> usize {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()) as usize
}

/// Of a segment of the log, whose batches are of at most `sectors_max` sectors: others are taken like one of them.
pub(crate) fn of_segment(bytes: &[u8], file_bytes: usize) -> Vec<Place> {
    assert_eq!(&bytes[..8], b"RAFTLOG\n");
    let mut places = Vec::new();
    let header = [
        ("magic", 8),
        ("version", 4),
        ("cluster", 16),
        ("node", 8),
        ("directory", 16),
        ("sequence", 8),
        ("length of the file", 8),
        ("first batch", 8),
        ("previous link", 4),
        ("checksum", 4),
        ("padding", SECTOR - 84),
    ];
    fields(&mut places, "segment header", 0, &header);
    let mut offset = SECTOR;
    let mut batches = 0;
    while offset < bytes.len() && bytes[offset] == FIRST {
        let len = number(bytes, offset + 1);
        let sectors = (32 + len).div_ceil(SECTOR - 1);
        let what = format!("batch {} of {len} bytes", number(bytes, offset + 5));
        let header = [("tag", 1), ("length", 4), ("number", 8), ("synced", 8), ("previous link", 4)];
        fields(&mut places, &what, offset, &header);
        fields(&mut places, &what, offset + 25, &[("checksum of the records", 4), ("checksum", 4)]);
        let records = len.min(SECTOR - 33);
        if records > 0 {
            fields(
                &mut places,
                &what,
                offset + 33,
                &[("kind of the first record", 1), ("records", records.max(2) - 1)],
            );
        }
        if sectors > 1 {
            fields(&mut places, &what, offset + SECTOR, &[("tag of the next sector", 1), ("records", SECTOR - 1)]);
            fields(&mut places, &what, offset + (sectors - 1) * SECTOR, &[("tag of the last sector", 1)]);
        }
        let padding = sectors * (SECTOR - 1) - 32 - len;
        if padding > 0 {
            let end = offset + sectors * SECTOR;
            fields(&mut places, &what, end - padding, &[("padding", padding)]);
        }
        offset += sectors * SECTOR;
        batches += 1;
    }
    assert!(batches > 1, "a segment has batches");
    if offset < file_bytes {
        fields(&mut places, "behind the last batch", offset, &[("tag", 1), ("sector", SECTOR - 1)]);
        fields(&mut places, "behind the last batch", file_bytes - SECTOR, &[("last sector", SECTOR)]);
    }
    places
}

/// Of a snapshot, whose blocks are told apart by what is in them.
pub(crate) fn of_snapshot(bytes: &[u8]) -> Vec<Place> {
    assert_eq!(&bytes[..8], b"raftsnap");
    let mut places = Vec::new();
    fields(&mut places, "snapshot", 0, &[("magic", 8), ("version", 4)]);
    let mut offset = 12;
    let mut sections = Vec::new();
    while offset < bytes.len() {
        let (section, len) = (bytes[offset], number(bytes, offset + 1));
        let what = format!("section {section}");
        fields(&mut places, &what, offset, &[("section", 1), ("length", 4), ("checksum", 4), ("payload", len)]);
        places.push(Place { part: format!("{what}: payload"), offset: offset + 9 + len / 2 });
        offset += 9 + len;
        sections.push(section);
    }
    assert_eq!(offset, bytes.len());
    // All but the removed nodes, of which a cluster of one has none.
    for section in [1, 2, 3, 5, 6, 7, 8] {
        assert!(sections.contains(&section), "no section {section}");
    }
    places
}

/// Of a small file: every byte.
pub(crate) fn of_small_file(bytes: &[u8]) -> Vec<Place> {
    (0..bytes.len()).map(|offset| Place { part: "byte".to_owned(), offset }).collect()
}
