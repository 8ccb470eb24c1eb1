// The bottleneck adapter, forward and backward. Instruction sets are compared where it has no activation: near the kink
// of relu, or of its slope, two of them may differ by anything.
#include "fuzzing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::fuzzing;

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  Contents contents(bytes);
  const int64_t m = bytes.below(4) == 0 ? bytes.below(3) : bytes.size(50), d = bytes.size(140), r = bytes.size(70);
  const bool residual_is_hidden = bytes.flag();
  const int64_t n = residual_is_hidden ? d : bytes.size(140);
  const DType dtype = bytes.dtype(), of_weights = bytes.flag() ? DType::kFloat32 : dtype;
  const Input hidden(bytes, contents, dtype, m * d);
  const Input down_weight(bytes, contents, of_weights, r * d), up_weight(bytes, contents, of_weights, n * r);
  const Input down_bias = Input::maybe(bytes, contents, of_weights, r);
  const Input up_bias = Input::maybe(bytes, contents, of_weights, n);
  const bool per_channel = bytes.flag();
  const Input scale = Input::maybe(bytes, contents, of_weights, per_channel ? n : 1);
  const Input gate = Input::maybe(bytes, contents, dtype, m);
  const Input residual = Input::maybe(bytes, contents, of_weights, m * n);
  const Input grad(bytes, contents, dtype, m * n), grad_down = Input::maybe(bytes, contents, dtype, m * r);
  const auto activation = static_cast<Activation>(bytes.flag() ? 0 : bytes.below(7));
  const Dropout dropout = dropout_of(bytes);
  const uint8_t needs = bytes.next(), more_needs = bytes.next();
  const auto need = [&](int bit) { return ((needs | more_needs << 8) >> bit & 1) != 0; };

  const auto fill = [&](AdapterOperands& problem, bool absolute) {
    problem.tokens = m, problem.in_features = d, problem.rank = r, problem.out_features = n;
    problem.hidden = hidden.array(absolute);
    problem.down_weight = down_weight.array(absolute), problem.down_bias = down_bias.array(absolute);
    problem.up_weight = up_weight.array(absolute), problem.up_bias = up_bias.array(absolute);
    problem.activation = activation;
    problem.scaling = absolute ? 2.0f : -2.0f;
    problem.scale = scale.array(absolute);
    problem.scale_per_channel = per_channel && scale.present();
    problem.gate = gate.array(absolute);
    problem.dropout = dropout;
  };
  const bool compared = activation == Activation::kIdentity && !contents.wild;
  // Both factors of two products, and of the gradient's third, are rounded to bf16 where the set has such products.
  const double operands = dtype == DType::kBFloat16 ? 6.5 * 0x1p-8 : 0.0;
  const auto out_dtype = residual.present() && !residual_is_hidden ? residual.dtype() : dtype;
  judge(!compared, {d + r + 12, operands}, [&](const Run& run) {
    Results results;
    results.emplace_back(out_dtype, m * n, run.poison);
    results.emplace_back(dtype, need(0) ? m * r : 0, run.poison);
    results.emplace_back(dtype, need(1) ? m * n : 0, run.poison);
    BottleneckAdapter problem;
    fill(problem, run.absolute);
    problem.residual = residual_is_hidden ? hidden.array(run.absolute) : residual.array(run.absolute);
    problem.out = results[0].array();
    problem.down = results[1].array_if(need(0));
    problem.up = results[2].array_if(need(1));
    run.kernels.bottleneck_adapter(problem, run.pool);
    return results;
  });
  const bool need_scale = need(7) && scale.present(), need_gate = need(8) && gate.present();
  judge(!compared, {m + d + r + n + 16, operands}, [&](const Run& run) {
    Results results;
    results.emplace_back(dtype, need(2) ? m * d : 0, run.poison);
    results.emplace_back(of_weights, need(3) ? r * d : 0, run.poison);
    results.emplace_back(of_weights, need(4) ? r : 0, run.poison);
    results.emplace_back(of_weights, need(5) ? n * r : 0, run.poison);
    results.emplace_back(of_weights, need(6) ? n : 0, run.poison);
    results.emplace_back(of_weights, need_scale ? scale.count() : 0, run.poison);
    results.emplace_back(dtype, need_gate ? m : 0, run.poison);
    BottleneckAdapterBackward problem;
    fill(problem, run.absolute);
    problem.grad = grad.array(run.absolute);
    problem.grad_down = grad_down.array(run.absolute);
    problem.residual_is_hidden = residual_is_hidden;
    problem.dhidden = results[0].array_if(need(2));
    problem.ddown_weight = results[1].array_if(need(3));
    problem.ddown_bias = results[2].array_if(need(4));
    problem.dup_weight = results[3].array_if(need(5));
    problem.dup_bias = results[4].array_if(need(6));
    problem.dscale = results[5].array_if(need_scale);
    problem.dgate = results[6].array_if(need_gate);
    run.kernels.bottleneck_adapter_backward(problem, run.pool);
    return results;
  });
  return 0;
}
