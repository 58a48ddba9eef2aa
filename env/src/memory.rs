//! The allocator of every dfs program.
//!
//! Bytes travel in buffers of a MiB. glibc takes each from the kernel and gives it back, and the page faults then cost
//! more than all else that a read does: reading a GiB through a mount takes 1.6 s of processor time with glibc and 0.5 s
//! with jemalloc, which keeps what is free for a while. glibc that keeps it, too, needs twice the memory: each thread has
//! a heap of its own with holes in it.

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// One arena, as threads hand buffers to each other; what is free for a second goes back to the kernel.
// SAFETY: jemalloc reads a `const char *` of this name at its first allocation, or uses its defaults where it is null. The
// first word of a slice is the pointer to its bytes, which are static and end with a zero.
#[unsafe(export_name = "_rjem_malloc_conf")]
pub static SETTINGS: &[u8] = b"narenas:1,dirty_decay_ms:1000,muzzy_decay_ms:0\0";
