"""Writes, rewrites, renames and reads files until it is told to stop (SIGTERM); each line on stdout is of a file that was fsynced."""
import hashlib, os, random, signal, sys, time

top, seed = sys.argv[1], int(sys.argv[2])
rng = random.Random(seed)
stop = False


def on_term(*_):
    global stop
    stop = True


signal.signal(signal.SIGTERM, on_term)
os.makedirs(top, exist_ok=True)
longest, kept, i = 0.0, [], 0
while not stop:
    begin = time.monotonic()
    data = rng.randbytes(rng.choice([0, 1, 100, 4096, 70_000, 400_000, 2_000_000]))
    path = f"{top}/{seed}.{i}"
    fd = os.open(path + ".tmp", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]
    os.fsync(fd)
    os.close(fd)
    os.rename(path + ".tmp", path)
    top_fd = os.open(top, os.O_RDONLY)
    os.fsync(top_fd)
    os.close(top_fd)
    print(hashlib.sha256(data).hexdigest(), "", path, flush=True)
    kept.append((path, data[:1000]))
    kept = kept[-50:]
    old, head = rng.choice(kept)
    with open(old, "rb") as f:
        assert f.read(1000) == head, old
    # What goes away is never one of those that were told of.
    waste = f"{top}/waste.{seed}.{i}"
    with open(waste, "wb") as f:
        f.write(rng.randbytes(rng.choice([10, 100_000])))
    os.unlink(waste)
    longest = max(longest, time.monotonic() - begin)
    i += 1
print(f"{i} files, longest round {longest:.2f} s", file=sys.stderr)
