"""Two mounts of one cluster show one truth: coherence.py MOUNT-A MOUNT-B [TEST…]. DFS_ROUNDS scales the random
ones, DFS_SECONDS how long many work in one directory."""

import errno
import fcntl
import mmap
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
import unittest

MOUNTS = [os.path.abspath(sys.argv.pop(1)), os.path.abspath(sys.argv.pop(1))]
ROUNDS = int(os.environ.get("DFS_ROUNDS", "10000"))
SECONDS = int(os.environ.get("DFS_SECONDS", "10"))
SEED = int(os.environ.get("DFS_SEED", "1"))


def read(path):
    with open(path, "rb") as file:
        return file.read()


def processes(work, arguments):
    """Runs `work` in a process for each of the arguments; their answers, in order. Whoever takes too long is killed."""
    def child(pipe, argument):
        try:
            pipe.send((True, work(*argument)))
        except BaseException as error:  # pylint: disable=broad-except
            pipe.send((False, f"{type(error).__name__}: {error}"))
    running = []
    for argument in arguments:
        ours, theirs = multiprocessing.Pipe()
        process = multiprocessing.Process(target=child, args=(theirs, argument))
        process.start()
        theirs.close()
        running.append((process, ours))
    answers = []
    for process, pipe in running:
        answers.append(pipe.recv() if pipe.poll(300) else (False, "took too long"))
        process.join(5)
        if process.is_alive():
            process.kill()
    for good, answer in answers:
        if not good:
            raise AssertionError(answer)
    return [answer for _, answer in answers]


class Base(unittest.TestCase):
    def setUp(self):
        self.name = self.id().rsplit(".", 1)[-1]
        os.mkdir(os.path.join(MOUNTS[0], self.name))
        self.dirs = [os.path.join(mount, self.name) for mount in MOUNTS]

    def at(self, mount, name):
        return os.path.join(self.dirs[mount], name)

    def fails(self, number, work, *arguments):
        with self.assertRaises(OSError) as caught:
            work(*arguments)
        self.assertEqual(caught.exception.errno, number)


