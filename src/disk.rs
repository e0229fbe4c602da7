//! The one narrow door to the data directory: a flat directory of named files.
//!
//! Everything durable (log segments, snapshots, small identity files) goes through [`Disk`], so that the simulator can
//! put a [`MemoryDisk`](crate::memory_disk::MemoryDisk) in its place, which forgets what was not synced.
//!
//! What an implementation promises, and no more: bytes are durable after [`DiskFile::sync_data`] of the handle that
//! wrote them, names after [`Disk::sync_directory`]. Until then a crash may keep any part of them. After a failed sync
//! the unsynced bytes are in doubt for good, and a second sync proves nothing: the caller has to stop.

use std::fs::{DirBuilder, File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use crate::fail_point::fail_point;

/// The file whose lock says that a process uses the data directory.
pub const LOCK_FILE: &str = "LOCK";

/// The ending of files that are not finished. A file with this ending that is found at start is waste.
pub const TEMPORARY_SUFFIX: &str = ".tmp";

/// A data directory. Names are plain file names without a slash.
pub trait Disk: Send + Sync {
    /// The names of all files, in no particular order.
    fn list(&self) -> io::Result<Vec<String>>;

    /// Creates a file that must not exist. With `reserve_bytes` above 0 it is that long, reads as zeros, and has its
    /// blocks allocated if the file system can do so; its length is durable after the first `sync_data`.
    ///
    /// # Errors
    /// `AlreadyExists`; `StorageFull` if the reserve cannot be had, and then there may be an empty file of that name.
    fn create(&self, name: &str, reserve_bytes: u64) -> io::Result<Box<dyn DiskFile>>;

    /// Opens an existing file for reading and writing.
    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>>;

    /// Gives a file another name, replacing a file that had it.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;

    /// Removes a file.
    fn remove(&self, name: &str) -> io::Result<()>;

    /// Makes all creations, renames and removals so far durable.
    fn sync_directory(&self) -> io::Result<()>;

    /// The bytes that this process may still allocate.
    fn free_bytes(&self) -> io::Result<u64>;

    /// The path of a file, for messages to people.
    fn path(&self, name: &str) -> PathBuf;
}

/// An open file. All offsets are in bytes from its beginning.
pub trait DiskFile: Send {
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;

    /// Whether the length is 0.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Reads up to `buffer.len()` bytes at `offset`; 0 only at the end of the file.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;

    /// Reads exactly `buffer.len()` bytes at `offset`.
    ///
    /// # Errors
    /// `UnexpectedEof` if the file ends before.
    fn read_exact_at(&self, mut buffer: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buffer.is_empty() {
            match self.read_at(buffer, offset) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file ends too early")),
                Ok(count) => {
                    buffer = &mut buffer[count..];
                    offset += count as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Writes all of `bytes` at `offset`, growing the file if need be. On an error any part may have been written.
    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Makes the content durable, with as much metadata as is needed to read it back (`fdatasync`).
    fn sync_data(&mut self) -> io::Result<()>;

    /// Cuts the file, or extends it by zeros.
    fn set_len(&mut self, bytes: u64) -> io::Result<()>;
}

/// Puts a whole file in place, so that after a crash there is either the old one or the new one: written under a
/// temporary name, synced, renamed, and the directory synced.
///
/// # Errors
/// On any error the old file may still be the one that survives a crash, or already the new one.
pub fn write_atomically(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    replace(disk, name, bytes)?;
    disk.sync_directory()
}

/// As [`write_atomically`], but for the last step: the directory is not synced yet.
///
/// # Errors
/// Until then the old file is the one that counts, whatever failed.
pub fn replace(disk: &dyn Disk, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = format!("{name}{TEMPORARY_SUFFIX}");
    remove_if_there(disk, &temporary)?;
    let mut file = disk.create(&temporary, 0)?;
    file.write_all_at(bytes, 0)?;
    file.sync_data()?;
    drop(file);
    fail_point("atomic-temporary-after");
    disk.rename(&temporary, name)?;
    fail_point("atomic-rename-after");
    Ok(())
}

/// Reads a whole file of at most `bytes_max` bytes.
///
/// # Errors
/// `InvalidData` if it is longer.
pub fn read_whole(disk: &dyn Disk, name: &str, bytes_max: usize) -> io::Result<Vec<u8>> {
    let file = disk.open(name)?;
    let len = usize::try_from(file.len()?).ok().filter(|&len| len <= bytes_max).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("the file is longer than {bytes_max} bytes"))
    })?;
    let mut bytes = vec![0; len];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// Removes a file that may not be there.
pub fn remove_if_there(disk: &dyn Disk, name: &str) -> io::Result<()> {
    match disk.remove(name) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// A real directory, locked for as long as this value lives.
#[derive(Debug)]
pub struct OsDisk {
    directory: PathBuf,
    /// Synced after names changed.
    directory_handle: File,
    /// Holds the lock.
    _lock: File,
}

impl OsDisk {
    /// Opens a data directory, creating it with its parents if it is not there, and locks it.
    ///
    /// # Errors
    /// With the path in the text. `WouldBlock` if another process (or another `OsDisk` of this one) holds the lock.
    pub fn open(directory: &Path) -> io::Result<OsDisk> {
        create_directory(directory)?;
        let directory_handle = File::open(directory).map_err(|error| annotate(error, "open directory", directory))?;
        let lock = lock_directory(directory)?;
        Ok(OsDisk { directory: directory.to_path_buf(), directory_handle, _lock: lock })
    }
}

/// Creates `directory` and whatever of its parents is missing, and makes its own name durable.
fn create_directory(directory: &Path) -> io::Result<()> {
    let missing: Vec<&Path> = directory.ancestors().take_while(|path| !is_directory(path)).collect();
    for path in missing.iter().rev() {
        // Nobody but the owner has any business in a raft log.
        match DirBuilder::new().mode(0o700).create(path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                let error = annotate(error, "create data directory", path);
                // What was asked for is named too where it was one above it that could not be made.
                return Err(if *path == directory {
                    error
                } else {
                    annotate(error, "create data directory", directory)
                });
            }
            _ => sync_parent(path)?,
        }
    }
    if missing.is_empty() {
        // A process before this one may have been cut off between creating the directory and syncing its name.
        match sync_parent(directory) {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {}
            result => result?,
        }
    }
    Ok(())
}

fn is_directory(path: &Path) -> bool {
    path.as_os_str().is_empty() || path.is_dir()
}

fn sync_parent(path: &Path) -> io::Result<()> {
    let parent = match path.parent() {
        Some(parent) if parent.as_os_str().is_empty() => Path::new("."),
        Some(parent) => parent,
        None => return Ok(()),
    };
    File::open(parent).and_then(|file| file.sync_all()).map_err(|error| annotate(error, "sync directory", parent))
}

fn lock_directory(directory: &Path) -> io::Result<File> {
    let path = directory.join(LOCK_FILE);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .map_err(|error| annotate(error, "open lock file", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(io::Error::new(
            io::ErrorKind::WouldBlock,
            format!(
                "failed to lock data directory '{}': another process uses it; stop that one, or choose another \
                 directory with --data-dir",
                directory.display()
            ),
        )),
        Err(TryLockError::Error(error)) => Err(annotate(error, "lock data directory", directory)),
    }
}

fn annotate(error: io::Error, what: &str, path: &Path) -> io::Error {
    io::Error::new(error.kind(), format!("failed to {what} '{}': {error}", path.display()))
}

impl Disk for OsDisk {
    fn list(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in std::fs::read_dir(&self.directory)? {
            // Names that are not UTF-8 are none of ours.
            if let Ok(name) = entry?.file_name().into_string() {
                names.push(name);
            }
        }
        Ok(names)
    }

    fn create(&self, name: &str, reserve_bytes: u64) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(self.path(name))?;
        if reserve_bytes > 0 {
            reserve(&file, reserve_bytes)?;
        }
        fail_point("disk-create-after");
        Ok(Box::new(OsFile(file)))
    }

    fn open(&self, name: &str) -> io::Result<Box<dyn DiskFile>> {
        let file = OpenOptions::new().read(true).write(true).open(self.path(name))?;
        Ok(Box::new(OsFile(file)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        fail_point("disk-rename-before");
        std::fs::rename(self.path(from), self.path(to))?;
        fail_point("disk-rename-after");
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        fail_point("disk-remove-before");
        std::fs::remove_file(self.path(name))?;
        fail_point("disk-remove-after");
        Ok(())
    }

    fn sync_directory(&self) -> io::Result<()> {
        fail_point("disk-directory-sync-before");
        self.directory_handle.sync_all()?;
        fail_point("disk-directory-sync-after");
        Ok(())
    }

    fn free_bytes(&self) -> io::Result<u64> {
        let figures = rustix::fs::fstatvfs(&self.directory_handle)?;
        Ok(figures.f_bavail.saturating_mul(figures.f_frsize))
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name)
    }
}

/// Allocates blocks, so that later writes need no journal commit for the size. Where the file system cannot, the file
/// gets its length as a hole: slower, and out of space may then show later, at a write.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    loop {
        match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, bytes) {
            Ok(()) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => return file.set_len(bytes),
            Err(error) => return Err(error.into()),
        }
    }
}

