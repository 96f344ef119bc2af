/* A stand-in for libcuda.so.1: enough of the driver API for Triton's launch path to run on a machine without a GPU.

   Nothing is executed. What is checked is what a driver would refuse: launches outside the hardware's limits or without the
   shared memory they were promised, and tensor maps that break the rules of cuTensorMapEncodeTiled. With recording on, the last
   launches are kept with the bytes of each argument; their number and sizes are read from the kernel's binary, so that an
   argument in the wrong place shows. The device is an H100 (compute capability 9.0). */

#include <cuda.h>
#include <elf.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define MAX_PARAMETERS 64
#define MAX_RECORDS 256
#define MAX_BYTES 4096
#define SHARED_PER_BLOCK 232448
#define TENSOR_MAP_MAGIC 0x50414d524f534e54ull

typedef struct {
  char name[256];
  int count; /* of parameters, -1 if the binary does not say */
  int size[MAX_PARAMETERS];
  int dynamic_shared; /* what cuFuncSetAttribute allows */
} Function;

typedef struct {
  char name[256];
  unsigned grid[3], block[3], shared;
  uint64_t stream;
  int count;
  int size[MAX_PARAMETERS];
  unsigned char bytes[MAX_BYTES]; /* the arguments, one after the other */
} Record;

/* What a tensor map holds here, so that a recorded argument can be read. */
typedef struct {
  uint64_t magic, address;
  uint32_t type, rank, swizzle, padding;
  uint32_t shape[5], box[5]; /* innermost first */
  uint64_t stride[4];        /* bytes, of dimensions 1 and up */
} TensorMap;

_Static_assert(sizeof(TensorMap) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

static Record records[MAX_RECORDS];
static int recording, recorded;
static char message[512] = "no error";

static CUresult refuse(const char *why) {
  strncpy(message, why, sizeof message - 1);
  return CUDA_ERROR_INVALID_VALUE;
}

/* ---- for the tests */

void stub_record(int on) { recording = on, recorded = 0; }
int stub_recorded(void) { return recorded; }
const Record *stub_launch(int i) { return i < 0 || i >= recorded || i >= MAX_RECORDS ? NULL : &records[i]; }

/* ---- the driver */

CUresult cuInit(unsigned flags) { return CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char **text) { return *text = message, CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int *version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice *device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) { return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS; }
CUresult cuDeviceGet(CUdevice *device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext *context) { return *context = (CUcontext)1, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return cuCtxGetCurrent(context); }
CUresult cuCtxGetLimit(size_t *value, CUlimit limit) { return *value = 0, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: *value = 9; break;
  case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: *value = 0; break;
  case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: *value = 132; break;
  case CU_DEVICE_ATTRIBUTE_WARP_SIZE: *value = 32; break;
  case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: *value = 65536; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: *value = SHARED_PER_BLOCK; break;
  case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: *value = 233472; break;
  default: *value = 1; /* clock rates and the like */
  }
  return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  if (attribute != CU_POINTER_ATTRIBUTE_DEVICE_POINTER) return refuse("stub: unknown pointer attribute");
  return *(CUdeviceptr *)data = pointer, CUDA_SUCCESS;
}

CUresult cuModuleLoadData(CUmodule *module, const void *image) {
  if (memcmp(image, ELFMAG, SELFMAG)) return refuse("stub: not an ELF binary");
  const Elf64_Ehdr *header = image;
  /* Copied, since the caller may free it: the section table comes last but for the program headers. */
  size_t sections = header->e_shoff + (size_t)header->e_shnum * header->e_shentsize;
  size_t programs = header->e_phoff + (size_t)header->e_phnum * header->e_phentsize;
  size_t size = sections > programs ? sections : programs;
  void *copy = malloc(size);
  if (!copy) return CUDA_ERROR_OUT_OF_MEMORY;
  return *module = memcpy(copy, image, size), CUDA_SUCCESS;
}

/* Sizes of the kernel's parameters from section .nv.info.<kernel>: records (format, attribute, 16-bit value or size of what
   follows); attribute 0x17 describes one parameter: index, ordinal and offset (16 bits each), flags with the size in bits 18-31. */
