// The toy's ops, through torch's stable ABI.
#include "toy.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

using torch::stable::Tensor;

extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void**);

namespace {

void* current_stream() {
  void* stream = nullptr;
  aoti_torch_get_current_cuda_stream(0, &stream);
  return stream;
}

const float* data(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* mutable_data(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Tensor add(const Tensor& x, const Tensor& y_, double scale, int64_t threads, int64_t rows_y, int64_t rows_z,
           int64_t shared, int64_t allowed) {
  const Tensor y = torch::stable::contiguous(y_);
  Tensor out = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  const toy::Add problem{x.size(0), x.size(1), static_cast<float>(scale), data(x), data(y), mutable_data(out)};
  const toy::Launch launch{static_cast<int>(threads), static_cast<int>(rows_y), static_cast<int>(rows_z),
                           static_cast<int>(shared), static_cast<int>(allowed)};
  const char* error = toy::add(problem, launch, current_stream());
  STD_TORCH_CHECK(error == nullptr, "add: ", error);
  return out;
}

// Copies `count` elements, however many there are; on a stream of its own where asked to; says nothing of errors where
// there is nothing to copy.
Tensor copy(const Tensor& x, int64_t count, bool elsewhere) {
  Tensor out = torch::stable::new_empty(x, {x.numel()});
  const char* error = toy::copy(data(x), mutable_data(out), count, elsewhere ? nullptr : current_stream());
  STD_TORCH_CHECK(error == nullptr || count == 0, "copy: ", error);
  return out;
}

std::tuple<int64_t, int64_t> device(const Tensor&) {
  int multiprocessors = 0;
  const int arch = toy::device_arch(&multiprocessors);
  return {arch, multiprocessors};
}

}  // namespace

STABLE_TORCH_LIBRARY(gpuless_toy, m) {
  m.def(
      "add.cuda(Tensor x, Tensor y, float scale, int threads, int rows_y, int rows_z, int shared, int allowed)"
      " -> Tensor");
  m.def("copy.cuda(Tensor x, int count, bool elsewhere) -> Tensor");
  m.def("device.cuda(Tensor x) -> (int, int)");
  m.def("nothing.cuda(Tensor x) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(gpuless_toy, CompositeExplicitAutograd, m) {
  m.impl("add.cuda", TORCH_BOX(&add));
  m.impl("copy.cuda", TORCH_BOX(&copy));
  m.impl("device.cuda", TORCH_BOX(&device));
}
