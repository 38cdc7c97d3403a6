/* The simulated machine (see machine.h): settings from the environment, memory held by the
 * processes in the log and in the list of other users' processes, and the log itself. */
#define _GNU_SOURCE
#include "cgroups.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

static const Bytes MIB = 1ull << 20;

/* Says on stderr, once, what cannot be done with a file. */
static void complain(int *said, const char *problem, const char *path) {
  if (!(*said)++) fprintf(stderr, "tfgpu simulate: %s %s: %s\n", problem, path, strerror(errno));
}

/* ---- settings */

/* Returns where the value of `key` starts in TFGPU_SIMULATE. NULL: the key is not there. */
static const char *find_value(const char *key) {
  const char *item = getenv("TFGPU_SIMULATE");
  size_t length = strlen(key);
  while (item && *item) {
    if (!strncmp(item, key, length) && item[length] == '=') return item + length + 1;
    item += strcspn(item, ",");
    item += *item == ',';
  }
  return NULL;
}

/* Copies the value of `key` for one GPU to `out`: its item of the list, or the last item. */
void machine_setting(const char *key, int gpu, const char *fallback, char out[SETTING_TEXT]) {
  const char *value = find_value(key);
  size_t length;
  if (!value) value = fallback;
  length = strcspn(value, ":,");
  while (gpu-- > 0 && value[length] == ':') {
    value += length + 1;
    length = strcspn(value, ":,");
  }
  if (length >= SETTING_TEXT) length = SETTING_TEXT - 1;
  memcpy(out, value, length);
  out[length] = '\0';
}

static long long read_number(const char *key, int gpu, const char *fallback) {
  char text[SETTING_TEXT];
  machine_setting(key, gpu, fallback, text);
  return strtoll(text, NULL, 10);
}

int machine_gpus(void) {
  long long count = read_number("count", 0, "1");
  if (count < 0) return 0;
  return count > MAX_GPUS ? MAX_GPUS : (int)count;
}

/* Limits for cgroups came with CUDA 13.4. */
int machine_driver_version(void) {
  return (int)read_number("driver", 0, cgroups_backend(0) == NO_BACKEND ? "13000" : "13040");
}
int machine_error(const char *key, int gpu) { return (int)read_number(key, gpu, "0"); }
void machine_driver_release(char *out, size_t room) {
  char text[SETTING_TEXT];
  machine_setting("release", 0, cgroups_backend(0) == NO_BACKEND ? "580.00.00" : "615.00.00", text);
  snprintf(out, room, "%s", text);
}

/* ---- places: GPUs and their MIG instances */

int machine_instance_place(int gpu, int instance) { return MAX_GPUS + gpu * MAX_INSTANCES + instance; }
int machine_gpu_of(int place) { return place < MAX_GPUS ? place : (place - MAX_GPUS) / MAX_INSTANCES; }
int machine_instance_of(int place) { return place < MAX_GPUS ? -1 : (place - MAX_GPUS) % MAX_INSTANCES; }

/* Reads the sizes of a GPU's MIG instances, and returns how many there are. */
static int read_instances(int gpu, Bytes out[MAX_INSTANCES]) {
  char text[SETTING_TEXT], *rest = text, *item;
  int count = 0;
  machine_setting("mig", gpu, "0", text);
  while ((item = strsep(&rest, "+")) && count < MAX_INSTANCES) {
    out[count] = strtoull(item, NULL, 10) * MIB;
    if (out[count]) count++;
  }
  return count;
}

int machine_instances(int gpu) {
  Bytes sizes[MAX_INSTANCES];
  return read_instances(gpu, sizes);
}

int machine_has(int place) {
  int gpu = machine_gpu_of(place);
  return place >= 0 && gpu < machine_gpus() && machine_instance_of(place) < machine_instances(gpu);
}

Bytes machine_memory(int place) {
  Bytes sizes[MAX_INSTANCES] = {0};
  if (place < MAX_GPUS) return (Bytes)read_number("memory_mib", place, "16384") * MIB;
  read_instances(machine_gpu_of(place), sizes);
  return sizes[machine_instance_of(place)];
}

Bytes machine_reserved(int place) {
  Bytes reserved = (Bytes)read_number("reserved_mib", place, "0") * MIB, total = machine_memory(place);
  if (place >= MAX_GPUS) return 0;
  return reserved < total ? reserved : total;
}

