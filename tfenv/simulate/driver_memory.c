/* Stub libcuda.so.1, part two: memory. "Device memory" is host memory that the kernel commits only
 * where it is touched, so 80 GiB cost nothing. Copies are memcpy. Each allocation is written down. */
#define _GNU_SOURCE
#include "cgroups.h"
#include "driver.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

/* ---- the allocations of this process */

typedef struct Block {
  struct Block *next;
  DevicePointer start;
  Bytes size;
  int device;
  int mapped; /* physical memory of driver_virtual.c, which is counted there */
  int managed;
} Block;

static Block *blocks;
static Bytes used[MAX_GPUS];     /* by CUDA ordinal */
static Bytes contexts[MAX_GPUS]; /* what this process's contexts take, likewise */
static pthread_mutex_t memory_lock = PTHREAD_MUTEX_INITIALIZER;

/* What everybody but this process holds in one place. */
typedef struct {
  int place;
  Bytes simulated; /* by other processes in the log */
  Bytes listed;    /* by other users' processes from the list */
  Bytes beside;    /* by other processes in the log in other MIG instances of the same GPU */
} Others;

static void add_holding(void *context, const Holding *holding) {
  Others *others = context;
  int here = holding->place == others->place;
  if (machine_gpu_of(holding->place) != machine_gpu_of(others->place) || holding->bytes <= 0) return;
  if (holding->listed) others->listed += here ? (Bytes)holding->bytes : 0;
  else if (holding->pid != getpid()) *(here ? &others->simulated : &others->beside) += (Bytes)holding->bytes;
}

static Others others_on(int device) {
  Others others = {.place = driver_place(device)};
  machine_each_holding(add_holding, &others);
  return others;
}

/* Returns what all simulated processes hold on the GPU, in whatever instance of it. */
static Bytes held_on(int device, const Others *others) {
  return used[device] + contexts[device] + others->simulated + others->beside;
}

static Bytes free_on(int device, const Others *others) {
  Bytes total = machine_usable(driver_place(device));
  Bytes taken = used[device] + contexts[device] + others->simulated + others->listed;
  return taken < total ? total - taken : 0;
}

/* Tells whether the card has so much left, and every limit for a cgroup that this process is in. */
static int fits(Bytes size, int device, const Others *others) {
  return size <= free_on(device, others) && size <= cgroups_room(others->place, driver_cgroups());
}

/* Reserves `size` bytes of address space. Returns 0 when the host cannot. */
static DevicePointer reserve(Bytes size) {
  void *start = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return start == MAP_FAILED ? 0 : (DevicePointer)start;
}

static void add_block(DevicePointer start, Bytes size, int device, int mapped, int managed) {
  Block *block = malloc(sizeof *block);
  if (!block) abort();
  *block = (Block){blocks, start, size, device, mapped, managed};
  blocks = block;
}

static int allocate(DevicePointer *out, Bytes size, int device, const char *call, int managed) {
  Others others;
  DevicePointer start = 0;
  int log;
  if (!size || !driver_has(device)) return INVALID_VALUE;
  pthread_mutex_lock(&memory_lock);
  log = log_open();
  others = others_on(device);
  if (managed || fits(size, device, &others)) /* managed memory may exceed the GPU's */
    start = reserve(size);
  if (start) {
    add_block(start, size, device, 0, managed);
    used[device] += size;
  }
  log_write(log, start ? "alloc" : "oom", driver_place(device), size, held_on(device, &others), call);
  log_close(log);
  pthread_mutex_unlock(&memory_lock);
  if (!start) return OUT_OF_MEMORY;
  *out = start;
  return SUCCESS;
}

/* Takes memory of a device that no address leads to, and writes it down. */
static int take(Bytes *account, int device, Bytes size, const char *operation, const char *call) {
  Others others;
  int log, taken;
  pthread_mutex_lock(&memory_lock);
  log = log_open();
  others = others_on(device);
  taken = fits(size, device, &others);
  if (taken) *account += size;
  log_write(log, taken ? operation : "oom", driver_place(device), size, held_on(device, &others), call);
  log_close(log);
  pthread_mutex_unlock(&memory_lock);
  return taken ? SUCCESS : OUT_OF_MEMORY;
}

static void give_back(Bytes *account, int device, Bytes size, const char *operation, const char *call) {
  Others others;
  int log;
  pthread_mutex_lock(&memory_lock);
  *account -= size;
  log = log_open();
  others = others_on(device);
  log_write(log, operation, driver_place(device), size, held_on(device, &others), call);
  log_close(log);
  pthread_mutex_unlock(&memory_lock);
}

int memory_open_context(int device) {
  Bytes cost = machine_context(driver_place(device));
  return cost ? take(&contexts[device], device, cost, "context", "cuDevicePrimaryCtxRetain") : SUCCESS;
}

