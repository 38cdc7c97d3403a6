/* What the parts of the stub CUDA runtime share. */
#pragma once
#include "driver.h"

#include <stdlib.h>

int runtime_result(int result); /* keeps an error for cudaGetLastError, and returns it */

/* Something to point at. The stub libcuda.so.1 keeps its own function for this to itself. */
static inline int runtime_new_handle(void **out) {
  *out = calloc(1, 64);
  return *out ? SUCCESS : OUT_OF_MEMORY;
}

API int cudaSetDevice(int device);