class Truth(Base):
    """What one mount did when its call returned, the very next call on the other one sees."""

    def test_random_rounds(self):
        rng = random.Random(SEED)
        files = {}   # name: (content, mode, xattr)
        handles = {}   # (mount, name): file open for reading since some round ago
        count = 0

        def check(mount, name):
            path = self.at(mount, name)
            if name not in files:
                self.fails(errno.ENOENT, os.stat, path)
                self.assertNotIn(name, os.listdir(self.dirs[mount]))
                return
            content, mode, xattr = files[name]
            what = rng.randrange(6)
            if what == 0:
                stat = os.stat(path)
                self.assertEqual((stat.st_size, stat.st_mode & 0o777), (len(content), mode))
            elif what == 1:
                self.assertEqual(read(path), content)
            elif what == 2:
                self.assertEqual(sorted(os.listdir(self.dirs[mount])), sorted(files))
            elif what == 3 and xattr is not None:
                self.assertEqual(os.getxattr(path, "user.x"), xattr)
            elif what == 4:
                # A file that has been open here all the time, its pages read before.
                if (mount, name) not in handles:
                    handles[mount, name] = os.open(path, os.O_RDONLY)
                self.assertEqual(os.pread(handles[mount, name], len(content) + 100, 0), content)
            else:
                self.assertEqual({entry.name: entry.stat().st_size for entry in os.scandir(self.dirs[mount])},
                                 {name: len(file[0]) for name, file in files.items()})

        for turn in range(ROUNDS):
            one = rng.randrange(2)
            other = 1 - one
            names = list(files)
            op = rng.randrange(9) if names else 0
            name = rng.choice(names) if names else None
            if op == 0 or len(files) < 3:
                count += 1
                name = f"f{count}"
                content = rng.randbytes(rng.choice([0, 1, 100, 5000, 20000]))
                with open(self.at(one, name), "xb") as file:
                    file.write(content)
                files[name] = (content, os.stat(self.at(one, name)).st_mode & 0o777, None)
            elif op == 1:
                content, mode, xattr = files[name]
                offset, data = rng.randrange(len(content) + 50), rng.randbytes(rng.choice([1, 10, 3000]))
                fd = os.open(self.at(one, name), os.O_WRONLY)
                # Seen when write returns, not only when the file is closed.
                os.pwrite(fd, data, offset)
                content = content.ljust(offset, b"\0")
                files[name] = (content[:offset] + data + content[offset + len(data):], mode, xattr)
                check(other, name)
                os.close(fd)
            elif op == 2:
                content, mode, xattr = files[name]
                size = rng.randrange(len(content) + 100)
                os.truncate(self.at(one, name), size)
                files[name] = (content[:size].ljust(size, b"\0"), mode, xattr)
            elif op == 3:
                content, _, xattr = files[name]
                mode = rng.choice([0o600, 0o644, 0o755, 0o640])
                os.chmod(self.at(one, name), mode)
                files[name] = (content, mode, xattr)
            elif op == 4:
                target = rng.choice([rng.choice(names), f"r{turn}"])
                os.rename(self.at(one, name), self.at(one, target))
                if target != name:
                    files[target] = files.pop(name)
                    for mount in range(2):
                        for gone in (name, target):
                            if (mount, gone) in handles:
                                os.close(handles.pop((mount, gone)))
                    check(other, name)
                name = target
            elif op == 5 and len(files) > 12:
                os.unlink(self.at(one, name))
                del files[name]
                for mount in range(2):
                    if (mount, name) in handles:
                        os.close(handles.pop((mount, name)))
            elif op == 6:
                content, mode, _ = files[name]
                os.setxattr(self.at(one, name), "user.x", xattr := rng.randbytes(20))
                files[name] = (content, mode, xattr)
            elif op == 7:
                content, mode, xattr = files[name]
                data = rng.randbytes(rng.choice([1, 100, 3000]))
                with open(self.at(one, name), "ab") as file:
                    file.write(data)
                files[name] = (content + data, mode, xattr)
            check(other, name)
            if rng.random() < 0.3:
                check(one, name)
        for fd in handles.values():
            os.close(fd)

    def test_a_mapped_page_follows(self):
        with open(self.at(0, "f"), "wb") as file:
            file.write(b"\0" * 8192)
        fds = [os.open(self.at(mount, "f"), os.O_RDWR) for mount in range(2)]
        maps = [mmap.mmap(fd, 8192, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) for fd in fds]
        rng = random.Random(SEED)
        for turn in range(min(ROUNDS, 300)):
            one, at = rng.randrange(2), rng.randrange(8180)
            data = b"%08d" % turn
            maps[one][at:at + 8] = data
            maps[one].flush()
            self.assertEqual(maps[1 - one][at:at + 8], data, turn)
        for fd in fds:
            os.close(fd)

    def test_dirty_mapped_pages_hold_nobody_up_and_are_not_lost(self):
        page, pages, rng, slowest = 4096, 16, random.Random(SEED), 0
        content = bytearray(pages * page)
        with open(self.at(0, "f"), "wb") as file:
            file.write(content)
        fds = [os.open(self.at(mount, "f"), os.O_RDWR) for mount in range(2)]
        maps = [mmap.mmap(fd, len(content), mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE) for fd in fds]
        for turn in range(min(ROUNDS, 400)):
            # Each mount has pages of its own, as stores reach the file by whole pages.
            for one in range(2):
                at, data = page * (2 * rng.randrange(pages // 2) + one), b"%08d" % turn
                maps[one][at:at + 8] = data
                content[at:at + 8] = data
            one = rng.randrange(2)
            at, data = page * (2 * rng.randrange(pages // 2) + one) + 100, b"w%07d" % turn
            began = time.monotonic()
            if rng.random() < 0.2:
                os.truncate(self.at(one, "f"), len(content))
            else:
                os.pwrite(fds[one], data, at)
                content[at:at + 8] = data
            slowest = max(slowest, time.monotonic() - began)
        for one in maps:
            one.flush()
        for mount in range(2):
            self.assertEqual(read(self.at(mount, "f")), content)
        for fd in fds:
            os.close(fd)
        self.assertLess(slowest, 2, "a client was cut off")
        print(f"beside dirty pages: slowest call {slowest * 1000:.0f} ms", file=sys.stderr)

    def test_tail_follows(self):
        open(self.at(0, "log"), "wb").close()
        reader = os.open(self.at(1, "log"), os.O_RDONLY)
        with open(self.at(0, "log"), "ab", buffering=0) as log:
            for turn in range(min(ROUNDS, 500)):
                line = b"line %d\n" % turn
                log.write(line)
                self.assertEqual(os.read(reader, 1000), line)
        os.close(reader)

    def test_what_is_unlinked_elsewhere_stays_open_here(self):
        with open(self.at(0, "f"), "wb") as file:
            file.write(b"still there")
        fd = os.open(self.at(1, "f"), os.O_RDWR)
        os.unlink(self.at(0, "f"))
        self.fails(errno.ENOENT, os.stat, self.at(1, "f"))
        time.sleep(0.3)   # longer than the master takes to free what nobody has open
        self.assertEqual(os.pread(fd, 100, 0), b"still there")
        os.pwrite(fd, b"more", 11)
        os.fsync(fd)
        self.assertEqual((os.pread(fd, 100, 0), os.fstat(fd).st_nlink), (b"still theremore", 0))
        os.close(fd)


class Races(Base):
    def test_exclusive_creates_have_one_winner(self):
        rounds = ROUNDS

        def work(mount, start):
            won = []
            for turn in range(start, rounds):
                try:
                    os.close(os.open(self.at(mount, f"f{turn}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY))
                    won.append(turn)
                except FileExistsError:
                    pass
            return won
        answers = processes(work, [(mount, 0) for mount in (0, 1)])
        self.assertEqual(sorted(answers[0] + answers[1]), list(range(rounds)))

    def test_appended_lines_are_whole(self):
        lines = 2 * ROUNDS

        def work(mount, who):
            fd = os.open(self.at(mount, "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            for turn in range(lines):
                line = b"%d %d %s\n" % (who, turn, b"x" * (turn % 60))
                if os.write(fd, line) != len(line):
                    raise AssertionError("a short write")
            os.close(fd)
        processes(work, [(who % 2, who) for who in range(4)])
        for mount in range(2):
            seen = [-1] * 4
            for line in read(self.at(mount, "log")).splitlines():
                who, turn, fill = line.split(b" ") if line.count(b" ") == 2 else (b"9", b"9", line)
                who, turn = int(who), int(turn)
                self.assertEqual((turn, fill), (seen[who] + 1, b"x" * (turn % 60)))
                seen[who] = turn
            self.assertEqual(seen, [lines - 1] * 4)

    def test_one_directory_for_all(self):
        seconds = SECONDS

        def work(mount, who):
            rng, slowest, done, end = random.Random(who), 0, 0, time.monotonic() + seconds
            while time.monotonic() < end:
                name, other = (self.at(mount, f"n{rng.randrange(20)}") for _ in range(2))
                began = time.monotonic()
                try:
                    what = rng.randrange(3)
                    if what == 0:
                        os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
                    elif what == 1:
                        os.rename(name, other)
                    else:
                        os.unlink(name)
                except FileNotFoundError:
                    pass
                slowest, done = max(slowest, time.monotonic() - began), done + 1
            return slowest, done
        alone = processes(work, [(0, who) for who in range(4)])
        answers = processes(work, [(who % 2, who) for who in range(8)])
        rates = [sum(answer[1] for answer in all_of_them) / seconds for all_of_them in (alone, answers)]
        print(f"slowest {max(a[0] for a in answers):.3f} s, {rates[1]:.0f} /s, {rates[0]:.0f} /s with one mount", file=sys.stderr)
        self.assertLess(max(answer[0] for answer in answers), 2)
        self.assertEqual(sorted(os.listdir(self.dirs[0])), sorted(os.listdir(self.dirs[1])))

    def test_a_listing_is_never_older_than_its_opening(self):
        """Many list one directory, some of them slowly, while names come and go in it on both mounts."""
        for number in range(300):
            with open(self.at(0, "ground%03d" % number), "wb"):
                pass

        def change(mount, who):
            rounds, end = 0, time.monotonic() + SECONDS
            before = None
            while time.monotonic() < end:
                name = f"{who}.{rounds}"
                with open(self.at(mount, name), "wb"):
                    pass
                if before:
                    os.unlink(self.at(mount, before))
                for look in (mount, 1 - mount):
                    names = os.listdir(self.dirs[look])
                    if name not in names or (before and before in names) or len(set(names)) != len(names):
                        raise AssertionError(f"{name} made, {before} removed on {mount}, listed on {look}: {sorted(names)}")
                    if sum(name.startswith("ground") for name in names) != 300:
                        raise AssertionError("names that nobody touched are missing")
                before, rounds = name, rounds + 1
            return rounds

        def dawdle(mount, seed):
            chance, rounds, end = random.Random(seed), 0, time.monotonic() + SECONDS
            while time.monotonic() < end:
                fd = os.open(self.dirs[mount], os.O_RDONLY | os.O_DIRECTORY)
                with os.scandir(fd) as entries:
                    for number, _ in enumerate(entries):
                        if number == chance.randrange(1, 300):
                            time.sleep(chance.random() / 50)
                os.close(fd)
                rounds += 1
            return rounds
        jobs = [(change, mount, f"{mount}.{who}") for mount in range(2) for who in range(2)]
        jobs += [(dawdle, mount, SEED + who) for mount in range(2) for who in range(2)]
        done = processes(lambda work, *arguments: work(*arguments), jobs)
        print(f"{sum(done[:4])} changes, {sum(done[4:])} slow listings", file=sys.stderr)
        self.assertGreater(min(done), 0)

    def test_a_new_owner_may_at_once_and_an_old_one_may_not(self):
        """The kernel decides by the owner that it has: it must not have an old one, also if nobody looked at the file since."""
        names = ["own%d" % number for number in range(20)]
        for name in names:
            with open(self.at(0, name), "wb"):
                pass

        def work(user, expected):
            # Others may not search what is above it.
            os.chdir(self.dirs[1])
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
            for name in names:
                try:
                    os.utime(name, (1, 1))
                    code = 0
                except OSError as error:
                    code = error.errno
                if code != expected:
                    raise AssertionError(f"{name}: errno {code}, not {expected}")

        for owner, code in [(1234, 0), (0, errno.EPERM), (1234, 0)]:
            for entry in os.scandir(self.dirs[1]):
                entry.stat()
            for name in names:
                os.chown(self.at(0, name), owner, owner)
            processes(work, [(1234, code)])

    def test_locks_exclude_across_mounts(self):
        with open(self.at(0, "n"), "wb") as file:
            file.write(b"0")
        rounds = min(ROUNDS, 300)

        def work(mount, kind):
            fd = os.open(self.at(mount, "n"), os.O_RDWR)
            for _ in range(rounds):
                if kind == "flock":
                    fcntl.flock(fd, fcntl.LOCK_EX)
                else:
                    fcntl.lockf(fd, fcntl.LOCK_EX)
                number = int(os.pread(fd, 100, 0))
                os.pwrite(fd, b"%d" % (number + 1), 0)
                if kind == "flock":
                    fcntl.flock(fd, fcntl.LOCK_UN)
                else:
                    fcntl.lockf(fd, fcntl.LOCK_UN)
        processes(work, [(who % 2, "flock" if who < 2 else "fcntl") for who in range(4)])
        self.assertEqual(read(self.at(1, "n")), b"%d" % (4 * rounds))

    def test_a_waiter_wakes_at_once(self):
        fds = [os.open(self.at(mount, "l"), os.O_RDWR | os.O_CREAT) for mount in range(2)]
        for _ in range(20):
            fcntl.flock(fds[0], fcntl.LOCK_EX)
            woken = []
            waiter = threading.Thread(target=lambda: (fcntl.flock(fds[1], fcntl.LOCK_EX), woken.append(time.monotonic())))
            waiter.start()
            time.sleep(0.05)
            self.assertEqual(woken, [])
            released = time.monotonic()
            fcntl.flock(fds[0], fcntl.LOCK_UN)
            waiter.join(10)
            self.assertLess(woken[0] - released, 0.1)
            fcntl.flock(fds[1], fcntl.LOCK_UN)
        for fd in fds:
            os.close(fd)

    def test_two_writers_of_one_file(self):
        size, seconds = 4096, 5
        open(self.at(0, "f"), "wb").close()

        def work(mount, who):
            fd = os.open(self.at(mount, "f"), os.O_RDWR)
            done, end = 0, time.monotonic() + seconds
            while time.monotonic() < end:
                os.pwrite(fd, bytes([who]) * size, (2 * (done % 64) + who) * size)
                done += 1
            os.close(fd)
            return done
        done = processes(work, [(0, 0), (1, 1)])
        print(f"two writers: {done[0] / seconds:.0f} and {done[1] / seconds:.0f} writes/s", file=sys.stderr)
        for mount in range(2):
            content = read(self.at(mount, "f"))
            for block in range(0, len(content) // size):
                who = content[block * size:(block + 1) * size]
                self.assertEqual(who, bytes([block % 2]) * size, (mount, block))
        self.assertGreater(min(done), 0)

    def test_a_listing_does_not_wait_for_a_stream(self):
        stop = os.path.join(self.dirs[0], "stop")

        def write():
            fd = os.open(self.at(0, "stream"), os.O_WRONLY | os.O_CREAT)
            block, written, began = b"\1" * (1 << 20), 0, time.monotonic()
            while not os.path.exists(stop) and written < 4000 << 20:
                os.write(fd, block)
                written += len(block)
            os.close(fd)
            return written / (time.monotonic() - began)

        def look():
            slowest, size, looks, end = 0, 0, 0, time.monotonic() + 5
            while time.monotonic() < end:
                began = time.monotonic()
                out = subprocess.run(["ls", "-l", self.dirs[1]], stdout=subprocess.PIPE, check=True).stdout
                slowest = max(slowest, time.monotonic() - began)
                sizes = [int(line.split()[4]) for line in out.splitlines() if line.endswith(b"stream")]
                if sizes and sizes[0] < size:
                    raise AssertionError(f"the size went back from {size} to {sizes[0]}")
                size, looks = max([size, *sizes]), looks + 1
                time.sleep(0.02)
            open(stop, "wb").close()
            return slowest, looks, size
        rate, (slowest, looks, size) = processes(lambda work: work(), [(write,), (look,)])
        print(f"ls -l: {looks} times, slowest {slowest * 1000:.0f} ms, stream {rate / (1 << 20):.0f} MiB/s", file=sys.stderr)
        self.assertGreater(size, 0)


if __name__ == "__main__":
    multiprocessing.set_start_method("fork")
    signal.alarm(1800)
    unittest.main(verbosity=2)