struct OsFile(File);

impl DiskFile for OsFile {
    fn len(&self) -> io::Result<u64> {
        Ok(self.0.metadata()?.len())
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.0.read_at(buffer, offset)
    }

    fn write_all_at(&mut self, bytes: &[u8], offset: u64) -> io::Result<()> {
        fail_point("disk-write-before");
        self.0.write_all_at(bytes, offset)?;
        fail_point("disk-write-after");
        Ok(())
    }

    fn sync_data(&mut self) -> io::Result<()> {
        fail_point("disk-sync-before");
        self.0.sync_data()?;
        fail_point("disk-sync-after");
        Ok(())
    }

    fn set_len(&mut self, bytes: u64) -> io::Result<()> {
        self.0.set_len(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_lock_is_refused_and_freed_with_its_holder() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("a/b/data");
        let disk = OsDisk::open(&directory).unwrap();
        let error = OsDisk::open(&directory).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let text = error.to_string();
        assert!(text.contains("a/b/data") && text.contains("--data-dir"), "{text}");
        drop(disk);
        OsDisk::open(&directory).unwrap();
    }

    #[test]
    fn files_live_from_creation_to_removal() {
        let directory = tempfile::tempdir().unwrap();
        let disk = OsDisk::open(directory.path()).unwrap();
        let mut file = disk.create("one", 10_000).unwrap();
        assert_eq!(disk.create("one", 0).err().unwrap().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(file.len().unwrap(), 10_000);
        file.write_all_at(b"middle", 5_000).unwrap();
        file.sync_data().unwrap();
        let mut bytes = [1; 8];
        file.read_exact_at(&mut bytes, 4_999).unwrap();
        assert_eq!(&bytes, b"\0middle\0");
        assert_eq!(file.read_exact_at(&mut bytes, 9_999).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        file.set_len(3).unwrap();
        assert!(!file.is_empty().unwrap());
        disk.rename("one", "two").unwrap();
        disk.sync_directory().unwrap();
        assert_eq!(disk.open("one").err().unwrap().kind(), io::ErrorKind::NotFound);
        assert_eq!(disk.open("two").unwrap().len().unwrap(), 3);
        disk.remove("two").unwrap();
        assert_eq!(disk.list().unwrap(), [LOCK_FILE]);
        assert!(disk.free_bytes().unwrap() > 0);
        assert_eq!(disk.path("x"), directory.path().join("x"));
    }

    #[test]
    fn a_file_is_replaced_as_a_whole() {
        let directory = tempfile::tempdir().unwrap();
        let disk = OsDisk::open(directory.path()).unwrap();
        disk.create("boot.tmp", 0).unwrap();
        write_atomically(&disk, "boot", b"first").unwrap();
        write_atomically(&disk, "boot", b"second").unwrap();
        assert_eq!(read_whole(&disk, "boot", 6).unwrap(), b"second");
        assert_eq!(read_whole(&disk, "boot", 5).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut names = disk.list().unwrap();
        names.sort();
        assert_eq!(names, [LOCK_FILE, "boot"]);
    }
}
