/* Devices and contexts: every device is an H100 but for its capability. */

#include "fake_cuda.h"
#include <stdio.h>

__thread int current;
__thread intptr_t context;

static int setting(const char *name, int otherwise) {
  const char *text = getenv(name);
  return text ? atoi(text) : otherwise;
}
int device_count(void) {
  static int count;
  if (!count) count = setting("FAKE_CUDA_DEVICES", 1);
  return count < 1 ? 1 : count > MAX_DEVICES ? MAX_DEVICES : count;
}
int capability(void) {
  static int value;
  if (!value) value = setting("FAKE_CUDA_CAPABILITY", 90);
  return value;
}

int has_primary_context[MAX_DEVICES];

/* The runtime makes the primary context of its device current where none is, else takes its device from the context. */
void attach(void) {
  if (!context) context = current + 1;
  current = context - 1;
  has_primary_context[current] = 1;
}

cudaError_t cudaGetDeviceCount(int *count) { return *count = device_count(), cudaSuccess; }
cudaError_t cudaGetDevice(int *device) { return *device = context ? context - 1 : current, cudaSuccess; }
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= device_count()) return refuse_quietly(cudaErrorInvalidDevice, "there is no such device");
  current = device, context = device + 1, has_primary_context[device] = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int *version) { return *version = 13000, cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { return *version = 13000, cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *properties, int device) {
  if (device < 0 || device >= device_count()) return refuse_quietly(cudaErrorInvalidDevice, "there is no such device");
  *properties = (struct cudaDeviceProp){.totalGlobalMem = 80 * GIB,
                                        .sharedMemPerBlock = 49152,
                                        .sharedMemPerBlockOptin = SHARED_PER_BLOCK,
                                        .sharedMemPerMultiprocessor = 233472,
                                        .regsPerBlock = 65536,
                                        .regsPerMultiprocessor = 65536,
                                        .warpSize = 32,
                                        .maxThreadsPerBlock = 1024,
                                        .maxThreadsDim = {1024, 1024, 64},
                                        .maxGridSize = {2147483647, 65535, 65535},
                                        .maxThreadsPerMultiProcessor = 2048,
                                        .maxBlocksPerMultiProcessor = 32,
                                        .multiProcessorCount = 132,
                                        .l2CacheSize = 50 << 20,
                                        .totalConstMem = 65536,
                                        .memPitch = 2147483647,
                                        .textureAlignment = 512,
                                        .memoryBusWidth = 5120,
                                        .unifiedAddressing = 1,
                                        .major = capability() / 10,
                                        .minor = capability() % 10};
  snprintf(properties->name, sizeof properties->name, "Fake CUDA device %d", device);
  properties->uuid.bytes[0] = device + 1;
  return cudaSuccess;
}

int attribute_value(int attribute) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return capability() / 10;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return capability() % 10;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return 132;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return 32;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return 1024;
  case CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR: return 2048;
  case CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X: return 2147483647;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return 65536;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK: return 49152;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return SHARED_PER_BLOCK;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return 233472;
  case CU_DEVICE_ATTRIBUTE_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE:
  case CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH: return 1;
  default: return 0; /* optional features */
  }
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  return *value = attribute_value(attribute), cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { return *can = device != peer, cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int length, int device) {
  return snprintf(id, length, "0000:%02x:00.0", device), cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
cudaError_t cudaProfilerStart(void) { return cudaSuccess; }
cudaError_t cudaProfilerStop(void) { return cudaSuccess; }
