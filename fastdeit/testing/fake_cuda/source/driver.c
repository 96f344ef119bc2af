/* The driver API, which Triton and Inductor call. */

#include "fake_cuda.h"
#include <dlfcn.h>
#include <elf.h>
#include <stdio.h>

#define TENSOR_MAP_MAGIC 0x50414d524f534e54ull

typedef struct {
  intptr_t context;
  char image[];
} Module;
typedef struct {
  char name[256];
  int count; /* of parameters, -1 if the binary does not say */
  int size[MAX_PARAMETERS];
  int dynamic_shared; /* what cuFuncSetAttribute allows */
  intptr_t context;
} Function;
/* What a tensor map holds here, so that a recorded argument can be read. Triton 3.7 and newer clear bit 21 of the second eight
 * bytes, around a fault of a driver: no bit of a type. */
typedef struct {
  uint64_t magic;
  uint32_t type, rank;
  uint64_t address;
  uint32_t swizzle, padding;
  uint32_t shape[5], box[5]; /* innermost first */
  uint64_t stride[4];        /* bytes, of dimensions 1 and up */
} TensorMap;
_Static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = last_message(), CUDA_SUCCESS; }
CUresult cuGetErrorName(CUresult error, const char **text) { return *text = last_message(), CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int *count) { return *count = device_count(), CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  if (ordinal < 0 || ordinal >= device_count())
    return refuse_in_driver(CUDA_ERROR_INVALID_DEVICE, "there is no device %d", ordinal);
  return *device = ordinal, CUDA_SUCCESS;
}
CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
  return snprintf(name, length, "Fake CUDA device %d", device), CUDA_SUCCESS;
}
CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  return *value = attribute_value(attribute), CUDA_SUCCESS;
}
CUresult cuCtxGetDevice(CUdevice *device) {
  if (!context) return CUDA_ERROR_INVALID_CONTEXT;
  return *device = context - 1, CUDA_SUCCESS;
}
CUresult cuCtxGetCurrent(CUcontext *pointer) { return *pointer = (CUcontext)context, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext pointer) {
  context = (intptr_t)pointer;
  if (context) current = context - 1;
  return CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxRetain(CUcontext *pointer, CUdevice device) {
  return has_primary_context[device] = 1, *pointer = (CUcontext)(intptr_t)(device + 1), CUDA_SUCCESS;
}
CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  return *flags = 0, *active = has_primary_context[device], CUDA_SUCCESS;
}
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuStreamGetCtx(CUstream handle, CUcontext *pointer) {
  Stream *stream = stream_of((cudaStream_t)handle);
  if (!stream) return CUDA_ERROR_INVALID_HANDLE;
  return *pointer = (CUcontext)(intptr_t)(device_of_stream(stream) + 1), CUDA_SUCCESS;
}
CUresult cuStreamCreate(CUstream *handle, unsigned flags) {
  return (CUresult)cudaStreamCreateWithFlags((cudaStream_t *)handle, flags);
}
CUresult cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
  return (CUresult)capture_status((cudaStream_t)handle, (enum cudaStreamCaptureStatus *)status);
}
CUresult cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER)
    return refuse_in_driver(CUDA_ERROR_INVALID_VALUE, "pointer attribute %d", attribute);
  if (device_of((void *)pointer) == UNKNOWN)
    return CUDA_ERROR_INVALID_VALUE; /* Triton asks it of pointers that it does not know */
  return *(CUdeviceptr *)value = pointer, CUDA_SUCCESS;
}
CUresult cuMemGetAddressRange_v2(CUdeviceptr *start, size_t *size, CUdeviceptr address) {
  CUresult result = CUDA_ERROR_INVALID_VALUE;
  LOCKED {
    Range *range = find_range((void *)address);
    if (range) *start = (CUdeviceptr)range->start, *size = range->size, result = CUDA_SUCCESS;
  }
  return result;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  attach();
  NOTE(MODULE_LOAD, "cuModuleLoadData");
  if (memcmp(image, ELFMAG, SELFMAG)) return refuse_in_driver(CUDA_ERROR_INVALID_IMAGE, "the module is not an ELF binary");
  if (prohibits_unsafe_calls())
    return invalidate(cudaErrorStreamCaptureUnsupported, "the first launch of a kernel"), CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  const Elf64_Ehdr *header = image;
  /* Copied, since the caller may free it: the section table comes last but for the program headers. */
  size_t sections = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  size_t size = sections > programs ? sections : programs;
  Module *loaded = malloc(sizeof *loaded + size);
  loaded->context = context;
  memcpy(loaded->image, image, size);
  return *module = (CUmodule)loaded, CUDA_SUCCESS;
}
CUresult cuModuleLoadDataEx(CUmodule *module, const void *image, unsigned count, CUjit_option *options, void **values) {
  return cuModuleLoadData(module, image);
}
CUresult cuModuleLoad(CUmodule *module, const char *path) {
  FILE *file = fopen(path, "rb");
  if (!file) return refuse_in_driver(CUDA_ERROR_FILE_NOT_FOUND, "there is no module %s", path);
  fseek(file, 0, SEEK_END);
  long size = ftell(file);
  rewind(file);
  char *image = malloc(size);
  int complete = fread(image, 1, size, file) == (size_t)size;
  fclose(file);
  CUresult result =
      complete ? cuModuleLoadData(module, image) : refuse_in_driver(CUDA_ERROR_INVALID_IMAGE, "cannot read %s", path);
  return free(image), result;
}
CUresult cuModuleUnload(CUmodule module) { return free(module), CUDA_SUCCESS; }

