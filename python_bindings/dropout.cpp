// philox_dropout for CPU tensors; schema in peft_kernels/ops/dropout/schema.py.
#include "tensors.h"

namespace peft_kernels::bindings {
namespace {

Tensor philox_dropout(const Tensor& x_, double p, const Tensor& seed) {
  const Tensor x = as_contiguous(defined("x", x_));
  const cpu::Array values = array("x", x);  // checked before memory is allocated
  const cpu::Dropout dropout = make_dropout(p, seed, "p");
  Tensor out = empty(x, x.sizes(), x.scalar_type());
  cpu::kernels().philox_dropout(values, x.numel(), dropout, output(out), torch_threads());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) { m.impl("philox_dropout", TORCH_BOX(&philox_dropout)); }

}  // namespace peft_kernels::bindings
