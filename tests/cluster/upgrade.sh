#!/usr/bin/env bash
# Data of another format version: refused with one line and left as it is, or made again where it is only a copy.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
up
. "$HOME_DIR/cluster.env"
export DFS_MASTERS
mkdir "$MNT/d"
for i in {1..50}; do echo "file $i" >"$MNT/d/$i"; done
head -c 3000000 /dev/urandom >"$MNT/d/big"
(cd "$MNT/d" && sha256sum *) >"$WORK/sums"
right() { (cd "$MNT/d" && sha256sum --quiet -c "$WORK/sums") || fail "a file is lost or wrong"; }
M=$HOME_DIR/data/master-1 C=$HOME_DIR/data/chunkd-1
state() { (cd "$1" && find . -type f ! -name LOCK -print0 | sort -z | xargs -0 sha256sum); }
down

for version in 0 2 4294967295; do
    step "a data directory of format $version"
    for daemon in master chunkd; do
        data=$HOME_DIR/data/$daemon-1
        cp "$data/IDENTITY" "$WORK/IDENTITY"
        sed -i "s/^format = .*/format = $version/" "$data/IDENTITY"
        state "$data" >"$WORK/before"
        refused 2 "format $version, this program knows" "dfs-$daemon" --config "$HOME_DIR/conf/$daemon-1.toml"
        state "$data" | cmp - "$WORK/before" || fail "a refused $daemon changed its data directory"
        cp "$WORK/IDENTITY" "$data/IDENTITY"
    done
    step "a state store of format $version: made again from snapshot and log"
    sed -i "s/^format = .*/format = $version/" "$M/STATE"
    up
    right
    grep -q "it has format $version, this program knows 1.*" "$HOME_DIR/log/master-1.log" || fail "the state store was not built again"
    grep -q '^format = 1$' "$M/STATE" || fail "$(cat "$M/STATE")"
    down
done

step "an identity as the first version wrote it"
! grep -q group "$M/IDENTITY" || fail "a group that was never restored has a number: $(cat "$M/IDENTITY")"
up
right

step "a chunk file of a later version is not read, and not taken for damage of the disk"
down
file=$(find "$C/chunks" -name '*.chunk' -size +100k | head -n 1)
# Byte 8 of the header is the version (docs/formats/chunk.md); the checksum is made to fit, as a later program's would.
python3 - "$file" <<'PY'
import struct, sys
def crc32c(data):
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF
with open(sys.argv[1], "r+b") as f:
    head = bytearray(f.read(64))
    assert head[:8] == b"dfschunk" and crc32c(head[:60]) == struct.unpack_from("<I", head, 60)[0]
    struct.pack_into("<I", head, 8, 9)
    struct.pack_into("<I", head, 60, crc32c(head[:60]))
    f.seek(0)
    f.write(head)
PY
up
right
grep -qi 'version' "$HOME_DIR/log/chunkd-1.log" || fail "the chunk daemon says nothing of the version"
