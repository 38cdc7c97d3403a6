/* Stub CUDA runtime, part two: memory, copies, streams, events and graphs. PyTorch takes all of its memory here. Only
 * expandable segments are virtual memory of the driver, whose functions it finds by cudaGetDriverEntryPoint. */
#define _GNU_SOURCE
#include "runtime.h"

#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

/* The runtime works on device 0 until a program chooses another. */
static int get_ready(void) {
  int device;
  return cuCtxGetDevice(&device) ? cudaSetDevice(0) : SUCCESS;
}

/* ---- memory */

API int cudaMemGetInfo(size_t *available, size_t *total) {
  int result = get_ready();
  return runtime_result(result ? result : cuMemGetInfo_v2(available, total));
}

API int cudaMalloc(void **out, size_t size) {
  int result = get_ready();
  return runtime_result(result ? result : cuMemAlloc_v2((DevicePointer *)out, size));
}

API int cudaMallocManaged(void **out, size_t size) {
  int result = get_ready();
  return runtime_result(result ? result : cuMemAllocManaged((DevicePointer *)out, size));
}

API int cudaMallocAsync(void **out, size_t size) {
  int result = get_ready();
  return runtime_result(result ? result : cuMemAllocAsync((DevicePointer *)out, size));
}

API int cudaMallocFromPoolAsync(void **out, size_t size, Pool *pool) {
  return runtime_result(cuMemAllocFromPoolAsync((DevicePointer *)out, size, pool));
}

API int cudaFree(void *start) {
  int result = get_ready();
  return runtime_result(result ? result : cuMemFree_v2((DevicePointer)start));
}

API int cudaFreeAsync(void *start) { return runtime_result(cuMemFreeAsync((DevicePointer)start)); }
API int cudaHostAlloc(void **out, size_t size) { return runtime_result(cuMemHostAlloc(out, size)); }
API int cudaMallocHost(void **out, size_t size) { return runtime_result(cuMemHostAlloc(out, size)); }
API int cudaFreeHost(void *start) { return cuMemFreeHost(start); }
NO_EFFECT(cudaHostRegister)
NO_EFFECT(cudaHostUnregister)

API int cudaHostGetDevicePointer(void **out, void *host) {
  *out = host;
  return SUCCESS;
}

/* struct cudaPointerAttributes starts with type, device, devicePointer, hostPointer. */
API int cudaPointerGetAttributes(int *out, const void *address) {
  enum { TYPE_DEVICE = 2, DEVICE_ORDINAL = 9, BYTES = 24 };
  int device;
  memset(out, 0, BYTES);
  out[1] = -1;
  if (cuPointerGetAttribute(&device, DEVICE_ORDINAL, (DevicePointer)address)) return SUCCESS;
  out[0] = TYPE_DEVICE;
  out[1] = device;
  memcpy(out + 2, &address, sizeof address);
  return SUCCESS;
}

/* ---- stream-ordered pools */

API int cudaDeviceGetDefaultMemPool(Pool **out, int device) {
  return runtime_result(cuDeviceGetDefaultMemPool(out, device));
}
API int cudaDeviceGetMemPool(Pool **out, int device) { return runtime_result(cuDeviceGetMemPool(out, device)); }
API int cudaDeviceSetMemPool(int device, Pool *pool) { return runtime_result(cuDeviceSetMemPool(device, pool)); }
API int cudaMemPoolGetAttribute(Pool *pool, int attribute, void *value) {
  return cuMemPoolGetAttribute(pool, attribute, value);
}
API int cudaMemPoolSetAttribute(Pool *pool, int attribute, void *value) {
  return cuMemPoolSetAttribute(pool, attribute, value);
}
NO_EFFECT(cudaMemPoolSetAccess)
NO_EFFECT(cudaMemPoolTrimTo)

/* ---- copies: at once, whatever stream is named */

API int cudaMemcpy(void *to, const void *from, size_t size) {
  memmove(to, from, size);
  return SUCCESS;
}

API int cudaMemcpyAsync(void *to, const void *from, size_t size) { return cudaMemcpy(to, from, size); }
API int cudaMemcpyPeerAsync(void *to, int to_device UNUSED, const void *from, int from_device UNUSED, size_t size) {
  return cudaMemcpy(to, from, size);
}

API int cudaMemcpy2DAsync(char *to, size_t to_pitch, const char *from, size_t from_pitch, size_t width, size_t rows) {
  for (size_t row = 0; row < rows; row++) memmove(to + row * to_pitch, from + row * from_pitch, width);
  return SUCCESS;
}

API int cudaMemset(void *start, int value, size_t size) {
  memset(start, value, size);
  return SUCCESS;
}

API int cudaMemsetAsync(void *start, int value, size_t size) { return cudaMemset(start, value, size); }
API int cudaGetSymbolAddress(void **out) { return runtime_new_handle(out); }
NO_EFFECT(cudaMemcpyToSymbol)
NO_EFFECT(cudaMemcpyToSymbolAsync)

/* ---- functions of the driver, in their newest versions */

API int cudaGetDriverEntryPoint(const char *name, void **out, unsigned long long flags UNUSED, int *status) {
  enum { FOUND = 0, SYMBOL_NOT_FOUND = 1 };
  char versioned[96];
  void *driver = dlopen("libcuda.so.1", RTLD_NOW);
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  *out = dlsym(driver, versioned);
  if (!*out) *out = dlsym(driver, name);
  if (status) *status = *out ? FOUND : SYMBOL_NOT_FOUND;
  return SUCCESS;
}

