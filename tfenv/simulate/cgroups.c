/* Memory limits for cgroups, as drivers from release 615 on keep them (see cgroups.h). Limits and the cgroups of processes
 * are records in the log, so all processes of a simulation know them. */
#define _GNU_SOURCE
#include "cgroups.h"

#include <limits.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/vfs.h>

static const char ROOT[] = "/sys/fs/cgroup";
enum { CGROUP2_MAGIC = 0x63677270 };

/* ---- who counts */

CgroupBackend cgroups_backend(int gpu) {
  char text[SETTING_TEXT];
  machine_setting("cgroup_limits", gpu, "none", text);
  if (!strncmp(text, "dmem", 4)) return DMEM;
  return strcmp(text, "misc") ? NO_BACKEND : MISC;
}

/* "dmem/2": down to which depth below the root cgroups have the kernel's files. */
static int deepest_counted(void) {
  char text[SETTING_TEXT];
  machine_setting("cgroup_limits", 0, "none", text);
  return text[4] == '/' ? atoi(text + 5) : MAX_CHAIN;
}

/* ---- cgroups by their paths. The number of a directory tells cgroups apart, in every mount and namespace. The kernel
 * gives no number again: it has 64 bits, of which the upper ones count how often the lower ones were used. */

static CgroupId find_id(const char *path) {
  struct stat status;
  struct statfs system;
  if (statfs(path, &system) || system.f_type != CGROUP2_MAGIC || stat(path, &status)) return 0;
  return S_ISDIR(status.st_mode) ? status.st_ino : 0;
}

int cgroups_exists(const char *path) { return find_id(path) != 0; }

static int is_below_root(const char *path) {
  return !strncmp(path, ROOT, strlen(ROOT)) && (path[strlen(ROOT)] == '/' || !path[strlen(ROOT)]);
}

int cgroups_depth(const char *path) {
  int depth = 0;
  if (!is_below_root(path)) return -1;
  for (const char *rest = path + strlen(ROOT); *rest; rest++) depth += *rest == '/' && rest[1] && rest[1] != '/';
  return depth;
}

int cgroups_has_kernel_files(const char *path) {
  int depth = cgroups_depth(path);
  return cgroups_backend(0) == DMEM && depth > 0 && depth <= deepest_counted();
}

CgroupChain cgroups_chain_of(const char *path) {
  CgroupChain chain = {0};
  char rest[PATH_MAX];
  if (!realpath(path, rest) || strlen(rest) >= MAX_PATH || !is_below_root(rest)) return chain;
  strcpy(chain.path, rest);
  for (;;) {
    CgroupId id = find_id(rest);
    if (!id || chain.count == MAX_CHAIN) return chain;
    chain.counted[chain.count] = cgroups_has_kernel_files(rest);
    chain.ids[chain.count++] = id;
    if (!strcmp(rest, ROOT)) return chain;
    *strrchr(rest, '/') = '\0';
  }
}

/* Tells whether a cgroup of a chain was removed. A process can leave the one in which it opened CUDA. */
static int is_removed(const CgroupChain *chain, int index) {
  char path[MAX_PATH];
  strcpy(path, chain->path);
  for (int i = 0; i < index; i++) *strrchr(path, '/') = '\0';
  return find_id(path) != chain->ids[index];
}

CgroupChain cgroups_own_chain(void) {
  CgroupChain chain = {0};
  char line[PATH_MAX], path[sizeof ROOT + sizeof line];
  FILE *file = fopen("/proc/self/cgroup", "re");
  while (file && fgets(line, sizeof line, file)) {
    line[strcspn(line, "\n")] = '\0';
    if (strncmp(line, "0::/", 4) || !strncmp(line, "0::/..", 6)) continue;
    snprintf(path, sizeof path, "%s%s", ROOT, line[4] ? line + 3 : "");
    chain = cgroups_chain_of(path);
  }
  if (file) fclose(file);
  return chain;
}

/* ---- what the log says: limits, and the cgroups in which processes opened CUDA */

typedef struct {
  int gpu;
  CgroupId id;
  CgroupLimits limits;
} Limited;

typedef struct {
  int pid;
  CgroupChain chain;
} Member;

static struct {
  Limited *items;
  size_t count;
} limited;
static struct {
  Member *items;
  size_t count;
} members;
static pthread_mutex_t tables_lock = PTHREAD_MUTEX_INITIALIZER;

static void *grow(void *items, size_t count, size_t size) {
  void *grown = realloc(items, (count + 1) * size);
  if (!grown) abort();
  return grown;
}

static Member *member_of(int pid) {
  for (size_t i = 0; i < members.count; i++)
    if (members.items[i].pid == pid) return &members.items[i];
  return NULL;
}

static void take_limits(int gpu, CgroupId id, CgroupLimits limits) {
  for (size_t i = 0; i < limited.count; i++)
    if (limited.items[i].gpu == gpu && limited.items[i].id == id) {
      limited.items[i].limits = limits;
      return;
    }
  limited.items = grow(limited.items, limited.count, sizeof *limited.items);
  limited.items[limited.count++] = (Limited){gpu, id, limits};
}

static void take_membership(int pid, CgroupId id, int counted) {
  Member *member = member_of(pid);
  if (!member) {
    members.items = grow(members.items, members.count, sizeof *members.items);
    member = &members.items[members.count++];
    *member = (Member){pid, {0}};
  }
  if (member->chain.count == MAX_CHAIN) return;
  member->chain.counted[member->chain.count] = counted;
  member->chain.ids[member->chain.count++] = id;
}

void cgroups_forget_process(int pid) {
  pthread_mutex_lock(&tables_lock);
  Member *member = member_of(pid);
  if (member) member->chain.count = 0;
  pthread_mutex_unlock(&tables_lock);
}

