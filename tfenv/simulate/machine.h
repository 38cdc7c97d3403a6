/* The simulated machine as all stub libraries see it: its GPUs, who holds their memory, the log.
 *
 * The stubs are written from the public documentation of the CUDA and NVML interfaces. They need
 * no CUDA headers. Environment variables describe the machine:
 *
 *   TFGPU_SIMULATE            "count=2,memory_mib=24576:81920,name=NVIDIA A100". Keys: count,
 *                             memory_mib, reserved_mib (of it, what the driver keeps for itself),
 *                             context_mib (what a process takes by opening a GPU), name, capability (8.0),
 *                             multiprocessors (108), utilisation (per cent), mig (sizes in MiB of its MIG instances,
 *                             joined by '+', or 0: MIG is off), driver (13000), release (580.00.00), cgroup_limits (none:
 *                             see cgroups.h. With others the driver is 13040 and the release 615.00.00). And what NVML
 *                             answers instead, as numbers of nvmlReturn_t: init_error to nvmlInit, error
 *                             to all questions about a GPU, memory_error and processes_error to
 *                             how much memory it has and who uses it. uuid_error is CUDA's answer, as a number of
 *                             CUresult, to which card is which.
 *                             A value may be a ':'-separated list, one item a GPU. The last repeats.
 *   TFGPU_SIMULATE_LOG        A file. One JSON line for each request to the driver is appended.
 *   TFGPU_SIMULATE_PROCESSES  A file of "<gpu> <pid> <MiB>" lines: what other users' processes hold. Of a
 *                             MIG instance: "<gpu>:<instance> <pid> <MiB>". -1 MiB: NVML does not say.
 *                             One line on stderr complains of a file that cannot be read.
 */
#pragma once
#include <stddef.h>

/* Parameters that a stub ignores are left out where they come last: on x86-64 and AArch64 the
 * caller alone passes and removes them. */
#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

enum {
  MAX_GPUS = 32,
  MAX_INSTANCES = 7, /* MIG instances of one GPU */
  MAX_PLACES = MAX_GPUS * (1 + MAX_INSTANCES),
  UUID_BYTES = 16,
  UUID_TEXT = 41,
  SETTING_TEXT = 96
};

typedef unsigned long long Bytes;

/* ---- the GPUs, numbered 0, 1, ... in the order of their PCI buses. A place is where memory is: a whole GPU,
 * by its number, or one of its MIG instances, by a number above all GPUs'. */
int machine_gpus(void);
int machine_has(int place);
int machine_instances(int gpu); /* 0: MIG is off */
int machine_instance_place(int gpu, int instance);
int machine_gpu_of(int place);
int machine_instance_of(int place); /* -1: a whole GPU */
int machine_driver_version(void);
void machine_driver_release(char *out, size_t room);
int machine_error(const char *key, int gpu); /* 0: none */
void machine_setting(const char *key, int gpu, const char *fallback, char out[SETTING_TEXT]);
Bytes machine_memory(int place);   /* as NVML tells it */
Bytes machine_reserved(int place); /* of it, what the driver keeps. A MIG instance has none of its own */
Bytes machine_usable(int place);   /* the rest, which CUDA can give */
Bytes machine_context(int place);  /* what a process takes by opening it */
void machine_name(int place, char *out, size_t room);
void machine_capability(int place, int *major, int *minor);
int machine_multiprocessors(int place);
int machine_utilisation(int gpu);
int machine_pci_bus(int place);
void machine_uuid(int place, unsigned char out[UUID_BYTES]);
void machine_uuid_text(int place, char out[UUID_TEXT]);

/* ---- what processes hold */
typedef struct {
  int place;
  int pid;
  long long bytes;
  int listed;        /* 1: a line of TFGPU_SIMULATE_PROCESSES. 0: a live process in TFGPU_SIMULATE_LOG */
  long long managed; /* of the bytes, managed memory */
} Holding;

/* The log's names of what takes and frees managed memory. CUDA has no function of the second name. */
#define MANAGED_ALLOC "cuMemAllocManaged"
#define MANAGED_FREE "cuMemFreeManaged"

/* Calls `visit` for everything that somebody holds now. */
void machine_each_holding(void (*visit)(void *context, const Holding *holding), void *context);

/* ---- the log. It is locked from open to close, so that looking at what others hold, deciding and
 * writing the decision down are one step among processes. */
int log_open(void); /* -1 when there is none */
void log_write(int log, const char *operation, int place, Bytes bytes, Bytes held, const char *call);
void log_close(int log);
