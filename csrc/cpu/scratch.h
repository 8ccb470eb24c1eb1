// Memory that a thread keeps from call to call, so that no kernel touches fresh pages in steady state. Two buffers: one
// for what the calling thread prepares before it starts tasks, one for a task's own panels (the caller runs tasks too).
#pragma once

#include <cstddef>

namespace peft_kernels::cpu {

// Uninitialised, 64-byte aligned, valid until the same thread's next call of the same function.
float* caller_scratch(size_t floats);
float* task_scratch(size_t floats);

}  // namespace peft_kernels::cpu
