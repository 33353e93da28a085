#!/usr/bin/env bash
# The fused kernels under ttsem's checks (sanitize.py), in a virtual environment of its own. ttsem needs Python 3.12 or
# newer: where none is found, or the packages cannot be installed, one line says so and nothing runs.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=${SANITIZE_VENV:-.venv-sanitize}
pins="torch==2.13.0 triton==3.8.0 ttsem==0.1.0"

skip() { echo "sanitize: skipped, $1"; exit 0; }

fits() { "$1" -c 'import ensurepip, sys, venv; sys.exit(not (3, 12) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null; }

python=
for candidate in python3.12 python3.13 python3.14 python3 "${HOME:-}"/.pyenv/versions/3.1[234].*/bin/python; do
    if command -v "$candidate" >/dev/null && fits "$candidate"; then python=$candidate; break; fi
done

install() {  # torch of PyPI pins another Triton, which it does not need here
    rm -rf "$venv" && "$python" -m venv "$venv" &&
        timeout 240 "$venv"/bin/python -m pip install --quiet torch==2.13.0 numpy safetensors pytest &&
        "$venv"/bin/python -m pip install --quiet --no-deps triton==3.8.0 ttsem==0.1.0 &&
        echo "$pins" >"$venv"/.installed
}

if [ "$(cat "$venv"/.installed 2>/dev/null)" != "$pins" ]; then
    [ -n "$python" ] || skip "ttsem needs Python 3.12 to 3.14, and none is on the PATH or under ~/.pyenv/versions"
    [ "$(df -Pk . | awk 'END { print $4 }')" -gt 10000000 ] || skip "its torch needs 10 GB of disk"
    log=$(mktemp) why=
    install >"$log" 2>&1 || why="ttsem cannot be installed for $python within 4 minutes: $(grep -i -m 1 error "$log" || :)"
    rm -f "$log"
    [ -z "$why" ] || skip "$why"
fi
export CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 PYTHONPATH=.:tests
exec "$venv"/bin/python -m support.bare_package support.sanitize "$@"
