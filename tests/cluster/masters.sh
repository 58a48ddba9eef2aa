#!/usr/bin/env bash
# The group of masters grows from one to three, loses one with its disk and gets another for it, and shrinks to one again, while
# programs write, rename, read and remove: no error, nothing lost. Clients and chunk daemons know of one master at first.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/cluster.key")

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
# A master that is to be added; its address.
new_master() { # NUMBER
    local port
    port=$(free_port)
    cat >"$HOME_DIR/conf/master-$1.toml" <<TOML
id = $1
listen = "127.0.0.1:$port"
data = "$HOME_DIR/data/master-$1"
cluster_key_file = "$HOME_DIR/cluster.key"
join = true
snapshot_every = 300
TOML
    start_master "$1"
    printf '127.0.0.1:%s\n' "$port"
}
start_master() { # NUMBER
    setsid "$DFS_BIN_DIR/dfs-master" --config "$HOME_DIR/conf/master-$1.toml" >>"$HOME_DIR/log/master-$1.log" 2>&1 </dev/null &
    echo $! >"$HOME_DIR/run/master-$1.pid"
    disown
}
serving() { grep -q ' serving' "$HOME_DIR/log/master-$1.log"; }
address() { sed -n 's/^listen = "\(.*\)"$/\1/p' "$HOME_DIR/conf/master-$1.toml"; }
masters() { # the ids of those that vote, in one line, the leader's first
    dfs master ls --json | python3 -c '
import json, sys
print(*(m["id"] for m in sorted(json.load(sys.stdin), key=lambda m: (not m["leader"], m["id"])) if m["voter"]))'
}
are() { # IDS…: these vote, and one of them leads
    [[ $(masters 2>/dev/null | xargs -n1 | sort | xargs) == "$*" ]]
}
settle() { wait_for 60 are "$@" || fail "the masters are not $*: $(dfs master ls 2>&1)"; }

# Bad input, before anything else.
refused 2 'not host:port' dfs master add nonsense "${KEY[@]}"
refused 2 'invalid value' dfs master remove minusone "${KEY[@]}"
refused 1 'No such file' dfs master remove 1 --cluster-key-file "$WORK/none"
echo not-the-key-of-this-cluster >"$WORK/other.key"
refused 1 'proof is wrong' dfs master remove 1 --cluster-key-file "$WORK/other.key"
refused 1 'the only one that votes' dfs master remove 1 "${KEY[@]}"
refused 1 "127.0.0.1:1: " dfs master add 127.0.0.1:1 "${KEY[@]}"
[[ $(dfs master remove 77 "${KEY[@]}" --json | tr -d ' \n') == '{"master":77,"removed":false}' ]] || fail "removing nobody"
printf 'id = 1\nlisten = "127.0.0.1:0"\ndata = "%s"\ncluster_key_file = "%s"\njoin = true\n[[peers]]\nid = 1\naddress = "127.0.0.1:0"\n' \
    "$WORK/x" "$HOME_DIR/cluster.key" >"$WORK/both.toml"
refused 2 'exclude each other' dfs-master --config "$WORK/both.toml"

