// The NF4 codec and dropout: the same bits on every instruction set, for any weight and any absmax.
#include "fuzzing.h"

using namespace peft_kernels;
using namespace peft_kernels::cpu;
using namespace peft_kernels::cpu::fuzzing;

namespace {

void quantize(Bytes& bytes, Contents& contents) {
  const int64_t count = bytes.size(3000) * bytes.below(4);
  const int log2 = 5 + static_cast<int>(bytes.below(8));
  const Input weight(bytes, contents, bytes.dtype(), count);
  judge(contents.wild, {0}, [&](const Run& run) {
    Results results;
    results.emplace_back(DType::kFloat32, (count + (int64_t{1} << log2) - 1) >> log2, run.poison);  // absmax
    Buffer packed(1, (count + 1) / 2);
    std::memset(packed.data(), run.poison, packed.bytes());
    run.kernels.nf4_quantize(weight.array(), count, log2, packed.data(), results[0].floats(), run.pool);
    results.emplace_back(DType::kFloat32, static_cast<int64_t>(packed.bytes()), run.poison);
    for (size_t i = 0; i < packed.bytes(); ++i) results[1].floats()[i] = packed.data()[i];
    return results;
  });
}

void dequantize(Bytes& bytes, Contents& contents) {
  const int64_t count = bytes.size(3000) * bytes.below(4);
  const NF4Input weight(bytes, contents, count);
  const DType dtype = bytes.dtype();
  judge(contents.wild, {0}, [&](const Run& run) {
    Results results;
    results.emplace_back(dtype, count, run.poison);
    run.kernels.nf4_dequantize(weight.weight(), count, results[0].array(), run.pool);
    return results;
  });
}

void dropout(Bytes& bytes, Contents& contents) {
  const int64_t count = bytes.size(3000) * bytes.below(4);
  const Input x(bytes, contents, bytes.dtype(), count);
  const Dropout dropout = dropout_of(bytes);
  judge(contents.wild, {0}, [&](const Run& run) {
    Results results;
    results.emplace_back(x.dtype(), count, run.poison);
    run.kernels.philox_dropout(x.array(), count, dropout, results[0].array(), run.pool);
    return results;
  });
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const int64_t family = bytes.below(3);
  Contents contents(bytes);
  (family == 0 ? quantize : family == 1 ? dequantize : dropout)(bytes, contents);
  return 0;
}
