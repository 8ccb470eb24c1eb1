// All kernels of one instruction set, in the order in which they build on each other, and their table.
// Included by isa/*.cpp, inside that set's namespace, after its simd/ header.

namespace {
#include "rows-inl.h"

#include "plan-inl.h"

#include "nf4-inl.h"

#include "tile-inl.h"

#include "scale_columns-inl.h"

#include "linear_forward-inl.h"

#include "linear_backward-inl.h"

#include "linear_int8-inl.h"

#include "dora-inl.h"

#include "activation-inl.h"

#include "adapter-inl.h"

#include "adapter_backward-inl.h"
}  // namespace

extern const Kernels kTable;
const Kernels kTable{kName,
                     plan,
                     nf4_quantize,
                     nf4_dequantize,
                     philox_dropout,
                     adapted_linear,
                     adapted_linear_backward,
                     scale_columns,
                     nf4_linear_int8,
                     dora_norm,
                     activate,
                     bottleneck_adapter,
                     bottleneck_adapter_backward};
