// The norms of DoRA, and the pass that scales and sums columns.
#include "fuzzing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::fuzzing;

namespace {

void norm(Bytes& bytes, Contents& contents) {
  const int64_t n = bytes.size(60), k = bytes.size(300), r = bytes.size(40);
  const DType dtype = bytes.dtype();
  const Input a(bytes, contents, dtype, r * k), b(bytes, contents, dtype, n * r);
  const bool quantised = bytes.flag();
  const NF4Input nf4(bytes, contents, quantised ? n * k : 0);
  const Input dense = quantised ? Input() : Input(bytes, contents, bytes.dtype(), n * k);
  const double scaling = static_cast<double>(bytes.below(9)) - 4.0;
  // The error is relative to the norm itself: the tolerance is the documented 1e-6, and two roundings.
  judge(contents.wild, {10}, [&](const Run& run) {
    Results results;
    results.emplace_back(DType::kFloat32, n, run.poison);
    DoraNorm problem;
    problem.in_features = k, problem.out_features = n, problem.rank = r;
    if (quantised) problem.nf4 = nf4.weight();
    problem.dense = dense.array();
    problem.a = a.array();
    problem.b = b.array();
    problem.scaling = scaling;
    problem.norm = results[0].floats();
    run.kernels.dora_norm(problem, run.pool);
    return results;
  });
}

void scale_columns(Bytes& bytes, Contents& contents) {
  const int64_t m = bytes.below(70), n = bytes.size(300);
  const DType dtype = bytes.dtype(), of_scale = bytes.flag() ? DType::kFloat32 : dtype;
  const Input v(bytes, contents, dtype, m * n), scale = Input::maybe(bytes, contents, of_scale, n);
  const Input z = Input::maybe(bytes, contents, dtype, m * n);
  const bool sums = bytes.flag();
  judge(contents.wild, {m + 4}, [&](const Run& run) {
    Results results;
    results.emplace_back(dtype, scale.present() ? m * n : 0, run.poison);
    results.emplace_back(dtype, sums ? n : 0, run.poison);
    results.emplace_back(of_scale, z.present() ? n : 0, run.poison);
    ScaleColumns problem;
    problem.rows = m, problem.columns = n;
    problem.v = v.array(run.absolute);
    problem.scale = scale.array(run.absolute);
    problem.z = z.array(run.absolute);
    problem.scaled = results[0].array_if(scale.present());
    problem.sums = results[1].array_if(sums);
    problem.dots = results[2].array_if(z.present());
    if (problem.scaled || problem.sums || problem.dots) run.kernels.scale_columns(problem, run.pool);
    return results;
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const bool of_norm = bytes.flag();
  Contents contents(bytes);
  (of_norm ? norm : scale_columns)(bytes, contents);
  return 0;
}
