// The NF4 linear on activations rounded to int8: the same bits on every instruction set.
#include "fuzzing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::fuzzing;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  Contents contents(bytes);
  const int64_t m = bytes.below(20), k = bytes.size(300), n = bytes.size(80);
  const Input x(bytes, contents, bytes.dtype(), m * k);
  const NF4Input weight(bytes, contents, n * k);
  const Input bias = Input::maybe(bytes, contents, bytes.flag() ? DType::kFloat32 : x.dtype(), n);
  judge(contents.wild, {0}, [&](const Run& run) {
    Results results;
    results.emplace_back(x.dtype(), m * n, run.poison);
    NF4LinearInt8 problem;
    problem.tokens = m, problem.in_features = k, problem.out_features = n;
    problem.x = x.array();
    problem.nf4 = weight.weight();
    problem.bias = bias.array();
    problem.y = results[0].array();
    run.kernels.nf4_linear_int8(problem, run.pool);
    return results;
  });
  return 0;
}
