#!/usr/bin/env bash
# Runs the tests with the "newest" or the "lowest" versions ($1) in an environment of its own, and says before and after
# what is not as in requirements/dev.txt. TORCH=torch==2.6.0+cpu tries another torch; otherwise it is the locked one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=.venv-$1
rm -rf "$venv"
lock() { .venv-lock/bin/python tools/lock.py "$@"; }
lock resolve "$1" --torch "${TORCH:-}" "$venv.txt"
lock compare "$venv.txt"
UNHASHED=1 tools/install.sh "$venv" "$venv.txt"
"$venv/bin/python" -m pip check || echo "Goes on all the same."
status=0
"$venv/bin/python" -m pytest -W default ${PARALLEL:-} ${PYTEST:-} || status=$?
lock compare "$venv.txt"
echo "Tests with the $1 versions: $([ "$status" = 0 ] && echo passed || echo "FAILED, see above")"
exit "$status"
