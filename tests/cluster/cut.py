"""The network of a client is cut, for less and for longer than its session lives, while programs work on its mounts and another
client changes the same files.

cut.py WORK LONG TTL, with DFS_BIN_DIR set: LONG is how long a long cut lasts, TTL how long a session lives, in seconds. Three masters
and three chunk daemons; client `a` has a soft mount and a hard one, client `b` another one: see namespaces.py.

What must hold. A short cut is a pause: no error. Over a long one a hard mount has no error, but for what somebody else has taken
meanwhile; a soft one has EIO and ETIMEDOUT until the network is back. Either way nothing that was acknowledged is lost or done twice,
what was not is told, a call never sees what was before a change that the other client had finished when it began, and everything
goes on by itself, open files included.
"""

import errno
import fcntl
import hashlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

from namespaces import IN, OUT, Cluster, Daemon, mounted, run, wait_for

WORK, LONG, TTL = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
SHORT = 3
SOFT_TIMEOUT = 10
# Until every program on a mount goes on after its network is back.
BACK = 15
# Until what a mount held is to be had by others after it was cut off: its session's life, 2 s, and what a slow machine adds.
FREE = TTL + 2 + 6
# Until dfs-mount has ended after a signal, beyond the time-out of a soft mount and 5 s for programs that use the mount.
ENDS = 10
MASTERS, CHUNKDS = ["m1", "m2", "m3"], ["c1", "c2", "c3"]
PLACES = {"soft": f"{WORK}/soft", "hard": f"{WORK}/hard", "other": f"{WORK}/other"}
OPTIONS = {"soft": f"timeout={SOFT_TIMEOUT}", "hard": "hard", "other": "timeout=120"}
GIVEN_UP = {errno.EIO, errno.ETIMEDOUT}
BEGAN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGAN:6.1f}  {text}", flush=True)


# ---- programs: processes of their own, for a file of a mount that is cut off must not hold up anybody else ----


class Phase:
    """Where a round is: the network is cut, the programs are to end, everything has been looked at."""

    def __init__(self):
        self.cut, self.stop, self.over = (multiprocessing.Event() for _ in range(3))


class Program:
    def __init__(self, function, top, phase):
        self.name, self.what = f"{function.__name__} on {top}", function
        self.pipe, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.Process(target=self.main, args=(theirs, top, phase), daemon=True)
        self.process.start()
        theirs.close()
        self.hear(60)

    def main(self, pipe, top, phase):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        try:
            steps = self.what(top, phase)
            next(steps)
            pipe.send(None)
            for result in steps:
                pipe.send(result)
        except BaseException as error:
            pipe.send(error)

    def hear(self, seconds):
        """What it says next."""
        assert self.pipe.poll(seconds), f"{self.name} does not get on within {seconds} s"
        said = self.pipe.recv()
        if isinstance(said, BaseException):
            raise AssertionError(f"{self.name}: {said!r}")
        return said


def attempt(log, what, *arguments):
    """Does something and notes (when it began, when it ended, what came of it, the errno or None)."""
    began, result, error = time.monotonic(), None, None
    try:
        result = what(*arguments)
    except OSError as failed:
        error = failed.errno
    log.append((began, time.monotonic(), result, error))
    return error


# ---- on the mounts that are cut off: generators that yield once when they are ready, then their results ----


def writer(top, phase):
    """Whole files, fsynced: the digest of each that was acknowledged."""
    rng, log, number = random.Random(1), [], 0
    os.mkdir(f"{top}/written")

    def write(path, data):
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, data)
            os.fsync(fd)
        finally:
            os.close(fd)
        return os.path.basename(path), hashlib.sha256(data).hexdigest()

    yield
    while not phase.stop.is_set():
        attempt(log, write, f"{top}/written/{number}", rng.randbytes(rng.choice([10, 5000, 200_000, 1_000_000])))
        number += 1
    yield log


def holder_of_dirty(top, phase):
    """Bytes that were not committed when the network was cut: one file that the other client changes, and one that it does not."""
    fds = {}
    for name in ("lost", "kept"):
        fds[name] = os.open(f"{top}/{name}", os.O_RDWR)
        os.pwrite(fds[name], b"first", 0)
        os.fsync(fds[name])
    yield
    phase.cut.wait()
    for fd in fds.values():
        os.pwrite(fd, b"later", 0)
    yield
    phase.stop.wait()
    logs = {}
    for name, fd in fds.items():
        logs[name] = []
        attempt(logs[name], os.fsync, fd)
        # Told once; then the file works again.
        attempt(logs[name], os.fsync, fd)
        attempt(logs[name], os.close, fd)
    yield logs


