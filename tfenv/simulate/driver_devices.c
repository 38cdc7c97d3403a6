/* Stub libcuda.so.1, part one: initialisation, which GPUs are visible, their attributes, contexts
 * and the names of errors. */
#define _GNU_SOURCE
#include "driver.h"

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int initialised_by; /* process id, or 0: not yet */
static int device_count;
static int place_of[MAX_GPUS]; /* CUDA ordinal -> GPU of the machine, or MIG instance */
static Context contexts[MAX_GPUS];
static CgroupChain cgroups;
static __thread Context *current;
static pthread_mutex_t init_lock = PTHREAD_MUTEX_INITIALIZER;

/* CUDA does not survive fork(): a child of a process that opened it gets NOT_INITIALIZED. */
int driver_ready(void) { return initialised_by && initialised_by == getpid(); }
int driver_has(int device) { return driver_ready() && device >= 0 && device < device_count; }
int driver_place(int device) { return place_of[device]; }
const CgroupChain *driver_cgroups(void) { return &cgroups; }
Context *driver_context(int device) { return &contexts[device]; }
Context *driver_current(void) { return current; }
int driver_new_handle(void **out) {
  *out = calloc(1, 64);
  return *out ? SUCCESS : OUT_OF_MEMORY;
}

/* ---- CUDA_VISIBLE_DEVICES: numbers, or beginnings of UUIDs. The first bad entry ends the list */

static const int NO_PLACE = -1;

/* Returns what CUDA shows of a GPU: all of it or, where it is split, its first MIG instance. */
static int shown_of(int gpu) { return machine_instances(gpu) ? machine_instance_place(gpu, 0) : gpu; }

static int is_faster(int gpu, int other) {
  int major[2], minor[2];
  machine_capability(gpu, &major[0], &minor[0]);
  machine_capability(other, &major[1], &minor[1]);
  if (major[0] != major[1]) return major[0] > major[1];
  if (minor[0] != minor[1]) return minor[0] > minor[1];
  if (machine_multiprocessors(gpu) != machine_multiprocessors(other))
    return machine_multiprocessors(gpu) > machine_multiprocessors(other);
  return machine_memory(gpu) > machine_memory(other);
}

/* CUDA counts the fastest first, and by PCI bus only if it is told to. Which is faster NVIDIA does not say in
 * full. Here it is the one of the newer generation, with more multiprocessors, with more memory. Equals stay as NVML
 * has them. */
static int gpu_by_number(int number) {
  const char *order = getenv("CUDA_DEVICE_ORDER");
  int ordered[MAX_GPUS], count = 0;
  if (order && !strcmp(order, "PCI_BUS_ID")) return number;
  for (int gpu = 0; gpu < machine_gpus(); gpu++) {
    int place = count++;
    for (; place > 0 && is_faster(gpu, ordered[place - 1]); place--) ordered[place] = ordered[place - 1];
    ordered[place] = gpu;
  }
  return ordered[number];
}

/* The driver ignores what follows a number: "0 " and "0x0" are 0. */
static int place_by_number(const char *token) {
  char *end;
  long number = strtol(token, &end, 10);
  return end == token || number < 0 || number >= machine_gpus() ? NO_PLACE : shown_of(gpu_by_number((int)number));
}

static int begins_with(int place, const char *beginning) {
  char uuid[UUID_TEXT];
  machine_uuid_text(place, uuid);
  return !strncasecmp(uuid, beginning, strlen(beginning));
}

/* The prefix alone names no GPU, not even where there is one. */
static int place_by_uuid(const char *beginning) {
  int found = NO_PLACE;
  if (!beginning[strlen("GPU-")]) return NO_PLACE;
  for (int place = 0; place < MAX_PLACES; place++) {
    if (!machine_has(place) || !begins_with(place, beginning)) continue;
    if (found >= 0) return NO_PLACE; /* it fits more than one */
    found = place < MAX_GPUS ? shown_of(place) : place;
  }
  return found;
}

