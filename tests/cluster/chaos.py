"""Faults of every kind against a cluster whose daemons live in network namespaces of their own, while programs work on two mounts.

chaos.py WORK SECONDS SEED, with DFS_BIN_DIR set. Prints what was done; exit status 1 when anything does not hold. Network namespaces,
tmpfs and mounts that it makes are gone when it ends. The choice and the order of the faults come from SEED.

Three masters, five chunk daemons, each with a small tmpfs, and one client with both mounts and the commands: see namespaces.py.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time

from namespaces import IN, OUT, Cluster, Daemon, mounted, run, wait_for

WORK, SECONDS, SEED = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
MASTERS, CHUNKDS, CLIENT = ["m1", "m2", "m3"], ["c1", "c2", "c3", "c4", "c5"], "k"
CLUSTER = Cluster(WORK, MASTERS, CHUNKDS, [CLIENT], chunkd_settings='reserve = "8MiB"\n')
DISK_MIB = 640
MOUNTS = [f"{WORK}/mnt1", f"{WORK}/mnt2"]
BEGAN = time.monotonic()


def say(text):
    print(f"{time.monotonic() - BEGAN:6.1f}  {text}", flush=True)


KINDS = [
    "kill_master", "kill_leader", "kill_chunkd", "pause_master", "pause_chunkd", "cut_master", "cut_chunkd", "deaf_master",
    "mute_master", "deaf_chunkd", "mute_chunkd", "cut_pair", "cut_client", "full_disk",
]

# ---- the faults: each begins, tells that it has, lasts, and is taken back ----


class Faults:
    def __init__(self, daemons, rng, fired):
        self.daemons, self.rng, self.fired = daemons, rng, fired

    def note(self, kind):
        self.fired[kind] = self.fired.get(kind, 0) + 1

    def last(self, least, most):
        time.sleep(self.rng.uniform(least, most))

    def kill(self, kind, name):
        daemon = self.daemons[name]
        assert daemon.lives(), f"{name} died by itself: {daemon.log}"
        daemon.kill()
        say(f"{kind} {name}")
        self.note(kind)
        self.last(0.2, 3)
        daemon.start()

    def kill_master(self):
        self.kill("kill_master", self.rng.choice(MASTERS))

    def kill_leader(self):
        if name := CLUSTER.leader():
            self.kill("kill_leader", name)

    def kill_chunkd(self):
        self.kill("kill_chunkd", self.rng.choice(CHUNKDS))

    def pause(self, kind, name, least, most):
        daemon = self.daemons[name]
        assert daemon.lives(), f"{name} died by itself: {daemon.log}"
        os.kill(daemon.process.pid, signal.SIGSTOP)
        wait_for(5, f"{name} stands still", lambda: daemon.state() == "T")
        say(f"{kind} {name}")
        self.note(kind)
        self.last(least, most)
        os.kill(daemon.process.pid, signal.SIGCONT)

    def pause_master(self):
        self.pause("pause_master", CLUSTER.leader() or self.rng.choice(MASTERS), 1, 6)

    def pause_chunkd(self):
        self.pause("pause_chunkd", self.rng.choice(CHUNKDS), 1, 8)

    def partition(self, kind, name, rules, least, most):
        CLUSTER.cut(name, rules)
        say(f"{kind} {name}")
        try:
            self.last(least, most)
            if CLUSTER.dropped(name) > 0:
                self.note(kind)
        finally:
            CLUSTER.mend(name)

    def cut_master(self):
        self.partition("cut_master", self.rng.choice(MASTERS), [IN, OUT], 1, 8)

    def cut_chunkd(self):
        self.partition("cut_chunkd", self.rng.choice(CHUNKDS), [IN, OUT], 1, 8)

    def deaf_master(self):
        self.partition("deaf_master", CLUSTER.leader() or self.rng.choice(MASTERS), [IN], 1, 6)

    def mute_master(self):
        self.partition("mute_master", CLUSTER.leader() or self.rng.choice(MASTERS), [OUT], 1, 6)

    def deaf_chunkd(self):
        self.partition("deaf_chunkd", self.rng.choice(CHUNKDS), [IN], 1, 6)

    def mute_chunkd(self):
        self.partition("mute_chunkd", self.rng.choice(CHUNKDS), [OUT], 1, 6)

    def cut_pair(self):
        """Two chunk daemons that do not reach each other, and both reach everybody else."""
        one, other = self.rng.sample(CHUNKDS, 2)
        CLUSTER.cut(one, [("input", f"ip saddr {CLUSTER.address[other]}"), ("output", f"ip daddr {CLUSTER.address[other]}")])
        say(f"cut_pair {one} {other}")
        try:
            self.last(3, 8)
            listed = run(*CLUSTER.inside(one, "nft", "list", "table", "inet", "cut")).stdout
            if any(word != "0" for word in packets(listed)):
                self.note("cut_pair")
        finally:
            CLUSTER.mend(one)

    def cut_client(self):
        self.partition("cut_client", CLIENT, [IN, OUT], 1, 5)

    def full_disk(self):
        name = self.rng.choice(CHUNKDS)
        ballast = f"{self.daemons[name].data}/ballast"
        try:
            with open(ballast, "wb", buffering=0) as file:
                while file.write(bytes(1 << 20)):
                    pass
        except OSError:
            pass
        try:
            if os.statvfs(self.daemons[name].data).f_bavail == 0:
                self.note("full_disk")
            say(f"full_disk {name}")
            self.last(2, 8)
        finally:
            os.unlink(ballast)


def packets(listed):
    words = listed.split()
    return [words[at + 1] for at, word in enumerate(words) if word == "packets"]


# ---- the work ----


class Work:
    """Works in a process of its own until told to stop, then looks, through the other mount, at what must be there.

    Not a thread: whoever starts a program closes all files in between, and an fd of a mount that is cut off would hold up the
    interpreter, and with it those who make and mend the faults.
    """

    def __init__(self, name, number):
        self.name = name
        self.place, self.rng = f"{MOUNTS[number]}/{name}", random.Random(f"{SEED} {name}")
        self.elsewhere = f"{MOUNTS[1 - number]}/{name}"
        self.local = f"{WORK}/local-{name}"
        self.rounds, self.slowest, self.stop = 0, 0.0, multiprocessing.Event()
        self.pipe, theirs = multiprocessing.Pipe()
        os.mkdir(self.local)
        self.process = multiprocessing.Process(target=self.main, args=(theirs,), daemon=True)
        self.process.start()

    def main(self, pipe):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        pipe.send((self.attempt(self.work), self.rounds, self.slowest))
        pipe.recv()
        pipe.send(self.attempt(self.check))

    def attempt(self, what):
        try:
            what()
            return None
        except Exception as error:
            said = getattr(error, "stderr", None) or getattr(error, "stdout", None) or ""
            say(f"{self.name} failed: {error!r} {said}")
            return f"{error!r} {said}"

    def work(self):
        os.mkdir(self.place)
        while not self.stop.is_set():
            began = time.monotonic()
            self.round()
            self.slowest = max(self.slowest, time.monotonic() - began)
            self.rounds += 1

    def said(self, seconds):
        assert self.pipe.poll(seconds), f"{self.name} does not get on within {seconds} s"
        return self.pipe.recv()


class Fsx(Work):
    def round(self):
        seed = str(self.rng.randrange(1 << 30))
        with open(f"{self.local}/fsx.toml", "w") as file:
            file.write("flen = 131072\n[opsize]\nmax = 32768\n[weights]\nclose_open = 1\ninvalidate = 1\nfsync = 1\ntruncate = 2\npunch_hole = 1\n")
        name = f"{self.place}/{seed}"
        run("fsx", "-q", "-f", f"{self.local}/fsx.toml", "-N", "300", "-S", seed, "-P", self.local, name, timeout=400)
        os.unlink(name)

    def check(self):
        assert self.rounds > 0, "fsx did not get on"


class Git(Work):
    def git(self, *arguments):
        run("git", "-C", f"{self.place}/repo", *arguments, timeout=400)

    def round(self):
        repo = f"{self.place}/repo"
        if not os.path.exists(repo):
            run("git", "init", "-q", repo, timeout=400)
        for _ in range(5):
            with open(f"{repo}/file{self.rng.randrange(20)}", "wb") as file:
                file.write(self.rng.randbytes(self.rng.choice([100, 3000, 60000])))
        self.git("add", "-A")
        self.git("commit", "-q", "--allow-empty", "-m", f"round {self.rounds}")
        if self.rounds % 5 == 4:
            self.git("gc", "-q")
            self.git("fsck", "--full")

    def check(self):
        def git(*arguments):
            return run("git", "-C", f"{self.elsewhere}/repo", *arguments, timeout=400).stdout

        git("fsck", "--full", "--strict")
        count = int(git("rev-list", "--count", "HEAD"))
        assert count >= self.rounds, f"{count} commits of {self.rounds} are there"
        assert git("status", "--porcelain") == "", "the work tree is not what was committed"


class Sqlite(Work):
    def round(self):
        base = sqlite3.connect(f"{self.place}/base", timeout=300)
        base.execute("pragma synchronous = full")
        base.execute("create table if not exists rows (number integer primary key, data blob, sum text)")
        data = self.rng.randbytes(self.rng.choice([50, 2000, 20000]))
        with base:
            base.execute("insert into rows values (?, ?, ?)", (self.rounds, data, hashlib.sha256(data).hexdigest()))
            if self.rounds > 300:
                base.execute("update rows set data = data where number = ?", (self.rng.randrange(self.rounds),))
        base.close()

    def check(self):
        base = sqlite3.connect(f"{self.elsewhere}/base")
        assert base.execute("pragma integrity_check").fetchall() == [("ok",)], "sqlite's integrity check"
        rows = base.execute("select number, data, sum from rows order by number").fetchall()
        numbers = [number for number, _, _ in rows]
        assert numbers[: self.rounds] == list(range(self.rounds)), f"{len(numbers)} of {self.rounds} committed rows are there"
        for number, data, digest in rows:
            assert hashlib.sha256(data).hexdigest() == digest, f"row {number}"


def read_all(fd):
    """A read that hits an error after some pages is short; the next one tells."""
    parts, at = [], 0
    while part := os.pread(fd, 1 << 20, at):
        parts.append(part)
        at += len(part)
    return b"".join(parts)


class Writer(Work):
    """Writes, overwrites, appends and fsyncs, and keeps what every file must hold after its last fsync."""

    def __init__(self, name, number):
        # Before the process begins.
        self.synced = {}
        super().__init__(name, number)

    def round(self):
        number = self.rng.randrange(40)
        path, known = f"{self.place}/{number}", self.synced.get(number, b"")
        flags = os.O_RDWR | os.O_CREAT
        fd = os.open(path, flags, 0o644)
        try:
            there = read_all(fd)
            assert there == known, f"{path}: {len(there)} bytes that are not the {len(known)} that were fsynced"
            content = bytearray(known)
            for _ in range(self.rng.randrange(1, 5)):
                data = self.rng.randbytes(self.rng.choice([10, 4000, 30000, 300000]))
                at = len(content) if self.rng.random() < 0.5 else self.rng.randrange(len(content) + 1)
                if at + len(data) > 2_000_000:
                    content.clear()
                    at = 0
                    os.ftruncate(fd, 0)
                os.pwrite(fd, data, at)
                content[at : at + len(data)] = data
            os.fsync(fd)
            self.synced[number] = bytes(content)
        finally:
            os.close(fd)

    def check(self):
        for number, content in self.synced.items():
            with open(f"{self.elsewhere}/{number}", "rb") as file:
                there = file.read()
            assert there == content, f"file {number}: {len(there)} bytes that are not the {len(content)} that were fsynced"


# ---- all of it ----


def healthy():
    try:
        now = CLUSTER.status()
    except (subprocess.SubprocessError, ValueError):
        return False
    repair = now["repair"]
    up = sum(node["state"] == "up" for node in now["nodes"])
    return up == len(CHUNKDS) and now["under_replicated"] == 0 and repair["waiting"] + repair["copying"] + repair["flawed"] == 0


def faults_until(deadline, daemons):
    """First every kind once, in a random order, then at random; one at a time for masters, chunk daemons and the client each."""
    rng, fired, failed = random.Random(SEED), {}, []
    number = 0

    def one(name, fault):
        try:
            getattr(fault, name)()
        except Exception as error:
            failed.append(f"{name}: {error!r} {getattr(error, 'stderr', None) or ''}")

    queue = list(KINDS)
    rng.shuffle(queue)
    under_way = []
    while (queue or time.monotonic() < deadline) and not failed:
        name = queue.pop() if queue else rng.choice(KINDS)
        while any(thread.name == group(name) and thread.is_alive() for thread in under_way):
            time.sleep(0.1)
        number += 1
        # A generator of its own: what it chooses does not depend on what goes on beside it.
        fault = Faults(daemons, random.Random(f"{SEED} {number}"), fired)
        under_way.append(threading.Thread(target=one, args=(name, fault), name=group(name), daemon=True))
        under_way[-1].start()
        time.sleep(rng.uniform(0.3, 1.5))
    for thread in under_way:
        thread.join(60)
    for name in KINDS:
        if name not in fired and not failed:
            # Nothing was on its way, or nobody led, at that moment: once more.
            number += 1
            one(name, Faults(daemons, random.Random(f"{SEED} {number}"), fired))
    say("faults: " + ", ".join(f"{kind} {count}" for kind, count in sorted(fired.items())))
    assert not failed, f"a fault could not be made: {failed}"
    missing = [name for name in KINDS if name not in fired]
    assert not missing, f"never fired: {missing}"


def group(name):
    return "master" if "master" in name or "leader" in name else "client" if "client" in name else "chunkd"


def scenario(daemons, mounts):
    for daemon in daemons.values():
        daemon.start()
    wait_for(60, "the cluster is up", CLUSTER.ready)
    for number in (0, 1):
        mounts.append(CLUSTER.mount(CLIENT, MOUNTS[number], "timeout=120", f"mount{number + 1}"))
        wait_for(60, "a mount", lambda: mounted(MOUNTS[number]))
    works = [Fsx("fsx", 0), Git("git", 0), Sqlite("sqlite", 1), Writer("writer", 1)]
    faults_until(time.monotonic() + SECONDS, daemons)
    for work in works:
        work.stop.set()
    failed = []
    for work in works:
        error, rounds, slowest = work.said(400)
        say(f"{work.name}: {rounds} rounds, the slowest {slowest:.1f} s")
        failed += [f"{work.name}: {error}"] if error else []
    assert not failed, f"programs saw errors: {failed}"
    for daemon in daemons.values():
        assert daemon.lives(), f"{daemon.name} died by itself"
    try:
        wait_for(180, "every chunk is whole again", healthy)
    except AssertionError:
        say(CLUSTER.dfs("status", "--json", check=False).stdout)
        say(CLUSTER.dfs("fsck", "--cluster-key-file", CLUSTER.key, check=False).stdout)
        raise
    say("whole again")
    for work in works:
        work.pipe.send("look")
    wrong = [f"{work.name}: {error}" for work in works if (error := work.said(400))]
    assert not wrong, f"not what was fsynced: {wrong}"
    say("everything that was fsynced is there")
    found = CLUSTER.dfs("fsck", "--cluster-key-file", CLUSTER.key, "--deep", check=False, timeout=300)
    assert found.returncode == 0, f"fsck: {found.stdout}{found.stderr}"
    for number, process in enumerate(mounts):
        run("umount", MOUNTS[number])
        assert process.wait(60) == 0, "dfs-mount ended with an error"
    say("fsck is clean, unmounted")


def ended_by(_signal, _frame):
    sys.exit(1)


def main():
    signal.signal(signal.SIGTERM, ended_by)
    daemons, mounts, tmpfs = {}, [], []
    try:
        CLUSTER.make_network()
        for name in [*MASTERS, *CHUNKDS]:
            daemons[name] = Daemon(CLUSTER, name)
            if name in CHUNKDS:
                run("mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "dfs-chaos", daemons[name].data)
                tmpfs.append(daemons[name].data)
        scenario(daemons, mounts)
        return 0
    except AssertionError as error:
        print(f"FAIL: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        CLUSTER.clean_up(MOUNTS, [*mounts, *(daemon.process for daemon in daemons.values())])
        for place in tmpfs:
            run("umount", "-l", place, check=False)


if __name__ == "__main__":
    sys.exit(main())
