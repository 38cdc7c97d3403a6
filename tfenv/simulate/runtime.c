/* Stub libcudart.so.12, the CUDA runtime: TensorFlow registers its kernels here when it is imported,
 * and nothing is ever launched. What needs a device is asked of the stub libcuda.so.1. */
#define _GNU_SOURCE
#include "driver.h"

#include <string.h>

/* ---- registration of kernels, at import: no device is touched */

API void **__cudaRegisterFatBinary(void *binary UNUSED) {
  static void *handle;
  return &handle;
}

#define REGISTER(name) \
  API void name(void) {}
REGISTER(__cudaRegisterFatBinaryEnd)
REGISTER(__cudaUnregisterFatBinary)
REGISTER(__cudaRegisterFunction)
REGISTER(__cudaRegisterVar)
REGISTER(__cudaRegisterHostVar)
REGISTER(__cudaRegisterManagedVar)

API char __cudaInitModule(void **handle UNUSED) { return 1; }

/* ---- launches */

typedef struct {
  unsigned x, y, z;
} Dimensions;

NO_EFFECT(__cudaPushCallConfiguration)
NO_EFFECT(cudaLaunchKernel)
NO_EFFECT(cudaFuncSetAttribute)

API int __cudaPopCallConfiguration(Dimensions *grid, Dimensions *block, size_t *shared, void **stream) {
  *grid = *block = (Dimensions){1, 1, 1};
  *shared = 0;
  *stream = NULL;
  return SUCCESS;
}

API int cudaGetFuncBySymbol(void **function, const void *symbol) {
  *function = (void *)symbol;
  return SUCCESS;
}

API int cudaFuncGetAttributes(void *attributes) {
  enum { ATTRIBUTES_BYTES = 144, MAX_THREADS_PER_BLOCK = 6 /* in ints */ };
  memset(attributes, 0, ATTRIBUTES_BYTES);
  ((int *)attributes)[MAX_THREADS_PER_BLOCK] = 1024;
  return SUCCESS;
}

API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  *blocks = 1;
  return SUCCESS;
}

/* ---- devices */

API int cudaRuntimeGetVersion(int *version) {
  *version = 12050;
  return SUCCESS;
}

API int cudaDriverGetVersion(int *version) { return cuDriverGetVersion(version); }

API int cudaGetDeviceCount(int *count) {
  int result = cuInit(0);
  *count = 0;
  return result ? result : cuDeviceGetCount(count);
}

API int cudaGetDevice(int *device) {
  if (cuCtxGetDevice(device)) *device = 0;
  return SUCCESS;
}

API int cudaSetDevice(int device) {
  Context *context;
  int result = cuInit(0);
  if (!result) result = cuDevicePrimaryCtxRetain(&context, device);
  return result ? result : cuCtxSetCurrent(context);
}

API int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return cuDeviceGetAttribute(value, attribute, device);
}

API int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}

/* struct cudaDeviceProp of CUDA 12 by byte offsets: only what Eigen and CUB divide by. */
enum {
  PROPERTIES_BYTES = 1032, NAME_BYTES = 256, UUID_AT = 256, TOTAL_MEMORY_AT = 288,
  SHARED_PER_BLOCK_AT = 296, SHARED_PER_MULTIPROCESSOR_AT = 640
};
enum { SHARED_PER_BLOCK = 8, SHARED_PER_MULTIPROCESSOR = 81 }; /* attributes of the driver */
static const struct {
  int offset, attribute;
} properties[] = {
    {304, 12}, {308, 10},                      /* registers per block, warp size */
    {320, 1},  {324, 2},  {328, 3}, {332, 4},  /* threads per block, block dimensions */
    {336, 5},  {340, 6},  {344, 7},            /* grid dimensions */
    {348, 13}, {360, 75}, {364, 76},           /* clock rate, compute capability */
    {388, 16}, {616, 38},                      /* multiprocessors, L2 cache */
    {624, 39}, {648, 82},                      /* threads, registers per multiprocessor */
};

static void copy_size(char *to, int attribute, int device) {
  int value = 0;
  cuDeviceGetAttribute(&value, attribute, device);
  *(size_t *)to = (size_t)value;
}

API int cudaGetDeviceProperties_v2(char *out, int device) {
  int result = cuDeviceGetName(memset(out, 0, PROPERTIES_BYTES), NAME_BYTES, device);
  if (result) return result;
  cuDeviceGetUuid((unsigned char *)out + UUID_AT, device);
  cuDeviceTotalMem_v2((size_t *)(out + TOTAL_MEMORY_AT), device);
  copy_size(out + SHARED_PER_BLOCK_AT, SHARED_PER_BLOCK, device);
  copy_size(out + SHARED_PER_MULTIPROCESSOR_AT, SHARED_PER_MULTIPROCESSOR, device);
  for (size_t i = 0; i < sizeof properties / sizeof *properties; i++)
    cuDeviceGetAttribute((int *)(out + properties[i].offset), properties[i].attribute, device);
  return SUCCESS;
}

/* ---- streams, events, copies, errors */

NO_EFFECT(cudaDeviceSynchronize)
NO_EFFECT(cudaStreamSynchronize)
NO_EFFECT(cudaEventSynchronize)
NO_EFFECT(cudaGetLastError)
NO_EFFECT(cudaPeekAtLastError)

API int cudaEventCreate(void **event) { return cuEventCreate(event, 0); }
API int cudaEventDestroy(void *event) { return cuEventDestroy_v2(event); }
API int cudaEventRecord(void *event, void *stream) { return cuEventRecord(event, stream); }
API int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  return cuEventElapsedTime(milliseconds, start, end);
}

API int cudaMemcpyAsync(void *to, const void *from, size_t size) {
  memmove(to, from, size);
  return SUCCESS;
}

API int cudaMemsetAsync(void *start, int value, size_t size) {
  memset(start, value, size);
  return SUCCESS;
}

API const char *cudaGetErrorName(int result) { return result ? "cudaErrorUnknown" : "cudaSuccess"; }
API const char *cudaGetErrorString(int result) { return result ? "unknown error" : "no error"; }
