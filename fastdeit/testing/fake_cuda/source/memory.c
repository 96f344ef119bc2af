/* Memory and copies. Allocated ranges are sorted by address. */

#include "fake_cuda.h"
#include <sys/mman.h>

static Range *ranges;
static long range_count, range_capacity;
static size_t used[MAX_DEVICES];
static int moves_data; /* whether copies and memset are performed */
static int separate;   /* whether memory that was freed is never allocated again */

/* The last range that starts at or before the address and reaches beyond it. */
Range *find_range(const void *address) {
  long low = 0, high = range_count;
  while (low < high) {
    long middle = (low + high) / 2;
    if ((const char *)address < ranges[middle].start) high = middle;
    else low = middle + 1;
  }
  Range *range = low ? &ranges[low - 1] : NULL;
  return range && (const char *)address < range->start + range->size ? range : NULL;
}
int device_of(const void *address) {
  int device = UNKNOWN;
  LOCKED {
    Range *range = find_range(address);
    if (range) device = range->device;
  }
  return device;
}
int within_allocation(const void *address, size_t size) {
  int within = 1;
  LOCKED {
    Range *range = find_range(address);
    within = !range || (const char *)address + size <= range->start + range->size;
  }
  return within;
}
static void add_range(char *start, size_t size, int device) {
  LOCKED {
    if (range_count == range_capacity) {
      range_capacity = range_capacity ? 2 * range_capacity : 256;
      ranges = realloc(ranges, range_capacity * sizeof *ranges);
    }
    long i = range_count++;
    for (; i && ranges[i - 1].start > start; i--) ranges[i] = ranges[i - 1];
    ranges[i] = (Range){start, size, device};
    if (device >= 0) used[device] += size;
  }
}
static void *map_range(size_t size, int device) {
  size = size ? (size + 4095) & ~4095ull : 4096;
  void *start = mmap(NULL, size, PROT_READ | PROT_WRITE,
                     (device == PINNED ? MAP_SHARED : MAP_PRIVATE) | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return NULL;
  add_range(start, size, device);
  return start;
}
static void unmap(Range range) {
  if (separate) mmap(range.start, range.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  else munmap(range.start, range.size);
}
static int remove_range(void *start, int unmaps) {
  int found = 0;
  LOCKED {
    Range *range = find_range(start);
    if (range && range->start == start) {
      if (unmaps) unmap(*range);
      if (range->device >= 0) used[range->device] -= range->size;
      memmove(range, range + 1, (ranges + --range_count - range) * sizeof *range);
      found = 1;
    }
  }
  return found;
}

cudaError_t cudaMalloc(void **address, size_t size) {
  attach();
  UNSAFE("cudaMalloc");
  if (!size) return *address = NULL, cudaSuccess;
  if (used[current] + size > 79 * GIB || !(*address = map_range(size, current)))
    return refuse_quietly(cudaErrorMemoryAllocation, "out of memory");
  NOTE(ALLOCATION, "cudaMalloc", .bytes = size);
  return cudaSuccess;
}
cudaError_t cudaFree(void *address) {
  attach();
  if (!address) return cudaSuccess;
  UNSAFE("cudaFree");
  if (!remove_range(address, 1)) return refuse(cudaErrorInvalidValue, "cudaFree of %p, which was not allocated", address);
  NOTE(RELEASE, "cudaFree");
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **address, size_t size, unsigned flags) {
  attach();
  UNSAFE("cudaHostAlloc");
  if (!(*address = map_range(size, PINNED))) return refuse_quietly(cudaErrorMemoryAllocation, "out of memory");
  NOTE(HOST_ALLOCATION, "cudaHostAlloc", .bytes = size);
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *address) { return remove_range(address, 1), cudaSuccess; }
cudaError_t cudaHostRegister(void *address, size_t size, unsigned flags) {
  attach();
  UNSAFE("cudaHostRegister");
  if (device_of(address) != UNKNOWN) return refuse(cudaErrorHostMemoryAlreadyRegistered, "cudaHostRegister of %p, which is", address);
  add_range(address, size, PINNED);
  NOTE(HOST_ALLOCATION, "cudaHostRegister", .bytes = size);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *address) {
  if (!remove_range(address, 0))
    return refuse(cudaErrorHostMemoryNotRegistered, "cudaHostUnregister of %p, which is not registered", address);
  return cudaSuccess;
}
cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned flags) { return *device = host, cudaSuccess; }
cudaError_t cudaMemGetInfo(size_t *available, size_t *total) {
  attach();
  return *total = 80 * GIB, *available = 79 * GIB - used[current], cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *attributes, const void *address) {
  int device = device_of(address);
  *attributes = (struct cudaPointerAttributes){cudaMemoryTypeUnregistered, .device = device < 0 ? 0 : device};
  if (device == UNKNOWN) return cudaSuccess;
  attributes->type = device == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
  attributes->devicePointer = (void *)address;
  if (device == PINNED) attributes->hostPointer = (void *)address;
  return cudaSuccess;
}

EXPORTED void fake_cuda_move_data(int on) {
  LOCKED {
    moves_data = on;
    for (long i = 0; !on && i < range_count; i++)
      if (ranges[i].device >= 0) madvise(ranges[i].start, ranges[i].size, MADV_DONTNEED); /* zeros again */
  }
}

EXPORTED void fake_cuda_separate_memory(int on) { LOCKED separate = on; }

static int copy_kind(const void *to, const void *from) {
  int target = device_of(to), source = device_of(from);
  if (target >= 0 && source >= 0) return target == source ? ON_DEVICE : BETWEEN_DEVICES;
  if (target >= 0) return source == PINNED ? TO_DEVICE : PAGEABLE_TO_DEVICE;
  return target == PINNED ? FROM_DEVICE : PAGEABLE_FROM_DEVICE;
}
static cudaError_t copy(void *to, const void *from, size_t size, cudaStream_t handle, const char *what) {
  cudaError_t error = issue(handle, what);
  if (error) return error;
  if (!within_allocation(to, size) || !within_allocation(from, size))
    return refuse(cudaErrorIllegalAddress, "copy of %zu bytes beyond an allocation", size);
  int kind = copy_kind(to, from), captured = is_capturing(handle);
  NOTE(kind, what, .stream = (uint64_t)handle, .bytes = size);
  if (captured && (kind == PAGEABLE_TO_DEVICE || kind == PAGEABLE_FROM_DEVICE))
    return invalidate(cudaErrorStreamCaptureUnsupported, "copy to or from pageable memory");
  if (!captured && (moves_data || kind == FROM_DEVICE || kind == PAGEABLE_FROM_DEVICE)) memmove(to, from, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size, stream, "cudaMemcpyAsync");
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  note_wait(WAIT_COPY, "cudaMemcpy", NULL);
  return copy(to, from, size, NULL, "cudaMemcpy");
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t size, cudaStream_t stream) {
  return copy(to, from, size, stream, "cudaMemcpyPeerAsync");
}
cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch, size_t width, size_t height,
                              enum cudaMemcpyKind kind, cudaStream_t stream) {
  for (size_t row = 0; row < height; row++) {
    cudaError_t error =
        copy((char *)to + row * to_pitch, (const char *)from + row * from_pitch, width, stream, "cudaMemcpy2DAsync");
    if (error) return error;
  }
  return cudaSuccess;
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind) {
  NOTE(SYMBOL_COPY, "cudaMemcpyToSymbol", .bytes = size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *address, int value, size_t size, cudaStream_t stream) {
  cudaError_t error = issue(stream, "cudaMemsetAsync");
  if (error) return error;
  if (device_of(address) != current || !within_allocation(address, size))
    return refuse(cudaErrorInvalidValue, "memset of %zu bytes outside the current device's memory", size);
  NOTE(MEMSET, "cudaMemsetAsync", .stream = (uint64_t)stream, .bytes = size);
  if (moves_data && !is_capturing(stream)) memset(address, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *address, int value, size_t size) { return cudaMemsetAsync(address, value, size, NULL); }

/* Device memory for every __device__ variable that PyTorch asks for: enough that a launch gets a valid pointer. */
cudaError_t cudaGetSymbolAddress(void **address, const void *symbol) {
  static void *buffer[MAX_DEVICES];
  attach();
  LOCKED
    if (!buffer[current]) buffer[current] = map_range(65536, current);
  return *address = buffer[current], cudaSuccess;
}
