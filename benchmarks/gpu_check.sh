#!/usr/bin/env bash
# All checks that need a GPU, in about ten minutes. The script needs no network. It installs, builds,
# and runs the tests on cuda:0 while the four tools of compute-sanitizer check every kernel. Then it
# runs the benchmarks alone. It writes benchmarks/results/<gpu>.csv and a short report, <gpu>.md. The
# whole output is in build/gpu_check/. The exit status is 0 only if every step passed.
#
#     benchmarks/gpu_check.sh [tests] [sanitizers] [benchmarks]     # all three by default
#
#     PYTHON   the interpreter (default: python3)
#     WHEELS   a folder of wheels to install, relative to the root of the repository: the libraries
#              to compare with and their dependencies
#     COMMIT   the commit of which this folder is an unchanged copy, if it has no .git
#     LIMIT    seconds after which a step that still runs is ended and fails (default: 560)
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
parts=" ${*:-tests sanitizers benchmarks} "
for part in $parts; do
  case $part in
  tests | sanitizers | benchmarks) ;;
  *) echo "expected tests, sanitizers or benchmarks, got $part" >&2 && exit 2 ;;
  esac
done
deadline=$((SECONDS + ${LIMIT:-560}))
logs=build/gpu_check
rm -rf $logs
mkdir -p $logs

gpu=$(
  "$python" - <<'PROGRAM'
import sys

import torch

sys.path.insert(0, "benchmarks")
from run import device_name, result_file

assert torch.cuda.is_available(), "no GPU: torch.cuda.is_available() is false"
print(result_file(device_name()).stem)
PROGRAM
) || exit 1
results=benchmarks/results/$gpu.csv
report=benchmarks/results/$gpu.md

wanted() { [[ $parts == *" $1 "* ]]; }

limited() {
  local left=$((deadline - SECONDS))
  timeout -k 5 $((left > 0 ? left : 1)) "$@"
}

step() { # step NAME COMMAND...: runs it and records the outcome
  local name=$1 began=$SECONDS outcome=passed
  shift
  "$@" >"$logs/$name.log" 2>&1 || outcome=FAILED
  local summary
  summary=$(grep -E '[0-9]+ (passed|failed)' "$logs/$name.log" | tail -n 1 | tr -d '=')
  echo "| $name | $outcome | $((SECONDS - began)) s | $summary |" | tee -a "$logs/steps"
  [ $outcome = passed ] || tail -n 40 "$logs/$name.log"
}

sanitize() { # sanitize TOOL: runs every kernel once under the tool
  # Without torch's caching allocator a tool sees where each tensor ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  limited compute-sanitizer --tool "$1" --target-processes all --print-limit 5000 \
    "${pytest[@]}" tests/ops/test_cuda.py -k "test_every_kernel and float32" >"$logs/$1.out" 2>&1
  local outcome=$?
  tail -n 20 "$logs/$1.out"
  # Only reports on the kernels of marginops count, not those on torch and its libraries.
  grep -E '^========= .*marginops::cuda' "$logs/$1.out" | grep -v 'Host Frame' >"$logs/$1.ours"
  head -n 20 "$logs/$1.ours"
  [ $outcome = 0 ] && [ ! -s "$logs/$1.ours" ] &&
    grep -q '[0-9] passed' "$logs/$1.out" && grep -q 'SUMMARY: ' "$logs/$1.out"
}

# A fresh cache, so that the build is timed and no other library is found.
MARGINOPS_CACHE_DIR=$(mktemp -d)
export MARGINOPS_CACHE_DIR
trap 'rm -rf "$MARGINOPS_CACHE_DIR"' EXIT
pytest=("$python" -m pytest -q -p no:cacheprovider)

step install "$python" -m pip install --quiet --no-deps --no-build-isolation .
if [ -n "${WHEELS:-}" ]; then
  step wheels "$python" -m pip install --quiet --no-deps --no-index "$WHEELS"/*.whl
fi
step build "$python" -c '
from marginops import _native
assert _native.load("cpu") and _native.load("cuda")'

# Emulation, compilation and packaging need no GPU.
tests='tests/ops tests/models tests/metrics tests/training tests/commands'
# The processes share the cores of the host.
if wanted tests; then
  OMP_NUM_THREADS=2 step tests limited "${pytest[@]}" -n 8 --dist loadfile $tests &
fi
if wanted sanitizers; then
  for tool in memcheck racecheck initcheck synccheck; do
    OMP_NUM_THREADS=2 step $tool sanitize $tool &
  done
fi
wait
if wanted benchmarks; then
  rm -f "$results"
  step benchmarks limited "$python" benchmarks/run.py ${COMMIT:+--commit "$COMMIT"}
fi

{
  "$python" -c '
import torch
print(f"# {torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")'
  printf '\n| step | outcome | time | |\n|---|---|---:|---|\n'
  cat "$logs/steps"
  if wanted benchmarks && [ -f "$results" ]; then
    echo
    "$python" benchmarks/goals.py "$results"
  fi
} >"$report"
cat "$report"
! grep -q '| FAILED |' "$report"