# The load: each of its processes writes, fsyncs, renames, reads and removes, and in the end looks for what must be there.
cat >"$WORK/load.py" <<'PY'
import hashlib, os, random, sys, time
directory, stop = sys.argv[1:]
rng, there, count, longest = random.Random(directory), {}, 0, 0.0
os.mkdir(directory)
while not os.path.exists(stop):
    name, data, began = f"{directory}/{count}", rng.randbytes(rng.choice([10, 5000, 40000])), time.monotonic()
    with open(name + ".new", "xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(name + ".new", name)
    there[name] = hashlib.sha256(data).digest()
    old = rng.choice(list(there))
    assert hashlib.sha256(open(old, "rb").read()).digest() == there[old], old
    if len(there) > 50:
        os.unlink(old)
        del there[old]
    longest = max(longest, time.monotonic() - began)
    count += 1
assert sorted(os.listdir(directory)) == sorted(os.path.basename(name) for name in there)
for name, digest in there.items():
    assert hashlib.sha256(open(name, "rb").read()).digest() == digest, name
print(f"{count} rounds, the longest {longest:.2f} s")
PY
workers=()
for n in 1 2 3; do
    python3 "$WORK/load.py" "$MNT/load$n" "$WORK/stop" >"$WORK/load$n.out" 2>&1 &
    workers+=($!)
done
works() { # the load goes on: a file that is made now is seen
    local name="$MNT/now-$RANDOM$RANDOM"
    timeout 30 sh -c "echo x >'$name' && test -s '$name' && rm '$name'" || fail "nothing can be written"
    for pid in "${workers[@]}"; do ! gone "$pid" || { cat "$WORK"/load*.out; fail "a program saw an error"; }; done
}
works

for n in 2 3; do
    new=$(new_master "$n")
    wait_for 20 serving "$n" || fail "master $n does not serve"
    dfs master add "$new" "${KEY[@]}" --wait 120
    dfs master add "$new" "${KEY[@]}" # again: nothing happens
    works
done
settle 1 2 3
step "one master has become three"

# The one that everybody was told of goes; who connects knows of dead ones, and of one that does not lead.
DFS_MASTERS=$(address 2)
dfs master remove 1 "${KEY[@]}"
settle 2 3
works
read -r lead follow <<<"$(masters)"
DFS_MASTERS="127.0.0.1:1,127.0.0.1:2,$(address "$follow")"
settle 2 3
step "master 1 was removed: $lead leads, $follow follows"
crash master-1
start_master 1 # it comes back with all that it knew: nobody minds, and it serves nobody
# At first it may know who leads, and say so; when it has wanted to lead itself it knows that it is none of them.
alone() {
    local said status=0
    said=$(dfs --masters "$(address 1)" --timeout 3 status 2>&1) || status=$?
    [[ $status == 1 && $said == *'cannot reach the cluster'* ]]
}
wait_for 30 alone || fail "master 1 still knows who leads"
works
[[ $(masters) == "$lead $follow" ]] || fail "the leader has changed: $(masters)"
kill -TERM "$(pid master-1)"
wait_for 20 gone "$(pid master-1)" || fail "master 1 does not stop"
step "it came back, and disturbed nobody"

new=$(new_master 4)
wait_for 20 serving 4 || fail "master 4 does not serve"
dfs master add "$new" "${KEY[@]}" --wait 120
settle 2 3 4
works

# One dies and its disk with it: another one takes its place.
lead=$(masters); lead=${lead%% *}
dead=$lead
crash "master-$dead"
rm -rf "$HOME_DIR/data/master-$dead" "$HOME_DIR/conf/master-$dead.toml" "$HOME_DIR/run/master-$dead.pid"
left=$(for n in 2 3 4; do [[ $n == "$dead" ]] || echo "$n"; done | xargs)
DFS_MASTERS=$(for n in $left; do address "$n"; done | paste -sd,)
led() { [[ $(masters 2>/dev/null | cut -d' ' -f1) =~ [0-9] ]]; }
wait_for 30 led || fail "nobody leads"
works
alive=${left%% *}
refused 1 'no majority' dfs master remove "$alive" "${KEY[@]}"
dfs master remove "$dead" "${KEY[@]}"
settle $left
new=$(new_master 5)
wait_for 20 serving 5 || fail "master 5 does not serve"
dfs master add "$new" "${KEY[@]}" --wait 120
settle $left 5
works
step "master $dead, who led, died with its disk and was replaced by master 5"

# Back to one, the leader first each time.
remaining="$left 5"
while [[ $remaining == *' '* ]]; do
    lead=$(masters | cut -d' ' -f1)
    dfs master remove "$lead" "${KEY[@]}"
    remaining=$(for n in $remaining; do [[ $n == "$lead" ]] || echo "$n"; done | xargs)
    DFS_MASTERS=$(for n in $remaining; do address "$n"; done | paste -sd,)
    settle $remaining
    works
    kill -TERM "$(pid "master-$lead")"
    wait_for 20 gone "$(pid "master-$lead")" || fail "master $lead does not stop"
    works
done
step "master $remaining is alone again"

touch "$WORK/stop"
for n in 1 2 3; do
    wait "${workers[n - 1]}" || { cat "$WORK/load$n.out"; fail "a program saw an error, or something is lost"; }
    step "load $n: $(cat "$WORK/load$n.out")"
done
dfs fsck --deep "${KEY[@]}" || fail "fsck"
