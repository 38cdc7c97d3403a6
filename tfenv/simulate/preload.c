/* Preloaded into every simulated process. It does two things, both when a program asks for a file by its name.
 *
 * JAX does not try CUDA unless there is /dev/nvidia0 or /dev/nvidiactl. Where there are simulated GPUs, they are there.
 * Nobody can open them.
 *
 * PyTorch and JAX may have NVIDIA's libraries beside them, and load those by their paths or by a DT_RPATH, which comes
 * before LD_LIBRARY_PATH. But who asks for a library by its name gets the one that was loaded first. So when Python looks
 * for PyTorch or for JAX's plugin, the stub libraries are loaded. They stay out of the global scope. */
#define _GNU_SOURCE
#include "machine.h"

#include <dirent.h>
#include <dlfcn.h>
#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>

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

static int describe(struct stat *out) {
  enum { NVIDIA = 195, CONTROL = 255 };
  memset(out, 0, sizeof *out);
  out->st_mode = S_IFCHR | 0666;
  out->st_rdev = makedev(NVIDIA, CONTROL);
  out->st_nlink = 1;
  return 0;
}

/* ---- stat, by all names that programs know it by: for large files, and from glibc before 2.33 */

#define INTERPOSE(name, parameters, arguments)            \
  API int name parameters;                                \
  int name parameters {                                   \
    static int (*next) parameters;                        \
    if (is_simulated(path)) return describe((void *)out); \
    load_stubs_before(path);                              \
    if (!next) *(void **)&next = dlsym(RTLD_NEXT, #name); \
    return next arguments;                                \
  }
INTERPOSE(stat, (const char *restrict path, struct stat *restrict out), (path, out))
INTERPOSE(stat64, (const char *restrict path, struct stat64 *restrict out), (path, out))
INTERPOSE(__xstat, (int version, const char *path, struct stat *out), (version, path, out))
INTERPOSE(__xstat64, (int version, const char *path, struct stat64 *out), (version, path, out))
