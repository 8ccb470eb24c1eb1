#include "../simd/avx512_bf16.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../../common/nf4.h"
#include "../api.h"
#include "../scratch.h"

namespace peft_kernels::cpu::avx512_bf16 {
#include "../kernels/table-inl.h"
}
