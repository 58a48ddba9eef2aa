#!/usr/bin/env bash
# What install.sh puts on a machine works: the commented settings, readiness for systemd, the helpers of mount and umount.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
"$ROOT/deploy/install.sh" --prefix "$WORK/root" --bin "$DFS_BIN_DIR" >/dev/null
etc=$WORK/root/etc/dfs
daemons=()
stop_daemons() {
    local pid
    for pid in "${daemons[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
    for pid in "${daemons[@]}"; do wait_for 20 gone "$pid" || return 1; done
}
at_end() {
    "$WORK/root/usr/sbin/umount.fuse.dfs" "$MNT" -l >/dev/null 2>&1 || true
    stop_daemons
}

step "the example settings are valid, with this machine's names and places"
read -r master_port chunkd_port < <(python3 -c '
import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(s.getsockname()[1] for s in held))')
head -c 32 /dev/urandom | base64 >"$etc/cluster.key"
for name in master chunkd client; do
    sed "s|/etc/dfs|$etc|; s|/var/lib/dfs|$WORK/data|; s|master-1.example.net:7100|127.0.0.1:$master_port|
        s|chunkd-1.example.net:7200|127.0.0.1:$chunkd_port|; s|0.0.0.0:7100|127.0.0.1:$master_port|; s|0.0.0.0:7200|127.0.0.1:$chunkd_port|
        s|^replicas = 3|replicas = 1|" "$etc/$name.toml.example" >"$etc/$name.toml"
done
# Every key that stands in a comment is one the programs know.
for name in master chunkd client; do
    sed "s|^# \([a-z_]* = .*\)|\1|" "$etc/$name.toml" | grep -v '^address\|^\[\[' | sort -u -t= -k1,1 >"$WORK/$name-full.toml"
done
echo 'listen = 1' >>"$WORK/master-full.toml"
refused 2 "duplicate key" dfs-master --config "$WORK/master-full.toml"
sed -i '$d' "$WORK/master-full.toml"
dfs-master --config "$WORK/master-full.toml" --check-config >/dev/null || fail "a key in master.toml is unknown"
sed -i 's|^data = .*|data = []|' "$WORK/chunkd-full.toml"
refused 2 "names no directory" dfs-chunkd --config "$WORK/chunkd-full.toml"
sed -i 's|^masters = .*|masters = []|' "$WORK/client-full.toml"
refused 2 "no masters" env -u DFS_MASTERS dfs-mount -o "config=$WORK/client-full.toml" "$MNT"

step "daemons tell systemd when they are ready"
start() { # NAME COMMAND…: returns when the command says READY=1
    local name=$1
    shift
    python3 - "$WORK/$name" "$@" <<'PY'
import os, socket, subprocess, sys
path, command = sys.argv[1], sys.argv[2:]
listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
listener.bind(path + ".notify")
listener.settimeout(30)
with open(path + ".log", "w") as log:
    child = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True,
                             env=dict(os.environ, NOTIFY_SOCKET=path + ".notify"))
with open(path + ".pid", "w") as out:
    print(child.pid, file=out)
while b"READY=1" not in listener.recv(4096).split(b"\n"):
    pass
PY
}
for name in master chunkd; do
    start $name "$WORK/root/usr/bin/dfs-$name" --config "$etc/$name.toml" || { cat "$WORK/$name.log"; fail "dfs-$name was not ready"; }
    daemons+=("$(cat "$WORK/$name.pid")")
done
export DFS_MASTERS=127.0.0.1:$master_port
ready() { dfs status --ready 1 >/dev/null 2>&1; }
wait_for 30 ready || fail "the cluster is not usable"

step "mount.fuse.dfs and umount.fuse.dfs"
unset DFS_MASTERS
mounted() { grep -q " $MNT fuse.*\| $MNT .* fuse.dfs " /proc/self/mountinfo; }
"$WORK/root/usr/sbin/mount.fuse.dfs" dfs "$MNT" -o "rw,noatime,_netdev,config=$etc/client.toml"
mounted || fail "the helper came back before the mount was there"
mkdir -p "$MNT/pub/below"
echo kept >"$MNT/pub/below/file"
"$WORK/root/usr/sbin/umount.fuse.dfs" "$MNT"
! mounted || fail "still mounted"
"$WORK/root/usr/sbin/mount.fuse.dfs" "127.0.0.1:$master_port:/pub" "$MNT" -o ro
[[ $(cat "$MNT/below/file") == kept ]] || fail "a directory of the cluster is not what was mounted"
(echo x >"$MNT/new") 2>/dev/null && fail "a read-only mount was written to"
"$WORK/root/usr/sbin/umount.fuse.dfs" "$MNT"

step "dfs-mount --foreground tells systemd, and SIGTERM unmounts"
start mount "$WORK/root/usr/bin/dfs-mount" --foreground -o "config=$etc/client.toml" "$MNT" || { cat "$WORK/mount.log"; fail "dfs-mount was not ready"; }
mounted || fail "ready before it was mounted"
echo late >"$MNT/late"
kill -TERM "$(cat "$WORK/mount.pid")"
wait_for 30 gone "$(cat "$WORK/mount.pid")" || fail "dfs-mount does not end"
! mounted || fail "SIGTERM left the mount behind"
[[ $(dfs --masters "127.0.0.1:$master_port" cat /late) == late ]] || fail "SIGTERM lost what was written"

step "SIGTERM stops the daemons cleanly"
stop_daemons || fail "a daemon does not stop"
