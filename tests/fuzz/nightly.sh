#!/usr/bin/env bash
# The nightly fuzzing of `make fuzz`: the Python entries on a library with ASan and UBSan, then libFuzzer on the C++ API.
#
# FUZZ_INPUTS: of the Python fuzzer, in all. FUZZ_SECONDS: of each C++ fuzzer. A failure prints its seed: FUZZ_SEED repeats it.
set -euo pipefail
cd "$(dirname "$0")/../.."
inputs=${FUZZ_INPUTS:-100000} seconds=${FUZZ_SECONDS:-60} seed=${FUZZ_SEED:-$(date +%Y%m%d)}
python=$PWD/.venv/bin/python

package=build/fuzz/package
mkdir -p "$package/peft_kernels"
tar --exclude=_native.so --exclude=__pycache__ -cf - peft_kernels | tar -xf - -C "$package"
cmake -G Ninja -S . -B build/fuzz --log-level=WARNING -DPEFT_KERNELS_CUDA=0 -DPEFT_KERNELS_SANITIZE=address,undefined \
  -DPython_EXECUTABLE="$python" -DPEFT_KERNELS_OUTPUT_DIR="$PWD/$package/peft_kernels"
cmake --build build/fuzz
PYTHONPATH="$package:tests" \
  LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=4096 UBSAN_OPTIONS=print_stacktrace=1 \
  "$python" -P -W error -m fuzz --inputs "$inputs" --seed "$seed"

if ! command -v clang++ >/dev/null; then
  echo "clang++ is not installed: no libFuzzer"
  exit
fi
cmake -G Ninja -S . -B build/libfuzzer --log-level=WARNING -DCMAKE_CXX_COMPILER=clang++ -DPEFT_KERNELS_BINDINGS=OFF \
  -DPEFT_KERNELS_CPP_TESTS=ON -DPEFT_KERNELS_LIBFUZZER=ON -DPEFT_KERNELS_SANITIZE=address,undefined
cmake --build build/libfuzzer --target fuzzers
for fuzzer in build/libfuzzer/fuzz_*; do
  [[ -x $fuzzer && -f $fuzzer ]] || continue
  echo "--- $fuzzer"
  "$fuzzer" -seed="$seed" -max_total_time="$seconds" -max_len=96 -len_control=0 -verbosity=0 -print_final_stats=1 \
    -artifact_prefix=build/libfuzzer/
done