void cgroups_forget_all(void) {
  pthread_mutex_lock(&tables_lock);
  limited.count = members.count = 0;
  pthread_mutex_unlock(&tables_lock);
}

void cgroups_take_record(const char *line) {
  int pid, gpu;
  Bytes bytes, held, id;
  char operation[16];
  if (sscanf(line, "{\"pid\": %d, \"op\": \"%15[a-z]\", \"gpu\": %d, \"instance\": %*d, \"bytes\": %llu, \"held\": %llu, "
             "\"call\": \"%llu", &pid, operation, &gpu, &bytes, &held, &id) != 6)
    return;
  pthread_mutex_lock(&tables_lock);
  if (!strcmp(operation, "limit") || !strcmp(operation, "reserve")) take_limits(gpu, id, (CgroupLimits){held, bytes});
  if (!strcmp(operation, "cgroup")) take_membership(pid, id, (int)held);
  pthread_mutex_unlock(&tables_lock);
}

void cgroups_join(int log, const CgroupChain *chain) {
  char id[32];
  for (int i = 0; i < chain->count; i++) {
    snprintf(id, sizeof id, "%llu", chain->ids[i]);
    log_write(log, "cgroup", 0, 0, (Bytes)chain->counted[i], id);
  }
}

static CgroupLimits find_limits(int gpu, CgroupId id) {
  for (size_t i = 0; i < limited.count; i++)
    if (limited.items[i].gpu == gpu && limited.items[i].id == id) return limited.items[i].limits;
  return (CgroupLimits){0, UNLIMITED};
}

CgroupLimits cgroups_limits(int gpu, CgroupId id) {
  pthread_mutex_lock(&tables_lock);
  CgroupLimits limits = find_limits(gpu, id);
  pthread_mutex_unlock(&tables_lock);
  return limits;
}

static void write_limits(int log, const char *operation, int gpu, CgroupId id, CgroupLimits limits) {
  char text[32];
  snprintf(text, sizeof text, "%llu", id);
  log_write(log, operation, gpu, limits.hard, limits.soft, text);
}

/* Under dmem the soft limit of a cgroup includes what is reserved for those below it. The root's must fit on the GPU. */
int cgroups_set_limits(int log, int gpu, const CgroupChain *chain, CgroupLimits limits) {
  Bytes before = cgroups_limits(gpu, chain->ids[0]).soft;
  CgroupLimits above[MAX_CHAIN];
  int count = cgroups_backend(gpu) == DMEM && before != limits.soft ? chain->count : 1;
  for (int i = 1; i < count; i++) {
    above[i] = cgroups_limits(gpu, chain->ids[i]);
    Bytes others = above[i].soft > before ? above[i].soft - before : 0;
    Bytes most = i < chain->count - 1 ? above[i].hard : machine_usable(gpu);
    above[i].soft = others + limits.soft;
    if (limits.soft > before && (above[i].soft < others || above[i].soft > most)) return 0;
  }
  write_limits(log, "limit", gpu, chain->ids[0], limits);
  for (int i = 1; i < count; i++) write_limits(log, "reserve", gpu, chain->ids[i], above[i]);
  return 1;
}

static int is_set(CgroupLimits limits) { return limits.soft || limits.hard != UNLIMITED; }

int cgroups_nearest_limited(int gpu, const CgroupChain *chain) {
  int found = -1;
  pthread_mutex_lock(&tables_lock);
  for (int i = chain->count - 1; i >= 0; i--)
    if (is_set(find_limits(gpu, chain->ids[i]))) found = i;
  pthread_mutex_unlock(&tables_lock);
  return found;
}

/* ---- what they hold */

typedef struct {
  int place;
  CgroupId id;
  Bytes bytes;
} Use;

/* Under misc a process counts in the nearest limited cgroup alone. */
static void add_holding(void *context, const Holding *holding) {
  Use *use = context;
  CgroupChain chain = {0};
  if (holding->place != use->place || holding->listed) return;
  pthread_mutex_lock(&tables_lock);
  Member *member = member_of(holding->pid);
  if (member) chain = member->chain;
  pthread_mutex_unlock(&tables_lock);
  int nearest = cgroups_backend(use->place) == MISC ? cgroups_nearest_limited(use->place, &chain) : -1;
  for (int i = nearest < 0 ? 0 : nearest; i < chain.count; i++) {
    if (chain.ids[i] == use->id) use->bytes += (Bytes)(holding->bytes - holding->managed);
    if (nearest >= 0) return;
  }
}

Bytes cgroups_used(int gpu, CgroupId id) {
  Use use = {gpu, id, 0};
  machine_each_holding(add_holding, &use);
  return use.bytes;
}

Bytes cgroups_room(int place, const CgroupChain *chain) {
  Bytes room = UNLIMITED;
  if (place >= MAX_GPUS || cgroups_backend(place) == NO_BACKEND || machine_instances(place)) return room;
  for (int i = 0; i < chain->count; i++) {
    CgroupLimits limits = cgroups_limits(place, chain->ids[i]);
    if (!is_set(limits) || is_removed(chain, i)) continue;
    if (limits.hard != UNLIMITED) {
      Bytes used = cgroups_used(place, chain->ids[i]), left = limits.hard > used ? limits.hard - used : 0;
      if (left < room) room = left;
    }
    if (cgroups_backend(place) == MISC) break;
  }
  return room;
}

Bytes cgroups_reported(int place, const CgroupChain *chain) {
  if (place >= MAX_GPUS || !chain->count || cgroups_backend(place) == NO_BACKEND || machine_instances(place))
    return UNLIMITED;
  return cgroups_limits(place, chain->ids[0]).hard;
}
