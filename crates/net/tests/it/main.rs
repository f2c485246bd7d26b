//! The firewall against the kernel, each test in a network namespace of its own, without guests: the tests write and
//! read the frames of machines themselves.
#![expect(clippy::unwrap_used, reason = "tests")]

mod bed;
mod bridged;
mod dns;
mod frame;
mod keeping;
mod learning;
mod limits;
mod links;
mod moving;
mod names;
mod policy;
mod resolver;
mod rules;
mod spoofing;
mod sys;
mod taps;
