/* Stub libcupti.so.12 and libcupti.so.13, the profiler. JAX refuses CUDA unless it tells its version. */
#include <stdint.h>

#define API __attribute__((visibility("default")))

API int cuptiGetVersion(uint32_t *version) {
  *version = 24; /* of CUDA 12.6 */
  return 0;
}

API int cuptiGetResultString(int result, const char **out) {
  *out = result ? "not simulated" : "success";
  return 0;
}
