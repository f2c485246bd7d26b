//! The brain: what may happen, in which order, and after a crash. No HTTP, no environment, nothing printed.
//!
//! Reading order: [`plan`](mod@plan) holds all policy, `drive` performs its steps with one task per machine,
//! `machines` admits requests and `levels` changes what is wanted, `engine` starts everything again after a crash, `inventory` lists what may be left of
//! us on a host.

mod access;
mod admission;
mod choose;
mod config;
mod deadline;
mod dial;
mod doctor;
mod drive;
mod elsewhere;
mod engine;
mod error;
mod exec;
mod expose;
mod files;
mod fork;
mod hosts;
mod images;
mod inventory;
mod kernel;
mod keys;
mod levels;
mod lifetime;
mod machines;
mod names;
mod network;
mod operations;
mod outside;
mod phases;
mod plan;
mod pool;
mod ports;
mod prepare;
mod processes;
mod rows;
mod snapshots;
mod wait;
mod warm;

pub use config::{
    EngineConfig, Kernels, Mode, NamedKernel, NetworkConfig, Reach, RuntimeOptions, Urls,
};
pub use deadline::READY;
pub use doctor::doctor;
pub use elsewhere::{elsewhere, note_elsewhere};
pub use engine::Engine;
pub use error::Error;
pub use exec::Execution;
pub use expose::{Published, Reached, TokenFor};
pub use files::{ChangeFile, FileBytes, ListFiles, WriteFile};
pub use fork::Fork;
pub use hutch_disk::pool::Mode as PoolMode;
pub use hutch_net::cidr::Cidr;
pub use inventory::{Item, inventory};
pub use keys::Principal;
pub use machines::{Admitted, ListMachines};
pub use processes::{ExecOutput, ProcessInput};
pub use snapshots::ListSnapshots;
pub use wait::Target;

pub use hutch_image::child_main as build_disk_main;
pub use hutch_runtime::shim::main as shim_main;