static void read_parameters(const unsigned char *image, Function *function) {
  const Elf64_Ehdr *header = (const void *)image;
  const Elf64_Shdr *sections = (const void *)(image + header->e_shoff);
  const char *names = (const char *)image + sections[header->e_shstrndx].sh_offset;
  char wanted[300] = ".nv.info.";
  strcat(wanted, function->name);
  function->count = -1;
  for (int i = 0; i < header->e_shnum; i++) {
    if (strcmp(names + sections[i].sh_name, wanted)) continue;
    const unsigned char *at = image + sections[i].sh_offset, *end = at + sections[i].sh_size;
    function->count = 0;
    while (at + 4 <= end) {
      uint16_t size;
      memcpy(&size, at + 2, 2);
      if (at[0] == 4 && at[1] == 0x17) {
        uint16_t ordinal;
        uint32_t flags;
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

CUresult cuModuleGetFunction(CUfunction *function, CUmodule module, const char *name) {
  Function *new = calloc(1, sizeof *new);
  if (!new) return CUDA_ERROR_OUT_OF_MEMORY;
  strncpy(new->name, name, sizeof new->name - 1);
  new->dynamic_shared = 49152;
  read_parameters((const unsigned char *)module, new);
  if (new->count < 0) return free(new), refuse("stub: the binary has no such kernel");
  return *function = (CUfunction)new, CUDA_SUCCESS;
}

CUresult cuFuncGetAttribute(int *value, CUfunction_attribute attribute, CUfunction function) {
  return *value = attribute == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS;
}

CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) {
  if (attribute == CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) {
    if (value > SHARED_PER_BLOCK) return refuse("stub: more shared memory than a block can have");
    ((Function *)function)->dynamic_shared = value;
  }
  // Not a message of ours: Triton asks for what newer drivers have, and takes the old way where it is refused.
  return (int)attribute > (int)CU_FUNC_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

CUresult cuOccupancyMaxActiveClusters(int *count, CUfunction function, const CUlaunchConfig *config) {
  return *count = 1, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction handle, void **parameters, void **extra) {
  const Function *function = (const Function *)handle;
  if (!function) return refuse("stub: no kernel");
  if (c->gridDimX < 1 || c->gridDimX > 2147483647u || c->gridDimY < 1 || c->gridDimY > 65535 || c->gridDimZ < 1 ||
      c->gridDimZ > 65535)
    return refuse("stub: the grid is outside the limits (2^31 - 1, 65535, 65535)");
  if ((uint64_t)c->blockDimX * c->blockDimY * c->blockDimZ > 1024) return refuse("stub: more than 1024 threads in a block");
  if ((int)c->sharedMemBytes > function->dynamic_shared) return refuse("stub: more shared memory than was set for the kernel");
  for (int i = 0; i < function->count; i++)
    if (!parameters[i]) return refuse("stub: too few arguments");
  if (!recording) return CUDA_SUCCESS;
  if (recorded < MAX_RECORDS) {
    Record *r = &records[recorded];
    size_t offset = 0;
    memcpy(r->name, function->name, sizeof r->name);
    memcpy(r->grid, &c->gridDimX, sizeof r->grid);
    memcpy(r->block, &c->blockDimX, sizeof r->block);
    r->shared = c->sharedMemBytes;
    r->stream = (uint64_t)c->hStream;
    r->count = function->count;
    memcpy(r->size, function->size, sizeof r->size);
    for (int i = 0; i < function->count; i++) {
      if (offset + function->size[i] > MAX_BYTES) return refuse("stub: more than 4096 bytes of arguments");
      memcpy(r->bytes + offset, parameters[i], function->size[i]);
      offset += function->size[i];
    }
  }
  recorded++;
  return CUDA_SUCCESS;
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

/* The rules that the driver's documentation gives for tiled tensor maps without interleaving. */
CUresult cuTensorMapEncodeTiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address,
                                const cuuint64_t *shape, const cuuint64_t *strides, const cuuint32_t *box,
                                const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                                CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  TensorMap new = {.magic = TENSOR_MAP_MAGIC, .address = (uint64_t)address, .type = type, .rank = rank, .swizzle = swizzle};
  uint64_t inner = (uint64_t)box[0] * element_bytes(type);
  if ((uintptr_t)map % 64) return refuse("stub: the tensor map itself is not 64-byte aligned");
  if (rank < 1 || rank > 5) return refuse("stub: a tensor map's rank is 1 to 5");
  if (!address || (uintptr_t)address % 16) return refuse("stub: a tensor map's base address is not 16-byte aligned");
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE) return refuse("stub: interleaved tensor maps are not covered");
  for (cuuint32_t i = 0; i < rank; i++) {
    if (shape[i] < 1 || shape[i] > 1ull << 32) return refuse("stub: a tensor map's dimension is not in 1..2^32");
    if (box[i] < 1 || box[i] > 256) return refuse("stub: a tensor map's box is not in 1..256");
    if (steps[i] < 1 || steps[i] > 8) return refuse("stub: a tensor map's element stride is not in 1..8");
    new.shape[i] = shape[i], new.box[i] = box[i];
  }
  for (cuuint32_t i = 0; i + 1 < rank; i++) {
    if (strides[i] % 16) return refuse("stub: a tensor map's stride is not a multiple of 16 bytes");
    if (strides[i] >= 1ull << 40) return refuse("stub: a tensor map's stride is 2^40 bytes or more");
    new.stride[i] = strides[i];
  }
  if (inner % 16) return refuse("stub: the innermost box is not a multiple of 16 bytes");
  if ((swizzle == CU_TENSOR_MAP_SWIZZLE_32B && inner > 32) || (swizzle == CU_TENSOR_MAP_SWIZZLE_64B && inner > 64) ||
      (swizzle == CU_TENSOR_MAP_SWIZZLE_128B && inner > 128))
    return refuse("stub: the innermost box is longer than the swizzle");
  memset(map, 0, sizeof *map);
  memcpy(map, &new, sizeof new);
  return CUDA_SUCCESS;
}
