#!/usr/bin/env bash
# The network of a client is cut, for less and for longer than its session lives, while programs write, read, lock and change names on
# a soft mount and on a hard one, and another client changes the same files (cut.py).
# DFS_CUT_SECONDS: how long the long cuts last (30); DFS_SESSION_TTL: how long a session lives, in seconds (8). Needs root.
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"
need "ip nsenter nft" "packages iproute2, util-linux, nftables"
in_namespaces 900 cut "${DFS_CUT_SECONDS:-30}" "${DFS_SESSION_TTL:-8}"
