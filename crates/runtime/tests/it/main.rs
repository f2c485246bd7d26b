//! What every runtime must do, on the stub always, on QEMU and Docker where there is one.
#![expect(clippy::unwrap_used, reason = "a test that panics has failed")]

mod clones;
mod cloud_hypervisor;
mod confinement;
mod conformance;
mod docker;
mod faults;
mod firecracker;
mod initramfs;
mod lab;
mod memory;
mod network;
mod proof;
mod scripted;
mod sys;
mod user_network;
mod virtualbox;
mod world;
