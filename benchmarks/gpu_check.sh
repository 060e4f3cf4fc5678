#!/usr/bin/env bash
# Everything that only a GPU can show, meant for ten minutes on one: installs offline, builds, runs
# the tests on cuda:0, the four tools of compute-sanitizer over every kernel, and the benchmarks,
# whose results go to benchmarks/results/. The exit status is 0 only if all of it passed.
#
#     benchmarks/gpu_check.sh [report]     PYTHON=python3 chooses the interpreter
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
report=${1:-benchmarks/results/gpu-check.txt}
status=0

step() {  # step NAME COMMAND...: runs it, notes the outcome and the time
  local name=$1 began=$SECONDS
  shift
  echo "== $name: $*"
  if "$@"; then
    echo "passed  $((SECONDS - began)) s  $name" >>"$report"
  else
    echo "FAILED  $((SECONDS - began)) s  $name" >>"$report"
    status=1
  fi
}

mkdir -p "$(dirname "$report")"
"$python" - >"$report" <<'PROGRAM' || exit 1
import torch

assert torch.cuda.is_available(), "no GPU: torch.cuda.is_available() is false"
print(f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}, CUDA {torch.version.cuda}")
PROGRAM

pytest=("$python" -m pytest -q -p no:cacheprovider)
step "install" "$python" -m pip install --quiet --no-deps --no-build-isolation .
step "build" "$python" -c 'from marginops import _native; assert _native.load("cuda")'
step "tests" "${pytest[@]}" \
  tests/test_{margin,select,statistics,linear,moments,regularization,distribution}*.py \
  tests/test_{norms,homogeneity,metrics}*.py tests/test_cuda.py
for tool in memcheck racecheck initcheck synccheck; do
  # Without torch's caching allocator, so that a tool sees where each tensor ends.
  step "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
    compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
    "${pytest[@]}" tests/test_cuda.py -k "every_kernel and (10 or 1000) and float32"
done
step "benchmarks" "$python" benchmarks/run.py
cat "$report"
exit $status
