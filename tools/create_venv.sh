#!/usr/bin/env bash
# Makes the virtual environment $1 with the first Python on PATH that is new enough, or says what is missing.
set -euo pipefail
venv=$1
least=11 # of Python 3

new_enough() { "$1" -c "import sys; sys.exit(sys.version_info < (3, $least))" 2>/dev/null; }

if [ -x "$venv/bin/python" ] && new_enough "$venv/bin/python" && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi
for python in "${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11; do
    if ! new_enough "$python"; then continue; fi
    if ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
        version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
        echo "error: $python cannot make virtual environments. On Debian or Ubuntu: apt install python3-venv" \
            "(or python$version-venv), then run make again." >&2
        exit 1
    fi
    "$python" -m venv --clear "$venv"
    exit 0
done
echo "error: no Python 3.$least or newer found (looked for ${PYTHON:-python3} and python3.11 to python3.14)." \
    "On Debian or Ubuntu: apt install python3 python3-venv. Another one: make PYTHON=/path/to/python3 ..." >&2
exit 1
