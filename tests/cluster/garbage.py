"""What a stranger may send to a port: garbage, floods, messages that are too long, cut off or absurd. Prints a line for each case.

usage: garbage.py HOST:PORT master|chunkd        Raw HTTP/2 (RFC 9113) and gRPC frames, no library that minds its manners."""
import os, random, socket, struct, sys, time

address, kind = sys.argv[1], sys.argv[2]
HOST, PORT = address.rsplit(":", 1)
rng = random.Random(24)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
METHODS = {
    "master": ["dfs.v1.Session/Attach", "dfs.v1.Control/Attach", "dfs.v1.Admin/Status", "dfs.v1.Admin/Fsck",
               "dfs.v1.Admin/ChangeNode", "dfs.v1.Admin/Evict", "dfs.v1.Admin/Backup", "dfs.v1.Admin/ForgetNewer",
               "dfs.v1.Raft/Append", "dfs.v1.Raft/Vote", "dfs.v1.Raft/Snapshot"],
    "chunkd": ["dfs.v1.Chunk/Append", "dfs.v1.Chunk/Read", "dfs.v1.Chunk/Fetch"],
}[kind]


def connect():
    s = socket.create_connection((HOST, int(PORT)), timeout=10)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return s


def send(s, data):
    """False: the other side has had enough, as it should."""
    try:
        s.sendall(data)
        return True
    except (BrokenPipeError, ConnectionResetError, socket.timeout):
        return False


def drain(s, seconds):
    """Reads what comes until the other side ends it or the time is over; answers what came."""
    got, end = b"", time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and len(got) < 1 << 20:
        s.settimeout(left)
        try:
            part = s.recv(65536)
        except (socket.timeout, ConnectionResetError, BrokenPipeError):
            break
        if not part:
            break
        got += part
    return got


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def string(text):
    data = text.encode()
    assert len(data) < 127
    return bytes([len(data)]) + data


def headers(path, extra=()):
    out = b""
    fields = [(":method", "POST"), (":scheme", "http"), (":path", "/" + path), (":authority", "x"),
              ("content-type", "application/grpc"), ("te", "trailers"), *extra]
    for name, value in fields:
        out += b"\x00" + string(name) + string(value)
    return out


def begin(settings=b""):
    s = connect()
    send(s, PREFACE + frame(4, 0, 0, settings))
    return s


def message(payload, compressed=0, length=None):
    return bytes([compressed]) + struct.pack(">I", len(payload) if length is None else length) + payload


def call(path, body, end=True, wait=1.0, extra=()):
    """A call with this body, in frames of 16 KiB."""
    s = begin()
    send(s, frame(1, 4, 1, headers(path, extra)))
    parts = [body[i:i + 16384] for i in range(0, len(body), 16384)] or [b""]
    for i, part in enumerate(parts):
        last = end and i == len(parts) - 1
        if not send(s, frame(0, 1 if last else 0, 1, part)):
            break
    got = drain(s, wait)
    s.close()
    return got


def raw(data, wait=0.5):
    s = connect()
    send(s, data)
    drain(s, wait)
    s.close()