Bytes machine_usable(int place) { return machine_memory(place) - machine_reserved(place); }
Bytes machine_context(int place) { return (Bytes)read_number("context_mib", machine_gpu_of(place), "0") * MIB; }

int machine_multiprocessors(int place) { return (int)read_number("multiprocessors", machine_gpu_of(place), "108"); }
int machine_utilisation(int gpu) { return (int)read_number("utilisation", gpu, "0"); }
int machine_pci_bus(int place) { return machine_gpu_of(place) + 1; }

/* Names an instance as NVIDIA does, "MIG 3g.20gb": in sevenths of the GPU, with its memory. */
void machine_name(int place, char *out, size_t room) {
  char text[SETTING_TEXT];
  int gpu = machine_gpu_of(place);
  machine_setting("name", gpu, "Simulated GPU", text);
  if (place < MAX_GPUS) {
    snprintf(out, room, "%s", text);
    return;
  }
  Bytes whole = machine_memory(gpu), part = machine_memory(place);
  Bytes sevenths = whole ? part * MAX_INSTANCES / whole : 0;
  snprintf(out, room, "%.60s MIG %llug.%llugb", text, sevenths ? sevenths : 1, (part + (MIB << 9)) >> 30);
}

void machine_capability(int place, int *major, int *minor) {
  char text[SETTING_TEXT];
  machine_setting("capability", machine_gpu_of(place), "8.0", text);
  *major = *minor = 0;
  sscanf(text, "%d.%d", major, minor);
}

/* GPUs: a0fa4e00-0000-4000-8000-000000000000, a1...01, and so on. Their MIG instances: a010..., a011....
 * The first bytes tell them apart, so that a short beginning of a UUID is enough to name one. */
void machine_uuid(int place, unsigned char out[UUID_BYTES]) {
  static const unsigned char pattern[UUID_BYTES] = {0xa0, 0xfa, 0x4e, 0, 0, 0, 0x40, 0, 0x80};
  int gpu = machine_gpu_of(place), instance = machine_instance_of(place);
  memcpy(out, pattern, UUID_BYTES);
  out[0] = (unsigned char)(pattern[0] + gpu);
  if (instance >= 0) out[1] = (unsigned char)(0x10 + instance);
  out[UUID_BYTES - 2] = (unsigned char)(instance + 1);
  out[UUID_BYTES - 1] = (unsigned char)gpu;
}

void machine_uuid_text(int place, char out[UUID_TEXT]) {
  unsigned char u[UUID_BYTES];
  machine_uuid(place, u);
  snprintf(out, UUID_TEXT, "%s-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
           place < MAX_GPUS ? "GPU" : "MIG", u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8], u[9],
           u[10], u[11], u[12], u[13], u[14], u[15]);
}

/* ---- what processes hold: a running account of the log, read on from where it was left */

typedef struct {
  Holding *items;
  size_t count, room;
  long offset; /* what was read of the log, in bytes */
} Account;

static Account account;
static pthread_mutex_t account_lock = PTHREAD_MUTEX_INITIALIZER;

static Holding *holding_of(int pid, int place) {
  for (size_t i = 0; i < account.count; i++)
    if (account.items[i].pid == pid && account.items[i].place == place) return &account.items[i];
  if (account.count == account.room) {
    account.room = account.room ? 2 * account.room : 64;
    account.items = realloc(account.items, account.room * sizeof *account.items);
    if (!account.items) abort();
  }
  account.items[account.count] = (Holding){place, pid, 0, 0, 0};
  return &account.items[account.count++];
}

/* Forgets what a process holds: one that opens CUDA starts with nothing, whoever had its number before. */
static void forget_process(int pid) {
  for (size_t i = 0; i < account.count; i++)
    if (account.items[i].pid == pid) account.items[i].bytes = account.items[i].managed = 0;
  cgroups_forget_process(pid);
}

