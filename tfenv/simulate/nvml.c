/* Stub libnvidia-ml.so.1: what nvidia-ml-py and TensorFlow ask NVML about the simulated GPUs. NVML
 * sees every GPU, whatever CUDA_VISIBLE_DEVICES says. Memory in use is what live processes in the log
 * hold and what the list of other users' processes says. */
#define _GNU_SOURCE
#include "cgroups.h"

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum {
  SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NO_PERMISSION = 4, NOT_FOUND = 6,
  INSUFFICIENT_SIZE = 7, DRIVER_NOT_LOADED = 9, FUNCTION_NOT_FOUND = 13, GPU_IS_LOST = 15, VERSION_MISMATCH = 18
};

typedef struct {
  Bytes total, free, used;
} Memory;
typedef struct {
  unsigned version;
  Bytes total, reserved, free, used;
} Memory2;
typedef struct {
  unsigned pid;
  Bytes bytes;
  unsigned gpu_instance, compute_instance;
} Process;
typedef struct {
  unsigned pid;
  Bytes bytes;
} Process1;
typedef struct {
  char legacy_bus_id[16];
  unsigned domain, bus, device, device_id, subsystem_id;
  char bus_id[32];
} PciInfo;

static int users; /* nvmlInit calls less nvmlShutdown calls */

/* A handle is the place's number plus one, so that NULL is none. */
static int place_of(void *handle) { return (int)(intptr_t)handle - 1; }
static void *handle_of(int place) { return (void *)((intptr_t)place + 1); }
static int gpu_of(void *handle) { return machine_gpu_of(place_of(handle)); }
static int instance_of(void *handle) { return machine_instance_of(place_of(handle)); }

static int check(void *handle) {
  if (!users) return UNINITIALIZED;
  return machine_has(place_of(handle)) ? machine_error("error", gpu_of(handle)) : INVALID_ARGUMENT;
}

static int copy_text(char *out, unsigned room, const char *text) {
  if (!users) return UNINITIALIZED;
  if (room <= strlen(text)) return INSUFFICIENT_SIZE;
  strcpy(out, text);
  return SUCCESS;
}

/* A function that answers one number about a GPU. */
#define NUMBER(name, value)                       \
  API int name(void *handle, unsigned *out) {     \
    int result = check(handle);                   \
    if (!result) *out = (unsigned)(value);        \
    return result;                                \
  }
#define UNSUPPORTED(name)                         \
  API int name(void *handle) {                    \
    int result = check(handle);                   \
    return result ? result : NOT_SUPPORTED;       \
  }

/* ---- the library */

API int nvmlInit_v2(void) {
  int error = machine_error("init_error", 0);
  if (error) return error;
  users++;
  return SUCCESS;
}
API int nvmlInit(void) { return nvmlInit_v2(); }
API int nvmlInitWithFlags(void) { return nvmlInit_v2(); }

API int nvmlShutdown(void) {
  if (!users) return UNINITIALIZED;
  users--;
  return SUCCESS;
}

API const char *nvmlErrorString(int result) {
  switch (result) {
    case SUCCESS: return "Success";
    case UNINITIALIZED: return "Uninitialized";
    case INVALID_ARGUMENT: return "Invalid Argument";
    case NOT_SUPPORTED: return "Not Supported";
    case NO_PERMISSION: return "Insufficient Permissions";
    case NOT_FOUND: return "Not Found";
    case INSUFFICIENT_SIZE: return "Insufficient Size";
    case DRIVER_NOT_LOADED: return "Driver Not Loaded";
    case FUNCTION_NOT_FOUND: return "Function Not Found";
    case GPU_IS_LOST: return "GPU is lost";
    case VERSION_MISMATCH: return "Driver/library version mismatch";
    default: return "Unknown Error";
  }
}

API int nvmlSystemGetDriverVersion(char *out, unsigned room) {
  char release[SETTING_TEXT];
  machine_driver_release(release, sizeof release);
  return copy_text(out, room, release);
}

/* The version of CUDA, and the driver's release. */
API int nvmlSystemGetNVMLVersion(char *out, unsigned room) {
  char release[SETTING_TEXT], version[SETTING_TEXT + 3];
  machine_driver_release(release, sizeof release);
  snprintf(version, sizeof version, "13.%s", release);
  return copy_text(out, room, version);
}

API int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  *version = machine_driver_version();
  return SUCCESS;
}
API int nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }

