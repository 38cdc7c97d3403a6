/* The simulated machine as all stub libraries see it: its GPUs, who holds their memory, the log.
 *
 * The stubs are written from the public documentation of the CUDA and NVML interfaces; they need
 * no CUDA headers. Environment variables describe the machine:
 *
 *   TFGPU_SIMULATE            "count=2,memory_mib=24576:81920,name=NVIDIA A100". Keys: count,
 *                             memory_mib, name, capability (8.0), multiprocessors (108),
 *                             utilisation (per cent), mig (1: its UUID is "MIG-..."), driver (12080).
 *                             A value may be a ':'-separated list, one item a GPU; the last repeats.
 *   TFGPU_SIMULATE_LOG        file; one JSON line for each request to the driver, appended.
 *   TFGPU_SIMULATE_PROCESSES  file of "<gpu> <pid> <MiB>" lines: what other users' processes hold.
 */
#pragma once
#include <stddef.h>

/* Parameters that a stub ignores are left out where they come last: on x86-64 and AArch64 the
 * caller alone passes and removes them. */
#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))

enum { MAX_GPUS = 32, UUID_BYTES = 16, UUID_TEXT = 41, SETTING_TEXT = 96 };

typedef unsigned long long Bytes;

/* ---- the GPUs, numbered 0, 1, ... in the order of their PCI buses */
int machine_gpus(void);
int machine_driver_version(void);
Bytes machine_memory(int gpu);
void machine_name(int gpu, char *out, size_t room);
void machine_capability(int gpu, int *major, int *minor);
int machine_multiprocessors(int gpu);
int machine_utilisation(int gpu);
int machine_is_mig(int gpu);
int machine_pci_bus(int gpu);
void machine_uuid(int gpu, unsigned char out[UUID_BYTES]);
void machine_uuid_text(int gpu, char out[UUID_TEXT]);

/* ---- what processes hold */
typedef struct {
  int gpu;
  int pid;
  long long bytes;
  int listed; /* 1: a line of TFGPU_SIMULATE_PROCESSES; 0: a live process in TFGPU_SIMULATE_LOG */
} Holding;

/* Calls `visit` for everything that somebody holds now. */
void machine_each_holding(void (*visit)(void *context, const Holding *holding), void *context);

/* ---- the log. It is locked from open to close, so that looking at what others hold, deciding and
 * writing the decision down are one step among processes. */
int log_open(void); /* -1 when there is none */
void log_write(int log, const char *operation, int gpu, Bytes bytes, Bytes held, const char *call);
void log_close(int log);