static void take_record(const char *line) {
  int pid, gpu, instance, place;
  long long bytes;
  char operation[16];
  if (sscanf(line, "{\"pid\": %d, \"op\": \"%15[a-zA-Z]\", \"gpu\": %d, \"instance\": %d, \"bytes\": %lld",
             &pid, operation, &gpu, &instance, &bytes) != 5)
    return;
  place = instance < 0 ? gpu : machine_instance_place(gpu, instance);
  if (!strcmp(operation, "cuInit")) forget_process(pid);
  if (!strcmp(operation, "alloc") || !strcmp(operation, "context")) holding_of(pid, place)->bytes += bytes;
  if (!strcmp(operation, "free") || !strcmp(operation, "closed")) holding_of(pid, place)->bytes -= bytes;
  if (strstr(line, MANAGED_ALLOC)) holding_of(pid, place)->managed += strcmp(operation, "alloc") ? 0 : bytes;
  if (strstr(line, MANAGED_FREE)) holding_of(pid, place)->managed -= bytes;
}

static void read_log(void) {
  const char *path = getenv("TFGPU_SIMULATE_LOG");
  FILE *log = path ? fopen(path, "re") : NULL;
  struct stat status;
  char line[512];
  if (!log) return;
  if (!fstat(fileno(log), &status) && status.st_size < account.offset) /* emptied by somebody */
    account.count = 0, account.offset = 0, cgroups_forget_all();
  if (!fseek(log, account.offset, SEEK_SET))
    while (fgets(line, sizeof line, log) && strchr(line, '\n')) {
      account.offset += (long)strlen(line);
      take_record(line);
      cgroups_take_record(line);
    }
  fclose(log);
}

/* Tells whether a process still runs. One that ended holds no GPU memory, waited for or not. */
static int is_alive(int pid) {
  char path[32], line[512], *after_name;
  FILE *stat;
  int alive = 0;
  if (kill(pid, 0) && errno != EPERM) return 0;
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  if (!(stat = fopen(path, "re"))) return 1; /* hidden by hidepid: believe kill */
  if (fgets(line, sizeof line, stat) && (after_name = strrchr(line, ')')))
    alive = strncmp(after_name, ") Z", 3) && strncmp(after_name, ") X", 3);
  fclose(stat);
  return alive;
}

static int read_listed(const char *line, Holding *out) {
  int gpu, instance;
  if (sscanf(line, "%d:%d %d %lld", &gpu, &instance, &out->pid, &out->bytes) == 4) {
    out->place = machine_instance_place(gpu, instance);
    return machine_has(out->place);
  }
  return sscanf(line, "%d %d %lld", &out->place, &out->pid, &out->bytes) == 3 && machine_has(out->place);
}

static void each_listed(void (*visit)(void *, const Holding *), void *context) {
  static int said;
  const char *path = getenv("TFGPU_SIMULATE_PROCESSES");
  FILE *list = path ? fopen(path, "re") : NULL;
  char line[256];
  Holding holding = {.listed = 1};
  while (list && fgets(line, sizeof line, list))
    if (read_listed(line, &holding)) {
      holding.bytes *= (long long)MIB;
      visit(context, &holding);
    }
  if (path && (!list || ferror(list))) complain(&said, "cannot read", path);
  if (list) fclose(list);
}

void machine_each_holding(void (*visit)(void *context, const Holding *holding), void *context) {
  each_listed(visit, context);
  pthread_mutex_lock(&account_lock);
  read_log();
  for (size_t i = 0; i < account.count; i++)
    if (account.items[i].bytes > 0 && is_alive(account.items[i].pid))
      visit(context, &account.items[i]);
  pthread_mutex_unlock(&account_lock);
}

/* ---- the log */

static int said_of_log;

int log_open(void) {
  const char *path = getenv("TFGPU_SIMULATE_LOG");
  int log;
  if (!path) return -1;
  log = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (log < 0) complain(&said_of_log, "cannot write", path);
  else flock(log, LOCK_EX);
  return log;
}

void log_write(int log, const char *operation, int place, Bytes bytes, Bytes held, const char *call) {
  char line[256];
  int length = snprintf(line, sizeof line,
                        "{\"pid\": %d, \"op\": \"%s\", \"gpu\": %d, \"instance\": %d, \"bytes\": %llu, "
                        "\"held\": %llu, \"call\": \"%s\"}\n",
                        getpid(), operation, machine_gpu_of(place), machine_instance_of(place), bytes, held, call);
  if (log >= 0 && write(log, line, (size_t)length) != length) complain(&said_of_log, "cannot write", "the log of requests");
}

void log_close(int log) {
  if (log >= 0) close(log);
}