def holder_of_clean(top, phase):
    """An open file that lost nothing goes on."""
    fd = os.open(f"{top}/clean", os.O_RDWR)
    os.pwrite(fd, b"first", 0)
    os.fsync(fd)
    yield
    phase.stop.wait()
    os.pwrite(fd, b"later", 0)
    os.fsync(fd)
    yield os.pread(fd, 10, 0)


def locker(top, phase):
    fd = os.open(f"{top}/lock", os.O_RDWR)
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield
    phase.stop.wait()
    log = []
    attempt(log, fcntl.flock, fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    yield log
    os.close(fd)


def observe(phase, look):
    log = []
    yield
    while not phase.stop.is_set():
        attempt(log, look)
        time.sleep(0.01)
    yield log


def reader(top, phase):
    fd = os.open(f"{top}/version", os.O_RDONLY)
    yield from observe(phase, lambda: int(os.pread(fd, 20, 0)))


def opener(top, phase):
    def look():
        fd = os.open(f"{top}/version", os.O_RDONLY)
        try:
            return int(os.read(fd, 20))
        finally:
            os.close(fd)

    yield from observe(phase, look)


def sizer(top, phase):
    yield from observe(phase, lambda: os.stat(f"{top}/size").st_size)


def lister(top, phase):
    yield from observe(phase, lambda: max(int(name) for name in os.listdir(f"{top}/names")))


def changer(top, phase):
    """Changes of names, each once: of each round whether everything succeeded, or the errno of what did not."""
    log, number = [], 0
    top = f"{top}/changed"
    os.mkdir(top)

    def change(number):
        os.mkdir(f"{top}/{number}.new")
        os.rename(f"{top}/{number}.new", f"{top}/{number}.dir")
        os.close(os.open(f"{top}/{number}.file", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        os.link(f"{top}/{number}.file", f"{top}/{number}.link")
        os.unlink(f"{top}/{number}.file")
        os.symlink("nowhere", f"{top}/{number}.symlink")
        os.setxattr(f"{top}/{number}.link", "user.once", b"x", os.XATTR_CREATE)
        os.rename(f"{top}/{number}.symlink", f"{top}/{number}.dir/symlink")
        os.unlink(f"{top}/{number}.dir/symlink")
        return number

    yield
    while not phase.stop.is_set():
        attempt(log, change, number)
        number += 1
    yield log


def changed(number):
    return {f"{number}.dir", f"{number}.link"}


# ---- on the other client ----


def bumper(top, phase):
    """Changes what the observers look at, to ever higher numbers."""
    log, number = {"version": [], "size": [], "names": []}, 0
    fd, size = os.open(f"{top}/version", os.O_RDWR), os.open(f"{top}/size", os.O_RDWR)
    yield
    while not phase.stop.is_set():
        number += 1

        def done(what, result):
            log[what].append((time.monotonic(), number))

        done("version", os.pwrite(fd, b"%08d" % number, 0))
        done("size", os.ftruncate(size, number))
        done("names", os.mkdir(f"{top}/names/{number}"))
        time.sleep(0.2)
    yield log


def taker(top, phase):
    fd = os.open(f"{top}/lock", os.O_RDWR)
    yield
    phase.cut.wait()
    fcntl.flock(fd, fcntl.LOCK_EX)
    yield time.monotonic()
    phase.over.wait()


def rival(top, phase):
    """Changes the file whose last bytes the mount that is cut off has not committed."""
    yield
    phase.cut.wait()
    # A file that two clients have open for writing would not be kept by either.
    time.sleep(0.5)
    fd = os.open(f"{top}/lost", os.O_RDWR)
    os.pwrite(fd, b"other", 0)
    os.fsync(fd)
    yield time.monotonic()


OURS = [writer, holder_of_dirty, holder_of_clean, locker, reader, opener, sizer, lister, changer]
OTHERS = [bumper, taker, rival]


def prepare(top):
    os.makedirs(f"{top}/names/0")
    for name, data in (("version", b"%08d" % 0), ("size", b""), ("lock", b""), ("lost", b"zero."), ("kept", b"zero."), ("clean", b"zero.")):
        with open(f"{top}/{name}", "wb") as file:
            file.write(data)


# ---- what must hold ----


def code(error):
    return "success" if error is None else errno.errorcode[error]


def errors(kind, name, log, cut, mended):
    """The errors in a log must be those that may be; the first success after the cut tells when it went on."""
    for began, ended, _, error in log:
        if error is None:
            continue
        said = f"{name} on the {kind} mount: {code(error)}, {began - cut:.1f} s after the cut, {ended - mended:+.1f} s from its end"
        assert kind == "soft" and ended - cut > SHORT and error in GIVEN_UP and began < mended + BACK, said
    first = next((ended for began, ended, _, error in log if error is None and ended > mended), None)
    assert first is not None and first < mended + BACK, f"{name} on the {kind} mount does not go on within {BACK} s"
    return first - mended


def check_versions(kind, name, log, made):
    """No call sees what was before a change that had ended when it began."""
    at = newest = 0
    for began, _, seen, error in log:
        while at < len(made) and made[at][0] < began:
            newest = made[at][1]
            at += 1
        assert error is not None or seen >= newest, f"{name} on the {kind} mount saw {seen} when {newest} had long been there"
    assert log[-1][2] is not None, f"{name} on the {kind} mount: an error at last"


def check_dirty(kind, logs, seen, long):
    for name, log in logs.items():
        first, second, last = (error for _, _, _, error in log)
        assert second is None and last is None, f"{name} on the {kind} mount: told more than once"
        if name == "lost" and long:
            assert first == errno.EIO, f"fsync of what the other client changed, on the {kind} mount: {code(first)}"
        elif not (kind == "soft" and long):
            assert first is None, f"fsync of {name} on the {kind} mount: {code(first)}"
        assert first in (None, errno.EIO), f"fsync of {name} on the {kind} mount: {code(first)}"
        wanted = {b"other"} if name == "lost" else {b"later"} if first is None else {b"first", b"later"}
        assert seen[name] in wanted, f"{name} of the {kind} mount: {seen[name]} after fsync said {code(first)}"


def check_written(kind, top, log):
    acknowledged = [result for _, _, result, error in log if error is None]
    assert acknowledged, f"the writer on the {kind} mount did not get on"
    for name, digest in acknowledged:
        with open(f"{top}/written/{name}", "rb") as file:
            assert hashlib.sha256(file.read()).hexdigest() == digest, f"{name}: not what was fsynced on the {kind} mount"
    return len(acknowledged)


def check_changed(kind, top, log):
    there, failed = set(os.listdir(f"{top}/changed")), set()
    for number, (_, _, _, error) in enumerate(log):
        if error is None:
            missing = changed(number) - there
            assert not missing, f"{missing}: changes that the {kind} mount acknowledged are not there"
            there -= changed(number)
        else:
            failed.add(str(number))
    extra = {name for name in there if name.split(".")[0] not in failed}
    assert not extra, f"{extra}: done twice, or undone, on the {kind} mount"
    return len(log)


def round_of(cluster, number, what, seconds, rules, during=None):
    long, phase = seconds > SHORT, Phase()
    tops = {kind: f"{PLACES[kind]}/{number}" for kind in ("soft", "hard")}
    there = {kind: f"{PLACES['other']}/{number}/{kind}" for kind in tops}
    programs = {}
    for kind in tops:
        prepare(there[kind])
        ours = {function: Program(function, f"{tops[kind]}/{kind}", phase) for function in OURS}
        programs[kind] = ours | {function: Program(function, there[kind], phase) for function in OTHERS}
    time.sleep(1.5)
    cluster.cut("a", rules)
    cut = time.monotonic()
    say(f"{what}: cut for {seconds} s")
    try:
        phase.cut.set()
        for kind in tops:
            programs[kind][holder_of_dirty].hear(5)
        if during:
            during(cut)
        time.sleep(max(0, cut + seconds - time.monotonic()))
        assert cluster.dropped("a") > 0, "nothing was on its way"
    finally:
        cluster.mend("a")
    mended = time.monotonic()
    if long:
        for kind in tops:
            for function in (taker, rival):
                waited = programs[kind][function].hear(1) - cut
                assert waited < FREE, f"{function.__name__} waited {waited:.1f} s for the {kind} mount"
    time.sleep(BACK if long else 4)
    phase.stop.set()
    for kind in tops:
        judge(kind, programs[kind], there[kind], cut, mended, long)
    phase.over.set()


def judge(kind, programs, there, cut, mended, long):
    logs = {function: programs[function].hear(60) for function in (*OURS, bumper)}
    if not long:
        for function in (taker, rival):
            waited = programs[function].hear(30) - cut
            assert waited < SHORT + BACK, f"{function.__name__} waited {waited:.1f} s"
    back = {function: errors(kind, function.__name__, logs[function], cut, mended) for function in (writer, reader, opener, sizer, lister, changer)}
    made = logs[bumper]
    for function, name in ((reader, "version"), (opener, "version"), (sizer, "size"), (lister, "names")):
        check_versions(kind, function.__name__, logs[function], made[name])
    locked = logs[locker][0][3]
    assert locked == (errno.EAGAIN if long else None), f"the lock of the {kind} mount: {code(locked)}"
    assert logs[holder_of_clean] == b"later", "an open file does not go on"
    seen = {}
    for name in ("lost", "kept", "clean"):
        with open(f"{there}/{name}", "rb") as file:
            seen[name] = file.read()
    assert seen["clean"] == b"later", "what an open file wrote after the cut"
    check_dirty(kind, logs[holder_of_dirty], seen, long)
    written, changes = check_written(kind, there, logs[writer]), check_changed(kind, there, logs[changer])
    slowest = max(back, key=back.get)
    told = sum(error is not None for function in (writer, reader, opener, sizer, lister, changer) for *_, error in logs[function])
    say(f"  {kind}: {written} files fsynced, {changes} rounds of changes, {told} calls failed, back {back[slowest]:.1f} s after the network ({slowest.__name__})")


# ---- ends during a cut ----


def holds(top, phase):
    fd = os.open(f"{top}/held", os.O_RDWR | os.O_CREAT)
    os.pwrite(fd, b"first", 0)
    yield
    phase.cut.wait()
    os.pwrite(fd, b"later", 0)
    yield
    phase.stop.wait()


def ended(process, what, bound, began):
    wait_for(bound, f"{what} ends", lambda: process.poll() is not None)
    say(f"  {what}: ended after {time.monotonic() - began:.1f} s")


def ends(cluster, cut):
    """Programs and mounts end while the network is cut, whatever they hold."""
    victim = subprocess.Popen(["stat", f"{PLACES['hard']}/never-looked-up"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    mounts = {}
    time.sleep(max(0, cut + 1 - time.monotonic()))
    began = time.monotonic()
    for kind, process in ENDING.items():
        mounts[kind] = process
    mounts["end-soft"].terminate()
    run("umount", "-f", f"{WORK}/end-hard", check=False)  # it says that it is busy, and is rid of whoever waits
    mounts["end-hard"].terminate()
    mounts["end-hard"].send_signal(signal.SIGINT)
    assert victim.poll() is None, "it did not wait"
    asked = time.monotonic()
    victim.send_signal(signal.SIGINT)
    ended(victim, "Ctrl-C of a program", 3, asked)
    ended(mounts["end-hard"], "hard, umount -f, SIGTERM and SIGINT", 5 + ENDS, began)
    ended(mounts["end-soft"], "soft, SIGTERM", SOFT_TIMEOUT + 5 + ENDS, began)
    for kind in mounts:
        assert not mounted(f"{WORK}/{kind}"), f"{kind}: a dead mount is left"


ENDING = {}


def scenario(cluster, daemons, mounts):
    for daemon in daemons.values():
        daemon.start()
    wait_for(60, "the cluster is up", cluster.ready)
    for kind, place in PLACES.items():
        mounts[place] = cluster.mount("b" if kind == "other" else "a", place, OPTIONS[kind], kind)
        wait_for(60, "a mount", lambda: mounted(place))
    both = [IN, OUT]
    round_of(cluster, "1", "short", SHORT, both)
    phase = Phase()
    for kind in ("soft", "hard"):
        place = f"{WORK}/end-{kind}"
        ENDING[f"end-{kind}"] = mounts[place] = cluster.mount("a", place, OPTIONS[kind], f"end-{kind}")
        wait_for(60, "a mount", lambda: mounted(place))
        os.mkdir(f"{PLACES['other']}/end-{kind}")
    holders = [Program(holds, f"{WORK}/end-{kind}/end-{kind}", phase) for kind in ("soft", "hard")]

    def during(cut):
        phase.cut.set()
        for program in holders:
            program.hear(5)
        ends(cluster, cut)
        phase.stop.set()

    round_of(cluster, "2", "long", LONG, both, during)
    round_of(cluster, "3", "long, only what comes in", LONG, [IN])
    found = cluster.dfs("fsck", "--cluster-key-file", cluster.key, "--deep", check=False, timeout=300)
    assert found.returncode == 0, f"fsck: {found.stdout}{found.stderr}"
    for place in PLACES.values():
        run("umount", place)
        assert mounts[place].wait(60) == 0, "dfs-mount ended with an error"
    say("fsck is clean, unmounted")


def ended_by(_signal, _frame):
    sys.exit(1)


def main():
    signal.signal(signal.SIGTERM, ended_by)
    cluster = Cluster(WORK, MASTERS, CHUNKDS, ["a", "b"], master_settings=f"session_ttl_s = {TTL}\n")
    daemons, mounts = {}, {}
    try:
        cluster.make_network()
        for name in [*MASTERS, *CHUNKDS]:
            daemons[name] = Daemon(cluster, name)
        scenario(cluster, daemons, mounts)
        return 0
    except AssertionError as error:
        print(f"FAIL: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        cluster.clean_up(mounts, [*mounts.values(), *(daemon.process for daemon in daemons.values())])


if __name__ == "__main__":
    sys.exit(main())
