#!/usr/bin/env bash
# Correctness, then speed, on a bare machine with an NVIDIA GPU, unattended:
#
#   benchmarks/on_gpu.sh
#
# takes at most 10 minutes and leaves logs, JSON and a plot in $OUT (default: benchmarks/results).
#
#   MINUTES=10     for everything together; 9 where a command is killed after 10
#   OUT=folder     where results go
#   PYTHON=python3 which Python; the torch that it has is used, if that one sees the GPU
#   WHEELS=.whl    folder with wheels, for a machine without a network: fla_core, flash_linear_attention, einops, rich, ...
#   LLCOMPILE_AUTOTUNE=1  tune launches before they are timed (each kernel is compiled several times: give it an hour)
#   ARGS="..."     further arguments for the benchmark, as --quick or --families scalar/none
#
# Where a machine is lent that takes the working tree and nothing else, bring the wheels along once:
#   pip download --no-deps -d .whl fla-core==0.6.0 flash-linear-attention==0.6.0 einops
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

MINUTES=${MINUTES:-10}
OUT=${OUT:-benchmarks/results}
PYTHON=${PYTHON:-python3}
WHEELS=${WHEELS:-.whl}
WORK=${WORK:-$(mktemp -d)}
FLA=(fla-core==0.6.0 flash-linear-attention==0.6.0)
mkdir -p "$OUT"

started=$SECONDS
left() { echo $((MINUTES * 60 - (SECONDS - started))); }
say() { echo "==> [$((SECONDS - started)) s] $*"; }
# install SECONDS ARGUMENTS OF PIP...: into the environment, by the outer Python's pip.
install() {
  timeout "$1" "$PYTHON" -m pip --python "$python" install --no-cache-dir --retries 0 --timeout 15 "${@:2}" >>"$OUT/install.log" 2>&1
}

say "the machine"
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader || { say "error: no NVIDIA GPU here"; exit 1; }

# A virtual environment that sees the packages of the system's Python: nothing of the machine is changed, and a torch
# that is there is not downloaded again.
say "Python"
"$PYTHON" -m venv --system-site-packages "$WORK/venv" 2>/dev/null || "$PYTHON" -m venv --without-pip --system-site-packages "$WORK/venv" || exit 1
python=$WORK/venv/bin/python
site=$("$python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
# The packages of a Python that itself is a virtual environment are not the system's: a .pth file brings them in.
"$PYTHON" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' >"$site/outer.pth"
sees() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }
gpu() { "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; }

gpu || { say "torch is not here, or does not see the GPU: installing it"; install 240 'torch>=2.11,<2.14'; }
gpu || { say "error: no torch that sees the GPU; see $OUT/install.log"; tail -n 3 "$OUT/install.log"; exit 1; }
for package in rich networkx sympy numpy jinja2 transformers pytest xdist matplotlib einops; do
  wheel=${package/xdist/pytest-xdist}
  sees $package || install 60 --find-links "$WHEELS" --no-index $wheel || install 60 $wheel ||
    say "no $package: what needs it is left out"
done
# Without what it asks for, so that torch.compile knows the backend's name; nothing is built or fetched.
install 60 --no-deps --no-build-isolation --no-index -e . || say "llcompile cannot be installed: see $OUT/install.log"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 OMP_NUM_THREADS=4
unset TRITON_INTERPRET

# No kernel is timed before it is known to be right, but a failure stops nothing: the logs say which cases failed.
# Nearly all of the time is compilation, on the CPU. Models take longest and begin first.
say "correctness (at most 45% of the time)"
many=()
sees xdist && many=(-n auto --maxprocesses 16 --dist load --maxschedchunk 1)
rm -f "$OUT/failures.txt"
FAILURES=$OUT/failures.txt timeout $((MINUTES * 27)) "$python" -m pytest "${many[@]}" -m cuda -v --no-header --maxfail=20 -p no:cacheprovider -p tests.helpers.as_they_come tests/models/test_cuda.py tests/kernels/test_triton_cuda.py tests/kernels/test_triton_cuda_long.py 2>&1 |
  tee "$OUT/tests.log" | tail -n 25
tests=${PIPESTATUS[0]}

# FLA alone, without what it asks for: it must not bring another torch or Triton. Not before the tests: transformers
# runs FLA's kernels where it finds them, and models are compared with transformers' own code.
sees fla || install 60 --no-deps --find-links "$WHEELS" --no-index "${FLA[@]}" || install 90 --no-deps "${FLA[@]}" ||
  say "FLA cannot be installed: no comparison with it"

say "routed level weights, in CUDA graphs"
timeout 60 "$python" -m benchmarks.routed --device cuda --graph --json "$OUT/routed-cuda-graph-$(date -u +%F).json" 2>&1 | tee "$OUT/routed.log"

seconds=$(($(left) - 40)) # the last case, the tables and the plot need some
say "speed ($seconds s)"
json=$OUT/operator-cuda-$(date -u +%F).json
timeout $((seconds + 15)) "$python" -m llcompile bench operator --device cuda --output "$json" \
  --minutes "$(printf '%d.%02d' $((seconds / 60)) $((seconds % 60 * 100 / 60)))" ${ARGS:-} 2>&1 | tee "$OUT/bench.log"
bench=${PIPESTATUS[0]}
"$python" -m llcompile bench plot "$json" --out "${json%.json}.png"

[ "$tests" = 0 ] || say "NOT all tests passed (exit code $tests): see $OUT/failures.txt"
say "done: $(ls "$OUT" | tr '\n' ' ')"
[ "$tests" = 0 ] && [ "$bench" = 0 ]
