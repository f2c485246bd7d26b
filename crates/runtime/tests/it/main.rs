//! What every runtime must do, on the stub always and on QEMU where there is one.

mod conformance;
mod initramfs;
mod lab;
mod proof;
