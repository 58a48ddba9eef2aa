#!/usr/bin/env bash
# Three masters; the leader is killed while files are created: the program sees no error, every file exists once.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --masters 3
. "$HOME_DIR/cluster.env"
export DFS_MASTERS

leader() { # the name of the leading master
    dfs status --json | python3 -c '
import json, sys
print(next("master-%d" % m["id"] for m in json.load(sys.stdin)["masters"] if m["leader"]))'
}
has_leader() { leader >/dev/null 2>&1; }

for round in 1 2; do
    wait_for 20 has_leader || fail "no leader"
    before=$(leader)
    mkdir "$MNT/d$round"
    python3 - "$MNT/d$round" >"$WORK/created" <<'PY' &
import os, sys
for i in range(2000):
    fd = os.open(f"{sys.argv[1]}/f{i}", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(fd, b"%d" % i)
    os.close(fd)
    print(i, flush=True)
PY
    creator=$!
    enough() { (($(wc -l <"$WORK/created") > 300)); }
    wait_for 60 enough || fail "the creator does not get on"
    crash "$before"
    step "killed the leader $before after $(wc -l <"$WORK/created") files"
    wait $creator || fail "the creating program saw an error"
    wait_for 20 has_leader || fail "no new leader"
    [[ $(leader) != "$before" ]] || fail "the dead master leads"
    [[ $(ls "$MNT/d$round" | sort -u | wc -l) == 2000 && $(ls "$MNT/d$round" | wc -l) == 2000 ]] || fail "not 2,000 files"
    python3 - "$MNT/d$round" <<'PY' || fail "contents"
import sys
for i in range(2000):
    assert open(f"{sys.argv[1]}/f{i}", "rb").read() == b"%d" % i, i
PY
    up   # the dead one comes back
done
down
up
for round in 1 2; do [[ $(ls "$MNT/d$round" | wc -l) == 2000 ]] || fail "files are gone after a restart"; done
