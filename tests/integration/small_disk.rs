use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The size of the small file system: above the node's reserve, two segments of its log.
const DISK_BYTES: u64 = 320 << 20;

/// A file system in memory, mounted over a node's data directory. It stays with the processes that use it until they
/// end.
pub(crate) struct SmallDisk(PathBuf);

impl SmallDisk {
    /// `None`, with a word about it, where this user may not mount.
    pub(crate) fn mount(directory: &Path) -> Option<SmallDisk> {
        let options = format!("size={DISK_BYTES}");
        let mut mount = Command::new("mount");
        let mount = mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(directory).output();
        match mount {
            Ok(output) if output.status.success() => Some(SmallDisk(directory.to_owned())),
            other => {
                println!("SKIPPED: a small file system can't be mounted here, which takes root: {other:?}");
                None
            }
        }
    }

    fn ballast(&self) -> PathBuf {
        self.0.join("ballast")
    }

    /// Takes all space but about `left` bytes.
    pub(crate) fn fill_but(&self, left: u64) {
        let free = || {
            let figures = rustix::fs::statvfs(&self.0).unwrap();
            figures.f_bavail * figures.f_frsize
        };
        let file = File::options().create(true).append(true).open(self.ballast()).unwrap();
        let had = file.metadata().unwrap().len();
        let more = free().saturating_sub(left);
        if more > 0 {
            rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), had, more).unwrap();
        }
    }

    /// Gives back what [`Self::fill_but`] took.
    pub(crate) fn free(&self) {
        std::fs::remove_file(self.ballast()).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}
