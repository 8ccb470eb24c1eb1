#include "../simd/avx512_vnni.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "../../common/nf4.h"
#include "../api.h"
#include "../scratch.h"

namespace peft_kernels::cpu::avx512_vnni {
#include "../kernels/table-inl.h"
}
