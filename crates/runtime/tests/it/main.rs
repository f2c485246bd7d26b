//! What every runtime must do, on the stub always and on QEMU where there is one.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

mod cloud_hypervisor;
mod confinement;
mod conformance;
mod faults;
mod firecracker;
mod initramfs;
mod lab;
mod proof;
