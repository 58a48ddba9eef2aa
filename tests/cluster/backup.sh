#!/usr/bin/env bash
# A backup is taken while files are written; every master is lost; what was fsynced before the backup is there after a restore.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up --masters 3 --chunkds 4
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
KEY=(--cluster-key-file "$HOME_DIR/cluster.key")
WRITER=$ROOT/tests/cluster/writer.py
CONF=$HOME_DIR/conf/master-1.toml
DATA=$HOME_DIR/data

status() { dfs status --json | python3 -c "import json, sys; s = json.load(sys.stdin); print($1)"; }
is() { [[ $(status "$1" 2>/dev/null) == "${2:-True}" ]]; }
whole='s["under_replicated"] == 0 and s["waiting_seal"] == 0 and s["repair"]["waiting"] + s["repair"]["copying"] == 0 and s["repair"]["flawed"] == 0'
clean() { dfs fsck "${KEY[@]}" "$@" >"$WORK/fsck" 2>&1; }
BACKUP=(dfs-master backup --config "$CONF")
RESTORE=(dfs-master restore --config "$CONF")
node() { printf '%016x' "$(sed -n 's/^node = //p' "$DATA/$1/IDENTITY")"; }
files() { find "$DATA"/chunkd-* -name '*.chunk' | wc -l; }

: >"$WORK/sums"
python3 "$WRITER" "$MNT/w" 1 >"$WORK/sums" 2>"$WORK/writer" &
writer=$!
at_end() { kill "$writer" 2>/dev/null || true; }
more() { (($(wc -l <"$WORK/sums") >= $1)); }
wait_for 120 more 60 || fail "the writer does not get on"

step "a backup under load"
cp "$WORK/sums" "$WORK/sums.before"
"${BACKUP[@]}" "$WORK/backup" || fail "no backup"
[[ $(stat -c %a "$WORK/backup") == 600 ]] || fail "others may read the backup"
kill -0 $writer || { cat "$WORK/writer"; fail "the writer saw an error"; }
# From another master's settings just as well.
dfs-master backup --config "$HOME_DIR/conf/master-3.toml" "$WORK/backup.3" || fail "no backup by way of master 3"
refused 2 'overwrites nothing' "${BACKUP[@]}" "$WORK/backup"
refused 1 'No such file or directory' "${BACKUP[@]}" "$WORK/nowhere/backup"
# Two at a time to one name: one of them is the file, whole.
one=0 two=0
"${BACKUP[@]}" "$WORK/twice" >"$WORK/one" 2>&1 & first=$!
"${BACKUP[@]}" "$WORK/twice" >"$WORK/two" 2>&1 || two=$?
wait $first || one=$?
(((one == 0) + (two == 0) == 1)) || { cat "$WORK/one" "$WORK/two"; fail "two backups to one name ended with $one and $two"; }
cat "$WORK/one" "$WORK/two"
grep -qE 'another backup is being taken|overwrites nothing|exists' "$WORK/one" "$WORK/two" || fail "it does not say why"
[[ -s $WORK/twice ]] || fail "two backups to one name leave none"
head -c 32 /dev/urandom | base64 >"$WORK/other.key"
sed "s|$HOME_DIR/cluster.key|$WORK/other.key|" "$CONF" >"$WORK/stranger.toml"
refused 1 'the proof is wrong' dfs-master backup --config "$WORK/stranger.toml" "$WORK/stolen"
[[ $(cd "$WORK" && echo stolen* *.part) == 'stolen* *.part' ]] || fail "an unfinished backup is left"

step "the cluster goes on: chunks are filled and sealed, a daemon is emptied"
head -c 150M /dev/urandom >"$MNT/later"
wait_for 120 more $(($(wc -l <"$WORK/sums.before") + 40)) || fail "the writer does not get on"
kill -TERM $writer
wait $writer || { cat "$WORK/writer"; fail "the writer saw an error"; }
dfs sync "$MNT"
dfs node drain "${KEY[@]}" --wait 120 "$(node chunkd-1)" || fail "not emptied: $(dfs node ls)"
umount "$MNT"

step "all masters are lost"
crash master-1 master-2 master-3
mkdir "$WORK/old"
mv "$DATA"/master-{1,2,3} "$WORK/old"

