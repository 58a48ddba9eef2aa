"""What docs/SEMANTICS.md promises, on a mount: promises.py DIRECTORY [TEST…]. Runs as root; each test has a directory."""

import ctypes
import errno
import fcntl
import json
import mmap
import multiprocessing
import os
import resource
import signal
import struct
import subprocess
import sys
import threading
import time
import unittest
from concurrent.futures import ThreadPoolExecutor

TOP = os.path.abspath(sys.argv.pop(1))
libc = ctypes.CDLL(None, use_errno=True)
EVERY_BYTE = bytes(b for b in range(1, 256) if b != ord("/"))
USER, OTHER = 1001, 1002


def as_user(uid, work, groups=()):
    """Runs `work` as somebody else in a process of its own; answers the errno that it failed with, or 0."""
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            os.setgroups(list(groups))
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            work()
            status = 0
        except OSError as error:
            status = error.errno
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def within(seconds, condition):
    """Waits until a condition holds, at most so long."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def places(path):
    """Where a file's bytes are, of each slice: (start in the file, end, chunk, what to add to find them in the chunk)."""
    path, mount = os.path.abspath(path), TOP
    while not os.path.ismount(mount):
        mount = os.path.dirname(mount)
    said = subprocess.run(["dfs", "stat", "--json", "--chunks", "/" + os.path.relpath(path, mount)],
                          check=True, stdout=subprocess.PIPE, timeout=60).stdout
    return [(one["offset"], one["offset"] + one["length"], one["chunk"], one["chunk_offset"] - one["offset"])
            for one in json.loads(said)[0]["slices"]]


def write(path, data=b"", mode=0o644):
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)


def read(path):
    with open(path, "rb") as file:
        return file.read()


class Base(unittest.TestCase):
    def setUp(self):
        self.dir = os.path.join(TOP, self.id())
        os.mkdir(self.dir)
        os.chmod(self.dir, 0o777)
        os.chdir(self.dir)
        os.umask(0o022)

    def fails(self, number, call, *args, **named):
        with self.assertRaises(OSError) as caught:
            call(*args, **named)
        self.assertEqual(errno.errorcode[caught.exception.errno], errno.errorcode[number])


