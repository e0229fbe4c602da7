use std::path::PathBuf;

use raftexample::fail_point::{FAIL_POINTS, HELD};

use crate::support::{Cluster, wait_for};

/// The directory in which one node looks for what to do at its fail-points.
pub(crate) struct Orders {
    directory: PathBuf,
}

impl Orders {
    pub(crate) fn new(cluster: &Cluster, id: u64) -> Self {
        let directory = cluster.data_dir(id).with_file_name(format!("orders-{id}"));
        std::fs::create_dir_all(&directory).unwrap();
        Self { directory }
    }

    /// Starts a node that is down, and that looks here from now on.
    pub(crate) fn spawn(&self, cluster: &mut Cluster, id: u64) {
        let directory = self.directory.display();
        let armed: Vec<String> = FAIL_POINTS.iter().map(|point| format!("{point}=return({directory})")).collect();
        cluster.spawn_with(id, &[("FAILPOINTS", &armed.join(";"))]);
    }

    /// The next thread that comes to `point` is held there.
    pub(crate) fn hold(&self, point: &str) {
        self.give(point, "hold");
    }

    /// The process ends when a thread comes to `point`.
    pub(crate) fn kill(&self, point: &str) {
        self.give(point, "kill");
    }

    fn give(&self, point: &str, order: &str) {
        // Whoever finds it finds all of it.
        let unfinished = self.directory.join(format!("{point}.new"));
        std::fs::write(&unfinished, order).unwrap();
        std::fs::rename(unfinished, self.directory.join(point)).unwrap();
    }

    pub(crate) fn is_held(&self, point: &str) -> bool {
        self.directory.join(format!("{point}{HELD}")).exists()
    }

    #[track_caller]
    pub(crate) fn wait_held(&self, point: &str) {
        wait_for(&format!("a thread that comes to {point}"), || self.is_held(point).then_some(()));
    }

    /// Lets go who is held at `point`, or forgets who was killed there.
    pub(crate) fn release(&self, point: &str) {
        std::fs::remove_file(self.directory.join(format!("{point}{HELD}"))).unwrap();
    }

    /// Holds the node at all of these points, in whichever order it comes to them, and does `meanwhile` at each.
    #[track_caller]
    pub(crate) fn hold_at_each(&self, points: &[&str], mut meanwhile: impl FnMut(&str)) {
        let mut left = points.to_vec();
        while !left.is_empty() {
            let at = wait_for(&format!("a thread that comes to one of {left:?}"), || {
                left.iter().position(|point| self.is_held(point))
            });
            let point = left.swap_remove(at);
            println!("held at {point}");
            meanwhile(point);
            self.release(point);
        }
    }
}
