/* Stub libcuda.so.1, part four: virtual memory management, as TensorFlow takes memory from 2.22 on, JAX from 0.10
 * on, and PyTorch for expandable segments. Address space is reserved, physical memory is created, and the one is mapped to
 * the other. Creating it takes the GPU's memory, so that is what is counted and written down. */
#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <stdlib.h>
#include <sys/mman.h>

enum { GRANULARITY = 2 << 20, LOCATION_DEVICE = 1, LOCATION_HOST = 2 };

/* A piece of physical memory. It lives until it was released and is mapped nowhere. */
typedef struct {
  Bytes size;
  int device; /* -1: the host's memory */
  int references;
} Physical;

typedef struct Mapping {
  struct Mapping *next;
  DevicePointer start;
  Bytes size;
  Physical *physical;
} Mapping;

static Mapping *mappings;
static pthread_mutex_t mappings_lock = PTHREAD_MUTEX_INITIALIZER;

static void drop(Physical *physical) {
  if (--physical->references) return;
  if (physical->device >= 0) memory_give_back(physical->device, physical->size, "cuMemRelease");
  free(physical);
}

/* ---- physical memory. CUmemAllocationProp starts with type, requestedHandleTypes, location.type, location.id. */

API int cuMemGetAllocationGranularity(size_t *out, const int *properties UNUSED) {
  *out = GRANULARITY;
  return SUCCESS;
}

API int cuMemCreate(Physical **out, size_t size, const int *properties) {
  int device = properties[2] == LOCATION_DEVICE ? properties[3] : -1;
  int result = SUCCESS;
  if (!size || size % GRANULARITY) return INVALID_VALUE;
  if (!driver_ready()) return NOT_INITIALIZED;
  if (device >= 0 && !driver_has(device)) return INVALID_DEVICE;
  if (device >= 0) result = memory_take(device, size, "cuMemCreate");
  if (result) return result;
  *out = malloc(sizeof **out);
  if (!*out) abort();
  **out = (Physical){size, device, 1};
  return SUCCESS;
}

API int cuMemRelease(Physical *physical) {
  pthread_mutex_lock(&mappings_lock);
  drop(physical);
  pthread_mutex_unlock(&mappings_lock);
  return SUCCESS;
}

API int cuMemRetainAllocationHandle(Physical **out, DevicePointer address) {
  *out = NULL;
  pthread_mutex_lock(&mappings_lock);
  for (Mapping *mapping = mappings; mapping; mapping = mapping->next)
    if (address >= mapping->start && address < mapping->start + mapping->size) *out = mapping->physical;
  if (*out) (*out)->references++;
  pthread_mutex_unlock(&mappings_lock);
  return *out ? SUCCESS : INVALID_VALUE;
}

API int cuMemGetAllocationPropertiesFromHandle(int *properties, Physical *physical) {
  enum { PINNED = 1 };
  int on_device = physical->device >= 0;
  properties[0] = PINNED;
  properties[1] = 0;
  properties[2] = on_device ? LOCATION_DEVICE : LOCATION_HOST;
  properties[3] = on_device ? physical->device : 0;
  return SUCCESS;
}

/* No other process and no other device can have a part of it. */
REFUSED(cuMemExportToShareableHandle)
REFUSED(cuMemImportFromShareableHandle)
REFUSED(cuMulticastCreate)
REFUSED(cuMulticastAddDevice)
REFUSED(cuMulticastBindMem)
REFUSED(cuMulticastUnbind)

API int cuMulticastGetGranularity(size_t *out) {
  *out = GRANULARITY;
  return SUCCESS;
}

/* ---- address space. What is reserved beyond the boundaries stays so: address space costs nothing. */

API int cuMemAddressReserve(DevicePointer *out, size_t size, size_t alignment) {
  size_t boundary = alignment > GRANULARITY ? alignment : GRANULARITY;
  void *start = mmap(NULL, size + boundary, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return OUT_OF_MEMORY;
  *out = ((DevicePointer)start + boundary - 1) / boundary * boundary;
  return SUCCESS;
}

API int cuMemAddressFree(DevicePointer start, size_t size) {
  munmap((void *)start, size);
  return SUCCESS;
}

API int cuMemMap(DevicePointer start, size_t size, size_t offset UNUSED, Physical *physical) {
  Mapping *mapping;
  if (mprotect((void *)start, size, PROT_READ | PROT_WRITE)) return INVALID_VALUE;
  mapping = malloc(sizeof *mapping);
  if (!mapping) abort();
  pthread_mutex_lock(&mappings_lock);
  *mapping = (Mapping){mappings, start, size, physical};
  mappings = mapping;
  physical->references++;
  pthread_mutex_unlock(&mappings_lock);
  if (physical->device >= 0) memory_map(start, size, physical->device);
  return SUCCESS;
}

API int cuMemUnmap(DevicePointer start, size_t size) {
  pthread_mutex_lock(&mappings_lock);
  for (Mapping **at = &mappings; *at;) {
    Mapping *mapping = *at;
    if (mapping->start < start || mapping->start >= start + size) {
      at = &mapping->next;
      continue;
    }
    *at = mapping->next;
    if (mapping->physical->device >= 0) memory_unmap(mapping->start);
    drop(mapping->physical);
    free(mapping);
  }
  pthread_mutex_unlock(&mappings_lock);
  mmap((void *)start, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  return SUCCESS;
}

NO_EFFECT(cuMemSetAccess)

API int cuMemGetAccess(unsigned long long *flags) {
  enum { READ_WRITE = 3 };
  *flags = READ_WRITE;
  return SUCCESS;
}
