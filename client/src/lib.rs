//! The file system as a library: session, caches, write-behind, readahead. No FUSE in it.

pub mod master;
