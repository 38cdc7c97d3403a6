/* Stub libcuda.so.1, part three: streams, events, modules, kernels and graphs. Everything succeeds
 * at once and kernels do nothing: what a program computes on a simulated GPU is meaningless. */
#define _GNU_SOURCE
#include "driver.h"

#include <stdlib.h>
#include <time.h>

#define NEW_HANDLE(name) \
  API int name(void **out) { return driver_new_handle(out); }
#define FREE_HANDLE(name) \
  API int name(void *handle) { free(handle); return SUCCESS; }

/* ---- streams */

NEW_HANDLE(cuStreamCreate)
NEW_HANDLE(cuStreamCreateWithPriority)
FREE_HANDLE(cuStreamDestroy_v2)
NO_EFFECT(cuStreamSynchronize)
NO_EFFECT(cuStreamQuery)
NO_EFFECT(cuStreamWaitEvent)

API int cuStreamIsCapturing(void *stream UNUSED, int *status) {
  *status = 0;
  return SUCCESS;
}

API int cuStreamGetPriority(void *stream UNUSED, int *priority) {
  *priority = 0;
  return SUCCESS;
}

API int cuStreamGetCtx(void *stream UNUSED, Context **out) {
  *out = driver_current();
  return SUCCESS;
}

API int cuLaunchHostFunc(void *stream UNUSED, void (*function)(void *), void *argument) {
  function(argument);
  return SUCCESS;
}

/* Words in memory that streams write and wait for. They are written at once, so nobody has to wait. */
API int cuStreamWriteValue32_v2(void *stream UNUSED, unsigned *address, unsigned value) {
  *address = value;
  return SUCCESS;
}
API int cuStreamWriteValue64_v2(void *stream UNUSED, unsigned long long *address, unsigned long long value) {
  *address = value;
  return SUCCESS;
}
NO_EFFECT(cuStreamWaitValue32_v2)
NO_EFFECT(cuStreamWaitValue64_v2)

/* ---- events: the time they were recorded */

API int cuEventCreate(void **event, unsigned flags UNUSED) { return driver_new_handle(event); }
FREE_HANDLE(cuEventDestroy_v2)
NO_EFFECT(cuEventQuery)
NO_EFFECT(cuEventSynchronize)

API int cuEventRecord(void *event, void *stream UNUSED) {
  clock_gettime(CLOCK_MONOTONIC, event);
  return SUCCESS;
}

API int cuEventElapsedTime(float *milliseconds, void *start, void *end) {
  const struct timespec *from = start, *to = end;
  *milliseconds = (float)(to->tv_sec - from->tv_sec) * 1e3f + (float)(to->tv_nsec - from->tv_nsec) / 1e6f;
  return SUCCESS;
}

/* ---- modules and kernels */

NEW_HANDLE(cuModuleLoad)
NEW_HANDLE(cuModuleLoadFatBinary)
NEW_HANDLE(cuModuleLoadData)
NEW_HANDLE(cuModuleLoadDataEx)
NEW_HANDLE(cuModuleGetFunction)
FREE_HANDLE(cuModuleUnload)
NEW_HANDLE(cuLibraryLoadData)
NEW_HANDLE(cuLibraryGetKernel)
NO_EFFECT(cuLibraryUnload)
NO_EFFECT(cuTensorMapEncodeTiled)
NO_EFFECT(cuFuncSetAttribute)
NO_EFFECT(cuFuncSetCacheConfig)
NO_EFFECT(cuLaunchKernel)
NO_EFFECT(cuLaunchKernelEx)
NO_EFFECT(cuLaunchCooperativeKernel)

API int cuFuncGetAttribute(int *value, int attribute) {
  enum { MAX_THREADS_PER_BLOCK = 0 };
  *value = attribute == MAX_THREADS_PER_BLOCK ? 1024 : 0;
  return SUCCESS;
}

API int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks) {
  *blocks = 1;
  return SUCCESS;
}
API int cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(blocks);
}

/* Linking PTX code, which nobody gets as far as. */
REFUSED(cuLinkCreate_v2)
REFUSED(cuLinkAddData_v2)
REFUSED(cuLinkComplete)

/* ---- graphs (XLA's command buffers): made, kept and launched without effect */

NEW_HANDLE(cuGraphCreate)
NEW_HANDLE(cuGraphAddKernelNode_v2)
NEW_HANDLE(cuGraphAddMemsetNode)
NEW_HANDLE(cuGraphAddMemcpyNode)
NEW_HANDLE(cuGraphAddChildGraphNode)
NEW_HANDLE(cuGraphAddEmptyNode)
NEW_HANDLE(cuGraphAddNode_v2)
NEW_HANDLE(cuGraphInstantiateWithFlags)
NEW_HANDLE(cuGraphClone)
FREE_HANDLE(cuGraphDestroy)
FREE_HANDLE(cuGraphExecDestroy)
NO_EFFECT(cuGraphExecKernelNodeSetParams_v2)
NO_EFFECT(cuGraphExecMemsetNodeSetParams)
NO_EFFECT(cuGraphExecMemcpyNodeSetParams)
NO_EFFECT(cuGraphExecChildGraphNodeSetParams)
NO_EFFECT(cuGraphExecNodeSetParams)
NO_EFFECT(cuGraphExecUpdate_v2)
NO_EFFECT(cuGraphAddDependencies)
NO_EFFECT(cuGraphAddDependencies_v2)
NO_EFFECT(cuGraphLaunch)
NO_EFFECT(cuDeviceGraphMemTrim)
NO_EFFECT(cuStreamBeginCaptureToGraph)
NO_EFFECT(cuStreamEndCapture)

static int no_nodes(size_t *count) {
  *count = 0;
  return SUCCESS;
}

API int cuGraphGetNodes(void *graph UNUSED, void **nodes UNUSED, size_t *count) { return no_nodes(count); }
API int cuGraphGetRootNodes(void *graph UNUSED, void **nodes UNUSED, size_t *count) { return no_nodes(count); }
API int cuGraphNodeGetDependencies(void *node UNUSED, void **nodes UNUSED, size_t *count) { return no_nodes(count); }
API int cuGraphNodeGetDependencies_v2(void *node UNUSED, void **nodes UNUSED, void *edges UNUSED, size_t *count) {
  return no_nodes(count);
}

API int cuGraphNodeGetType(void *node UNUSED, int *type) {
  enum { KERNEL = 0 };
  *type = KERNEL;
  return SUCCESS;
}

API int cuGraphConditionalHandleCreate(unsigned long long *handle) {
  *handle = 1;
  return SUCCESS;
}
