/* The simulated machine (see machine.h): settings from the environment, memory held by the
 * processes in the log and in the list of other users' processes, and the log itself. */
#define _GNU_SOURCE
#include "machine.h"

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

/* ---- settings */

/* Where the value of `key` starts in TFGPU_SIMULATE; NULL when the key is not there. */
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
static void read_setting(const char *key, int gpu, const char *fallback, char out[SETTING_TEXT]) {
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
  read_setting(key, gpu, fallback, text);
  return strtoll(text, NULL, 10);
}

int machine_gpus(void) {
  long long count = read_number("count", 0, "1");
  if (count < 0) return 0;
  return count > MAX_GPUS ? MAX_GPUS : (int)count;
}

int machine_driver_version(void) { return (int)read_number("driver", 0, "12080"); }
Bytes machine_memory(int gpu) { return (Bytes)read_number("memory_mib", gpu, "16384") * MIB; }
int machine_multiprocessors(int gpu) { return (int)read_number("multiprocessors", gpu, "108"); }
int machine_utilisation(int gpu) { return (int)read_number("utilisation", gpu, "0"); }
int machine_is_mig(int gpu) { return read_number("mig", gpu, "0") != 0; }
int machine_pci_bus(int gpu) { return gpu + 1; }

void machine_name(int gpu, char *out, size_t room) {
  char text[SETTING_TEXT];
  read_setting("name", gpu, "Simulated GPU", text);
  snprintf(out, room, "%s", text);
}

void machine_capability(int gpu, int *major, int *minor) {
  char text[SETTING_TEXT];
  read_setting("capability", gpu, "8.0", text);
  *major = *minor = 0;
  sscanf(text, "%d.%d", major, minor);
}

/* a0fa4e00-0000-4000-8000-000000000000, a1...01, and so on: the first byte tells GPUs apart, so
 * that a short beginning of a UUID is enough to name one. */
void machine_uuid(int gpu, unsigned char out[UUID_BYTES]) {
  static const unsigned char pattern[UUID_BYTES] = {0xa0, 0xfa, 0x4e, 0, 0, 0, 0x40, 0, 0x80};
  memcpy(out, pattern, UUID_BYTES);
  out[0] = (unsigned char)(pattern[0] + gpu);
  out[UUID_BYTES - 1] = (unsigned char)gpu;
}

void machine_uuid_text(int gpu, char out[UUID_TEXT]) {
  unsigned char u[UUID_BYTES];
  machine_uuid(gpu, u);
  snprintf(out, UUID_TEXT, "%s-%02x%02x%02x%02x-%02x%02x-%02x%02x-%02x%02x-%02x%02x%02x%02x%02x%02x",
           machine_is_mig(gpu) ? "MIG" : "GPU", u[0], u[1], u[2], u[3], u[4], u[5], u[6], u[7], u[8],
           u[9], u[10], u[11], u[12], u[13], u[14], u[15]);
}

/* ---- what processes hold: a running account of the log, read on from where it was left */

typedef struct {
  Holding *items;
  size_t count, room;
  long offset; /* what was read of the log, in bytes */
} Account;

static Account account;
static pthread_mutex_t account_lock = PTHREAD_MUTEX_INITIALIZER;

static Holding *holding_of(int pid, int gpu) {
  for (size_t i = 0; i < account.count; i++)
    if (account.items[i].pid == pid && account.items[i].gpu == gpu) return &account.items[i];
  if (account.count == account.room) {
    account.room = account.room ? 2 * account.room : 64;
    account.items = realloc(account.items, account.room * sizeof *account.items);
    if (!account.items) abort();
  }
  account.items[account.count] = (Holding){gpu, pid, 0, 0};
  return &account.items[account.count++];
}

/* A process that opens CUDA starts with nothing, whoever had its number before. */
static void forget_process(int pid) {
  for (size_t i = 0; i < account.count; i++)
    if (account.items[i].pid == pid) account.items[i].bytes = 0;
}

static void take_record(const char *line) {
  int pid, gpu;
  long long bytes;
  char operation[16];
  if (sscanf(line, "{\"pid\": %d, \"op\": \"%15[a-zA-Z]\", \"gpu\": %d, \"bytes\": %lld", &pid,
             operation, &gpu, &bytes) != 4)
    return;
  if (!strcmp(operation, "cuInit")) forget_process(pid);
  if (!strcmp(operation, "alloc")) holding_of(pid, gpu)->bytes += bytes;
  if (!strcmp(operation, "free")) holding_of(pid, gpu)->bytes -= bytes;
}

static void read_log(void) {
  const char *path = getenv("TFGPU_SIMULATE_LOG");
  FILE *log = path ? fopen(path, "re") : NULL;
  struct stat status;
  char line[512];
  if (!log) return;
  if (!fstat(fileno(log), &status) && status.st_size < account.offset) /* emptied by somebody */
    account.count = 0, account.offset = 0;
  if (!fseek(log, account.offset, SEEK_SET))
    while (fgets(line, sizeof line, log) && strchr(line, '\n')) {
      account.offset += (long)strlen(line);
      take_record(line);
    }
  fclose(log);
}

/* Whether a process still runs; one that ended holds no GPU memory, waited for or not. */
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

static void each_listed(void (*visit)(void *, const Holding *), void *context) {
  const char *path = getenv("TFGPU_SIMULATE_PROCESSES");
  FILE *list = path ? fopen(path, "re") : NULL;
  char line[256];
  Holding holding = {.listed = 1};
  if (!list) return;
  while (fgets(line, sizeof line, list))
    if (sscanf(line, "%d %d %lld", &holding.gpu, &holding.pid, &holding.bytes) == 3) {
      holding.bytes *= (long long)MIB;
      visit(context, &holding);
    }
  fclose(list);
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

static void complain(const char *path) {
  static int said;
  if (!said++) fprintf(stderr, "tfgpu simulate: cannot write %s: %s\n", path, strerror(errno));
}

int log_open(void) {
  const char *path = getenv("TFGPU_SIMULATE_LOG");
  int log;
  if (!path) return -1;
  log = open(path, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0666);
  if (log < 0) complain(path);
  else flock(log, LOCK_EX);
  return log;
}

void log_write(int log, const char *operation, int gpu, Bytes bytes, Bytes held, const char *call) {
  char line[256];
  int length = snprintf(line, sizeof line,
                        "{\"pid\": %d, \"op\": \"%s\", \"gpu\": %d, \"bytes\": %llu, \"held\": %llu, "
                        "\"call\": \"%s\"}\n",
                        getpid(), operation, gpu, bytes, held, call);
  if (log >= 0 && write(log, line, (size_t)length) != length) complain("the log of requests");
}

void log_close(int log) {
  if (log >= 0) close(log);
}
