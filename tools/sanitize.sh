#!/usr/bin/env bash
# Build the native part with AddressSanitizer and UndefinedBehaviorSanitizer in build/sanitize and run tests against it:
#     tools/sanitize.sh [pytest arguments; without any: tests/unit/native]
set -euo pipefail
cd "$(dirname "$0")/.."
python="$PWD/.venv/bin/python"
build="$PWD/build/sanitize"

cmake -S . -B "$build" -DQUERN_SANITIZE=ON -DPython_EXECUTABLE="$python" \
  -Dnanobind_DIR="$("$python" -m nanobind --cmake_dir)" > /dev/null
cmake --build "$build" --parallel 2

# Python imports sitecustomize first, in subprocesses of tests too; it puts this build in the place of the installed one.
mkdir -p "$build/site"
cat > "$build/site/sitecustomize.py" <<PYTHON
import glob, importlib.util, sys

(path,) = glob.glob("$build/_native*.so")


class Finder:
    @staticmethod
    def find_spec(name, where=None, target=None):
        return importlib.util.spec_from_file_location(name, path) if name == "quern._native" else None


sys.meta_path.insert(0, Finder)
PYTHON

# The interpreter is not instrumented, so the library comes in first; what Python leaks is not ours to find.
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$build/site"
exec "$python" -m pytest -p no:cacheprovider "${@:-tests/unit/native}"
