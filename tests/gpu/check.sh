#!/usr/bin/env bash
# Everything that a machine with an NVIDIA GPU can show, in one command: `make gpu-check`. Builds the CUDA C++ kernels for
# the GPU that is there, tests them (under compute-sanitizer too, in CUDA graphs and on side streams), measures every
# family against its baselines, and leaves the table in bench-cuda.md. Needs nvcc and a CUDA build of torch.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=.venv/bin/python

nvidia-smi --query-gpu=name,driver_version,compute_cap --format=csv
arch=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)
case $arch in 90 | 100 | 103) arch+=a ;; esac
export PEFT_KERNELS_CUDA=1 PEFT_KERNELS_CUDA_ARCHS="$arch-real"
make venv
"$python" setup.py --quiet build_ext --inplace # make does not look at these variables
"$python" -m peft_kernels

failed=()
check() { # check COMMAND...: run it, note it if it fails, go on: a GPU may be here only once
  printf '\n======== %s\n' "$*"
  "$@" || failed+=("$*")
}

if command -v compute-sanitizer >/dev/null; then
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1 # torch hands out parts of large blocks, beyond whose ends nothing is noticed
  for tool in memcheck racecheck synccheck initcheck; do
    check compute-sanitizer --tool "$tool" --error-exitcode 1 --target-processes all \
      "$python" -m pytest -q tests/gpu -k "test_few_tokens or test_codec or test_dora_norm"
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
else
  printf '\ncompute-sanitizer is not on the PATH (it comes with the CUDA toolkit): those checks are left out\n'
fi
check "$python" -m pytest -q tests/gpu
check "$python" -m peft_kernels.bench --device cuda
for command in "${failed[@]}"; do printf 'FAILED: %s\n' "$command"; done
exit "$((${#failed[@]} > 0))"
