#!/usr/bin/env bash
# Bad input: one clear line, the promised status or errno, and nothing lost.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
head -c 300000 /dev/urandom >"$WORK/keep"
cp "$WORK/keep" "$MNT/keep"
kept() { cmp "$WORK/keep" "$MNT/keep" || fail "$1 lost data"; }
conf=$HOME_DIR/conf

step "unknown configuration keys"
for daemon in master chunkd; do
    { cat "$conf/$daemon-1.toml" | sed '/^\[/,$d'; echo 'colour = "red"'; } >"$WORK/$daemon.toml"
    refused 2 "colour" "dfs-$daemon" --config "$WORK/$daemon.toml"
done
printf 'masters = ["%s"]\ncolour = "red"\n' "${DFS_MASTERS%%,*}" >"$WORK/client.toml"
mkdir "$WORK/mnt2"
refused 2 "colour" dfs-mount -o "config=$WORK/client.toml" "$WORK/mnt2"
refused 2 "colour" dfs-mount -o colour=red "$WORK/mnt2"

step "a port in use"
for daemon in master chunkd; do
    sed "s|$HOME_DIR|$WORK/other|g" "$conf/$daemon-1.toml" | sed "s|$WORK/other/cluster.key|$HOME_DIR/cluster.key|; s|$WORK/other/conf|$HOME_DIR/conf|" >"$WORK/$daemon.toml"
    refused 1 "in use" "dfs-$daemon" --config "$WORK/$daemon.toml"
done

step "data directories of another node and another cluster"
down
cp -a "$HOME_DIR" "$WORK/saved"
key=$(sed -n 's/^cluster_key_file *= *"\(.*\)"/\1/p' "$conf/master-1.toml")
head -c 32 /dev/urandom | base64 >"$WORK/other.key"
for daemon in master chunkd; do
    sed "s|$key|$WORK/other.key|" "$conf/$daemon-1.toml" >"$WORK/$daemon.toml"
    refused 2 "cluster" "dfs-$daemon" --config "$WORK/$daemon.toml"
done
sed 's/^id *= *1/id = 7/' "$conf/master-1.toml" >"$WORK/master.toml"
refused 2 "master|node|belongs" dfs-master --config "$WORK/master.toml"
one=$(sed -n 's/^data *= *\[ *"\([^"]*\)".*/\1/p' "$conf/chunkd-1.toml")
two=$(sed -n 's/^data *= *\[ *"\([^"]*\)".*/\1/p' "$conf/chunkd-2.toml")
sed "s|^data *=.*|data = [\"$one\", \"$two\"]|" "$conf/chunkd-1.toml" >"$WORK/chunkd.toml"
refused 2 "node|belongs" dfs-chunkd --config "$WORK/chunkd.toml"
up
kept "a refused start"

step "mount points"
: >"$WORK/file"
refused 2 "not a directory" dfs-mount "$WORK/file"
refused 2 "no such|No such|does not exist" dfs-mount "$WORK/nothing"
refused 2 "busy|already" dfs-mount "$MNT"
refused 1 "127.0.0.1:1" dfs-mount --masters 127.0.0.1:1 "$WORK/mnt2"
! grep -q " $WORK/mnt2 " /proc/self/mountinfo || fail "a dead mount stayed behind"

step "names over 255 bytes"
python3 - "$MNT" <<'PY'
import errno, os, sys
long = sys.argv[1] + "/" + "n" * 256
for call in (lambda: os.mkdir(long), lambda: open(long, "w"), lambda: os.stat(long), lambda: os.symlink("x", long)):
    try:
        call()
    except OSError as e:
        assert e.errno == errno.ENAMETOOLONG, e
    else:
        raise SystemExit("a name of 256 bytes was accepted")
os.mkdir(sys.argv[1] + "/" + "n" * 255)
PY

step "flipped bits in chunk files: the other replicas answer"
down
python3 - "$HOME_DIR" <<'PY'
import glob, os, sys
flipped = 0
for path in glob.glob(sys.argv[1] + "/**/*.chunk", recursive=True):
    if "chunkd-1" not in path: continue
    with open(path, "r+b") as f:
        data = bytearray(f.read())
        for at in range(1000, len(data) - 200, 4096):
            data[at] ^= 0x10
            flipped += 1
        f.seek(0); f.write(data)
assert flipped > 10, flipped
PY
up
kept "a replica with flipped bits"

step "a Raft log whose last record was cut off"
for bytes in 1 9 40; do
    down
    python3 - "$HOME_DIR" "$bytes" <<'PY'
import glob, os, sys
logs = [p for p in glob.glob(sys.argv[1] + "/data/master-1/log/*") if os.path.getsize(p) > 0]
assert logs, "no Raft log files found"
last = max(logs)
os.truncate(last, os.path.getsize(last) - int(sys.argv[2]))
PY
    up
    kept "a torn log tail ($bytes bytes)"
    echo "$bytes" >"$MNT/after-$bytes"
done
for bytes in 1 9 40; do [[ $(cat "$MNT/after-$bytes") == "$bytes" ]] || fail "what was written after the repair is gone"; done

step "a client of another protocol version, and a read without a token: see the protocol tests of master and chunkd"
