/* Stub libnvrtc, the compiler of CUDA source at run time. PyTorch compiles some of its kernels when they are first used.
 * What comes out is empty: the driver loads anything. */
#include <stddef.h>

#define API __attribute__((visibility("default")))
#define NO_EFFECT(name) \
  API int name(void) { return 0; }

API int nvrtcVersion(int *major, int *minor) {
  *major = TOOLKIT_MAJOR;
  *minor = 0;
  return 0;
}

API int nvrtcCreateProgram(void **program) {
  static char something;
  *program = &something;
  return 0;
}
NO_EFFECT(nvrtcDestroyProgram)
NO_EFFECT(nvrtcAddNameExpression)
NO_EFFECT(nvrtcCompileProgram)

API int nvrtcGetLoweredName(void *program, const char *expression, const char **out) {
  (void)program;
  *out = expression;
  return 0;
}

#define EMPTY(size_name, text_name)                    \
  API int size_name(void *program, size_t *size) {     \
    (void)program;                                     \
    *size = 1;                                         \
    return 0;                                          \
  }                                                    \
  API int text_name(void *program, char *out) {        \
    (void)program;                                     \
    *out = '\0';                                       \
    return 0;                                          \
  }
EMPTY(nvrtcGetPTXSize, nvrtcGetPTX)
EMPTY(nvrtcGetCUBINSize, nvrtcGetCUBIN)
EMPTY(nvrtcGetProgramLogSize, nvrtcGetProgramLog)

API const char *nvrtcGetErrorString(int result) { return result ? "not simulated" : "success"; }
