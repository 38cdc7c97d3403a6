/* Stub libnccl.so.2, which sums over GPUs and processes. Communicators are made and every operation "succeeds" at once.
 * Nobody waits for anybody, and nothing is sent. Other functions fail. */
#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
#define NO_EFFECT(name) \
  API int name(void) { return SUCCESS; }

enum { SUCCESS = 0, SYSTEM_ERROR = 2 };

typedef struct {
  char bytes[128];
} UniqueId;
typedef struct {
  int ranks, rank;
} Communicator;

API int ncclGetVersion(int *version) {
  *version = 22800;
  return SUCCESS;
}

API const char *ncclGetErrorString(int result) { return result ? "not simulated" : "success"; }
API const char *ncclGetLastError(void) { return "not simulated"; }

/* ---- communicators */

static int create(Communicator **out, int ranks, int rank) {
  *out = malloc(sizeof **out);
  if (!*out) return SYSTEM_ERROR;
  **out = (Communicator){ranks, rank};
  return SUCCESS;
}

API int ncclGetUniqueId(UniqueId *out) {
  memset(out, 0, sizeof *out);
  return SUCCESS;
}

API int ncclCommInitAll(Communicator **out, int ranks) {
  int result = SUCCESS;
  for (int rank = 0; rank < ranks && !result; rank++) result = create(&out[rank], ranks, rank);
  return result;
}
API int ncclCommInitRank(Communicator **out, int ranks, UniqueId id UNUSED, int rank) {
  return create(out, ranks, rank);
}
API int ncclCommInitRankConfig(Communicator **out, int ranks, UniqueId id UNUSED, int rank) {
  return create(out, ranks, rank);
}
API int ncclCommInitRankScalable(Communicator **out, int ranks, int rank) { return create(out, ranks, rank); }

/* Everybody stays together, whatever its colour. */
API int ncclCommSplit(Communicator *from, int colour UNUSED, int key UNUSED, Communicator **out) {
  return create(out, from->ranks, from->rank);
}

API int ncclCommCount(Communicator *communicator, int *ranks) {
  *ranks = communicator->ranks;
  return SUCCESS;
}

API int ncclCommUserRank(Communicator *communicator, int *rank) {
  *rank = communicator->rank;
  return SUCCESS;
}

API int ncclCommGetAsyncError(Communicator *communicator UNUSED, int *error) {
  *error = SUCCESS;
  return SUCCESS;
}

API int ncclCommDestroy(Communicator *communicator) {
  free(communicator);
  return SUCCESS;
}
API int ncclCommAbort(Communicator *communicator) { return ncclCommDestroy(communicator); }
NO_EFFECT(ncclCommFinalize)

/* Memory that is registered goes faster. */
API int ncclCommRegister(Communicator *communicator, void *start UNUSED, size_t size UNUSED, void **handle) {
  *handle = communicator;
  return SUCCESS;
}
NO_EFFECT(ncclCommDeregister)

/* ---- operations */

NO_EFFECT(ncclGroupStart)
NO_EFFECT(ncclGroupEnd)
NO_EFFECT(ncclAllGather)
NO_EFFECT(ncclAllReduce)
NO_EFFECT(ncclAlltoAll)
NO_EFFECT(ncclBcast)
NO_EFFECT(ncclBroadcast)
NO_EFFECT(ncclGather)
NO_EFFECT(ncclReduce)
NO_EFFECT(ncclReduceScatter)
NO_EFFECT(ncclScatter)
NO_EFFECT(ncclSend)
NO_EFFECT(ncclRecv)

API int ncclRedOpCreatePreMulSum(int *operation) {
  *operation = 0;
  return SUCCESS;
}
NO_EFFECT(ncclRedOpDestroy)