/* Sizes of the kernel's parameters from section .nv.info.<kernel>: records (format, attribute, 16-bit value or size of what
   follows); attribute 0x17 describes one parameter: index, ordinal and offset (16 bits each), flags with the size in bits
   18-31. */
static void read_parameters(const char *image, Function *function) {
  const Elf64_Ehdr *header = (const void *)image;
  const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
  const char *names = image + sections[header->e_shstrndx].sh_offset;
  char wanted[300] = ".nv.info.";
  strcat(wanted, function->name);
  function->count = -1;
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    const unsigned char *at = (const unsigned char *)image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    function->count = 0;
    while (at + 4 <= end) {
      uint16_t size, ordinal;
      uint32_t flags;
      memcpy(&size, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {
        memcpy(&ordinal, at + 8, 2);
        memcpy(&flags, at + 12, 4);
        if (ordinal < MAX_PARAMETERS) {
          function->size[ordinal] = flags >> 18;
          if (ordinal >= function->count) function->count = ordinal + 1;
        }
      }
      at += at[0] == 4 ? 4 + size : 4;
    }
  }
}
CUresult cuModuleGetFunction(CUfunction *handle, CUmodule module, const char *name) {
  Function *function = calloc(1, sizeof *function);
  strncpy(function->name, name, sizeof function->name - 1);
  function->dynamic_shared = 49152;
  function->context = ((Module *)module)->context;
  read_parameters(((Module *)module)->image, function);
  if (function->count < 0) return free(function), refuse_in_driver(CUDA_ERROR_NOT_FOUND, "the module has no kernel %s", name);
  return *handle = (CUfunction)function, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > SHARED_PER_BLOCK) return refuse_in_driver(CUDA_ERROR_INVALID_VALUE, "more shared memory than a block can have");
    ((Function *)function)->dynamic_shared = value;
  }
  /* Triton asks for attributes of newer drivers, and does without where they are refused: no error to be kept. */
  return attribute > CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}
CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int *count, CUfunction function, int threads, size_t shared) {
  return *count = 2, CUDA_SUCCESS;
}

/* Eight bytes are a pointer or an integer; heap and mmap addresses are above 2^32, which no integer argument of a kernel
 * reaches. */
static CUresult check_argument(const Function *function, int index, const void *argument) {
  uint64_t value = function->size[index] == 8 ? *(const uint64_t *)argument : ((const TensorMap *)argument)->address;
  if (value <= 1ull << 32) return CUDA_SUCCESS;
  int device = device_of((void *)value);
  if (device == context - 1 || device == PINNED) return CUDA_SUCCESS;
  if (device == UNKNOWN)
    return refuse_in_driver(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: argument %d is no device memory", function->name, index);
  return refuse_in_driver(CUDA_ERROR_ILLEGAL_ADDRESS, "%s: argument %d is memory of device %d, launched on device %d",
                          function->name, index, device, (int)context - 1);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction handle, void **parameters, void **extra) {
  const Function *function = (const Function *)handle;
  if (!function) return refuse_in_driver(CUDA_ERROR_INVALID_HANDLE, "a launch of no kernel");
  if (!context) return refuse_in_driver(CUDA_ERROR_INVALID_CONTEXT, "%s: no context is current in this thread", function->name);
  if (function->context != context)
    return refuse_in_driver(CUDA_ERROR_INVALID_HANDLE, "%s was loaded on device %d, launched on device %d", function->name,
                            (int)function->context - 1, (int)context - 1);
  dim3 grid = {config->gridDimX, config->gridDimY, config->gridDimZ},
       block = {config->blockDimX, config->blockDimY, config->blockDimZ};
  if (outside_limits(grid, block))
    return refuse_in_driver(
        CUDA_ERROR_INVALID_VALUE,
        "%s: the grid is outside the limits (2^31 - 1, 65535, 65535), or the block has more than 1024 threads", function->name);
  if ((int)config->sharedMemBytes > function->dynamic_shared)
    return refuse_in_driver(CUDA_ERROR_INVALID_VALUE, "%s: more shared memory than was set for the kernel", function->name);
  for (int i = 0; i < function->count; i++) {
    if (!parameters[i]) return refuse_in_driver(CUDA_ERROR_INVALID_VALUE, "%s: too few arguments", function->name);
    if (!checks_pointers || (function->size[i] != 8 && function->size[i] != sizeof(CUtensorMap))) continue;
    CUresult error = check_argument(function, i, parameters[i]);
    if (error) return error;
  }
  cudaError_t error = issue((cudaStream_t)config->hStream, function->name);
  if (error) return cudaGetLastError(), (CUresult)error;
  Event event = {TRITON_LAUNCH,
                 .stream = (uint64_t)config->hStream,
                 .grid = {grid.x, grid.y, grid.z},
                 .block = {block.x, block.y, block.z},
                 .bytes = config->sharedMemBytes,
                 .count = function->count};
  memcpy(event.size, function->size, sizeof event.size);
  note_event(event, function->name, parameters);
  return CUDA_SUCCESS;
}
CUresult cuLaunchKernel(CUfunction function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters, void **extra) {
  CUlaunchConfig config = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared, stream};
  return cuLaunchKernelEx(&config, function, parameters, extra);
}