class Names(Base):
    def test_names_are_any_bytes_but_slash_and_zero_up_to_255(self):
        names = {bytes([b]) * 255 for b in EVERY_BYTE if b != ord(".")} | {EVERY_BYTE[:200], EVERY_BYTE[200:]}
        for name in names:
            write(name)
        self.assertEqual(set(os.listdir(b".")), names)
        self.fails(errno.ENAMETOOLONG, write, b"n" * 256)
        self.fails(errno.ENAMETOOLONG, os.stat, b"n" * 256)
        self.fails(errno.ENAMETOOLONG, os.mkdir, b"n" * 256)

    def test_65000_hard_links(self):
        write("f", b"x")
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda n: os.link("f", f"l{n}"), range(64_999)))
        self.assertEqual(os.stat("f").st_nlink, 65_000)
        self.fails(errno.EMLINK, os.link, "f", "more")
        os.unlink("l7")
        self.assertEqual(os.stat("l8").st_nlink, 64_999)
        os.link("f", "more")
        self.assertEqual(len(os.listdir(".")), 65_000)

    def test_rename_over_everything(self):
        def make(kind, name):
            {"file": lambda: write(name), "symlink": lambda: os.symlink("nowhere", name),
             "empty": lambda: os.mkdir(name), "full": lambda: (os.mkdir(name), write(name + "/in"))}[kind]()

        wanted = {("file", "empty"): errno.EISDIR, ("file", "full"): errno.EISDIR,
                  ("symlink", "empty"): errno.EISDIR, ("symlink", "full"): errno.EISDIR,
                  ("empty", "file"): errno.ENOTDIR, ("empty", "symlink"): errno.ENOTDIR,
                  ("full", "file"): errno.ENOTDIR, ("full", "symlink"): errno.ENOTDIR,
                  ("empty", "full"): errno.ENOTEMPTY, ("full", "full"): errno.ENOTEMPTY}
        kinds = ["file", "symlink", "empty", "full"]
        for source in kinds:
            for target in kinds:
                a, b = f"{source}-{target}-a", f"{source}-{target}-b"
                make(source, a)
                make(target, b)
                before = os.lstat(a).st_ino
                if (source, target) in wanted:
                    self.fails(wanted[source, target], os.rename, a, b)
                    self.assertEqual(os.lstat(a).st_ino, before)
                else:
                    os.rename(a, b)
                    self.assertEqual(os.lstat(b).st_ino, before)
                    self.assertFalse(os.path.lexists(a))

    def test_rename_exchange_noreplace_and_loops(self):
        def rename(a, b, flags):
            if libc.renameat2(-100, a.encode(), -100, b.encode(), flags) != 0:
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))

        noreplace, exchange = 1, 2
        write("f", b"f")
        os.makedirs("d/e/g")
        self.fails(errno.EEXIST, rename, "f", "d", noreplace)
        self.fails(errno.ENOENT, rename, "f", "none", exchange)
        rename("f", "d", exchange)
        self.assertEqual(read("d"), b"f")
        self.assertTrue(os.path.isdir("f/e/g"))
        rename("d", "new", noreplace)
        for flags in (0, noreplace):
            self.fails(errno.EINVAL, rename, "f", "f/e/g/x", flags)
        self.fails(errno.EINVAL, rename, "f", "f/e", exchange)
        self.fails(errno.ENOTEMPTY, rename, "f/e", "f", 0)
        os.rename("new", "new")
        os.link("new", "same")
        os.rename("new", "same")
        self.assertEqual(sorted(os.listdir(".")), ["f", "new", "same"])

    def test_directory_positions_stay_while_entries_come_and_go(self):
        names = {f"stays{n}" for n in range(3000)}
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(write, names))
        libc.opendir.restype = ctypes.c_void_p
        libc.readdir.restype = ctypes.c_void_p
        libc.telldir.restype = ctypes.c_long
        for call in (libc.readdir, libc.telldir, libc.closedir):
            call.argtypes = [ctypes.c_void_p]
        libc.seekdir.argtypes = [ctypes.c_void_p, ctypes.c_long]
        stop, rounds = threading.Event(), []

        def churn():
            while not stop.is_set():
                for n in range(200):
                    write(f"comes{n}")
                for n in range(200):
                    os.unlink(f"comes{n}")
                rounds.append(1)

        def walk(seek):
            stream, seen = libc.opendir(b"."), []
            while entry := libc.readdir(stream):
                name = ctypes.string_at(entry + 19).decode()
                if name in names:
                    seen.append(name)
                if seek and len(seen) % 97 == 0:
                    # Forgets what it had buffered and comes back to the same place.
                    here = libc.telldir(stream)
                    libc.seekdir(stream, here)
            libc.closedir(stream)
            return seen

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for n in range(10):
                seen = walk(seek=n % 2 == 1)
                self.assertEqual(len(seen), len(set(seen)), "an entry came twice")
                self.assertEqual(set(seen), names, "an entry was missed")
            self.assertTrue(within(60, lambda: rounds), "nothing came and went")
        finally:
            stop.set()
            thread.join()

    def test_file_handles_outlive_names_and_end_with_the_inode(self):
        write("f", b"found")
        # struct file_handle: room, type, bytes.
        handle = ctypes.create_string_buffer(struct.pack("Ii", 120, 0), 128)
        mount_id = ctypes.c_int()
        if libc.name_to_handle_at(-100, b"f", handle, ctypes.byref(mount_id), 0) != 0:
            self.fail(os.strerror(ctypes.get_errno()))
        os.rename("f", "g")
        top = os.open(".", os.O_RDONLY | os.O_DIRECTORY)

        def by_handle():
            fd = libc.open_by_handle_at(top, handle, os.O_RDONLY)
            if fd < 0:
                raise OSError(ctypes.get_errno(), "")
            with os.fdopen(fd, "rb") as file:
                return file.read()

        self.assertEqual(by_handle(), b"found")
        os.unlink("g")
        with open("/proc/sys/vm/drop_caches", "w") as drop:
            drop.write("2")
        self.fails(errno.ESTALE, by_handle)
        os.close(top)


