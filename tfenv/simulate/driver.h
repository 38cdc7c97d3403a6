/* What the parts of the stub libcuda.so.1 share, and what the stub CUDA runtime calls in it. */
#pragma once
#include "cgroups.h"
#include "machine.h"

typedef unsigned long long DevicePointer;

typedef enum {
  SUCCESS = 0,
  INVALID_VALUE = 1,
  OUT_OF_MEMORY = 2,
  NOT_INITIALIZED = 3,
  NO_DEVICE = 100,
  INVALID_DEVICE = 101,
  INVALID_CONTEXT = 201,
  NOT_FOUND = 500,
  NOT_SUPPORTED = 801
} Result;

/* A function that succeeds and does nothing. */
#define NO_EFFECT(name) \
  API int name(void) { return SUCCESS; }

/* A function that is there, because programs look for it, and always fails. */
#define REFUSED(name) \
  API int name(void) { return NOT_SUPPORTED; }

/* A device's primary context, its only one. A device is its CUDA ordinal. */
typedef struct {
  int device;
  int retained;
  unsigned flags;
} Context;

typedef struct Pool Pool; /* stream-ordered memory of a device: driver_memory.c */

int driver_ready(void);              /* cuInit succeeded in this very process */
int driver_has(int device);          /* such an ordinal exists */
int driver_place(int device);        /* ordinal -> GPU of the machine, or MIG instance */
const CgroupChain *driver_cgroups(void); /* those in which this process opened CUDA */
Context *driver_context(int device); /* its primary context */
Context *driver_current(void);       /* the calling thread's context, or NULL */
int driver_new_handle(void **out);   /* something to point at for streams, events, modules */

int memory_open_context(int device); /* takes what a context costs, or OUT_OF_MEMORY */
void memory_close_context(int device);
int memory_take(int device, Bytes size, const char *call); /* physical memory, which no address leads to */
void memory_give_back(int device, Bytes size, const char *call);
void memory_map(DevicePointer start, Bytes size, int device); /* from now on an address leads to it */
void memory_unmap(DevicePointer start);

API int cuInit(unsigned flags);
API int cuDriverGetVersion(int *version);
API int cuDeviceGetCount(int *count);
API int cuDeviceGetName(char *out, int room, int device);
API int cuDeviceGetUuid(unsigned char *out, int device);
API int cuDeviceTotalMem_v2(size_t *bytes, int device);
API int cuDeviceGetAttribute(int *value, int attribute, int device);
API int cuDevicePrimaryCtxRetain(Context **out, int device);
API int cuCtxSetCurrent(Context *context);
API int cuCtxGetDevice(int *device);
API int cuGetErrorString(int result, const char **out);
API int cuMemGetInfo_v2(size_t *available, size_t *total);
API int cuMemAlloc_v2(DevicePointer *out, size_t size);
API int cuMemAllocManaged(DevicePointer *out, size_t size);
API int cuMemAllocAsync(DevicePointer *out, size_t size);
API int cuMemAllocFromPoolAsync(DevicePointer *out, size_t size, Pool *pool);
API int cuMemFree_v2(DevicePointer start);
API int cuMemFreeAsync(DevicePointer start);
API int cuMemHostAlloc(void **out, size_t size);
API int cuMemFreeHost(void *start);
API int cuPointerGetAttribute(void *out, int attribute, DevicePointer address);
API int cuDeviceGetDefaultMemPool(Pool **out, int device);
API int cuDeviceGetMemPool(Pool **out, int device);
API int cuDeviceSetMemPool(int device, Pool *pool);
API int cuMemPoolGetAttribute(Pool *pool, int attribute, void *value);
API int cuMemPoolSetAttribute(Pool *pool, int attribute, void *value);
API int cuDeviceGetPCIBusId(char *out, int room, int device);
API int cuStreamCreate(void **stream);
API int cuEventCreate(void **event, unsigned flags);
API int cuEventDestroy_v2(void *event);
API int cuEventRecord(void *event, void *stream);
API int cuEventElapsedTime(float *milliseconds, void *start, void *end);
