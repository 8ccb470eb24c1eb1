#pragma once

#include <cstdint>

namespace toy {

struct Add {
  int64_t rows, count;
  float scale;
  const float *x, *y;  // [rows, count]
  float* out;
};
struct Launch {
  int threads, rows_y, rows_z, shared, allowed;  // allowed: bytes of shared memory to ask for; -1 not to ask
};

const char* add(const Add& problem, const Launch& launch, void* stream);
const char* copy(const float* x, float* out, int64_t count, void* stream);
int device_arch(int* multiprocessors);

}  // namespace toy
