// The adapted linear, forward and backward.
#include "fuzzing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::fuzzing;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  Contents contents(bytes);
  const int64_t m = bytes.below(4) == 0 ? bytes.below(3) : bytes.size(50), k = bytes.size(300), n = bytes.size(80);
  const DType dtype = bytes.dtype(), of_adapter = bytes.flag() ? DType::kFloat32 : dtype;
  const Input x(bytes, contents, dtype, m * k), grad(bytes, contents, dtype, m * n);
  const bool quantised = bytes.next() % 4 != 0;
  const NF4Input nf4(bytes, contents, quantised ? n * k : 0);
  const Input base(bytes, contents, dtype, quantised ? 0 : m * n);
  const Input base_of_grad(bytes, contents, dtype, quantised ? 0 : m * k);
  const Input column_scale = Input::maybe(bytes, contents, of_adapter, n);
  const Input input_scale = Input::maybe(bytes, contents, of_adapter, k);
  const Input bias = Input::maybe(bytes, contents, of_adapter, n);
  const int64_t rank = bytes.flag() ? bytes.size(70) : 0;
  const Input a = rank ? Input(bytes, contents, of_adapter, rank * k) : Input();
  const Input b = rank ? Input(bytes, contents, of_adapter, n * rank) : Input();
  const Input u = rank ? Input(bytes, contents, DType::kFloat32, m * rank) : Input();
  const Dropout dropout = rank ? dropout_of(bytes) : Dropout{};
  const bool need_z = bytes.flag(), need_x = bytes.flag(), need_a = rank && bytes.flag(), need_b = rank && bytes.flag();
  const bool need_scale = input_scale.present() && bytes.flag();

  const auto fill = [&](auto& problem, bool absolute) {
    problem.tokens = m, problem.in_features = k, problem.out_features = n;
    problem.x = x.array(absolute);
    if (quantised) problem.nf4 = nf4.weight(absolute);
    problem.lowrank = {rank, a.array(absolute), b.array(absolute), absolute ? 1.5f : -1.5f, dropout};
    problem.column_scale = column_scale.array(absolute);
    problem.input_scale = input_scale.array(absolute);
  };
  // Where the product is of bf16 pairs the weight, times its scale, is rounded to bf16.
  const double operands = dtype == DType::kBFloat16 ? 2 * 0x1p-8 : 0.0;
  judge(contents.wild, {k + rank + 8, operands}, [&](const Run& run) {
    Results results;
    results.emplace_back(dtype, m * n, run.poison);
    results.emplace_back(DType::kFloat32, m * rank, run.poison);
    results.emplace_back(dtype, need_z ? m * n : 0, run.poison);
    AdaptedLinear problem;
    fill(problem, run.absolute);
    if (!quantised) problem.base = base.array(run.absolute);
    problem.bias = bias.array(run.absolute);
    problem.y = results[0].array();
    problem.u = results[1].floats();
    problem.z = results[2].array_if(need_z);
    run.kernels.adapted_linear(problem, run.pool);
    return results;
  });
  judge(contents.wild, {n + m + rank + 8, operands}, [&](const Run& run) {
    Results results;
    results.emplace_back(dtype, need_x ? m * k : 0, run.poison);
    results.emplace_back(of_adapter, need_a ? rank * k : 0, run.poison);
    results.emplace_back(of_adapter, need_b ? n * rank : 0, run.poison);
    results.emplace_back(of_adapter, need_scale ? k : 0, run.poison);
    AdaptedLinearBackward problem;
    fill(problem, run.absolute);
    problem.grad = grad.array(run.absolute);
    if (!quantised && (need_x || need_scale)) problem.base = base_of_grad.array(run.absolute);
    problem.u = need_b ? u.floats(run.absolute) : nullptr;
    problem.dx = results[0].array_if(need_x);
    problem.dlora_a = results[1].array_if(need_a);
    problem.dlora_b = results[2].array_if(need_b);
    problem.dinput_scale = results[3].array_if(need_scale);
    if (rank || problem.nf4.packed != nullptr)
      run.kernels.adapted_linear_backward(problem, run.pool);
    else
      return Results();  // the bindings then call ScaleColumns
    return results;
  });
  return 0;
}