void memory_close_context(int device) {
  Bytes cost = contexts[device];
  if (cost) give_back(&contexts[device], device, cost, "closed", "cuDevicePrimaryCtxRelease");
}

int memory_take(int device, Bytes size, const char *call) { return take(&used[device], device, size, "alloc", call); }

void memory_give_back(int device, Bytes size, const char *call) {
  give_back(&used[device], device, size, "free", call);
}

void memory_map(DevicePointer start, Bytes size, int device) {
  pthread_mutex_lock(&memory_lock);
  add_block(start, size, device, 1, 0);
  pthread_mutex_unlock(&memory_lock);
}

/* Takes the block that starts at `start` out of the list. Returns NULL when there is none of that kind. */
static Block *take_block(DevicePointer start, int mapped) {
  for (Block **at = &blocks; *at; at = &(*at)->next)
    if ((*at)->start == start && (*at)->mapped == mapped) {
      Block *block = *at;
      *at = block->next;
      return block;
    }
  return NULL;
}

static int release(DevicePointer start, const char *call) {
  Block *block;
  Others others;
  int log;
  if (!driver_ready()) return NOT_INITIALIZED;
  if (!start) return SUCCESS;
  pthread_mutex_lock(&memory_lock);
  block = take_block(start, 0);
  if (block) {
    used[block->device] -= block->size;
    log = log_open();
    others = others_on(block->device);
    log_write(log, "free", driver_place(block->device), block->size, held_on(block->device, &others),
              block->managed ? MANAGED_FREE : call);
    log_close(log);
    munmap((void *)start, block->size);
    free(block);
  }
  pthread_mutex_unlock(&memory_lock);
  return block ? SUCCESS : INVALID_VALUE;
}

void memory_unmap(DevicePointer start) {
  pthread_mutex_lock(&memory_lock);
  free(take_block(start, 1));
  pthread_mutex_unlock(&memory_lock);
}

/* Returns the block around an address. Its size is 0 when there is none. */
static Block block_around(DevicePointer address) {
  Block found = {0};
  pthread_mutex_lock(&memory_lock);
  for (Block *block = blocks; block; block = block->next)
    if (address >= block->start && address < block->start + block->size) found = *block;
  pthread_mutex_unlock(&memory_lock);
  return found;
}

/* ---- allocate and free */

/* Where this process's own cgroup has a limit, that is the total. */
API int cuMemGetInfo_v2(size_t *available, size_t *total) {
  Others others;
  Bytes limit, room;
  if (!driver_current()) return INVALID_CONTEXT;
  others = others_on(driver_current()->device);
  limit = cgroups_reported(others.place, driver_cgroups());
  room = limit == UNLIMITED ? limit : cgroups_room(others.place, driver_cgroups());
  *total = machine_usable(others.place);
  if (limit < *total) *total = limit;
  pthread_mutex_lock(&memory_lock);
  *available = free_on(driver_current()->device, &others);
  pthread_mutex_unlock(&memory_lock);
  if (room < *available) *available = room;
  return SUCCESS;
}

API int cuMemAlloc_v2(DevicePointer *out, size_t size) {
  if (!driver_current()) return INVALID_CONTEXT;
  return allocate(out, size, driver_current()->device, "cuMemAlloc", 0);
}

API int cuMemAllocManaged(DevicePointer *out, size_t size) {
  if (!driver_current()) return INVALID_CONTEXT;
  return allocate(out, size, driver_current()->device, MANAGED_ALLOC, 1);
}

API int cuMemFree_v2(DevicePointer start) { return release(start, "cuMemFree"); }

API int cuMemHostAlloc(void **out, size_t size) {
  return posix_memalign(out, 4096, size) ? OUT_OF_MEMORY : SUCCESS;
}

API int cuMemFreeHost(void *start) {
  free(start);
  return SUCCESS;
}

NO_EFFECT(cuMemHostRegister_v2)
NO_EFFECT(cuMemHostUnregister)

API int cuMemHostGetDevicePointer_v2(DevicePointer *out, void *host) {
  *out = (DevicePointer)host;
  return SUCCESS;
}

API int cuMemGetAddressRange_v2(DevicePointer *start, size_t *size, DevicePointer address) {
  Block block = block_around(address);
  if (!block.size) return NOT_FOUND;
  if (start) *start = block.start;
  if (size) *size = block.size;
  return SUCCESS;
}

