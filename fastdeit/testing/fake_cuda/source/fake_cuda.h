/* A CUDA runtime, cuBLAS and driver whose kernels and GEMMs do nothing, for machines without a GPU.

   The library is preloaded and named libcuda.so.1. Its symbols take precedence over those of libcudart and libcublas, so that
   PyTorch and Triton run their CUDA code unchanged: dispatch, autocast, caching allocator, streams, graph capture, launches.
   Device memory is host memory that reads as zeros: kernels, copies to it and memset leave it as it is, so that what a program
   reads is the same in every run, whatever the memory was used for before. Copies can be switched on (fake_cuda_move_data).

   Every call that reaches the device is counted by kind and, while recording, kept as an event. What CUDA would refuse is
   refused with CUDA's error code and a message that is kept: waits and allocations inside a capture, streams of another device,
   foreign pointers, launches outside the hardware's limits, malformed tensor maps. Two simplifications: work completes at once,
   and one capture runs at a time. A function that is missing here is the real library's, which fails since no driver answers
   it.

   Environment: FAKE_CUDA_DEVICES (default 1), FAKE_CUDA_CAPABILITY (10 * major + minor, default 90). The ABI is that of
   CUDA 13. */

#pragma once
#define _GNU_SOURCE
#define __CUDA_API_VERSION_INTERNAL /* no macros that rename functions to their latest version */
#define __CUDA_FP16_H__ /* headers that the wheels leave incomplete; cuBLAS's needs the names of two types of them */
#define __CUDA_BF16_H__
typedef short __half, __nv_bfloat16;

#pragma GCC visibility push(default) /* the rest is hidden (-fvisibility=hidden): a preloaded name would replace others' */
#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#pragma GCC visibility pop
#define EXPORTED __attribute__((visibility("default")))

#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_DEVICES 16
#define MAX_STREAMS 1024
#define MAX_PARAMETERS 64
#define GIB (1ull << 30)
#define SHARED_PER_BLOCK 232448

extern pthread_mutex_t fake_cuda_mutex; /* recursive */
/* Runs the statement that follows with the lock held. It must not return, break or continue. */
#define LOCKED \
  for (int held = (pthread_mutex_lock(&fake_cuda_mutex), 1); held; held = (pthread_mutex_unlock(&fake_cuda_mutex), 0))

/* ---- events.c: counts, events and errors */

#define KINDS(K)                                                                                                        \
  K(LAUNCH, "launch")                                                                                                   \
  K(TRITON_LAUNCH, "triton_launch")                                                                                     \
  K(GEMM, "gemm")                                                                                                       \
  K(MEMSET, "memset")                                                                                                   \
  K(TO_DEVICE, "copy_to_device")                                                                                        \
  K(PAGEABLE_TO_DEVICE, "copy_to_device_pageable") K(FROM_DEVICE, "copy_from_device")                                   \
      K(PAGEABLE_FROM_DEVICE, "copy_from_device_pageable") K(ON_DEVICE, "copy_on_device")                               \
          K(BETWEEN_DEVICES, "copy_between_devices") K(SYMBOL_COPY, "copy_symbol") K(WAIT_STREAM, "wait_stream")        \
              K(WAIT_DEVICE, "wait_device") K(WAIT_EVENT, "wait_event") K(WAIT_COPY, "wait_copy") K(QUERY, "query")     \
                  K(RECORD_EVENT, "record_event") K(STREAM_WAIT, "stream_wait_event") K(HOST_FUNCTION, "host_function") \
                      K(ALLOCATION, "allocation") K(RELEASE, "release") K(HOST_ALLOCATION, "host_allocation")           \
                          K(CAPTURE, "capture") K(GRAPH_LAUNCH, "graph_launch") K(MODULE_LOAD, "module_load")           \
                              K(ERROR, "error")
#define IDENTIFIER(id, name) id,
enum { KINDS(IDENTIFIER) KIND_COUNT };

typedef struct {
  int kind, device;
  uint64_t stream;
  char *name; /* of the kernel or GEMM, or the text of an error */
  unsigned grid[3], block[3];
  uint64_t bytes; /* copied or allocated, or shared memory of a launch */
  int count;      /* of arguments, of a Triton launch or a GEMM */
  int size[MAX_PARAMETERS];
  unsigned char *arguments; /* one after the other */
} Event;

/* Counts an event; while recording keeps it with its name and the bytes of its arguments. */
void note_event(Event event, const char *name, void **arguments);
#define NOTE(kind_, name_, ...) note_event((Event){.kind = kind_, ##__VA_ARGS__}, name_, NULL)
void note_wait(int kind, const char *name, cudaStream_t stream);
/* Keeps the message of an error and returns its code, which is also the thread's last error. */
int refuse(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for the driver API, whose errors are none of the runtime's last ones. */
int refuse_in_driver(int code, const char *format, ...) __attribute__((format(printf, 2, 3)));
/* The same for what a caller may try without being wrong: nothing is kept. */
int refuse_quietly(int code, const char *text);
const char *last_message(void);
extern int recording, checks_pointers;

/* ---- devices.c */

extern __thread int current;      /* device of the runtime API in this thread */
extern __thread intptr_t context; /* of the driver API: device + 1, 0 for none */
extern int has_primary_context[MAX_DEVICES];
int device_count(void);
int capability(void);
int attribute_value(int attribute); /* the runtime and the driver number them alike */
void attach(void);                  /* makes a context current in this thread, as the runtime does */

/* ---- memory.c */

enum { PINNED = -1, UNKNOWN = -2 };
typedef struct {
  char *start;
  size_t size;
  int device; /* or PINNED */
} Range;
Range *find_range(const void *address); /* NULL if it is in no allocation; to be called with the lock held */
int device_of(const void *address);     /* or PINNED, or UNKNOWN */
int within_allocation(const void *address, size_t size);

/* ---- streams.c */

typedef struct Stream Stream;
Stream *stream_of(cudaStream_t handle); /* NULL, and an error, if the handle is none */
int is_capturing(cudaStream_t handle);
int device_of_stream(const Stream *stream);
cudaError_t issue(cudaStream_t handle, const char *what); /* before anything is issued to a stream */
cudaError_t capture_status(cudaStream_t handle, enum cudaStreamCaptureStatus *status);
int invalidate(int code, const char *what); /* an error that ends the capture, if there is one */
int prohibits_unsafe_calls(void);           /* whether a capture does, in this thread */
#define UNSAFE(what) \
  if (prohibits_unsafe_calls()) return invalidate(cudaErrorStreamCaptureUnsupported, what)

/* ---- kernels.c */

int outside_limits(dim3 grid, dim3 block);
EXPORTED void **__cudaRegisterFatBinary(void *binary);
EXPORTED void __cudaRegisterFatBinaryEnd(void **handle);
EXPORTED void __cudaUnregisterFatBinary(void **handle);
EXPORTED char __cudaInitModule(void **handle);
EXPORTED void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t size,
                                int constant, int global);
EXPORTED void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int limit,
                                     void *thread, void *block, void *block_size, void *grid_size, int *warp_size);
EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream);
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream);
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function);
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream);
