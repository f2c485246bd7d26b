//! The types and service traits generated from `proto/agent.proto`, for the agent and this crate alone: the host's
//! callers see the checked types of `Session` instead.

#![expect(missing_docs, reason = "generated; the schema carries the comments")]

tonic::include_proto!("hutch.agent.v1");
