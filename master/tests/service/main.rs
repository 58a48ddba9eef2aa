//! A real master on a real disk and a real port, driven by raw frames: what clients and chunk daemons rely on.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod chunks;
mod daemon;
mod fsck;
mod group;
mod harness;
mod holds;
mod leases;
mod program;
mod sessions;
mod speed;
