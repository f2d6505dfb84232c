// What the library says of itself and of its statuses.

#include "launch.cuh"

#define DK_TEXT(x) #x
#define DK_STRING(x) DK_TEXT(x)

#if !defined(DK_ARCHITECTURES)  // backends/cuda/build.py says
#define DK_ARCHITECTURES "architectures unknown"
#endif

int dk_abi_version(void) { return DK_ABI_VERSION; }

int dk_on_host(void) {
#if defined(__CUDACC__)
  return 0;
#else
  return 1;
#endif
}

const char *dk_build_info(void) {
#if defined(__CUDACC__)
  return "CUDA " DK_STRING(__CUDACC_VER_MAJOR__) "." DK_STRING(__CUDACC_VER_MINOR__) " for " DK_ARCHITECTURES;
#else
  return "host shim";
#endif
}

const char *dk_error_string(int status) {
  switch (status) {
    case DK_OK: return "no error";
    case DK_BAD_DTYPE: return "a dtype that this kernel does not take, or not beside the others";
    case DK_BAD_STRIDE: return "rows that are not contiguous";
    case DK_BAD_SIZE: return "a size out of range";
    case DK_MISSING: return "a tensor that is needed is missing";
    default: return cudaGetErrorString(static_cast<cudaError_t>(status));
  }
}