static int element_bytes(CUtensorMapDataType type) {
  switch (type) {
  case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
  case CU_TENSOR_MAP_DATA_TYPE_UINT16:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
  case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
  case CU_TENSOR_MAP_DATA_TYPE_INT64:
  case CU_TENSOR_MAP_DATA_TYPE_UINT64:
  case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
  default: return 4;
  }
}
static uint64_t longest_box(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
  case CU_TENSOR_MAP_SWIZZLE_NONE: return UINT64_MAX;
  case CU_TENSOR_MAP_SWIZZLE_32B: return 32;
  case CU_TENSOR_MAP_SWIZZLE_64B: return 64;
  default: return 128;
  }
}
/* The rules that the driver's documentation gives for tiled tensor maps without interleaving. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
#define REQUIRE(condition, text) \
  if (!(condition)) return refuse_in_driver(CUDA_ERROR_INVALID_VALUE, "a tensor map's " text)
  TensorMap made = {TENSOR_MAP_MAGIC, type, rank, (uint64_t)address, swizzle};
  uint64_t bytes = element_bytes(type), inner = box[0] * bytes, reach = shape[0] * bytes;
  REQUIRE((uintptr_t)map % 64 == 0, "own address is not 64-byte aligned");
  REQUIRE(rank >= 1 && rank <= 5, "rank is not in 1..5");
  REQUIRE(address && (uintptr_t)address % 16 == 0, "base address is not 16-byte aligned");
  REQUIRE(device_of(address) >= 0, "base address is not in device memory");
  REQUIRE(interleave == CU_TENSOR_MAP_INTERLEAVE_NONE, "interleaved layout is not covered");
  for (cuuint32_t i = 0; i < rank; i++) {
    REQUIRE(shape[i] >= 1 && shape[i] <= 1ull << 32, "dimension is not in 1..2^32");
    REQUIRE(box[i] >= 1 && box[i] <= 256, "box is not in 1..256");
    REQUIRE(steps[i] >= 1 && steps[i] <= 8, "element stride is not in 1..8");
    made.shape[i] = shape[i], made.box[i] = box[i];
  }
  for (cuuint32_t i = 0; i + 1 < rank; i++) {
    REQUIRE(strides[i] % 16 == 0, "stride is not a multiple of 16 bytes");
    REQUIRE(strides[i] < 1ull << 40, "stride is 2^40 bytes or more");
    made.stride[i] = strides[i], reach += (shape[i + 1] - 1) * strides[i];
  }
  REQUIRE(inner % 16 == 0, "innermost box is not a multiple of 16 bytes");
  REQUIRE(inner <= longest_box(swizzle), "innermost box is longer than the swizzle");
  REQUIRE(within_allocation(address, reach), "last element lies beyond the allocation");
  memset(map, 0, sizeof *map);
  memcpy(map, &made, sizeof made);
  return CUDA_SUCCESS;
#undef REQUIRE
}

/* ---- functions by name */

static int missing(void) { return CUDA_ERROR_NOT_SUPPORTED; }

cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *result) {
  static void *self;
  if (!self) {
    Dl_info info;
    dladdr((void *)missing, &info);
    self = dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }
  char versioned[200];
  snprintf(versioned, sizeof versioned, "%s_v2", name);
  *function = dlsym(self, name);
  if (!*function) *function = dlsym(self, versioned);
  if (!*function) *function = (void *)missing;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, cuuint64_t flags,
                             CUdriverProcAddressQueryResult *result) {
  return (CUresult)cudaGetDriverEntryPointByVersion(name, function, version, flags,
                                                    (enum cudaDriverEntryPointQueryResult *)result);
}
CUresult cuGetExportTable(const void **table, const CUuuid *id) { return CUDA_ERROR_NOT_FOUND; }
