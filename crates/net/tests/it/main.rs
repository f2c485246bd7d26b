//! The firewall against the kernel, each test in a network namespace of its own, without guests: the tests write and
//! read the frames of machines themselves.
#![expect(clippy::unwrap_used, reason = "tests")]

mod bed;
mod frame;
mod keeping;
mod learning;
mod links;
mod policy;
mod rules;
mod spoofing;
mod sys;
mod taps;