API int nvmlSystemGetProcessName(unsigned pid, char *out, unsigned room) {
  char text[64];
  FILE *name;
  snprintf(text, sizeof text, "/proc/%u/comm", pid);
  name = fopen(text, "re");
  snprintf(text, sizeof text, "process-%u", pid); /* a listed process need not exist */
  if (name) {
    if (fgets(text, sizeof text, name)) text[strcspn(text, "\n")] = '\0';
    fclose(name);
  }
  return copy_text(out, room, text);
}

/* ---- finding a GPU */

API int nvmlDeviceGetCount_v2(unsigned *count) {
  if (!users) return UNINITIALIZED;
  *count = (unsigned)machine_gpus();
  return SUCCESS;
}

API int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  *handle = handle_of((int)index);
  return users && index >= (unsigned)machine_gpus() ? INVALID_ARGUMENT : check(*handle);
}

API int nvmlDeviceGetHandleByUUID(const char *wanted, void **handle) {
  char uuid[UUID_TEXT];
  if (!users) return UNINITIALIZED;
  for (int place = 0; place < MAX_PLACES; place++) {
    if (!machine_has(place)) continue;
    machine_uuid_text(place, uuid);
    *handle = handle_of(place);
    if (!strcasecmp(uuid, wanted)) return SUCCESS;
  }
  return NOT_FOUND;
}

/* "0000:01:00.0" or "00000000:01:00.0" */
API int nvmlDeviceGetHandleByPciBusId_v2(const char *id, void **handle) {
  const char *colon = strchr(id, ':');
  unsigned long bus = colon ? strtoul(colon + 1, NULL, 16) : 0;
  if (!users) return UNINITIALIZED;
  for (int gpu = 0; gpu < machine_gpus(); gpu++)
    if ((unsigned long)machine_pci_bus(gpu) == bus) return nvmlDeviceGetHandleByIndex_v2((unsigned)gpu, handle);
  return NOT_FOUND;
}
API int nvmlDeviceGetHandleByPciBusId(const char *id, void **handle) {
  return nvmlDeviceGetHandleByPciBusId_v2(id, handle);
}

/* ---- what a GPU is */

NUMBER(nvmlDeviceGetIndex, instance_of(handle) < 0 ? gpu_of(handle) : instance_of(handle))
NUMBER(nvmlDeviceGetMinorNumber, gpu_of(handle))
NUMBER(nvmlDeviceGetCurrPcieLinkGeneration, 4)
NUMBER(nvmlDeviceGetCurrPcieLinkWidth, 16)
UNSUPPORTED(nvmlDeviceGetNvLinkState)
UNSUPPORTED(nvmlDeviceGetNvLinkRemoteDeviceType)
UNSUPPORTED(nvmlDeviceGetNvLinkRemotePciInfo_v2)
UNSUPPORTED(nvmlDeviceGetGpuFabricInfoV)

API int nvmlDeviceGetName(void *handle, char *out, unsigned room) {
  char name[SETTING_TEXT];
  int result = check(handle);
  if (result) return result;
  machine_name(place_of(handle), name, sizeof name);
  return copy_text(out, room, name);
}

API int nvmlDeviceGetUUID(void *handle, char *out, unsigned room) {
  char uuid[UUID_TEXT];
  int result = check(handle);
  if (result) return result;
  machine_uuid_text(place_of(handle), uuid);
  return copy_text(out, room, uuid);
}

API int nvmlDeviceGetPciInfo_v3(void *handle, PciInfo *out) {
  enum { SOME_NVIDIA_CARD = 0x20b010de };
  int result = check(handle);
  if (result) return result;
  memset(out, 0, sizeof *out);
  out->bus = (unsigned)machine_pci_bus(gpu_of(handle));
  out->device_id = SOME_NVIDIA_CARD;
  snprintf(out->legacy_bus_id, sizeof out->legacy_bus_id, "0000:%02X:00.0", out->bus & 0xff);
  snprintf(out->bus_id, sizeof out->bus_id, "00000000:%02X:00.0", out->bus & 0xff);
  return SUCCESS;
}

API int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
  int result = check(handle);
  if (!result) machine_capability(gpu_of(handle), major, minor);
  return result;
}

API int nvmlDeviceGetUtilizationRates(void *handle, unsigned gpu_and_memory[2]) {
  int result = check(handle);
  if (result) return result;
  if (machine_instances(gpu_of(handle))) return NOT_SUPPORTED; /* as NVML has it under MIG */
  gpu_and_memory[0] = (unsigned)machine_utilisation(gpu_of(handle));
  gpu_and_memory[1] = 0;
  return SUCCESS;
}

