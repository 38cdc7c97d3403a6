/* Stub maths library, built once for each of cuBLAS, cuBLASLt, cuDNN, cuFFT, cuSOLVER, cuSPARSE and some more.
 * TensorFlow refuses every GPU unless it can open them all, then asks cuDNN's version. JAX asks the version of each.
 * Matrix products "succeed" without computing. An operation that needs more gets an error: those in symbols.dat
 * fail, and of others TensorFlow's own wrapper reports that they are missing.
 * CUDNN_MAJOR, CUDNN_MINOR: which cuDNN this is, by its soname. TOOLKIT_MAJOR: of which CUDA the library is. */
#include <stddef.h>

#define API __attribute__((visibility("default")))
#define UNUSED __attribute__((unused))
#define NO_EFFECT(name) \
  API int name(void) { return 0; }

/* ---- versions: 8907 for 8.9.7, 90300 for 9.3.0 */

API size_t cudnnGetVersion(void) {
  return CUDNN_MAJOR < 9 ? CUDNN_MAJOR * 1000 + CUDNN_MINOR * 100 + 7 : CUDNN_MAJOR * 10000 + CUDNN_MINOR * 100;
}

/* Major, minor, patch are the parts 0, 1, 2. */
static int version_part(int major, int minor, int patch, int part, int *value) {
  const int version[] = {major, minor, patch};
  *value = part >= 0 && part < 3 ? version[part] : 0;
  return 0;
}

enum { IS_12 = TOOLKIT_MAJOR == 12 };

API int cudnnGetProperty(int part, int *value) {
  return version_part(CUDNN_MAJOR, CUDNN_MINOR, CUDNN_MAJOR < 9 ? 7 : 0, part, value);
}
API int cublasGetProperty(int part, int *value) { return version_part(IS_12 ? 12 : 13, IS_12 ? 9 : 2, 1, part, value); }
API int cusolverGetProperty(int part, int *value) { return version_part(IS_12 ? 11 : 12, 7, 5, part, value); }
API int cufftGetProperty(int part, int *value) { return version_part(IS_12 ? 11 : 12, 4, 1, part, value); }
API int cusparseGetProperty(int part, int *value) { return version_part(12, 7, 10, part, value); } /* of both */

API int cublasGetVersion_v2(void *handle UNUSED, int *version) {
  *version = IS_12 ? 120503 : 130201;
  return 0;
}

API int cufftGetVersion(int *version) {
  *version = IS_12 ? 11401 : 12401;
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
API int cusolverDnCreate(void **handle) { return create(handle); }
API int cusparseCreate(void **handle) { return create(handle); }
NO_EFFECT(cusolverDnDestroy)
NO_EFFECT(cusolverDnSetStream)
NO_EFFECT(cusparseDestroy)
NO_EFFECT(cusparseSetStream)

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

/* ---- matrix products: those of cuBLAS are in symbols.dat. cuBLASLt describes them first, and is asked how it would go
 * about one */

API int cublasLtMatmulDescCreate(void **out) { return create(out); }
API int cublasLtMatrixLayoutCreate(void **out) { return create(out); }
API int cublasLtMatmulPreferenceCreate(void **out) { return create(out); }
NO_EFFECT(cublasLtMatmulDescDestroy)
NO_EFFECT(cublasLtMatrixLayoutDestroy)
NO_EFFECT(cublasLtMatmulPreferenceDestroy)
NO_EFFECT(cublasLtMatmulDescSetAttribute)
NO_EFFECT(cublasLtMatrixLayoutSetAttribute)
NO_EFFECT(cublasLtMatmulPreferenceSetAttribute)
NO_EFFECT(cublasLtMatmul)

/* What was set is not kept. */
static int get_attribute(char *out, size_t size, size_t *written) {
  for (size_t i = 0; i < size; i++) out[i] = 0;
  if (written) *written = size;
  return 0;
}

API int cublasLtMatmulDescGetAttribute(void *handle UNUSED, int attribute UNUSED, char *out, size_t size, size_t *written) {
  return get_attribute(out, size, written);
}
API int cublasLtMatrixLayoutGetAttribute(void *handle UNUSED, int attribute UNUSED, char *out, size_t size, size_t *written) {
  return get_attribute(out, size, written);
}

API int cublasLtMatmulAlgoGetHeuristic(void *handle UNUSED, void *operation UNUSED, void *a UNUSED, void *b UNUSED,
                                       void *c UNUSED, void *d UNUSED, void *preference UNUSED, int wanted UNUSED,
                                       char *out, int *found) {
  enum { RESULT_BYTES = 96 }; /* cublasLtMatmulHeuristicResult_t */
  for (int i = 0; i < RESULT_BYTES; i++) out[i] = 0;
  *found = 1;
  return 0;
}

/* ---- errors */

#define ERROR_TEXT(name) \
  API const char *name(int result) { return result ? "not simulated" : "success"; }
ERROR_TEXT(cudnnGetErrorString)
ERROR_TEXT(cublasGetStatusString)
ERROR_TEXT(cusparseGetErrorString)
