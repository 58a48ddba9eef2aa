//! Makes a run depend on its seed alone: what libraries draw from the operating system (the keys of hash tables, election
//! time-outs) comes from the seed too, in the thread that runs it.

use rand::{Rng, SeedableRng, rngs::SmallRng};
use std::cell::RefCell;
use std::ffi::{c_long, c_uint, c_void};

thread_local! {
    /// None: this thread simulates nothing, and its randomness is the system's.
    static SEEDED: RefCell<Option<SmallRng>> = const { RefCell::new(None) };
}

/// Runs one seed on a thread of its own, where nothing was drawn before.
pub fn alone<T: Send>(seed: u64, run: impl FnOnce(u64) -> T + Send) -> T {
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            SEEDED.with(|seeded| *seeded.borrow_mut() = Some(SmallRng::seed_from_u64(seed)));
            run(seed)
        });
        running.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Takes the place of getrandom(2) of the C library, through which everything in this process draws.
///
/// # Safety
/// As the system's: `buffer` has room for `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    let drawn = SEEDED.try_with(|seeded| {
        let mut seeded = seeded.try_borrow_mut().ok()?;
        // SAFETY: the caller lends that many bytes, which may be written as such.
        let bytes = unsafe { std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length) };
        seeded.as_mut()?.fill_bytes(bytes);
        Some(length.cast_signed())
    });
    match drawn {
        Ok(Some(drawn)) => drawn,
        // SAFETY: the same call, made to the kernel.
        _ => unsafe { system_call(buffer, length, flags) },
    }
}

/// # Safety
/// As getrandom(2).
unsafe fn system_call(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    // SAFETY: as the caller promises.
    let drawn: c_long = unsafe { libc::syscall(libc::SYS_getrandom, buffer, length, flags) };
    isize::try_from(drawn).expect("not more than was asked for")
}
