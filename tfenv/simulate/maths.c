/* Stub maths library, built once for each of cuBLAS, cuBLASLt, cuDNN, cuFFT, cuSOLVER and cuSPARSE.
 * TensorFlow refuses every GPU unless it can open them all, then asks cuDNN's version. Matrix products
 * "succeed" without computing. An operation that needs more gets an error: TensorFlow's own wrapper
 * reports a missing symbol. CUDNN_MAJOR, CUDNN_MINOR: which cuDNN this is, by its soname. */
#include <stddef.h>

#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
#define NO_EFFECT(name) \
  API int name(void) { return 0; }

/* ---- versions: 8907 for 8.9.7, 90300 for 9.3.0 */

API size_t cudnnGetVersion(void) {
  return CUDNN_MAJOR < 9 ? CUDNN_MAJOR * 1000 + CUDNN_MINOR * 100 + 7 : CUDNN_MAJOR * 10000 + CUDNN_MINOR * 100;
}

API int cudnnGetProperty(int part, int *value) {
  const int version[] = {CUDNN_MAJOR, CUDNN_MINOR, CUDNN_MAJOR < 9 ? 7 : 0};
  *value = part >= 0 && part < 3 ? version[part] : 0;
  return 0;
}

API int cublasGetVersion_v2(void *handle UNUSED, int *version) {
  *version = 120503;
  return 0;
}

/* ---- handles */

static int create(void **handle) {
  static char something;
  *handle = &something;
  return 0;
}

API int cudnnCreate(void **handle) { return create(handle); }
API int cublasCreate_v2(void **handle) { return create(handle); }
API int cublasLtCreate(void **handle) { return create(handle); }
NO_EFFECT(cudnnDestroy)
NO_EFFECT(cudnnSetStream)
NO_EFFECT(cublasDestroy_v2)
NO_EFFECT(cublasLtDestroy)
NO_EFFECT(cublasSetStream_v2)

/* ---- modes */

API int cublasGetMathMode(void *handle UNUSED, int *mode) {
  *mode = 0;
  return 0;
}

API int cublasGetPointerMode_v2(void *handle UNUSED, int *mode) {
  *mode = 0;
  return 0;
}

NO_EFFECT(cublasSetMathMode)
NO_EFFECT(cublasSetPointerMode_v2)
NO_EFFECT(cublasSetWorkspace_v2)

/* ---- matrix products */

NO_EFFECT(cublasSgemv_v2)
NO_EFFECT(cublasSgemm_v2)
NO_EFFECT(cublasGemmEx)
NO_EFFECT(cublasGemmStridedBatchedEx)
NO_EFFECT(cublasSgemmStridedBatched)

/* ---- errors */

API const char *cudnnGetErrorString(int result) { return result ? "not simulated" : "success"; }
API const char *cublasGetStatusString(int result) { return result ? "not simulated" : "success"; }