API int cuPointerGetAttribute(void *out, int attribute, DevicePointer address) {
  enum {
    CONTEXT = 1, MEMORY_TYPE = 2, DEVICE_POINTER = 3, IS_MANAGED = 8, DEVICE_ORDINAL = 9,
    RANGE_START = 11, RANGE_SIZE = 12
  };
  enum { MEMORY_TYPE_DEVICE = 2 };
  Block block = block_around(address);
  if (!block.size) return INVALID_VALUE;
  switch (attribute) {
    case CONTEXT: *(Context **)out = driver_context(block.device); return SUCCESS;
    case MEMORY_TYPE: *(unsigned *)out = MEMORY_TYPE_DEVICE; return SUCCESS;
    case DEVICE_POINTER: *(DevicePointer *)out = address; return SUCCESS;
    case IS_MANAGED: *(unsigned *)out = 0; return SUCCESS;
    case DEVICE_ORDINAL: *(int *)out = block.device; return SUCCESS;
    case RANGE_START: *(DevicePointer *)out = block.start; return SUCCESS;
    case RANGE_SIZE: *(size_t *)out = block.size; return SUCCESS;
    default: return INVALID_VALUE;
  }
}

/* ---- copy and fill: at once, whatever stream is named */

static int copy(DevicePointer to, DevicePointer from, size_t size) {
  memmove((void *)to, (const void *)from, size);
  return SUCCESS;
}

API int cuMemcpyHtoD_v2(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyDtoH_v2(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyDtoD_v2(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyHtoDAsync_v2(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyDtoHAsync_v2(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyDtoDAsync_v2(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyAsync(DevicePointer to, DevicePointer from, size_t size) { return copy(to, from, size); }
API int cuMemcpyPeerAsync(DevicePointer to, Context *to_context UNUSED, DevicePointer from,
                          Context *from_context UNUSED, size_t size) {
  return copy(to, from, size);
}

API int cuMemsetD8_v2(DevicePointer start, unsigned char value, size_t count) {
  memset((void *)start, value, count);
  return SUCCESS;
}

API int cuMemsetD32_v2(DevicePointer start, unsigned value, size_t count) {
  unsigned *words = (unsigned *)start;
  for (size_t i = 0; i < count; i++) words[i] = value;
  return SUCCESS;
}

API int cuMemsetD8Async(DevicePointer start, unsigned char value, size_t count) {
  return cuMemsetD8_v2(start, value, count);
}

API int cuMemsetD32Async(DevicePointer start, unsigned value, size_t count) {
  return cuMemsetD32_v2(start, value, count);
}

/* ---- stream-ordered pools (TF_GPU_ALLOCATOR=cuda_malloc_async). A device has one pool */

struct Pool {
  int device;
  Bytes threshold; /* what it may keep when memory is freed */
};

static Pool pools[MAX_GPUS];

static int pool_of(Pool **out, int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  pools[device].device = device;
  *out = &pools[device];
  return SUCCESS;
}

API int cuDeviceGetDefaultMemPool(Pool **out, int device) { return pool_of(out, device); }
API int cuDeviceGetMemPool(Pool **out, int device) { return pool_of(out, device); }
API int cuDeviceSetMemPool(int device, Pool *pool UNUSED) { return driver_has(device) ? SUCCESS : INVALID_DEVICE; }

/* CUmemPoolProps starts with allocType, handleTypes, location.type, location.id. */
API int cuMemPoolCreate(Pool **out, const int *properties) { return pool_of(out, properties[3]); }
NO_EFFECT(cuMemPoolDestroy)
NO_EFFECT(cuMemPoolSetAccess)
NO_EFFECT(cuMemPoolTrimTo)

enum { RELEASE_THRESHOLD = 4, RESERVED_NOW = 5, RESERVED_MOST = 6, USED_NOW = 7, USED_MOST = 8 };

API int cuMemPoolSetAttribute(Pool *pool, int attribute, void *value) {
  int log;
  if (attribute != RELEASE_THRESHOLD) return SUCCESS;
  pool->threshold = *(Bytes *)value;
  log = log_open();
  log_write(log, "threshold", driver_place(pool->device), pool->threshold, 0, "cuMemPoolSetAttribute");
  log_close(log);
  return SUCCESS;
}

API int cuMemPoolGetAttribute(Pool *pool, int attribute, void *value) {
  switch (attribute) {
    case RELEASE_THRESHOLD: *(Bytes *)value = pool->threshold; return SUCCESS;
    case RESERVED_NOW:
    case RESERVED_MOST:
    case USED_NOW:
    case USED_MOST: *(Bytes *)value = used[pool->device]; return SUCCESS;
    default: *(int *)value = 1; return SUCCESS; /* how blocks are reused: all ways allowed */
  }
}

API int cuMemAllocFromPoolAsync(DevicePointer *out, size_t size, Pool *pool) {
  return allocate(out, size, pool->device, "cuMemAllocFromPoolAsync", 0);
}

API int cuMemAllocAsync(DevicePointer *out, size_t size) {
  if (!driver_current()) return INVALID_CONTEXT;
  return allocate(out, size, driver_current()->device, "cuMemAllocAsync", 0);
}

API int cuMemFreeAsync(DevicePointer start) { return release(start, "cuMemFreeAsync"); }
