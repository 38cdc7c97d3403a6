/* Stub libcudart.so.12 and libcudart.so.13, the CUDA runtime, part one: kernels, devices and errors. TensorFlow and
 * PyTorch register their kernels here when they are imported, and nothing is ever launched. What needs a device is asked
 * of the stub libcuda.so.1. CUDART_MAJOR: which runtime this is, by its soname. */
#define _GNU_SOURCE
#include "runtime.h"

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

API int __cudaGetKernel(void **kernel, const void *symbol) {
  *kernel = (void *)symbol;
  return SUCCESS;
}

/* ---- launches */

typedef struct {
  unsigned x, y, z;
} Dimensions;

NO_EFFECT(__cudaPushCallConfiguration)
NO_EFFECT(__cudaLaunchKernel)
NO_EFFECT(cudaLaunchKernel)
NO_EFFECT(cudaLaunchKernelExC)
NO_EFFECT(cudaLaunchCooperativeKernel)
NO_EFFECT(cudaFuncSetAttribute)
NO_EFFECT(cudaKernelSetAttributeForDevice)

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

/* CUB sorts by the code that a kernel has for a compute capability: it has the one for an A100. */
API int cudaFuncGetAttributes(int *attributes) {
  enum { ATTRIBUTES_BYTES = 144, MAX_THREADS_PER_BLOCK = 6, PTX_VERSION = 8, BINARY_VERSION = 9 /* in ints */ };
  memset(attributes, 0, ATTRIBUTES_BYTES);
  attributes[MAX_THREADS_PER_BLOCK] = 1024;
  attributes[PTX_VERSION] = attributes[BINARY_VERSION] = 80;
  return SUCCESS;
}

API int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 1;
  return SUCCESS;
}
API int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(blocks);
}

/* ---- libraries of kernels */

API int cudaLibraryLoadData(void **library) { return runtime_new_handle(library); }
API int cudaLibraryGetKernel(void **kernel) { return runtime_new_handle(kernel); }
NO_EFFECT(cudaLibraryUnload)

/* ---- devices */

API int cudaRuntimeGetVersion(int *version) {
  *version = CUDART_MAJOR == 12 ? 12050 : 13000;
  return SUCCESS;
}

API int cudaDriverGetVersion(int *version) { return cuDriverGetVersion(version); }

API int cudaGetDeviceCount(int *count) {
  int result = cuInit(0);
  *count = 0;
  return runtime_result(result ? result : cuDeviceGetCount(count));
}

API int cudaGetDevice(int *device) {
  if (cuCtxGetDevice(device)) *device = 0;
  return SUCCESS;
}

API int cudaSetDevice(int device) {
  Context *context;
  int result = cuInit(0);
  if (!result) result = cuDevicePrimaryCtxRetain(&context, device);
  return runtime_result(result ? result : cuCtxSetCurrent(context));
}

API int cudaDeviceGetAttribute(int *value, int attribute, int device) {
  return runtime_result(cuDeviceGetAttribute(value, attribute, device));
}

API int cudaDeviceGetPCIBusId(char *out, int room, int device) {
  return runtime_result(cuDeviceGetPCIBusId(out, room, device));
}

API int cudaDeviceCanAccessPeer(int *can, int one, int other) {
  *can = one != other;
  return SUCCESS;
}
NO_EFFECT(cudaDeviceEnablePeerAccess)
NO_EFFECT(cudaDeviceSynchronize)
NO_EFFECT(cudaProfilerStart)
NO_EFFECT(cudaProfilerStop)

/* struct cudaDeviceProp by byte offsets: what Eigen and CUB divide by, and what PyTorch shows. */
enum { NAME_BYTES = 256, UUID_AT = 256, TOTAL_MEMORY_AT = 288, SHARED_PER_BLOCK_AT = 296 };
enum { SHARED_PER_BLOCK = 8, SHARED_PER_MULTIPROCESSOR = 81 }; /* attributes of the driver */
typedef struct {
  int bytes, shared_per_multiprocessor_at;
  struct {
    int offset, attribute;
  } numbers[24];
} Layout;

/* What comes first is the same in both. */
#define COMMON                                                                      \
  {304, 12}, {308, 10},                     /* registers per block, warp size */    \
  {320, 1},  {324, 2},  {328, 3}, {332, 4}, /* threads per block, block dimensions */ \
  {336, 5},  {340, 6},  {344, 7},           /* grid dimensions */                   \
  {360, 75}, {364, 76}                      /* compute capability */
static const Layout cuda_12 = {1032, 640, {
    COMMON,
    {348, 13}, {388, 16}, /* clock rate, multiprocessors */
    {584, 33}, {616, 38}, /* PCI bus, L2 cache */
    {624, 39}, {648, 82}, /* threads, registers per multiprocessor */
}};
static const Layout cuda_13 = {1008, 624, {
    COMMON,
    {384, 16}, {568, 33}, {596, 38}, /* multiprocessors, PCI bus, L2 cache */
    {604, 39}, {632, 82},            /* threads, registers per multiprocessor */
}};

static void copy_size(char *to, int attribute, int device) {
  int value = 0;
  cuDeviceGetAttribute(&value, attribute, device);
  *(size_t *)to = (size_t)value;
}

static int describe_device(char *out, int device, const Layout *layout) {
  int result = cuDeviceGetName(memset(out, 0, (size_t)layout->bytes), NAME_BYTES, device);
  if (result) return runtime_result(result);
  cuDeviceGetUuid((unsigned char *)out + UUID_AT, device);
  cuDeviceTotalMem_v2((size_t *)(out + TOTAL_MEMORY_AT), device);
  copy_size(out + SHARED_PER_BLOCK_AT, SHARED_PER_BLOCK, device);
  copy_size(out + layout->shared_per_multiprocessor_at, SHARED_PER_MULTIPROCESSOR, device);
  for (int i = 0; layout->numbers[i].offset; i++)
    cuDeviceGetAttribute((int *)(out + layout->numbers[i].offset), layout->numbers[i].attribute, device);
  return SUCCESS;
}

/* The first name is CUDA 12's, the second is CUDA 13's. Both libraries have both: where TensorFlow was imported first,
 * its functions come before those that PyTorch links, and they lead to libcudart.so.12, also for a PyTorch of CUDA 13. */
API int cudaGetDeviceProperties_v2(char *out, int device) { return describe_device(out, device, &cuda_12); }
API int cudaGetDeviceProperties(char *out, int device) { return describe_device(out, device, &cuda_13); }

/* ---- errors. The runtime's numbers are the driver's, for those that happen here. A thread's last one is kept */

static __thread int last_error;

int runtime_result(int result) {
  if (result) last_error = result;
  return result;
}

API int cudaPeekAtLastError(void) { return last_error; }
API int cudaGetLastError(void) {
  int result = last_error;
  last_error = SUCCESS;
  return result;
}

API const char *cudaGetErrorName(int result) {
  switch (result) {
    case SUCCESS: return "cudaSuccess";
    case INVALID_VALUE: return "cudaErrorInvalidValue";
    case OUT_OF_MEMORY: return "cudaErrorMemoryAllocation";
    case NOT_INITIALIZED: return "cudaErrorInitializationError";
    case NO_DEVICE: return "cudaErrorNoDevice";
    case INVALID_DEVICE: return "cudaErrorInvalidDevice";
    case NOT_SUPPORTED: return "cudaErrorNotSupported";
    default: return "cudaErrorUnknown";
  }
}

API const char *cudaGetErrorString(int result) {
  const char *text;
  cuGetErrorString(result, &text);
  return text;
}