/* Finds "MIG-GPU-<UUID>/<GPU instance>/<compute instance>", as drivers before R470 named them. */
static int place_by_old_name(const char *token) {
  char uuid[UUID_TEXT];
  int gpu_instance, compute_instance, place;
  if (sscanf(token, "%40[^/]/%d/%d", uuid, &gpu_instance, &compute_instance) != 3 || compute_instance) return NO_PLACE;
  for (int gpu = 0; gpu < machine_gpus(); gpu++) {
    place = machine_instance_place(gpu, gpu_instance - 1);
    if (begins_with(gpu, uuid) && gpu_instance > 0 && gpu_instance <= machine_instances(gpu)) return place;
  }
  return NO_PLACE;
}

static int is_uuid(const char *token) { return !strncmp(token, "GPU-", 4) || !strncmp(token, "MIG-", 4); }

static const char *skip_blanks(const char *token) { return token + strspn(token, " "); }

/* A list is of UUIDs or of numbers, as its first entry is. An entry of the other kind ends it. */
static int place_by_token(const char *token, int by_uuid) {
  token = skip_blanks(token);
  if (!by_uuid) return place_by_number(token);
  if (!strncmp(token, "MIG-GPU-", 8)) return place_by_old_name(token + 4);
  return is_uuid(token) ? place_by_uuid(token) : NO_PLACE;
}

static int is_selected(int place) {
  for (int device = 0; device < device_count; device++)
    if (place_of[device] == place) return 1;
  return 0;
}

/* Returns INVALID_DEVICE, and selects nothing, where a GPU is named twice. */
static int select_listed(char *list) {
  int by_uuid = is_uuid(skip_blanks(list));
  char *token;
  while ((token = strsep(&list, ",")) && device_count < MAX_GPUS) {
    int place = place_by_token(token, by_uuid);
    if (place == NO_PLACE) break;
    if (is_selected(place)) {
      device_count = 0;
      return INVALID_DEVICE;
    }
    place_of[device_count++] = place;
  }
  return device_count ? SUCCESS : NO_DEVICE;
}

/* NVIDIA's MIG guide: CUDA enumerates a single instance, and no whole GPU beside it. */
static void keep_one_instance(void) {
  for (int device = 0; device < device_count; device++)
    if (machine_instance_of(place_of[device]) >= 0) {
      place_of[0] = place_of[device];
      device_count = 1;
    }
}

static int select_devices(void) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  int result;
  device_count = 0;
  if (visible) {
    char *list = strdup(visible);
    result = select_listed(list);
    free(list);
  } else {
    while (device_count < machine_gpus()) {
      place_of[device_count] = shown_of(gpu_by_number(device_count));
      device_count++;
    }
    result = device_count ? SUCCESS : NO_DEVICE;
  }
  keep_one_instance();
  return result;
}

static int initialise(void) {
  int log, result;
  if (driver_ready()) return SUCCESS;
  result = initialised_by ? NOT_INITIALIZED : select_devices(); /* the former in a child of who opened it */
  log = log_open();
  log_write(log, "cuInit", -1, initialised_by ? 0 : (Bytes)device_count, 0, "cuInit");
  if (!result && cgroups_backend(0) != NO_BACKEND) {
    cgroups = cgroups_own_chain();
    cgroups_join(log, &cgroups);
  }
  log_close(log);
  if (result) return result;
  for (int device = 0; device < device_count; device++) contexts[device].device = device;
  initialised_by = getpid();
  return SUCCESS;
}

API int cuInit(unsigned flags UNUSED) {
  int result;
  pthread_mutex_lock(&init_lock);
  result = initialise();
  pthread_mutex_unlock(&init_lock);
  return result;
}

API int cuDriverGetVersion(int *version) {
  *version = machine_driver_version();
  return SUCCESS;
}

/* ---- devices */

API int cuDeviceGetCount(int *count) {
  if (!driver_ready()) return NOT_INITIALIZED;
  *count = device_count;
  return SUCCESS;
}

API int cuDeviceGet(int *device, int ordinal) {
  if (!driver_ready()) return NOT_INITIALIZED;
  if (!driver_has(ordinal)) return INVALID_DEVICE;
  *device = ordinal;
  return SUCCESS;
}

API int cuDeviceGetName(char *out, int room, int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  machine_name(place_of[device], out, (size_t)room);
  return SUCCESS;
}

/* The first version gives a MIG instance the UUID of its whole GPU. */
API int cuDeviceGetUuid(unsigned char *out, int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  machine_uuid(machine_gpu_of(place_of[device]), out);
  return machine_error("uuid_error", machine_gpu_of(place_of[device]));
}

