#!/usr/bin/env bash
# Installs into the virtual environment $1, made if need be: torch, what the list $2 names, the package itself, editable.
# TORCH: another requirement than that of requirements/torch.txt; TORCH_INDEX: another index of wheels without CUDA.
# UNHASHED=1: the list has no hashes. Nothing is installed that the list does not name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
venv=$1 list=$2
hashes=(--require-hashes)
if [ -n "${UNHASHED:-}" ]; then hashes=(); fi

tools/create_venv.sh "$venv"
pip() { "$venv/bin/python" -m pip --quiet --quiet install "$@"; } # twice quiet: errors only
"$venv/bin/python" tools/install_torch.py --torch "${TORCH:-}" --index "${TORCH_INDEX:-}"
pip --no-deps --only-binary :all: ${hashes[@]+"${hashes[@]}"} --requirement "$list"
# Environments do not share a build folder: it remembers where the tools of one lie.
pip --no-deps --no-build-isolation --config-settings "build-dir=build/${venv##*.}-{wheel_tag}" --editable .
