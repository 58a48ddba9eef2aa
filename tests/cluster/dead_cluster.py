"""What programs meet on a mount whose whole cluster is dead: run by dead_cluster.sh.

dead_cluster.py prepare MOUNT                           files for one round
dead_cluster.py soft MOUNT FILE BOUND COMMAND           COMMAND kills the cluster; every operation ends within BOUND seconds
dead_cluster.py hard MOUNT FILE SECONDS COMMAND COMMAND … dead for SECONDS, then the second command brings it back: nothing fails
dead_cluster.py hold MOUNT FILE                         once FILE is there, keeps what an unmount has to deal with
dead_cluster.py after MOUNT FILE                        what the operations of a round said is true once the cluster is back

Each operation is a process of its own; FILE is where it is kept what each of them said.
"""

import ctypes
import errno
import fcntl
import json
import mmap
import os
import select
import signal
import subprocess
import sys
import time

BLOCK = 128 * 1024
LIBC = ctypes.CDLL(None, use_errno=True)


def block(name):
    return (name.encode() * BLOCK)[:BLOCK]


def write(path, data):
    with open(path, "wb") as file:
        file.write(data)


def check(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


# Operations: what is done while the cluster lives answers a function for what is done when it is dead. The names say what
# must be there afterwards if it succeeded: see `after`.


def stat(top):
    return lambda: os.stat(f"{top}/stat")


def ls(top):
    return lambda: os.listdir(f"{top}/ls")


def opens(top):
    return lambda: open(f"{top}/open", "rb").close()


def create(top):
    return lambda: os.open(f"{top}/create", os.O_CREAT | os.O_EXCL | os.O_WRONLY)


def read(top):
    fd = os.open(f"{top}/read", os.O_RDONLY)

    def act():
        if os.pread(fd, BLOCK, 0) != block("read"):
            raise AssertionError("other bytes")

    return act


def map_read(top):
    fd = os.open(f"{top}/map", os.O_RDONLY)
    mapped = mmap.mmap(fd, BLOCK, prot=mmap.PROT_READ)

    def act():
        # SIGBUS ends this process when the page cannot be had.
        if mapped[:BLOCK] != block("map"):
            raise AssertionError("other bytes")

    return act


def map_write(top):
    fd = os.open(f"{top}/mapped", os.O_RDWR)
    mapped = mmap.mmap(fd, BLOCK)
    mapped[:BLOCK] = block("was")
    mapped.flush()
    os.fsync(fd)

    def act():
        mapped[:BLOCK] = block("mapped")
        mapped.flush()

    return act


def write_sync(top):
    fd = os.open(f"{top}/synced", os.O_RDWR | os.O_CREAT)

    def act():
        os.pwrite(fd, block("synced"), 0)
        os.fsync(fd)

    return act


def write_close(top):
    fd = os.open(f"{top}/closed", os.O_RDWR | os.O_CREAT)

    def act():
        os.pwrite(fd, block("closed"), 0)
        os.close(fd)

    return act


def write_direct(top):
    fd = os.open(f"{top}/osync", os.O_RDWR | os.O_CREAT | os.O_SYNC)
    return lambda: os.pwrite(fd, block("osync"), 0)


def append(top):
    fd = os.open(f"{top}/appended", os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def act():
        os.write(fd, block("appended"))
        os.fsync(fd)

    return act


def dirty_before(top):
    """Bytes that were written while the cluster lived, and not committed when it died: told once, at the fsync."""
    fd = os.open(f"{top}/dirty", os.O_RDWR | os.O_CREAT)

    def act():
        os.fsync(fd)

    os.pwrite(fd, block("dirty"), 0)
    return act


def rename(top):
    return lambda: os.rename(f"{top}/rename", f"{top}/renamed")


def unlink(top):
    return lambda: os.unlink(f"{top}/unlink")


def mkdir(top):
    return lambda: os.mkdir(f"{top}/mkdir")


def link(top):
    return lambda: os.link(f"{top}/link", f"{top}/linked")


def symlink(top):
    return lambda: os.symlink("nowhere", f"{top}/symlink")


def readlink(top):
    return lambda: os.readlink(f"{top}/readlink")


def chmod(top):
    return lambda: os.chmod(f"{top}/chmod", 0o600)


def truncate(top):
    return lambda: os.truncate(f"{top}/truncate", 5)


def fallocate(top):
    fd = os.open(f"{top}/fallocate", os.O_RDWR)
    return lambda: os.posix_fallocate(fd, 0, 4 * BLOCK)


def setxattr(top):
    return lambda: os.setxattr(f"{top}/xattr", "user.key", b"value")


def listxattr(top):
    return lambda: os.listxattr(f"{top}/listxattr")


def copy(top):
    source, target = os.open(f"{top}/copy", os.O_RDONLY), os.open(f"{top}/copied", os.O_RDWR | os.O_CREAT)
    return lambda: os.copy_file_range(source, target, BLOCK)


def seek(top):
    fd = os.open(f"{top}/seek", os.O_RDONLY)
    return lambda: os.lseek(fd, 0, os.SEEK_HOLE)


def statfs(top):
    return lambda: os.statvfs(top)


def flock_now(top):
    fd = os.open(f"{top}/flock", os.O_RDWR)
    return lambda: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def flock_wait(top):
    fd = os.open(f"{top}/flock-wait", os.O_RDWR)
    return lambda: fcntl.flock(fd, fcntl.LOCK_EX)


def unlock(top):
    fd = os.open(f"{top}/unlock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    return lambda: fcntl.flock(fd, fcntl.LOCK_UN)


def syncfs(top):
    fd = os.open(top, os.O_RDONLY)
    return lambda: os.fsync(fd)


OPERATIONS = {
    function.__name__: function
    for function in (
        stat, ls, opens, create, read, map_read, map_write, write_sync, write_close, write_direct, append, dirty_before, rename,
        unlink, mkdir, link, symlink, readlink, chmod, truncate, fallocate, setxattr, listxattr, copy, seek, statfs, flock_now,
        flock_wait, unlock, syncfs,
    )
}
# Answered by a mount that has it in its caches, which it may believe until its leases end.
MAY_SUCCEED = {"unlock", "stat", "ls", "opens", "readlink", "listxattr", "statfs", "seek", "syncfs"}
# What an operation that succeeded leaves behind: a file and its bytes.
LEFT = {"map_write": "mapped", "write_sync": "synced", "write_close": "closed", "write_direct": "osync", "append": "appended", "dirty_before": "dirty"}
GONE = {"rename": "rename", "unlink": "unlink"}
MADE = {"rename": "renamed", "mkdir": "mkdir", "link": "linked", "symlink": "symlink", "create": "create"}


def prepare(top):
    os.makedirs(f"{top}/ls/inner")
    for name in ("stat", "open", "rename", "unlink", "link", "chmod", "truncate", "fallocate", "xattr", "listxattr", "flock", "flock-wait", "unlock"):
        write(f"{top}/{name}", name.encode())
    for name in ("read", "map", "copy", "seek", "mapped"):
        write(f"{top}/{name}", block(name))
    os.symlink("there", f"{top}/readlink")


class Operation:
    """A process that prepares itself, waits for the word, acts, and reports."""

    def __init__(self, name, top):
        self.name, self.report = name, None
        ours, theirs = os.pipe()
        go_read, self.go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                os.close(ours)
                os.close(self.go)
                act = OPERATIONS[name](top)
                os.write(theirs, b"ready\n")
                os.read(go_read, 1)
                began, error = time.monotonic(), None
                try:
                    act()
                except OSError as failed:
                    error = errno.errorcode[failed.errno]
                os.write(theirs, json.dumps([error, time.monotonic() - began]).encode())
                status = 0
            except BaseException as unexpected:
                os.write(theirs, f"{name}: {unexpected!r}".encode())
            finally:
                # Files are closed by the kernel: whoever waits for that waits for this process.
                os._exit(status)
        os.close(theirs)
        os.close(go_read)
        self.pipe = ours
        if not select.select([ours], [], [], 60)[0] or (said := os.read(ours, 100)) != b"ready\n":
            sys.exit(f"{name} is not ready: {said!r}")
        self.ended = False

    def start(self):
        os.write(self.go, b"x")
        os.close(self.go)

    def wait(self, until):
        """Whether it has ended: its report, or the signal that killed it."""
        while not self.ended:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.ended = True
                said = os.read(self.pipe, 1000)
                if os.WIFSIGNALED(status):
                    self.report = [signal.Signals(os.WTERMSIG(status)).name, 0.0]
                elif os.WEXITSTATUS(status):
                    sys.exit(f"{self.name}: {said.decode()}")
                else:
                    self.report = json.loads(said)
            elif time.monotonic() >= until:
                return False
            else:
                time.sleep(0.02)
        return True


def begin(top, command):
    # The one with uncommitted bytes last: they are committed within a second.
    operations = [Operation(name, top) for name in sorted(OPERATIONS, key=lambda name: name == "dirty_before")]
    subprocess.run(command, shell=True, check=True)
    for operation in operations:
        operation.start()
    return operations


def save(operations, file):
    with open(file, "w") as out:
        json.dump({operation.name: operation.report for operation in operations}, out)


def soft(top, file, bound, kill):
    operations = begin(top, kill)
    until = time.monotonic() + float(bound)
    stuck = [operation.name for operation in operations if not operation.wait(until)]
    if stuck:
        for name in stuck:
            print(f"{name}: no end within {bound} s")
    save(operations, file)
    bad = list(stuck)
    for operation in operations:
        error, seconds = operation.report or [None, 0]
        if operation.report is None:
            continue
        wanted = {"EIO", "ETIMEDOUT"} | ({"SIGBUS"} if operation.name == "map_read" else set())
        if error not in wanted and not (error is None and operation.name in MAY_SUCCEED):
            print(f"{operation.name}: {error or 'success'}")
            bad.append(operation.name)
    ended = [operation for operation in operations if operation.report]
    slowest = max(ended, key=lambda operation: operation.report[1])
    errors = sorted({operation.report[0] or "success" for operation in ended})
    print(f"{len(ended)} operations ended ({', '.join(errors)}), the slowest, {slowest.name}, after {slowest.report[1]:.1f} s")
    sys.exit(1 if bad else 0)


def hard(top, file, seconds, kill, revive):
    operations = begin(top, kill)
    time.sleep(float(seconds))
    early = [operation for operation in operations if operation.wait(0) and operation.name not in MAY_SUCCEED]
    # One more, to be killed: it must not have to wait for the cluster. Not in the same directory: there it would wait in the kernel,
    # which no signal ends, for those who are about to change it.
    victim = subprocess.Popen(["stat", f"{os.path.dirname(top)}/never-looked-up"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(1)
    assert victim.poll() is None, "it did not wait"
    began = time.monotonic()
    victim.kill()
    victim.wait(10)
    killed = time.monotonic() - began
    subprocess.run(revive, shell=True, check=True)
    until = time.monotonic() + 90
    stuck = [operation.name for operation in operations if not operation.wait(until)]
    save(operations, file)
    failed = [f"{operation.name} ({operation.report[0]})" for operation in operations if operation.report and operation.report[0]]
    if early or stuck or failed:
        names = [operation.name for operation in early]
        sys.exit(f"did not wait: {names}; did not go on: {stuck}; failed: {failed}")
    waited = sum(1 for operation in operations if operation.report[1] > float(seconds) / 2)
    print(f"{len(operations)} operations succeeded, {waited} of them waited; a process that waited was killed in {killed:.1f} s")


def hold(top, go):
    """Keeps written bytes, a changed page of a shared mapping and, once the cluster is dead, a request on its way."""
    fd = os.open(f"{top}/held", os.O_RDWR | os.O_CREAT)
    write(f"{top}/held-map", block("was"))
    mapped = mmap.mmap(os.open(f"{top}/held-map", os.O_RDWR), BLOCK)
    # What needs the cluster, the right to keep changes and the pages, is had before.
    os.pwrite(fd, block("first"), 0)
    assert mapped[:BLOCK] == block("was")
    mapped[:BLOCK] = block("now")
    mapped.flush()
    print("ready", flush=True)
    while not os.path.exists(go):
        time.sleep(0.02)
    os.pwrite(fd, block("held"), 0)
    mapped[:BLOCK] = block("later")
    print("holds", flush=True)
    try:
        os.stat(f"{top}/never-looked-up")
    except OSError:
        pass
    time.sleep(600)


def after(top, file):
    with open(file) as saved:
        reports = json.load(saved)
    for name, (error, _) in reports.items():
        if error is None:
            if name in LEFT:
                with open(f"{top}/{LEFT[name]}", "rb") as left:
                    assert left.read() == block(LEFT[name]), f"{name} said that it had worked"
            if name in MADE:
                os.lstat(f"{top}/{MADE[name]}")
            if name in GONE:
                assert not os.path.lexists(f"{top}/{GONE[name]}"), name
    # And everything works again.
    again = f"{top}/again"
    prepare(again)
    for name, operation in OPERATIONS.items():
        operation(again)()
    print("everything works again")


if __name__ == "__main__":
    what, top = sys.argv[1:3]
    {"prepare": prepare, "soft": soft, "hard": hard, "hold": hold, "after": after}[what](top, *sys.argv[3:])