API int cuDeviceGetUuid_v2(unsigned char *out, int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  machine_uuid(place_of[device], out);
  return machine_error("uuid_error", machine_gpu_of(place_of[device]));
}

API int cuDeviceTotalMem_v2(size_t *bytes, int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  *bytes = machine_usable(place_of[device]);
  return SUCCESS;
}

API int cuDeviceGetPCIBusId(char *out, int room, int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  snprintf(out, (size_t)room, "0000:%02X:00.0", (unsigned)machine_pci_bus(place_of[device]));
  return SUCCESS;
}

API int cuDeviceCanAccessPeer(int *can, int one, int other) {
  *can = driver_has(one) && driver_has(other) && one != other;
  return SUCCESS;
}

API int cuDeviceGetP2PAttribute(int *value, int attribute, int one, int other) {
  enum { ACCESS_SUPPORTED = 2 };
  *value = attribute == ACCESS_SUPPORTED && one != other;
  return SUCCESS;
}

/* Attributes by their number in CUdevice_attribute: those of an A100, where TensorFlow looks. */
enum {
  MULTIPROCESSOR_COUNT = 16,
  PCI_BUS_ID = 33,
  CAPABILITY_MAJOR = 75,
  CAPABILITY_MINOR = 76
};
static const struct {
  int attribute, value;
} attributes[] = {
    {1, 1024},       /* max threads per block */
    {2, 1024},       /* max block dimension x */
    {3, 1024},       /* y */
    {4, 64},         /* z */
    {5, 0x7fffffff}, /* max grid dimension x */
    {6, 65535},      /* y */
    {7, 65535},      /* z */
    {8, 49152},      /* max shared memory per block, bytes */
    {9, 65536},      /* total constant memory, bytes */
    {10, 32},        /* warp size */
    {11, 0x7fffffff}, /* max pitch, bytes */
    {12, 65536},     /* max registers per block */
    {13, 1410000},   /* clock rate, kHz */
    {14, 512},       /* texture alignment, bytes */
    {15, 1},         /* copies and kernels overlap */
    {19, 1},         /* can map host memory */
    {31, 1},         /* concurrent kernels */
    {36, 1215000},   /* memory clock rate, kHz */
    {37, 5120},      /* memory bus width, bits */
    {38, 41943040},  /* L2 cache, bytes */
    {39, 2048},      /* max threads per multiprocessor */
    {40, 3},         /* asynchronous engines */
    {41, 1},         /* unified addressing */
    {81, 167936},    /* max shared memory per multiprocessor, bytes */
    {82, 65536},     /* max registers per multiprocessor */
    {83, 1},         /* managed memory */
    {95, 1},         /* cooperative launches */
    {97, 166912},    /* max shared memory per block, opted in, bytes */
    {102, 1},        /* virtual memory management: driver_virtual.c */
    {106, 32},       /* max blocks per multiprocessor */
    {111, 1024},     /* reserved shared memory per block, bytes */
    {115, 1},        /* memory pools */
    {119, 1},        /* memory pools between processes */
    {122, 1},        /* streams write words of 64 bits and wait for them, */
    {123, 1},        /* also for a NOR of one */
};

API int cuDeviceGetAttribute(int *value, int attribute, int device) {
  int major, minor;
  if (!driver_has(device)) return INVALID_DEVICE;
  machine_capability(place_of[device], &major, &minor);
  *value = 0;
  for (size_t i = 0; i < sizeof attributes / sizeof *attributes; i++)
    if (attributes[i].attribute == attribute) *value = attributes[i].value;
  if (attribute == MULTIPROCESSOR_COUNT) *value = machine_multiprocessors(place_of[device]);
  if (attribute == PCI_BUS_ID) *value = machine_pci_bus(place_of[device]);
  if (attribute == CAPABILITY_MAJOR) *value = major;
  if (attribute == CAPABILITY_MINOR) *value = minor;
  return SUCCESS;
}

/* ---- contexts: TensorFlow uses each device's primary context and makes it current by thread */

static pthread_mutex_t contexts_lock = PTHREAD_MUTEX_INITIALIZER;

