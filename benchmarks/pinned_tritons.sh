#!/usr/bin/env bash
# Compiles the kernels with each Triton that a supported torch pins (2.11: 3.6.0, 2.12.0: 3.7.0, 2.12.1: 3.7.1), without a
# GPU. It resumes: what is in the files already is not compiled again. A kernel takes 2 to 10 seconds of one core.
#
#   benchmarks/pinned_tritons.sh [CHIP...] [--group NAME]     arguments as for `llcompile kernels matrix` (default: sm_90)
#
#   TRITONS="3.6.0 3.7.0 3.7.1"   releases
#   SITES=folder                  where they are installed, each in a folder of its own
#   OUT=folder                    where results go (default: benchmarks/results)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PYTHON=${PYTHON:-.venv/bin/python}
SITES=${SITES:-$HOME/.cache/llcompile/tritons}
OUT=${OUT:-benchmarks/results}
[ $# -gt 0 ] || set -- sm_90

for version in ${TRITONS:-3.6.0 3.7.0 3.7.1}; do
  site=$SITES/$version
  [ -d "$site/triton" ] || "$PYTHON" -m pip install --quiet --no-deps --target "$site" "triton==$version"
  PYTHONPATH=$site:$PWD "$PYTHON" -m llcompile kernels matrix "$@" --json "$OUT/kernels-compiled-triton-$version.json" ||
    echo "with Triton $version something does not compile or does not fit: see above"
done