class OpenFiles(Base):
    def test_appends_of_many_processes_are_whole(self):
        def lines(who):
            fd = os.open("log", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            for n in range(1000):
                os.write(fd, b"%d %d\n" % (who, n))
            os.close(fd)

        writers = [multiprocessing.Process(target=lines, args=(n,)) for n in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        got = read("log").split(b"\n")
        self.assertEqual(got.pop(), b"")
        for who in range(4):
            mine = [line for line in got if line.startswith(b"%d " % who)]
            self.assertEqual(mine, [b"%d %d" % (who, n) for n in range(1000)])

    def test_exclusive_create_has_one_winner(self):
        for n in range(50):
            with ThreadPoolExecutor(4) as pool:
                def make(_):
                    try:
                        os.close(os.open(f"f{n}", os.O_CREAT | os.O_EXCL))
                        return 1
                    except FileExistsError:
                        return 0
                self.assertEqual(sum(pool.map(make, range(4))), 1)
        os.symlink("nowhere", "dangling")
        self.fails(errno.EEXIST, os.open, "dangling", os.O_CREAT | os.O_EXCL)

    def test_truncate_at_open(self):
        write("f", b"before")
        os.utime("f", (1, 1))
        os.close(os.open("f", os.O_WRONLY | os.O_TRUNC))
        self.assertEqual(os.stat("f").st_size, 0)
        self.assertGreater(os.stat("f").st_mtime, 1)
        os.chmod("f", 0o444)
        self.assertEqual(as_user(USER, lambda: os.open("f", os.O_WRONLY | os.O_TRUNC)), errno.EACCES)

    def test_direct_and_cached_io_agree(self):
        page = mmap.mmap(-1, 8192)
        page.write(b"d" * 8192)
        direct = os.open("f", os.O_RDWR | os.O_CREAT | os.O_DIRECT)
        cached = os.open("f", os.O_RDWR)
        self.assertEqual(os.pwrite(cached, b"c" * 8192, 0), 8192)
        self.assertEqual(os.preadv(direct, [page], 0), 8192)
        self.assertEqual(page[:], b"c" * 8192)
        page[:] = b"D" * 8192
        self.assertEqual(os.pwritev(direct, [page], 4096), 8192)
        self.assertEqual(os.pread(cached, 20000, 0), b"c" * 4096 + b"D" * 8192)
        os.close(direct)
        os.close(cached)

    def test_nameless_files_fall_back(self):
        # FUSE has O_TMPFILE, the library does not: programs make a name and unlink it.
        self.fails(errno.EOPNOTSUPP, os.open, ".", os.O_TMPFILE | os.O_RDWR)
        import tempfile
        with tempfile.TemporaryFile(dir=".") as file:
            file.write(b"x")
        self.assertEqual(os.listdir("."), [])

    def test_unlinked_files_live_until_the_last_close(self):
        fd = os.open("f", os.O_RDWR | os.O_CREAT)
        other = os.open("f", os.O_RDONLY)
        os.write(fd, b"one")
        os.unlink("f")
        self.assertEqual(os.fstat(fd).st_nlink, 0)
        os.pwrite(fd, b"two", 5000)
        os.fsync(fd)
        os.fchmod(fd, 0o600)
        os.ftruncate(fd, 6000)
        self.assertEqual(os.pread(other, 3, 5000), b"two")
        self.assertEqual((os.fstat(other).st_size, os.fstat(other).st_mode & 0o777), (6000, 0o600))
        os.mkdir("d")
        dir_fd = os.open("d", os.O_RDONLY)
        os.rmdir("d")
        self.assertEqual(os.listdir(dir_fd), [])
        self.fails(errno.ENOENT, os.open, "in", os.O_CREAT | os.O_WRONLY, dir_fd=dir_fd)
        for n in (fd, other, dir_fd):
            os.close(n)

    def test_shared_and_private_mappings(self):
        write("f", b"." * 10000)
        fd = os.open("f", os.O_RDWR)
        shared = mmap.mmap(fd, 10000)
        private = mmap.mmap(fd, 10000, flags=mmap.MAP_PRIVATE)
        shared[5000:5006] = b"shared"
        self.assertEqual(os.pread(fd, 6, 5000), b"shared")
        self.assertEqual(private[5000:5006], b"shared")
        private[0:7] = b"private"
        self.assertEqual(os.pread(fd, 7, 0), b"." * 7)
        os.pwrite(fd, b"written", 9000)
        self.assertEqual(shared[9000:9007], b"written")
        shared.flush()
        self.assertEqual(subprocess.check_output(["cat", "f"])[5000:5006], b"shared")
        os.close(fd)

    def test_dup_and_fork_share_the_offset(self):
        fd = os.open("f", os.O_RDWR | os.O_CREAT)
        again = os.dup(fd)
        os.write(fd, b"abc")
        self.assertEqual(os.lseek(again, 0, os.SEEK_CUR), 3)
        child = os.fork()
        if child == 0:
            os.write(again, b"def")
            os._exit(0)
        os.waitpid(child, 0)
        os.write(fd, b"ghi")
        self.assertEqual(read("f"), b"abcdefghi")
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(again, fcntl.F_SETFL, flags | os.O_APPEND)
        os.lseek(fd, 0, os.SEEK_SET)
        os.write(fd, b"end")
        self.assertEqual(read("f"), b"abcdefghiend")

    def test_a_program_need_not_be_readable_to_be_run(self):
        subprocess.check_call(["cp", "/bin/true", "program"])
        os.chmod("program", 0o711)
        self.assertEqual(as_user(USER, lambda: read("program")), errno.EACCES)
        self.assertEqual(as_user(USER, lambda: os.execv("program", ["program"])), 0)
        os.chmod("program", 0o744)
        self.assertEqual(as_user(USER, lambda: os.execv("program", ["program"])), errno.EACCES)

    def test_a_running_program_is_not_written(self):
        subprocess.check_call(["cp", "/bin/sleep", "program"])
        child = subprocess.Popen(["./program", "60"])
        try:
            self.fails(errno.ETXTBSY, os.open, "program", os.O_WRONLY)
        finally:
            child.kill()
            child.wait()


def range_lock(kind, start, length):
    return struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)


class Locks(Base):
    def setUp(self):
        super().setUp()
        write("f", b"x" * 100)
        write("g", b"x" * 100)

    def child(self, work):
        """A process that works, says so, and waits until it is told to end."""
        ready, go = os.pipe(), os.pipe()
        pid = os.fork()
        if pid == 0:
            status = 99
            try:
                os.close(go[1])
                work()
                os.write(ready[1], b"!")
                os.read(go[0], 1)
                status = 0
            except OSError as error:
                status = error.errno
            finally:
                os._exit(status)
        os.close(ready[1])
        os.close(go[0])
        self.addCleanup(lambda: os.close(ready[0]))
        said = os.read(ready[0], 1)
        self.assertEqual(said, b"!")

        def end():
            os.close(go[1])
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return pid, end

    def held(self, name, kind=fcntl.LOCK_EX, start=0, length=0):
        def work():
            fcntl.lockf(open(name, "r+b"), kind, length, start)
            self.kept = None
        return work

    def test_ranges_exclude_each_other_and_say_whose_they_are(self):
        def work():
            self.kept = open("f", "r+b")
            fcntl.lockf(self.kept, fcntl.LOCK_EX, 10, 20)

        pid, end = self.child(work)
        with open("f", "r+b") as file:
            self.fails(errno.EAGAIN, fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB, 5, 25)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 20, 0)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 0, 30)
            kind, _, start, length, owner = struct.unpack(
                "hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, range_lock(fcntl.F_RDLCK, 0, 0)))
            self.assertEqual((kind, start, length, owner), (fcntl.F_WRLCK, 20, 10, pid))
            self.assertEqual(end(), 0)
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_any_close_gives_up_a_process_s_ranges(self):
        first = open("f", "r+b")
        fcntl.lockf(first, fcntl.LOCK_EX)
        open("f").close()
        attempt = as_user(0, lambda: fcntl.lockf(open("f", "r+b"), fcntl.LOCK_EX | fcntl.LOCK_NB))
        self.assertEqual(attempt, 0)
        first.close()

    def test_whole_file_locks_belong_to_the_open_file(self):
        first, second = open("f"), open("f")
        fcntl.flock(first, fcntl.LOCK_EX)
        self.fails(errno.EAGAIN, fcntl.flock, second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        again = os.dup(first.fileno())
        first.close()
        self.fails(errno.EAGAIN, fcntl.flock, second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        os.close(again)
        fcntl.flock(second, fcntl.LOCK_SH | fcntl.LOCK_NB)
        third = open("f")
        fcntl.flock(third, fcntl.LOCK_SH | fcntl.LOCK_NB)
        self.fails(errno.EAGAIN, fcntl.flock, third, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def test_a_killed_process_holds_nothing(self):
        def work():
            self.kept = [open("f", "r+b"), open("g", "r+b")]
            fcntl.lockf(self.kept[0], fcntl.LOCK_EX)
            fcntl.flock(self.kept[1], fcntl.LOCK_EX)

        pid, end = self.child(work)
        os.kill(pid, signal.SIGKILL)
        with open("f", "r+b") as f, open("g", "r+b") as g:
            start = time.monotonic()
            fcntl.lockf(f, fcntl.LOCK_EX)
            fcntl.flock(g, fcntl.LOCK_EX)
            self.assertLess(time.monotonic() - start, 5)
        end()

    def test_waiters_go_on_when_the_lock_is_free(self):
        for lock in (fcntl.lockf, fcntl.flock):
            def work():
                self.kept = open("f", "r+b")
                lock(self.kept, fcntl.LOCK_EX)

            _, end = self.child(work)
            done = []

            def wait():
                with open("f", "r+b") as file:
                    lock(file, fcntl.LOCK_EX)
                    done.append(1)

            waiter = threading.Thread(target=wait)
            waiter.start()
            waiter.join(0.3)
            self.assertEqual(done, [])
            end()
            waiter.join(10)
            self.assertEqual(done, [1])

    def test_two_that_wait_for_each_other_are_told(self):
        mine = open("f", "r+b")
        fcntl.lockf(mine, fcntl.LOCK_EX, 1, 0)
        attempts = os.pipe()

        def work():
            file = open("f", "r+b")
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 1)
            os.write(attempts[1], b"!")
            fcntl.lockf(file, fcntl.LOCK_EX, 1, 0)

        pid = os.fork()
        if pid == 0:
            status = 0
            try:
                work()
            except OSError as error:
                status = error.errno
            finally:
                os._exit(status)
        os.read(attempts[0], 1)
        # Whoever comes second is told. The alarm is the bound.
        signal.signal(signal.SIGALRM, lambda *_: None)
        signal.setitimer(signal.ITIMER_REAL, 20)
        told = 0
        try:
            libc_lock(mine.fileno(), 1, 1)
        except OSError as error:
            told = error.errno
        signal.setitimer(signal.ITIMER_REAL, 0)
        mine.close()
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.assertEqual(sorted([told, status]), [0, errno.EDEADLK])

    def test_a_signal_ends_a_wait(self):
        def work():
            self.kept = open("f", "r+b")
            fcntl.lockf(self.kept, fcntl.LOCK_EX)

        _, end = self.child(work)
        with open("f", "r+b") as file:
            signal.signal(signal.SIGALRM, lambda *_: None)
            signal.setitimer(signal.ITIMER_REAL, 0.5)
            start = time.monotonic()
            self.fails(errno.EINTR, libc_lock, file.fileno(), 0, 0)
            self.assertLess(time.monotonic() - start, 5)
        waiter = os.fork()
        if waiter == 0:
            fcntl.flock(open("f", "r+b"), fcntl.LOCK_EX)
            os._exit(0)
        time.sleep(0.3)
        os.kill(waiter, signal.SIGKILL)
        self.assertTrue(within(5, lambda: os.waitpid(waiter, os.WNOHANG)[0] == waiter))
        self.assertEqual(end(), 0)


def libc_lock(fd, start, length):
    """F_SETLKW without Python's own repetition after a signal."""
    lock = ctypes.create_string_buffer(range_lock(fcntl.F_WRLCK, start, length))
    if libc.fcntl(fd, fcntl.F_SETLKW, lock) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class Times(Base):
    def test_times_from_long_ago_to_far_ahead(self):
        write("f")
        for seconds in (-62_135_596_800, -86_400, -1, 0, 2**31, 4_102_444_800, 253_402_300_799):
            for nanos in (0, 1, 999_999_999):
                time_ns = seconds * 10**9 + nanos
                os.utime("f", ns=(time_ns, time_ns + 1 if nanos < 999_999_999 else time_ns))
                self.assertEqual(os.stat("f").st_atime_ns, time_ns)
        fd = os.open("f", os.O_RDONLY)
        self.assertEqual(os.fstat(fd).st_mtime_ns, 253_402_300_799_999_999_999)
        os.close(fd)

    def test_reading_moves_atime_as_relatime_does(self):
        write("f", b"x" * 10)
        os.utime("f", (1000, 2000))
        read("f")
        first = os.stat("f").st_atime
        self.assertGreater(first, 2000, "older than mtime: it moves")
        time.sleep(0.02)
        read("f")
        self.assertEqual(os.stat("f").st_atime, first, "within a day: it stays")
        os.utime("f", (1000, 2000))
        fd = os.open("f", os.O_RDONLY | os.O_NOATIME)
        os.read(fd, 10)
        os.close(fd)
        self.assertEqual(os.stat("f").st_atime, 1000, "O_NOATIME")

    def test_what_changes_moves_ctime_and_the_parent_s_times(self):
        write("f", b"x")
        os.mkdir("d")

        def moved(change, *paths):
            before = {path: os.lstat(path) for path in paths}
            time.sleep(0.01)
            change()
            return [(os.lstat(path).st_mtime_ns > before[path].st_mtime_ns,
                     os.lstat(path).st_ctime_ns > before[path].st_ctime_ns) for path in paths]

        both, ctime, none = (True, True), (False, True), (False, False)
        self.assertEqual(moved(lambda: os.chmod("f", 0o600), "f", "."), [ctime, none])
        self.assertEqual(moved(lambda: os.chown("f", 1, 1), "f", "."), [ctime, none])
        self.assertEqual(moved(lambda: os.link("f", "d/l"), "f", "d", "."), [ctime, both, none])
        self.assertEqual(moved(lambda: os.unlink("d/l"), "f", "d"), [ctime, both])
        self.assertEqual(moved(lambda: os.rename("f", "d/f"), ".", "d"), [both, both])
        self.assertEqual(moved(lambda: os.rename("d/f", "f"), ".", "d"), [both, both])
        self.assertEqual(moved(lambda: os.truncate("f", 5), "f", "."), [both, none])
        self.assertEqual(moved(lambda: os.setxattr("f", "user.a", b"1"), "f"), [ctime])
        self.assertEqual(moved(lambda: os.mkdir("d/e"), "d", "."), [both, none])
        self.assertEqual(moved(lambda: os.rmdir("d/e"), "d"), [both])
        with open("f", "ab") as file:
            self.assertEqual(moved(lambda: (file.write(b"y"), file.flush()), "f"), [both])

    def test_birth_time_and_names_of_the_file_system(self):
        write("f")
        shown = subprocess.check_output(["stat", "-f", "-c", "%l %T", "f"]).split()
        self.assertEqual(shown[0], b"255")
        self.assertEqual(os.pathconf("f", "PC_NAME_MAX"), 255)


class Space(Base):
    def test_space_adds_up(self):
        stat = os.statvfs(".")
        self.assertGreater(stat.f_blocks, 0)
        self.assertLessEqual(stat.f_bfree, stat.f_blocks)
        self.assertLessEqual(stat.f_bavail, stat.f_bfree)
        self.assertLessEqual(stat.f_ffree, stat.f_files)
        size = 64 << 20
        with open("f", "wb") as file:
            file.write(os.urandom(size))
            os.fsync(file.fileno())

        def less():
            return (stat.f_bavail - os.statvfs(".").f_bavail) * stat.f_frsize
        self.assertTrue(within(20, lambda: less() >= size * 0.9), f"{less()} bytes less are free")
        # Blocks are of 512 bytes, whatever st_blksize says.
        self.assertEqual(os.stat("f").st_blocks, size // 512)

    def test_holes_take_nothing(self):
        with open("f", "wb") as file:
            file.truncate(1 << 40)
            file.seek(1 << 30)
            file.write(b"x" * 8192)
        self.assertEqual((os.stat("f").st_size, os.stat("f").st_blocks), (1 << 40, 16))
        fd = os.open("f", os.O_RDWR)
        self.assertEqual(os.lseek(fd, 0, os.SEEK_DATA), 1 << 30)
        self.assertEqual(os.lseek(fd, 1 << 30, os.SEEK_HOLE), (1 << 30) + 8192)
        self.assertEqual(os.pread(fd, 10, 5), b"\0" * 10)
        self.fails(errno.ENXIO, os.lseek, fd, (1 << 30) + 8192, os.SEEK_DATA)
        punch = 0x3
        self.assertEqual(libc.fallocate(fd, punch, ctypes.c_long(1 << 30), ctypes.c_long(4096)), 0)
        self.assertEqual(os.fstat(fd).st_blocks, 8)
        os.close(fd)

    def test_fallocate_grows_zeroes_and_refuses_what_it_cannot(self):
        with open("f", "wb") as file:
            file.write(b"x" * 10000)
        fd = os.open("f", os.O_RDWR)

        def fallocate(mode, offset, length):
            if libc.fallocate(fd, mode, ctypes.c_long(offset), ctypes.c_long(length)) != 0:
                raise OSError(ctypes.get_errno(), "")

        keep, punch, collapse, zero, insert, unshare = 1, 2, 8, 16, 32, 64
        fallocate(0, 5000, 10000)
        self.assertEqual(os.fstat(fd).st_size, 15000)
        fallocate(keep, 15000, 10000)
        self.assertEqual(os.fstat(fd).st_size, 15000)
        fallocate(punch | keep, 1000, 1000)
        fallocate(zero, 3000, 1000)
        fallocate(zero | keep, 14000, 9000)
        wanted = bytearray(b"x" * 10000 + b"\0" * 5000)
        wanted[1000:2000] = wanted[3000:4000] = b"\0" * 1000
        self.assertEqual(os.pread(fd, 20000, 0), bytes(wanted))
        for mode in (collapse, insert, unshare):
            self.fails(errno.EOPNOTSUPP, fallocate, mode, 0, 4096)
        self.fails(errno.EINVAL, fallocate, 0, 0, 0)
        self.fails(errno.EFBIG, fallocate, 0, (1 << 63) - 1000, 2000)
        os.close(fd)

    def test_sizes_up_to_2_63_minus_1(self):
        most = (1 << 63) - 1
        write("f")
        os.truncate("f", most)
        self.assertEqual(os.stat("f").st_size, most)
        fd = os.open("f", os.O_RDWR)
        self.assertEqual(os.pwrite(fd, b"x", most - 1), 1)
        self.assertEqual(os.pread(fd, 1, most - 1), b"x")
        # The kernel's answer, before any file system is asked.
        self.fails(errno.EINVAL, os.pwrite, fd, b"x", most)
        os.close(fd)
        os.truncate("f", 0)

    def test_the_limit_of_a_process_holds(self):
        def work():
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))
            fd = os.open("f", os.O_WRONLY | os.O_CREAT)
            if os.write(fd, b"x" * 20000) != 10000:
                os._exit(98)
            os.write(fd, b"x")
        self.assertEqual(as_user(USER, work), errno.EFBIG)

    def test_copies_share_their_bytes(self):
        data = os.urandom(8 << 20)
        write("f", data)
        source, target = os.open("f", os.O_RDONLY), os.open("g", os.O_RDWR | os.O_CREAT)
        done = 0
        while done < len(data):
            done += os.copy_file_range(source, target, len(data) - done)
        self.assertEqual(os.pread(target, len(data), 0), data)
        os.pwrite(target, b"changed", 1000)
        self.assertEqual(os.pread(source, 7, 1000), data[1000:1007])
        os.close(source)
        os.close(target)
        # statfs tells what the daemons last said; where the bytes are is exact.
        of_source, of_target = places("f"), places("g")
        self.assertEqual([sum(end - start for start, end, *_ in of) for of in (of_source, of_target)], [len(data)] * 2)
        shared = sum(max(0, min(end, end_) - max(start, start_))
                     for start, end, *place in of_source for start_, end_, *place_ in of_target if place == place_)
        self.assertEqual(shared, len(data) - len(b"changed"))

    def test_replicas_and_chunk_size_by_directory(self):
        os.mkdir("d")
        os.setxattr("d", "user.dfs.replication", b"2")
        os.setxattr("d", "user.dfs.chunk_size", b"1MiB")
        write("d/f", b"x" * (3 << 20))
        os.mkdir("d/e")
        for name in ("d/f", "d/e"):
            self.assertEqual(os.getxattr(name, "user.dfs.replication"), b"2")
            self.assertEqual(os.getxattr(name, "user.dfs.chunk_size"), b"1048576")
            self.assertEqual(os.listxattr(name), [])
        self.assertEqual(read("d/f"), b"x" * (3 << 20))
        self.fails(errno.EINVAL, os.setxattr, "d", "user.dfs.replication", b"none")
        os.removexattr("d", "user.dfs.replication")
        self.fails(errno.ENODATA, os.getxattr, "d", "user.dfs.replication")
        self.assertEqual(as_user(USER, lambda: os.setxattr("d", "user.dfs.replication", b"1")), errno.EACCES)


class Permissions(Base):
    def test_groups_of_the_caller_count(self):
        write("f", b"secret", 0o640)
        os.chown("f", 0, 2001)
        self.assertEqual(as_user(USER, lambda: read("f")), errno.EACCES)
        self.assertEqual(as_user(USER, lambda: read("f"), groups=[2001]), 0)
        self.assertEqual(as_user(USER, lambda: write("f"), groups=[2001]), errno.EACCES)

    def test_sticky_directories(self):
        os.mkdir("d")
        os.chmod("d", 0o1777)
        write("d/f")
        os.chown("d/f", USER, USER)
        self.assertEqual(as_user(OTHER, lambda: os.unlink("d/f")), errno.EPERM)
        self.assertEqual(as_user(OTHER, lambda: os.rename("d/f", "d/g")), errno.EPERM)
        self.assertEqual(as_user(USER, lambda: os.unlink("d/f")), 0)

    def test_set_group_id_directories_hand_on_their_group(self):
        os.mkdir("d")
        os.chown("d", 0, 2001)
        os.chmod("d", 0o2777)
        self.assertEqual(as_user(USER, lambda: (write("d/f"), os.mkdir("d/e"))), 0)
        self.assertEqual((os.stat("d/f").st_gid, os.stat("d/e").st_gid), (2001, 2001))
        self.assertEqual(os.stat("d/e").st_mode & 0o7000, 0o2000)

    def test_privileges_end_with_writes_truncates_and_chowns(self):
        changes = {
            "write": lambda: os.write(os.open("f", os.O_WRONLY), b"y"),
            "append": lambda: os.write(os.open("f", os.O_WRONLY | os.O_APPEND), b"y"),
            "truncate": lambda: os.truncate("f", 1),
            "open": lambda: os.open("f", os.O_WRONLY | os.O_TRUNC),
            "fallocate": lambda: os.posix_fallocate(os.open("f", os.O_WRONLY), 0, 100),
        }
        capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
        for name, change in changes.items():
            with self.subTest(name):
                write("f", b"xx")
                os.chmod("f", 0o6777)
                os.setxattr("f", "security.capability", capability)
                self.assertEqual(as_user(USER, change), 0)
                self.assertEqual(oct(os.stat("f").st_mode & 0o7777), oct(0o777))
                self.fails(errno.ENODATA, os.getxattr, "f", "security.capability")
        write("g", b"xx")
        os.chmod("g", 0o6777)
        os.setxattr("g", "security.capability", capability)
        os.chown("g", USER, USER)
        self.assertEqual(oct(os.stat("g").st_mode & 0o7777), oct(0o777))
        self.fails(errno.ENODATA, os.getxattr, "g", "security.capability")
        write("h", b"xx")
        os.chmod("h", 0o6777)
        os.write(os.open("h", os.O_WRONLY), b"y")
        self.assertEqual(oct(os.stat("h").st_mode & 0o7777), oct(0o6777), "root's writes end nothing")

    def test_owners_and_times(self):
        write("f")
        os.chown("f", USER, USER)
        os.chmod("f", 0o666)
        self.assertEqual(as_user(USER, lambda: os.chown("f", OTHER, -1)), errno.EPERM)
        self.assertEqual(as_user(USER, lambda: os.chown("f", -1, 2001)), errno.EPERM)
        self.assertEqual(as_user(USER, lambda: os.chown("f", -1, 2001), groups=[2001]), 0)
        self.assertEqual(as_user(OTHER, lambda: os.utime("f")), 0)
        self.assertEqual(as_user(OTHER, lambda: os.utime("f", (1, 1))), errno.EPERM)
        os.chmod("f", 0o644)
        self.assertEqual(as_user(OTHER, lambda: os.utime("f")), errno.EACCES)
        self.assertEqual(as_user(OTHER, lambda: os.chmod("f", 0o777)), errno.EPERM)


class Acls(Base):
    def acl(self, *args):
        subprocess.check_call(["setfacl", *args])

    def shown(self, name):
        out = subprocess.check_output(["getfacl", "-cn", "--", name], stderr=subprocess.DEVNULL).decode()
        return [line.split("\t")[0] for line in out.split("\n") if line]

    def test_named_users_and_groups_and_the_mask(self):
        write("f", b"secret", 0o600)
        self.assertEqual(as_user(USER, lambda: read("f")), errno.EACCES)
        self.acl("-m", f"u:{USER}:rw,g:2001:r", "f")
        self.assertEqual(self.shown("f"), ["user::rw-", f"user:{USER}:rw-", "group::---", "group:2001:r--",
                                           "mask::rw-", "other::---"])
        self.assertEqual(os.stat("f").st_mode & 0o777, 0o660, "the group bits show the mask")
        self.assertEqual(as_user(USER, lambda: (read("f"), write("f", b"new"))), 0)
        self.assertEqual(as_user(OTHER, lambda: read("f"), groups=[2001]), 0)
        self.assertEqual(as_user(OTHER, lambda: write("f"), groups=[2001]), errno.EACCES)
        self.assertEqual(as_user(OTHER, lambda: read("f")), errno.EACCES)
        os.chmod("f", 0o640)
        self.assertIn("mask::r--", self.shown("f"))
        self.assertEqual(as_user(USER, lambda: write("f")), errno.EACCES)
        self.acl("-b", "f")
        self.assertEqual(self.shown("f"), ["user::rw-", "group::---", "other::---"])

    def test_defaults_are_inherited(self):
        os.mkdir("d")
        os.chmod("d", 0o777)
        self.acl("-d", "-m", f"u::rwx,u:{USER}:rwx,g::rx,o::-", "d")
        os.umask(0o077)
        write("d/f", b"x", 0o666)
        os.mkdir("d/e")
        self.assertEqual(self.shown("d/f"), ["user::rw-", f"user:{USER}:rwx", "group::r-x", "mask::rw-", "other::---"])
        self.assertEqual([line for line in self.shown("d/e") if line.startswith("default:")],
                         [line for line in self.shown("d") if line.startswith("default:")])
        self.assertEqual(as_user(USER, lambda: (write("d/f"), write("d/e/g"))), 0)
        self.assertEqual(as_user(OTHER, lambda: read("d/f")), errno.EACCES)
        self.acl("-k", "d")
        write("d/later", b"x", 0o666)
        self.assertEqual(os.stat("d/later").st_mode & 0o777, 0o600, "without a default the umask counts")


class Xattrs(Base):
    def test_limits_and_flags(self):
        write("f")
        os.setxattr("f", "user.most", b"v" * 65536)
        self.assertEqual(os.getxattr("f", "user.most"), b"v" * 65536)
        self.fails(errno.E2BIG, os.setxattr, "f", "user.more", b"v" * 65537)
        longest = "user." + "n" * 250
        os.setxattr("f", longest, b"")
        self.fails(errno.ERANGE, os.setxattr, "f", longest + "n", b"")
        self.assertEqual(sorted(os.listxattr("f")), ["user.most", longest])
        self.fails(errno.EEXIST, os.setxattr, "f", "user.most", b"", os.XATTR_CREATE)
        self.fails(errno.ENODATA, os.setxattr, "f", "user.none", b"", os.XATTR_REPLACE)
        self.fails(errno.ENODATA, os.getxattr, "f", "user.none")
        self.fails(errno.ENODATA, os.removexattr, "f", "user.none")
        self.fails(errno.EOPNOTSUPP, os.setxattr, "f", "unknown.a", b"")
        os.symlink("f", "s")
        self.fails(errno.EPERM, os.setxattr, "s", "user.a", b"", follow_symlinks=False)
        os.setxattr("s", "trusted.a", b"1", follow_symlinks=False)
        self.assertEqual(os.listxattr("s", follow_symlinks=False), ["trusted.a"])

    def test_who_may(self):
        write("f")
        os.setxattr("f", "trusted.t", b"1")
        os.setxattr("f", "user.u", b"1")

        def seen():
            if os.listxattr("f") != ["user.u"]:
                os._exit(98)
        self.assertEqual(as_user(USER, seen), 0)
        self.assertEqual(as_user(USER, lambda: os.getxattr("f", "user.u")), 0)
        self.assertEqual(as_user(USER, lambda: os.getxattr("f", "trusted.t")), errno.ENODATA)
        self.assertEqual(as_user(USER, lambda: os.setxattr("f", "trusted.t", b"2")), errno.EPERM)
        self.assertEqual(as_user(USER, lambda: os.setxattr("f", "user.u", b"2")), errno.EACCES)


if __name__ == "__main__":
    unittest.main(verbosity=2)