step "what cannot be restored"
python3 - "$WORK" <<'PY'
import sys
whole = bytearray(open(sys.argv[1] + "/backup", "rb").read())
open(sys.argv[1] + "/cut", "wb").write(whole[:-5])
whole[len(whole) // 2] ^= 4
open(sys.argv[1] + "/damaged", "wb").write(whole)
PY
refused 2 'damaged' "${RESTORE[@]}" "$WORK/damaged"
refused 2 'cut off' "${RESTORE[@]}" "$WORK/cut"
refused 2 'not a snapshot' "${RESTORE[@]}" "$CONF"
refused 2 'No such file' "${RESTORE[@]}" "$WORK/nothing"
refused 2 'is of cluster' dfs-master restore --config "$WORK/stranger.toml" "$WORK/backup"
[[ ! -e $DATA/master-1 ]] || fail "a refused restore left $(ls "$DATA/master-1")"
mkdir "$DATA/master-1"
echo thesis >"$DATA/master-1/thesis"
refused 2 'not empty' "${RESTORE[@]}" "$WORK/backup"
[[ $(cat "$DATA/master-1/thesis") == thesis ]] || fail "a refused restore changed the directory"
rm "$DATA/master-1/thesis"

step "the restore"
"${RESTORE[@]}" "$WORK/backup" || fail "not restored"
refused 2 'not empty' "${RESTORE[@]}" "$WORK/backup"
before=$(files)
up
sha256sum --quiet -c "$WORK/sums.before" || fail "a file of before the backup is lost"
wait_for 90 is "$whole" || fail "not whole: $(dfs status)"
sha256sum --quiet -c "$WORK/sums.before" || fail "a file of before the backup was lost by repair"
wait_for 60 clean --deep || { cat "$WORK/fsck"; fail "fsck found something"; }
sed 's/^/  /' "$WORK/fsck"

step "the cluster goes on working"
begin=$(wc -l <"$WORK/sums")
python3 "$WRITER" "$MNT/w" 2 >"$WORK/sums.after" 2>"$WORK/writer" &
writer=$!
again() { [[ -e $WORK/sums.after ]] && (($(wc -l <"$WORK/sums.after") >= 40)); }
wait_for 120 again || { cat "$WORK/writer"; fail "the writer does not get on"; }
kill -TERM $writer
wait $writer || { cat "$WORK/writer"; fail "the writer saw an error"; }

step "an old master that comes back is not heard"
crash master-2
rm -rf "$DATA/master-2"
cp -a "$WORK/old/master-2" "$DATA"
up
told() { grep -q 'must be emptied' "$HOME_DIR"/log/master-*.log; }
wait_for 30 told || fail "nobody says that its directory must be emptied"
is "[m['id'] for m in s['masters'] if m['leader']]" '[1]' || fail "master 1 does not lead: $(dfs status)"
crash master-2
rm -rf "$DATA/master-2"
up

step "nor is a majority of them, by a client that has seen the restored cluster"
echo new >"$MNT/after"
dfs sync "$MNT"
crash master-1 master-2 master-3
mkdir "$WORK/new"
old=()
for n in 2 3; do
    mv "$DATA/master-$n" "$WORK/new"
    cp -a "$WORK/old/master-$n" "$DATA"
    dfs-master --config "$HOME_DIR/conf/master-$n.toml" >>"$HOME_DIR/log/old-master-$n.log" 2>&1 &
    old+=($!)
done
at_end() { kill -KILL "${old[@]}" 2>/dev/null || true; }
# Who has seen nothing cannot know better; by its Raft term the old group can be told.
wait_for 60 is 's["term"] < 1000000' || fail "the old masters do not lead: $(dfs status)"
unheard() { grep -q 'this master is not listened to' "$HOME_DIR/log/mount.log"; }
wait_for 60 unheard || fail "the client says nothing of an old master"
if timeout 3 mkdir "$MNT/in-the-past"; then fail "a client that has seen the restored cluster has changed the old one"; fi
is 's["term"] < 1000000' || fail "the old masters do not lead any more: $(dfs status)"
kill -KILL "${old[@]}"
wait "${old[@]}" 2>/dev/null || true
(($(grep -c 'this master is not listened to' "$HOME_DIR/log/mount.log") <= 2)) || fail "the client says it again and again"
for n in 2 3; do
    rm -rf "$DATA/master-$n"
    mv "$WORK/new/master-$n" "$DATA"
done
up
[[ $(cat "$MNT/after") == new ]] || fail "a file of after the restore is lost"
echo more >"$MNT/later-still" || fail "the client does not go on"

step "what was made after the backup is kept until it is given up"
is 'any("does not know" in w for w in s["warnings"])' || fail "nothing unknown: $(dfs status)"
dfs-master forget-newer --config "$CONF" || fail "forget-newer"
known() { is 'any("does not know" in w for w in s["warnings"])' False; }
wait_for 60 known || fail "still unknown: $(dfs status)"
fewer() { (($(files) < before)); }
wait_for 60 fewer || fail "$(files) chunk files are there, $before were before"
down
up
sha256sum --quiet -c "$WORK/sums.before" "$WORK/sums.after" || fail "a file is lost"
wait_for 60 clean --deep || { cat "$WORK/fsck"; fail "fsck found something"; }
