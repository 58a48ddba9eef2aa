#!/usr/bin/env bash
# A follower that stood still until the log it lacks was purged, and one that lost its disk, are brought up by a snapshot, while a
# program goes on; afterwards each of them is good for a majority.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --masters 3
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
down
for n in 1 2 3; do sed -i '1i snapshot_every = 150' "$HOME_DIR/conf/master-$n.toml"; done
up

leader() { dfs status --json | python3 -c 'import json, sys; print(next(m["id"] for m in json.load(sys.stdin)["masters"] if m["leader"]))'; }
has_leader() { leader >/dev/null 2>&1; }
matched() { # ID: the last entry that the leader knows to be in its log
    dfs master ls --json | python3 -c 'import json, sys; print(next(m["matched"] for m in json.load(sys.stdin) if m["id"] == int(sys.argv[1])))' "$1"
}
older_snapshot() { # ID: the entry of the older of its two snapshots, up to which its log is purged
    local files=("$HOME_DIR/data/master-$1"/snapshots/*.snapshot)
    ((${#files[@]} == 2)) || { echo 0; return; }
    echo $((10#$(basename "${files[0]}" | cut -d- -f1)))
}
load() { # FROM TO: files that are there from then on
    python3 - "$MNT" "$1" "$2" <<'PY'
import os, sys
for i in range(int(sys.argv[2]), int(sys.argv[3])):
    fd = os.open(f"{sys.argv[1]}/f{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(fd, b"%d" % i)
    os.fsync(fd)
    os.close(fd)
PY
}
made=0
more() { load "$made" $((made + 100)) || fail "the program saw an error"; made=$((made + 100)); }
whole() {
    python3 - "$MNT" "$made" <<'PY' || fail "contents"
import os, sys
for i in range(int(sys.argv[2])):
    assert open(f"{sys.argv[1]}/f{i}", "rb").read() == b"%d" % i, i
PY
}
caught_up() { # ID: it has all that the leader had when this was asked
    local last its
    last=$(matched "$(leader 2>/dev/null)" 2>/dev/null) && its=$(matched "$1" 2>/dev/null) || return 1
    ((its >= last - 5))
}
purged_past() { # LEADER INDEX
    (($(older_snapshot "$1") > $2)) || { more; return 1; }
}
# With the leader killed, it takes the one that was behind to go on.
is_needed() { # ID
    local lead
    lead=$(leader)
    [[ $lead != "$1" ]] || lead=$((lead % 3 + 1))
    crash "master-$lead"
    wait_for 30 has_leader || fail "master $1 does not help to elect a leader"
    more
    whole
    up
    wait_for 30 caught_up "$lead" || fail "master $lead does not catch up"
}

wait_for 20 has_leader || fail "no leader"
more
lead=$(leader)
slow=$((lead % 3 + 1))
had=$(matched "$slow")
kill -STOP "$(pid "master-$slow")"
wait_for 240 purged_past "$lead" "$((had + 10))" || fail "the log is not purged"
[[ $(leader) == "$lead" ]] || fail "the leader has changed"
kill -CONT "$(pid "master-$slow")"
step "master $slow stood still at entry $had; the log begins after $(older_snapshot "$lead")"
wait_for 60 caught_up "$slow" || fail "master $slow does not catch up"
[[ ! -e $HOME_DIR/data/master-$slow/JOINING ]] || fail "it was never new here"
is_needed "$slow"
step "it caught up by a snapshot, and the leader's death needed it"

lead=$(leader)
wiped=$((lead % 3 + 1))
crash "master-$wiped"
rm -rf "$HOME_DIR/data/master-$wiped"
more
up
joined() { [[ -e $HOME_DIR/data/master-$wiped/IDENTITY && ! -e $HOME_DIR/data/master-$wiped/JOINING ]] && caught_up "$wiped"; }
wait_for 60 joined || fail "master $wiped, whose disk was wiped, does not come back"
is_needed "$wiped"
step "master $wiped lost its disk, caught up and votes"
whole
dfs fsck --cluster-key-file "$HOME_DIR/cluster.key" >/dev/null || fail "fsck"