API int cudaGetDriverEntryPointByVersion(const char *name, void **out, unsigned version UNUSED,
                                         unsigned long long flags, int *status) {
  return cudaGetDriverEntryPoint(name, out, flags, status);
}

/* ---- streams and events */

API int cudaStreamCreate(void **stream) { return cuStreamCreate(stream); }
API int cudaStreamCreateWithFlags(void **stream) { return cuStreamCreate(stream); }
API int cudaStreamCreateWithPriority(void **stream) { return cuStreamCreate(stream); }
NO_EFFECT(cudaStreamDestroy)
NO_EFFECT(cudaStreamSynchronize)
NO_EFFECT(cudaStreamQuery)
NO_EFFECT(cudaStreamWaitEvent)

API int cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}

API int cudaStreamGetPriority(void *stream UNUSED, int *priority) {
  *priority = 0;
  return SUCCESS;
}

API int cudaLaunchHostFunc(void *stream UNUSED, void (*function)(void *), void *argument) {
  function(argument);
  return SUCCESS;
}

API int cudaStreamAddCallback(void *stream, void (*function)(void *, int, void *), void *argument) {
  function(stream, SUCCESS, argument);
  return SUCCESS;
}

API int cudaEventCreate(void **event) { return cuEventCreate(event, 0); }
API int cudaEventCreateWithFlags(void **event, unsigned flags) { return cuEventCreate(event, flags); }
API int cudaEventDestroy(void *event) { return cuEventDestroy_v2(event); }
API int cudaEventRecord(void *event, void *stream) { return cuEventRecord(event, stream); }
API int cudaEventRecordWithFlags(void *event, void *stream) { return cuEventRecord(event, stream); }
API int cudaEventElapsedTime(float *milliseconds, void *start, void *end) {
  return cuEventElapsedTime(milliseconds, start, end);
}
NO_EFFECT(cudaEventQuery)
NO_EFFECT(cudaEventSynchronize)

/* ---- graphs. That a thread captures is remembered, because allocators ask for it. What is captured runs at once */

static __thread unsigned long long capture; /* the number of the capture that goes on, or 0 */

API int cudaStreamBeginCapture(void) {
  static unsigned long long captures;
  capture = __atomic_add_fetch(&captures, 1, __ATOMIC_RELAXED);
  return SUCCESS;
}
API int cudaStreamBeginCaptureToGraph(void) { return cudaStreamBeginCapture(); }

API int cudaStreamEndCapture(void *stream UNUSED, void **graph) {
  capture = 0;
  return runtime_new_handle(graph);
}

API int cudaStreamIsCapturing(void *stream UNUSED, int *status) {
  *status = capture != 0;
  return SUCCESS;
}

static int get_capture(int *status, unsigned long long *id, void **graph, void **nodes, void **edges, size_t *count) {
  *status = capture != 0;
  if (id) *id = capture;
  if (graph) *graph = NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (count) *count = 0;
  return SUCCESS;
}

#if CUDART_MAJOR == 12
API int cudaStreamGetCaptureInfo(void *stream UNUSED, int *status, unsigned long long *id) {
  return get_capture(status, id, NULL, NULL, NULL, NULL);
}
API int cudaStreamGetCaptureInfo_v2(void *stream UNUSED, int *status, unsigned long long *id, void **graph,
                                    void **nodes, size_t *count) {
  return get_capture(status, id, graph, nodes, NULL, count);
}
#else
API int cudaStreamGetCaptureInfo(void *stream UNUSED, int *status, unsigned long long *id, void **graph, void **nodes,
                                 void **edges, size_t *count) {
  return get_capture(status, id, graph, nodes, edges, count);
}
#endif

NO_EFFECT(cudaStreamUpdateCaptureDependencies)
NO_EFFECT(cudaThreadExchangeStreamCaptureMode)
API int cudaGraphInstantiate(void **graph) { return runtime_new_handle(graph); }
API int cudaGraphInstantiateWithFlags(void **graph) { return runtime_new_handle(graph); }
API int cudaGraphAddNode(void **node) { return runtime_new_handle(node); }
API int cudaUserObjectCreate(void **object) { return runtime_new_handle(object); }
NO_EFFECT(cudaGraphLaunch)
NO_EFFECT(cudaGraphDestroy)
NO_EFFECT(cudaGraphExecDestroy)
NO_EFFECT(cudaGraphRetainUserObject)
NO_EFFECT(cudaGraphDebugDotPrint)
NO_EFFECT(cudaUserObjectRelease)
NO_EFFECT(cudaDeviceSetGraphMemAttribute)

API int cudaDeviceGetGraphMemAttribute(int device UNUSED, int attribute UNUSED, unsigned long long *value) {
  *value = 0;
  return SUCCESS;
}

/* PyTorch warns of an empty graph. */
API int cudaGraphGetNodes(void *graph, void **nodes, size_t *count) {
  if (nodes) *nodes = graph;
  *count = 1;
  return SUCCESS;
}

API int cudaGraphNodeGetDependencies(void *node UNUSED, void **from UNUSED, void *edges UNUSED, size_t *count) {
  if (count) *count = 0;
  return SUCCESS;
}

API int cudaGraphConditionalHandleCreate(unsigned long long *handle) {
  *handle = 1;
  return SUCCESS;
}

/* ---- sharing with other processes */

REFUSED(cudaIpcGetMemHandle)
REFUSED(cudaIpcOpenMemHandle)
REFUSED(cudaIpcCloseMemHandle)
REFUSED(cudaIpcGetEventHandle)
REFUSED(cudaIpcOpenEventHandle)