/* ---- MIG: the instances of a GPU have handles of their own */

NUMBER(nvmlDeviceIsMigDeviceHandle, instance_of(handle) >= 0)
NUMBER(nvmlDeviceGetMaxMigDeviceCount, machine_instances(gpu_of(handle)) ? MAX_INSTANCES : 0)
NUMBER(nvmlDeviceGetGpuInstanceId, instance_of(handle) + 1)
NUMBER(nvmlDeviceGetComputeInstanceId, 0)

API int nvmlDeviceGetMigMode(void *handle, unsigned *now, unsigned *after_reset) {
  int result = check(handle);
  if (result) return result;
  if (!machine_instances(gpu_of(handle))) return NOT_SUPPORTED;
  *now = *after_reset = 1;
  return SUCCESS;
}

API int nvmlDeviceGetMigDeviceHandleByIndex(void *handle, unsigned instance, void **out) {
  int result = check(handle);
  if (result) return result;
  if (instance >= (unsigned)machine_instances(gpu_of(handle))) return NOT_FOUND;
  *out = handle_of(machine_instance_place(gpu_of(handle), (int)instance));
  return SUCCESS;
}

API int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(void *handle, void **out) {
  int result = check(handle);
  if (!result) *out = handle_of(gpu_of(handle));
  return result;
}

/* ---- who uses it */

enum { MAX_PROCESSES = 1024 };
typedef struct {
  int place;
  unsigned count;
  struct {
    int pid, instance;
    long long bytes;
  } processes[MAX_PROCESSES];
} Usage;

/* A GPU shows what is held in each of its instances, too. */
static int concerns(int place, const Holding *holding) {
  return holding->place == place || machine_gpu_of(holding->place) == place;
}

static void add_holding(void *context, const Holding *holding) {
  Usage *usage = context;
  int instance = machine_instance_of(holding->place);
  unsigned i = 0;
  if (!concerns(usage->place, holding)) return;
  while (i < usage->count && (usage->processes[i].pid != holding->pid || usage->processes[i].instance != instance)) i++;
  if (i == MAX_PROCESSES) return;
  if (i == usage->count) {
    usage->processes[i].pid = holding->pid;
    usage->processes[i].instance = instance;
    usage->processes[i].bytes = 0;
    usage->count++;
  }
  usage->processes[i].bytes += holding->bytes;
}

static void find_usage(int place, Usage *usage) {
  usage->place = place;
  usage->count = 0;
  machine_each_holding(add_holding, usage);
}

static int read_card(void *handle, Memory2 *memory) {
  Usage usage;
  Bytes usable;
  int result = check(handle);
  if (!result) result = machine_error("memory_error", gpu_of(handle));
  if (result) return result;
  find_usage(place_of(handle), &usage);
  usable = machine_usable(usage.place);
  memory->total = machine_memory(usage.place);
  memory->reserved = machine_reserved(usage.place);
  memory->used = 0;
  for (unsigned i = 0; i < usage.count; i++)
    if (usage.processes[i].bytes > 0) memory->used += (Bytes)usage.processes[i].bytes;
  if (memory->used > usable) memory->used = usable; /* managed memory exceeds it */
  memory->free = usable - memory->used;
  return SUCCESS;
}

/* Where the caller's own cgroup has a limit, that is the total. */
API int nvmlDeviceGetMemoryInfo_v2(void *handle, Memory2 *memory) {
  CgroupChain chain;
  Bytes limit, room;
  int result = read_card(handle, memory), place = place_of(handle);
  if (result || place >= MAX_GPUS || cgroups_backend(place) == NO_BACKEND) return result;
  chain = cgroups_own_chain();
  limit = cgroups_reported(place, &chain);
  if (limit >= memory->total) return SUCCESS;
  room = cgroups_room(place, &chain);
  memory->total = limit;
  if (room < memory->free) memory->free = room;
  memory->used = limit - memory->free;
  memory->used -= memory->used < memory->reserved ? memory->used : memory->reserved;
  return SUCCESS;
}

/* The first version counts what is reserved as used, and knows nothing of cgroups. */
API int nvmlDeviceGetMemoryInfo(void *handle, Memory *memory) {
  Memory2 second;
  int result = read_card(handle, &second);
  if (!result) *memory = (Memory){second.total, second.free, second.used + second.reserved};
  return result;
}

