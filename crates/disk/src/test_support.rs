//! What several tests of this crate need.

use std::path::Path;

/// A small tmpfs, where the test may mount one.
pub(crate) struct SmallFilesystem {
    dir: tempfile::TempDir,
}

impl SmallFilesystem {
    /// Of this size, as tmpfs takes it.
    pub fn mount(size: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let flags = rustix::mount::MountFlags::empty();
        let options = std::ffi::CString::new(format!("size={size}")).unwrap();
        match rustix::mount::mount("hutch-test", dir.path(), "tmpfs", flags, options.as_c_str()) {
            Ok(()) => Some(Self { dir }),
            Err(errno) => {
                eprintln!("skipped: cannot mount a small tmpfs here ({errno})");
                None
            }
        }
    }

    pub fn path(&self) -> &Path {
        self.dir.path()
    }
}

impl Drop for SmallFilesystem {
    fn drop(&mut self) {
        let flags = rustix::mount::UnmountFlags::DETACH;
        let _ = rustix::mount::unmount(self.dir.path(), flags);
    }
}
