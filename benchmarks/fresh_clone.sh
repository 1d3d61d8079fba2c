#!/usr/bin/env bash
# The README's two commands on a fresh clone of the last commit: how long they take, and whether they keep their limits
# (computing of `make run` 15 min, `make test` 10 min, on 2 cores; installation apart).
#
#     benchmarks/fresh_clone.sh [FOLDER]
set -euo pipefail
source=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
unset PYTHONPATH GLIBC_TUNABLES VIRTUAL_ENV
git clone --quiet "$source" "$folder/kappaflow"
cd "$folder/kappaflow"

step() { # NAME LIMIT_S COMMAND...
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    "$@" > "$folder/$name.log" 2>&1 || { echo "$name: failed, see $folder/$name.log"; exit 1; }
    local seconds=$((SECONDS - start))
    echo "$name: $seconds s (limit $limit s)"
    [ "$seconds" -le "$limit" ] || { echo "$name: over its limit"; exit 1; }
}

step install 1800 make install
step run 900 make run
step again 30 make run
grep -q "Nothing to be done" "$folder/again.log" || { echo "again: something was done"; exit 1; }
step test 600 make test
tail -n 1 "$folder/test.log"
