/* Preloaded into every simulated process. It does three things, all when a program asks for a file by its name.
 *
 * JAX does not try CUDA unless there is /dev/nvidia0 or /dev/nvidiactl. Where there are simulated GPUs, they are there.
 * Nobody can open them.
 *
 * PyTorch and JAX may have NVIDIA's libraries beside them, and load those by their paths or by a DT_RPATH, which comes
 * before LD_LIBRARY_PATH. But who asks for a library by its name gets the one that was loaded first. So when Python looks
 * for PyTorch or for JAX's plugin, the stub libraries are loaded. They stay out of the global scope.
 *
 * Where the kernel counts memory for cgroups ("dmem"), it has files for that, which the kernel here may not have. */
#define _GNU_SOURCE
#include "cgroups.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

/* ---- the stub libraries, before others of their names */

static void load_stubs(void) {
  Dl_info here;
  char path[PATH_MAX];
  struct dirent *entry;
  DIR *folder;
  if (!dladdr(&load_stubs, &here) || !realpath(here.dli_fname, path)) return;
  *strrchr(path, '/') = '\0';
  size_t length = strlen(path);
  folder = opendir(path);
  while (folder && (entry = readdir(folder))) {
    if (!strstr(entry->d_name, ".so.")) continue;
    snprintf(path + length, sizeof path - length, "/%s", entry->d_name);
    dlopen(path, RTLD_NOW | RTLD_LOCAL);
  }
  if (folder) closedir(folder);
}

static int ends_with(const char *path, const char *end) {
  size_t length = strlen(path), end_length = strlen(end);
  return length >= end_length && !strcmp(path + length - end_length, end);
}

static void load_stubs_before(const char *path) {
  static pthread_once_t once = PTHREAD_ONCE_INIT;
  if (ends_with(path, "/torch/__init__.py") || ends_with(path, "/jax_cuda12_plugin/__init__.py") ||
      ends_with(path, "/jax_cuda13_plugin/__init__.py"))
    pthread_once(&once, load_stubs);
}

/* ---- the devices */

static int is_simulated(const char *path) {
  return (!strcmp(path, "/dev/nvidiactl") || !strcmp(path, "/dev/nvidia0")) && machine_gpus() > 0;
}

/* ---- the kernel's files for limits of cgroups */

static const char CAPACITY[] = "/sys/fs/cgroup/dmem.capacity";

static int is_kernel_file(const char *path) {
  char cgroup[PATH_MAX];
  if (strncmp(path, "/sys/fs/cgroup/", 15) || cgroups_backend(0) != DMEM) return 0;
  if (!strcmp(path, CAPACITY)) return cgroups_exists("/sys/fs/cgroup");
  if (!ends_with(path, "/dmem.max") || strlen(path) >= sizeof cgroup) return 0;
  strcpy(cgroup, path);
  *strrchr(cgroup, '/') = '\0';
  return cgroups_has_kernel_files(cgroup) && cgroups_exists(cgroup);
}

static void ignore_holding(void *context UNUSED, const Holding *holding UNUSED) {}

/* Returns what a kernel's file says: a line for each GPU, with its memory or with the limit of a cgroup. */
static int open_kernel_file(const char *path) {
  char line[96], cgroup[PATH_MAX], limit[32];
  CgroupChain chain;
  int file = memfd_create("dmem", MFD_CLOEXEC);
  strcpy(cgroup, path);
  *strrchr(cgroup, '/') = '\0';
  chain = cgroups_chain_of(cgroup);
  machine_each_holding(ignore_holding, NULL); /* reads the log to its end */
  for (int gpu = 0; file >= 0 && gpu < machine_gpus(); gpu++) {
    Bytes size = strcmp(path, CAPACITY) ? cgroups_limits(gpu, chain.ids[0]).hard : machine_memory(gpu);
    snprintf(limit, sizeof limit, size == UNLIMITED ? "max" : "%llu", size);
    int length = snprintf(line, sizeof line, "nvidia/0000:%02x:00.0/vidmem %s\n", (unsigned)machine_pci_bus(gpu), limit);
    if (write(file, line, (size_t)length) != length) break;
  }
  if (file >= 0) lseek(file, 0, SEEK_SET);
  return file;
}

/* ---- what stat says of them */

static int describe(const char *path, struct stat *out) {
  enum { NVIDIA = 195, CONTROL = 255 };
  memset(out, 0, sizeof *out);
  out->st_mode = is_simulated(path) ? S_IFCHR | 0666 : S_IFREG | 0644;
  out->st_rdev = is_simulated(path) ? makedev(NVIDIA, CONTROL) : 0;
  out->st_nlink = 1;
  return 0;
}

/* ---- stat, by all names that programs know it by: for large files, and from glibc before 2.33 */

#define INTERPOSE(name, parameters, arguments)            \
  API int name parameters;                                \
  int name parameters {                                   \
    static int (*next) parameters;                        \
    if (is_simulated(path) || is_kernel_file(path))       \
      return describe(path, (void *)out);                 \
    load_stubs_before(path);                              \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name); \
    return next arguments;                                \
  }
INTERPOSE(stat, (const char *restrict path, struct stat *restrict out), (path, out))
INTERPOSE(stat64, (const char *restrict path, struct stat64 *restrict out), (path, out))
INTERPOSE(__xstat, (int version, const char *path, struct stat *out), (version, path, out))
INTERPOSE(__xstat64, (int version, const char *path, struct stat64 *out), (version, path, out))

/* Everybody can read the kernel's files, and root can write them. */
API int access(const char *path, int mode) {
  static int (*next)(const char *, int);
  if (is_kernel_file(path)) {
    if (!(mode & X_OK) && (!(mode & W_OK) || !getuid())) return 0;
    errno = EACCES;
    return -1;
  }
  if (!next) *(void **)&next = dlsym(RTLD_NEXT, "access");
  return next(path, mode);
}

/* ---- open, likewise */

enum { MAKES_FILE = O_CREAT | (O_TMPFILE & ~O_DIRECTORY) };

#define INTERPOSE_OPEN(name)                                          \
  API int name(const char *path, int flags, ...);                     \
  int name(const char *path, int flags, ...) {                        \
    static int (*next)(const char *, int, ...);                       \
    va_list rest;                                                     \
    va_start(rest, flags);                                            \
    mode_t mode = flags & MAKES_FILE ? va_arg(rest, mode_t) : 0;      \
    va_end(rest);                                                     \
    if (is_kernel_file(path)) return open_kernel_file(path);          \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name);             \
    return next(path, flags, mode);                                   \
  }
INTERPOSE_OPEN(open)
INTERPOSE_OPEN(open64)
