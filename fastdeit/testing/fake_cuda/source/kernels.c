/* Kernels that nvcc compiled: PyTorch's own. Their names come from the registration that nvcc generates. */

#include "fake_cuda.h"

typedef struct {
  const void *function;
  const char *name;
} Kernel;
static Kernel *kernels;
static size_t kernel_count, kernel_capacity, sorted_count;
static char fat_binary;

void **__cudaRegisterFatBinary(void *binary) { return (void **)&fat_binary; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 0; }
void __cudaRegisterVar(void **handle, char *variable, char *address, const char *name, int external, size_t size, int constant,
                       int global) {}
void __cudaRegisterFunction(void **handle, const char *function, char *device_function, const char *name, int limit,
                            void *thread, void *block, void *block_size, void *grid_size, int *warp_size) {
  LOCKED {
    if (kernel_count == kernel_capacity) {
      kernel_capacity = kernel_capacity ? 2 * kernel_capacity : 1 << 16;
      kernels = realloc(kernels, kernel_capacity * sizeof *kernels);
    }
    kernels[kernel_count++] = (Kernel){function, name};
  }
}
static int by_address(const void *a, const void *b) {
  const char *x = ((const Kernel *)a)->function, *y = ((const Kernel *)b)->function;
  return (x > y) - (x < y);
}
static const char *kernel_name(const void *function) {
  Kernel wanted = {function, NULL}, *found = NULL;
  LOCKED {
    if (sorted_count != kernel_count) qsort(kernels, sorted_count = kernel_count, sizeof *kernels, by_address);
    found = bsearch(&wanted, kernels, kernel_count, sizeof *kernels, by_address);
  }
  return found ? found->name : "a kernel that was not registered";
}

/* `kernel<<<grid, block, shared, stream>>>(...)` is a push, then a call of the kernel's host function, which pops and launches.
 */
static __thread struct {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
} configurations[8];
static __thread int configuration_count;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  if (configuration_count == 8) return 1;
  configurations[configuration_count].grid = grid;
  configurations[configuration_count].block = block;
  configurations[configuration_count].shared = shared;
  configurations[configuration_count++].stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  configuration_count--;
  *grid = configurations[configuration_count].grid;
  *block = configurations[configuration_count].block;
  *shared = configurations[configuration_count].shared;
  *(cudaStream_t *)stream = configurations[configuration_count].stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  return *kernel = (cudaKernel_t)function, cudaSuccess;
}

int outside_limits(dim3 grid, dim3 block) {
  return !grid.x || grid.x > 2147483647u || !grid.y || grid.y > 65535 || !grid.z || grid.z > 65535 || !block.x || !block.y ||
         !block.z || (uint64_t)block.x * block.y * block.z > 1024;
}
static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  cudaError_t error = issue(stream, "a launch");
  if (error) return error;
  if (outside_limits(grid, block))
    return refuse(cudaErrorInvalidConfiguration, "%s: grid %u %u %u of blocks %u %u %u is outside the limits",
                  kernel_name(function), grid.x, grid.y, grid.z, block.x, block.y, block.z);
  NOTE(LAUNCH, recording ? kernel_name(function) : "", .stream = (uint64_t)stream, .grid = {grid.x, grid.y, grid.z},
       .block = {block.x, block.y, block.z}, .bytes = shared);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  return launch(kernel, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  return launch(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3 grid, dim3 block, void **arguments, size_t shared,
                                        cudaStream_t stream) {
  return launch(function, grid, block, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **arguments) {
  return launch(function, config->gridDim, config->blockDim, config->dynamicSmemBytes, config->stream);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t stream, void (*function)(void *), void *argument) {
  cudaError_t error = issue(stream, "cudaLaunchHostFunc");
  if (error) return error;
  NOTE(HOST_FUNCTION, "cudaLaunchHostFunc", .stream = (uint64_t)stream);
  if (!is_capturing(stream)) function(argument);
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *attributes, const void *function) {
  *attributes = (struct cudaFuncAttributes){
      .maxThreadsPerBlock = 1024, .numRegs = 32, .ptxVersion = capability(), .binaryVersion = capability()};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *function, enum cudaFuncAttribute attribute, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *function, int threads, size_t shared,
                                                                   unsigned flags) {
  return *count = 2, cudaSuccess;
}
