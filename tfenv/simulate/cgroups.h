/* Memory limits for cgroups. A limit is for one GPU and all processes of a cgroup together. A process is counted where it
 * was when it opened CUDA. Managed memory is not counted, and MIG instances have no limits. A soft limit is reserved in
 * all cgroups above, too, under dmem. It must fit there, and it stays there when the cgroup is removed.
 *
 * The key "cgroup_limits" of TFGPU_SIMULATE says who counts: "none" (the default), as with older drivers. "dmem", the
 * kernel: the limits of all cgroups above a process hold. "dmem/2": only cgroups down to that depth have the kernel's files,
 * as where an administrator enabled the controller no further. "misc", the driver: only the nearest limit holds. */
#pragma once
#include "machine.h"

typedef unsigned long long CgroupId;
typedef enum { NO_BACKEND, DMEM, MISC } CgroupBackend;
enum { MAX_CHAIN = 32, MAX_PATH = 512 };
static const Bytes UNLIMITED = ~0ull;

/* A cgroup and those above it. */
typedef struct {
  int count;
  CgroupId ids[MAX_CHAIN];
  int counted[MAX_CHAIN]; /* it has the kernel's files */
  char path[MAX_PATH];    /* of the first */
} CgroupChain;

typedef struct {
  Bytes soft, hard;
} CgroupLimits;

CgroupBackend cgroups_backend(int gpu);
int cgroups_depth(const char *path); /* below the root. -1: it is no path of a cgroup */
int cgroups_has_kernel_files(const char *path); /* whether or not the cgroup is there */
int cgroups_exists(const char *path);
CgroupChain cgroups_chain_of(const char *path); /* empty: there is no such cgroup */
CgroupChain cgroups_own_chain(void);            /* of the calling process */

/* ---- what is written to the log, and read from it */
void cgroups_join(int log, const CgroupChain *chain); /* the calling process is in these from now on */
int cgroups_set_limits(int log, int gpu, const CgroupChain *chain, CgroupLimits limits); /* of the first. 0: no space */
void cgroups_take_record(const char *line);
void cgroups_forget_process(int pid);
void cgroups_forget_all(void);

/* ---- what holds. Whoever asks has read the log to its end: machine_each_holding does. */
CgroupLimits cgroups_limits(int gpu, CgroupId id);
int cgroups_nearest_limited(int gpu, const CgroupChain *chain); /* its index. -1: there is none */
Bytes cgroups_used(int gpu, CgroupId id);
Bytes cgroups_room(int place, const CgroupChain *chain);     /* what its processes can still allocate */
Bytes cgroups_reported(int place, const CgroupChain *chain); /* the limit of the first itself, or UNLIMITED */