/* The first to want it makes it, the last to leave it destroys it. Only then memory is taken and given back. */
API int cuDevicePrimaryCtxRetain(Context **out, int device) {
  int result = SUCCESS;
  if (!driver_ready()) return NOT_INITIALIZED;
  if (!driver_has(device)) return INVALID_DEVICE;
  pthread_mutex_lock(&contexts_lock);
  if (!contexts[device].retained) result = memory_open_context(device);
  if (!result) contexts[device].retained++;
  pthread_mutex_unlock(&contexts_lock);
  *out = &contexts[device];
  return result;
}

API int cuDevicePrimaryCtxRelease_v2(int device) {
  if (!driver_has(device)) return INVALID_DEVICE;
  pthread_mutex_lock(&contexts_lock);
  if (contexts[device].retained && !--contexts[device].retained) memory_close_context(device);
  pthread_mutex_unlock(&contexts_lock);
  return SUCCESS;
}

/* A context of a program's own is the device's primary one. */
API int cuCtxCreate_v2(Context **out, unsigned flags UNUSED, int device) {
  int result = cuDevicePrimaryCtxRetain(out, device);
  if (!result) current = *out;
  return result;
}

API int cuCtxDestroy_v2(Context *context) {
  if (!driver_ready() || !context) return INVALID_CONTEXT;
  if (current == context) current = NULL;
  return cuDevicePrimaryCtxRelease_v2(context->device);
}

API int cuDevicePrimaryCtxSetFlags_v2(int device, unsigned flags) {
  if (!driver_has(device)) return INVALID_DEVICE;
  contexts[device].flags = flags;
  return SUCCESS;
}

API int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
  if (!driver_has(device)) return INVALID_DEVICE;
  *flags = contexts[device].flags;
  *active = contexts[device].retained > 0;
  return SUCCESS;
}

API int cuCtxSetCurrent(Context *context) {
  if (!driver_ready()) return NOT_INITIALIZED;
  current = context;
  return SUCCESS;
}

API int cuCtxGetCurrent(Context **out) {
  *out = current;
  return SUCCESS;
}

API int cuCtxPushCurrent_v2(Context *context) {
  current = context;
  return SUCCESS;
}

API int cuCtxPopCurrent_v2(Context **out) {
  *out = current;
  current = NULL;
  return SUCCESS;
}

API int cuCtxGetDevice(int *device) {
  if (!current) return INVALID_CONTEXT;
  *device = current->device;
  return SUCCESS;
}

API int cuCtxGetId(Context *context, unsigned long long *id) {
  *id = (size_t)(context ? context : current);
  return SUCCESS;
}

API int cuCtxSynchronize(void) { return driver_ready() ? SUCCESS : NOT_INITIALIZED; }
NO_EFFECT(cuCtxEnablePeerAccess)

/* Contexts with a part of a GPU's multiprocessors. PyTorch wants to find these functions before it uses any other. */
REFUSED(cuGreenCtxCreate)
REFUSED(cuGreenCtxDestroy)
REFUSED(cuGreenCtxStreamCreate)
REFUSED(cuCtxFromGreenCtx)
REFUSED(cuDeviceGetDevResource)
REFUSED(cuDevResourceGenerateDesc)
REFUSED(cuDevSmResourceSplitByCount)

API int cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return SUCCESS;
}

/* ---- errors */

NO_EFFECT(cuLogsRegisterCallback)
NO_EFFECT(cuLogsUnregisterCallback)

static const struct {
  Result result;
  const char *name, *text;
} errors[] = {
    {SUCCESS, "CUDA_SUCCESS", "no error"},
    {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE", "invalid argument"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY", "out of memory"},
    {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED", "initialization error"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE", "no CUDA-capable device is detected"},
    {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE", "invalid device ordinal"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT", "invalid device context"},
    {NOT_FOUND, "CUDA_ERROR_NOT_FOUND", "named symbol not found"},
    {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED", "operation not supported"},
};

API int cuGetErrorName(int result, const char **out) {
  *out = "CUDA_ERROR_UNKNOWN";
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if ((int)errors[i].result == result) *out = errors[i].name;
  return SUCCESS;
}

API int cuGetErrorString(int result, const char **out) {
  *out = "unknown error";
  for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
    if ((int)errors[i].result == result) *out = errors[i].text;
  return SUCCESS;
}
