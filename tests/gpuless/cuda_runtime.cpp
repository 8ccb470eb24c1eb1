// What code from nvcc and our launchers call instead of libcudart, so that host code runs on a machine without a GPU:
// a launch goes to a function of Python's (cuda.py), which runs the kernel in the emulator. Linked into one library
// with the objects of csrc/cuda and python_bindings; what is missing here is an undefined symbol of that link.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <unordered_map>
#include <vector>

namespace {

// The emulated device; cuda.py has the same struct.
struct Device {
  int32_t arch, multiprocessors, shared_memory;  // 90 for sm_90; bytes of shared memory that one CTA may have
  int32_t code_error;                            // of a library that has no code for it; else 0
  cudaError_t (*launch)(const char* kernel, const uint32_t* grid_and_block, size_t shared, void** arguments,
                        int on_current_stream);
  cudaError_t (*allow_shared)(const char* kernel, int bytes);
};
const Device* device = nullptr;

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};
thread_local std::vector<Configuration> configurations;  // pushed by <<<...>>>, popped by the kernel's stub
thread_local cudaError_t last_error = cudaSuccess;

cudaStream_t current_stream() {
  static char stream;
  return reinterpret_cast<cudaStream_t>(&stream);
}

// Host function of a kernel -> its name in the PTX. Filled before main() by what nvcc generates.
std::unordered_map<const void*, const char*>& kernels() {
  static std::unordered_map<const void*, const char*> names;
  return names;
}

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

cudaError_t launch(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared, cudaStream_t stream) {
  if (device == nullptr) return remember(cudaErrorNoDevice);
  const auto kernel = kernels().find(function);
  if (kernel == kernels().end()) return remember(cudaErrorInvalidDeviceFunction);
  const uint32_t sizes[] = {grid.x, grid.y, grid.z, block.x, block.y, block.z};
  return remember(device->launch(kernel->second, sizes, shared, arguments, stream == current_stream()));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) void gpuless_set_device(const Device* emulated) {
  device = emulated;
  last_error = cudaSuccess;
}

__attribute__((visibility("default"))) int gpuless_take_error() { return cudaGetLastError(); }

// What torch has in libtorch_cuda.so.
int32_t aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = current_stream();
  return 0;
}

// ---- Called by what nvcc generates (its crt/host_runtime.h, crt/device_functions.h)
// -----------------------------------

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  kernels()[function] = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration c = configurations.back();
  configurations.pop_back();
  *grid = c.grid;
  *block = c.block;
  *shared = c.shared;
  *static_cast<cudaStream_t*>(stream) = c.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, arguments, shared, stream);
}

// ---- Called by launchers -------------------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, block, arguments, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* function, void** arguments) {
  if (config->numAttrs != 0) return remember(cudaErrorNotSupported);
  return launch(function, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  const auto kernel = kernels().find(function);
  if (device == nullptr) return remember(cudaErrorNoDevice);
  if (kernel == kernels().end()) return remember(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return remember(cudaErrorNotSupported);
  return remember(device->allow_shared(kernel->second, value));
}

// Whether there is code for this device is what callers ask.
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (device == nullptr) return remember(cudaErrorNoDevice);
  if (kernels().count(function) == 0) return remember(cudaErrorInvalidDeviceFunction);
  if (device->code_error != cudaSuccess) return remember(static_cast<cudaError_t>(device->code_error));
  *attributes = {};
  attributes->binaryVersion = device->arch;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* number) {
  *number = 0;
  return device == nullptr ? remember(cudaErrorNoDevice) : cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (device == nullptr) return remember(cudaErrorNoDevice);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = device->arch / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device->arch % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = device->multiprocessors;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device->shared_memory;
      return cudaSuccess;
    default:
      return remember(cudaErrorNotSupported);
  }
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorNoDevice:
      return "no CUDA-capable device is detected";
    case cudaErrorLaunchOutOfResources:
      return "too many resources requested for launch";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    case cudaErrorNotSupported:
      return "operation not supported";
    default:
      return "unknown error";
  }
}

}  // extern "C"
