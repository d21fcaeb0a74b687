#!/usr/bin/env bash
# The GPU suite, in one command and below nine minutes: bench/gpu/run.sh [--device cpu] [--toy] [--seconds 515] [PART ...]
# Needs python3 with torch, triton and transformers, and the folder wheels/ of `make gpu-wheels`; no network.
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-wheels}
SECONDS=0
compgen -G "$WHEELS/*.whl" >/dev/null || { echo "error: no wheels in $WHEELS: run make gpu-wheels where there is a network" >&2; exit 2; }
libraries=$(mktemp -d)
trap 'rm -rf "$libraries"' EXIT
if ! "$PYTHON" -m pip --version >/dev/null 2>&1; then  # a wheel is a zip file of what is to be imported
  for wheel in "$WHEELS"/*.whl; do "$PYTHON" -m zipfile -e "$wheel" "$libraries"; done
elif ! "$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --find-links "$WHEELS" --no-deps \
  --target "$libraries" "$WHEELS"/*.whl; then
  echo "error: the wheels do not fit $("$PYTHON" --version): make gpu-wheels GPU_PYTHON=3.N with its version" >&2
  exit 2
fi
export PYTHONPATH="$PWD:$libraries${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-4}" HF_HUB_OFFLINE=1
"$PYTHON" -m bench.gpu.drive --spent "$SECONDS" "$@"
