#!/usr/bin/env bash
# Installs dfs on this machine: programs, units, example settings. install.sh [--prefix DIR] [--bin DIR]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
prefix='' bin=$here/../target/release
while (($#)); do
    case $1 in
        --prefix) prefix=${2:?--prefix needs a directory}; shift 2 ;;
        --bin) bin=${2:?--bin needs a directory}; shift 2 ;;
        -h | --help) sed -n 2p "$0"; exit 0 ;;
        *) echo "install.sh: unknown argument '$1'" >&2; exit 2 ;;
    esac
done
for program in dfs-master dfs-chunkd dfs-mount dfs; do
    [[ -x $bin/$program ]] || { echo "install.sh: $bin/$program is missing: run cargo build --release first" >&2; exit 1; }
    install -Dm755 "$bin/$program" "$prefix/usr/bin/$program"
done
install -d "$prefix/usr/sbin"
# What mount(8) and umount(8) call for the type fuse.dfs; dfs-mount knows by its name what is wanted.
ln -sf ../bin/dfs-mount "$prefix/usr/sbin/mount.fuse.dfs"
ln -sf ../bin/dfs-mount "$prefix/usr/sbin/umount.fuse.dfs"
for unit in dfs-master.service dfs-chunkd.service dfs-mount@.service; do
    install -Dm644 "$here/$unit" "$prefix/usr/lib/systemd/system/$unit"
done
install -Dm644 "$here/dfs.sysusers" "$prefix/usr/lib/sysusers.d/dfs.conf"
install -Dm644 "$here/dfs.tmpfiles" "$prefix/usr/lib/tmpfiles.d/dfs.conf"
for settings in master chunkd client; do
    # What the operator wrote stays; the commented example lies beside it.
    install -Dm644 "$here/$settings.toml" "$prefix/etc/dfs/$settings.toml.example"
done
echo "Installed. Next: a cluster key in /etc/dfs/cluster.key, settings from /etc/dfs/*.toml.example,"
echo "then: systemd-sysusers; systemd-tmpfiles --create dfs.conf; systemctl enable --now dfs-master dfs-chunkd"