API int nvmlDeviceGetComputeRunningProcesses_v3(void *handle, unsigned *count, Process *out) {
  const unsigned no_instance = 0xffffffff;
  const Bytes unknown = ~0ull;
  Usage usage;
  int instance;
  long long bytes;
  unsigned room = *count;
  int result = check(handle);
  if (!result) result = machine_error("processes_error", gpu_of(handle));
  if (result) return result;
  find_usage(place_of(handle), &usage);
  *count = usage.count;
  if (room < usage.count) return INSUFFICIENT_SIZE;
  for (unsigned i = 0; i < usage.count; i++) {
    instance = usage.processes[i].instance;
    bytes = usage.processes[i].bytes;
    out[i] = (Process){(unsigned)usage.processes[i].pid, bytes < 0 ? unknown : (Bytes)bytes,
                       instance < 0 ? no_instance : (unsigned)instance + 1, instance < 0 ? no_instance : 0};
  }
  return SUCCESS;
}
API int nvmlDeviceGetComputeRunningProcesses_v2(void *handle, unsigned *count, Process *out) {
  return nvmlDeviceGetComputeRunningProcesses_v3(handle, count, out);
}

/* The first version does not know instances. */
API int nvmlDeviceGetComputeRunningProcesses(void *handle, unsigned *count, Process1 *out) {
  Process newer[MAX_PROCESSES];
  unsigned room = *count, found = MAX_PROCESSES;
  int result = nvmlDeviceGetComputeRunningProcesses_v3(handle, &found, newer);
  if (result) return result;
  *count = found;
  if (room < found) return INSUFFICIENT_SIZE;
  for (unsigned i = 0; i < found; i++) out[i] = (Process1){newer[i].pid, newer[i].bytes};
  return SUCCESS;
}

NUMBER(nvmlDeviceGetGraphicsRunningProcesses_v3, 0)
NUMBER(nvmlDeviceGetMPSComputeRunningProcesses_v3, 0)

/* ---- limits for cgroups */

typedef struct {
  const char *cgroup;
  Bytes soft, hard;
} NewLimits;
typedef struct {
  const char *cgroup;
  Bytes soft, hard, used;
} CurrentLimits;

static void ignore_holding(void *context UNUSED, const Holding *holding UNUSED) {}
static void read_log_to_its_end(void) { machine_each_holding(ignore_holding, NULL); }

/* Finds a cgroup, and says why its limits on a GPU can be neither set nor read. */
static int find_cgroup(void *handle, const char *path, CgroupChain *out) {
  int result = check(handle);
  if (result) return result;
  if (cgroups_backend(gpu_of(handle)) == NO_BACKEND) return FUNCTION_NOT_FOUND;
  if (machine_instances(gpu_of(handle)) || !getenv("TFGPU_SIMULATE_LOG")) return NOT_SUPPORTED;
  if (!path || cgroups_depth(path) < 0) return INVALID_ARGUMENT;
  *out = cgroups_chain_of(path);
  return out->count ? SUCCESS : NOT_FOUND;
}

API int nvmlDeviceSetMemoryLimits_v1(void *handle, const NewLimits *limits) {
  CgroupChain chain;
  int result = find_cgroup(handle, limits->cgroup, &chain), log;
  if (result) return result;
  if (geteuid()) return NO_PERMISSION;
  if (limits->soft > limits->hard) return INVALID_ARGUMENT;
  if (cgroups_backend(gpu_of(handle)) == DMEM ? !chain.counted[0] : !cgroups_depth(limits->cgroup)) return NOT_FOUND;
  log = log_open();
  read_log_to_its_end();
  if (!cgroups_set_limits(log, gpu_of(handle), &chain, (CgroupLimits){limits->soft, limits->hard}))
    result = INVALID_ARGUMENT;
  log_close(log);
  return result;
}

/* Under dmem a cgroup without the kernel's files has what is set for the nearest one above that has them. */
API int nvmlDeviceGetMemoryLimits_v1(void *handle, CurrentLimits *limits) {
  CgroupChain chain;
  CgroupLimits found;
  int gpu = gpu_of(handle), place = 0, result = find_cgroup(handle, limits->cgroup, &chain);
  if (result) return result;
  read_log_to_its_end();
  if (cgroups_backend(gpu) == MISC) place = cgroups_nearest_limited(gpu, &chain);
  else
    while (place < chain.count - 1 && !chain.counted[place]) place++;
  if (place < 0) return NOT_SUPPORTED;
  found = cgroups_limits(gpu, chain.ids[place]);
  limits->soft = found.soft;
  limits->hard = found.hard;
  limits->used = cgroups_used(gpu, chain.ids[place]);
  return SUCCESS;
}