def flood(one, count, start=b""):
    s = begin()
    send(s, start)
    piece = b"".join(one(i) for i in range(200))
    for i in range(count // 200):
        if not send(s, piece if one(0) == one(1) else b"".join(one(i * 200 + k) for k in range(200))):
            break
    drain(s, 0.3)
    s.close()


def crowd(count, data):
    """Many connections that say this and nothing more."""
    open_ones = []
    for _ in range(count):
        try:
            s = connect()
        except OSError:
            break
        send(s, data)
        open_ones.append(s)
    time.sleep(1)
    for s in open_ones:
        s.close()


def varint(n):
    out = b""
    while n > 127:
        out += bytes([n & 127 | 128])
        n >>= 7
    return out + bytes([n])


def field(number, value):
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    return varint(number << 3) + varint(value)


MOST = (1 << 64) - 1
absurd = b"".join(field(i, MOST) for i in range(1, 16))
absurd_bytes = b"".join(field(i, b"\xff" * 1000) for i in range(1, 16))
nested = b""
for _ in range(3000):
    nested = field(1, nested)


def every(body, **kw):
    for path in METHODS:
        call(path, body, wait=0.2, **kw)


def repeat(times, act):
    for _ in range(times):
        act()


CASES = [
    ("a megabyte of random bytes", lambda: raw(rng.randbytes(1 << 20))),
    ("a megabyte of zeroes", lambda: raw(bytes(1 << 20))),
    ("HTTP/1.1", lambda: raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")),
    ("an HTTP/1.1 header without end", lambda: raw(b"GET / HTTP/1.1\r\nX: " + b"a" * (1 << 20))),
    ("a TLS ClientHello", lambda: raw(bytes.fromhex("16030100c8010000c40303") + rng.randbytes(190))),
    ("half a preface, then silence", lambda: raw(PREFACE[:10])),
    ("a preface, then garbage", lambda: raw(PREFACE + rng.randbytes(100_000))),
    ("SETTINGS with absurd values", lambda: raw(PREFACE + frame(4, 0, 0, b"".join(
        struct.pack(">HI", i, 0xFFFFFFFF) for i in range(1, 7))))),
    ("a frame that says it has 16 MiB", lambda: raw(PREFACE + frame(4, 0, 0) + b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" + bytes(1 << 20))),
    ("DATA on a stream that was never opened", lambda: raw(PREFACE + frame(4, 0, 0) + frame(0, 0, 77, b"x" * 100))),
    ("a header block that is no HPACK", lambda: raw(PREFACE + frame(4, 0, 0) + frame(1, 4, 1, rng.randbytes(500)))),
    ("WINDOW_UPDATE beyond all bounds", lambda: raw(PREFACE + frame(4, 0, 0) + frame(8, 0, 0, b"\x7f\xff\xff\xff") * 3)),
    ("200,000 PINGs", lambda: flood(lambda i: frame(6, 0, 0, b"12345678"), 200_000)),
    ("200,000 SETTINGS", lambda: flood(lambda i: frame(4, 0, 0), 200_000)),
    ("20,000 streams opened and reset at once", lambda: flood(
        lambda i: frame(1, 4, 2 * i + 1, headers(METHODS[0])) + frame(3, 0, 2 * i + 1, struct.pack(">I", 8)), 20_000)),
    ("20,000 streams opened and left", lambda: flood(lambda i: frame(1, 4, 2 * i + 1, headers(METHODS[0])), 20_000)),
    ("headers continued without end", lambda: flood(
        lambda i: frame(9, 0, 1, b"\x00" + string("x-%d" % (i % 9)) + string("y" * 100)), 100_000, frame(1, 0, 1, headers(METHODS[0])))),
    ("1,000 connections that say nothing", lambda: crowd(1000, b"")),
    ("1,000 connections that begin and stop", lambda: crowd(1000, PREFACE + frame(4, 0, 0))),
    ("an unknown method", lambda: repeat(50, lambda: call("dfs.v1.Nothing/Here", message(b""), wait=0.05))),
    ("a message that says it has 4 GiB", lambda: every(message(b"x" * 1000, length=0xFFFFFFFF), end=False)),
    ("a message of 9 MiB", lambda: every(message(bytes(9 << 20)))),
    ("a message cut off", lambda: every(message(b"x" * 10, length=1000))),
    ("a message said to be compressed", lambda: every(message(b"x" * 10, compressed=1))),
    ("a message that is no protobuf", lambda: repeat(20, lambda: every(message(rng.randbytes(300))))),
    ("every number as large as can be", lambda: every(message(absurd))),
    ("bytes in every field", lambda: every(message(absurd_bytes))),
    ("messages 3,000 deep", lambda: every(message(nested))),
    ("300 greetings without a proof", lambda: repeat(300, lambda: call(METHODS[-1 if kind == "chunkd" else 1], message(
        field(1, field(1, 1) + field(2, b"ffffffffffffffff") + field(3, 7))), wait=0.02, end=False))),
    ("calls that stop in the middle of a frame", lambda: repeat(100, lambda: raw(
        PREFACE + frame(4, 0, 0) + frame(1, 4, 1, headers(METHODS[0])) + frame(0, 0, 1, bytes(5000))[:rng.randrange(20, 4000)], 0.01))),
]

for name, act in CASES:
    start = time.monotonic()
    act()
    print(f"{name}\t{time.monotonic() - start:.2f}", flush=True)
