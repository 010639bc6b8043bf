/* CUDA's runtime without a GPU. Device memory is memory of the host, whose size is enforced; streams have nothing to
   wait for; kernels are counted and do nothing. Copies and small fills are done. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include "cuda_runtime_api.h"
#include "driver_types.h"

#define MIB ((size_t)1 << 20)
#define LARGE MIB  /* fills and copies on the device beyond this are left out, but where operations are computed */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static double setting(const char *name, double otherwise) {
  const char *value = getenv(name);
  return value ? atof(value) : otherwise;
}
static size_t capacity(void) { return (size_t)(setting("STAND_IN_GIB", 79.1) * 1073741824.0); }
static int computes(void) { return setting("STAND_IN_COMPUTES", 0) != 0; }

/* What is counted, in this order for Python. */
static struct { long launches, waits, to_host, to_device; } counted;
void stand_in_counts(long *out) { memcpy(out, &counted, sizeof counted); }
void stand_in_reset(void) { memset(&counted, 0, sizeof counted); }
void stand_in_launch(void) { __sync_fetch_and_add(&counted.launches, 1); }

/* Memory. */
typedef struct Block { char *start; size_t size; struct Block *next; } Block;
static Block *blocks;
static size_t used;
static cudaError_t last_error;

static size_t mapped(size_t size) { return (size + 2 * MIB - 1) / (2 * MIB) * (2 * MIB) + 2 * MIB; }

cudaError_t cudaMalloc(void **pointer, size_t size) {
  pthread_mutex_lock(&lock);
  char *start = MAP_FAILED;
  if (used + size <= capacity())  /* pages come with their first use */
    start = mmap(0, mapped(size), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) {
    last_error = cudaErrorMemoryAllocation;
    *pointer = NULL;
  } else {
    Block *block = malloc(sizeof *block);
    *block = (Block){start, size, blocks};
    blocks = block;
    used += size;
    *pointer = start;
  }
  pthread_mutex_unlock(&lock);
  return start == MAP_FAILED ? cudaErrorMemoryAllocation : cudaSuccess;
}

cudaError_t cudaFree(void *pointer) {
  pthread_mutex_lock(&lock);
  for (Block **b = &blocks; *b; b = &(*b)->next)
    if ((*b)->start == pointer) {
      Block *gone = *b;
      *b = gone->next;
      used -= gone->size;
      munmap(gone->start, mapped(gone->size));
      free(gone);
      break;
    }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

static int on_device(const void *pointer) {
  const char *p = pointer;
  pthread_mutex_lock(&lock);
  Block *b = blocks;
  while (b && !(p >= b->start && p < b->start + b->size)) b = b->next;
  pthread_mutex_unlock(&lock);
  return b != NULL;
}

cudaError_t cudaMemGetInfo(size_t *unused, size_t *total) {
  *total = capacity();
  *unused = *total - used;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **pointer, size_t size, unsigned flags) {
  *pointer = aligned_alloc(4096, (size + 4095) / 4096 * 4096);
  return *pointer ? cudaSuccess : cudaErrorMemoryAllocation;
}
cudaError_t cudaFreeHost(void *pointer) { free(pointer); return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *pointer) {
  memset(a, 0, sizeof *a);
  a->type = on_device(pointer) ? cudaMemoryTypeDevice : cudaMemoryTypeUnregistered;
  a->devicePointer = (void *)pointer;
  return cudaSuccess;
}

static cudaError_t copy(void *to, const void *from, size_t size) {
  int there = on_device(to), here = on_device(from);
  counted.to_device += there && !here;
  counted.to_host += here && !there;
  if (!(there && here) || computes() || size <= LARGE) memmove(to, from, size);
  return cudaSuccess;
}
static cudaError_t wait_for(cudaStream_t stream);
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  copy(to, from, size);
  return wait_for(NULL);
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  return copy(to, from, size);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  if (computes() || size <= LARGE) memset(to, value, size);
  return cudaSuccess;
}
cudaError_t cudaMemset(void *to, int value, size_t size) { return cudaMemsetAsync(to, value, size, 0); }

/* The device. */
cudaError_t cudaGetDeviceCount(int *count) {
  const char *visible = getenv("CUDA_VISIBLE_DEVICES");
  *count = !(visible && !*visible);
  return *count ? cudaSuccess : cudaErrorNoDevice;
}
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return device ? cudaErrorInvalidDevice : cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) { snprintf(id, size, "0000:00:04.0"); return cudaSuccess; }

cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  const char *name = getenv("STAND_IN_NAME");
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "%s", name ? name : "NVIDIA H100 80GB HBM3");
  p->totalGlobalMem = capacity();
  p->major = 9;
  p->multiProcessorCount = 132;
  p->warpSize = 32;
  p->l2CacheSize = 50 * MIB;
  p->maxThreadsPerBlock = p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
  p->maxThreadsDim[2] = 64;
  p->maxThreadsPerMultiProcessor = 2048;
  p->maxBlocksPerMultiProcessor = 32;
  p->maxGridSize[0] = INT32_MAX;
  p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 48 << 10;
  p->sharedMemPerBlockOptin = 227 << 10;
  p->sharedMemPerMultiprocessor = 228 << 10;
  p->unifiedAddressing = p->concurrentKernels = 1;
  p->textureAlignment = 512;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  struct cudaDeviceProp p;
  cudaGetDeviceProperties(&p, device);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrClockRate: *value = 1980000; break;
    case cudaDevAttrMemoryClockRate: *value = 2619000; break;
    case cudaDevAttrGlobalMemoryBusWidth: *value = 5120; break;
    default: *value = 0;
  }
  return cudaSuccess;
}

/* The stream that is captured into a graph, within which nobody may wait; a graph is one launch. */
static cudaStream_t captured;
static unsigned long long captures;
static __thread enum cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *other) {
  enum cudaStreamCaptureMode before = mode;
  mode = *other;
  *other = before;
  return cudaSuccess;
}
static cudaError_t wait_for(cudaStream_t stream) {  /* NULL: for all of them; but where a thread asked to be let */
  counted.waits++;
  int refused = captured && mode != cudaStreamCaptureModeRelaxed && (!stream || stream == captured);
  return refused ? (last_error = cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaDeviceSynchronize(void) { return wait_for(NULL); }
cudaError_t cudaPeekAtLastError(void) { return last_error; }
cudaError_t cudaGetLastError(void) {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char *cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
const char *cudaGetErrorString(cudaError_t error) {
  if (error == cudaErrorStreamCaptureUnsupported) return "operation not permitted when stream is capturing";
  return error == cudaErrorMemoryAllocation ? "out of memory" : "error of the stand-in";
}

/* Streams; and events, whose time is that of their record. */
static void *fresh(void) { return calloc(1, 64); }
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = fresh(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { *stream = fresh(); return cudaSuccess; }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned flags, int priority) {
  *stream = fresh();
  return cudaSuccess;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { return wait_for(stream); }
cudaError_t cudaStreamGetPriority(cudaStream_t stream, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  *status = captured && stream == captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *graph, const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *count) {
  if (id) *id = captures;
  return cudaStreamIsCapturing(stream, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t stream, enum cudaStreamCaptureMode mode) {
  captured = stream;
  captures++;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t *graph) {
  *graph = fresh();
  captured = NULL;
  return cudaSuccess;
}
cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *run, cudaGraph_t graph, unsigned long long flags) {
  *run = fresh();
  return cudaSuccess;
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t run, cudaStream_t stream) { stand_in_launch(); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = fresh(); return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { return cudaEventCreate(event); }
cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { counted.waits++; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  clock_gettime(CLOCK_MONOTONIC, (struct timespec *)event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned flags) {
  return cudaEventRecord(event, stream);
}
cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
  struct timespec *a = (struct timespec *)start, *b = (struct timespec *)end;
  *ms = (b->tv_sec - a->tv_sec) * 1e3 + (b->tv_nsec - a->tv_nsec) * 1e-6;
  return cudaSuccess;
}

/* Kernels. nvcc's code pushes the configuration of a launch and pops it right before. */
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;
void **__cudaRegisterFatBinary(void *binary) { return fresh(); }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, uint3 *thread,
                            uint3 *block, dim3 *block_size, dim3 *grid_size, int *warp_size) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  pushed.grid = grid, pushed.block = block, pushed.shared = shared, pushed.stream = stream;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = pushed.grid, *block = pushed.block, *shared = pushed.shared, *(cudaStream_t *)stream = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) { *kernel = (cudaKernel_t)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **arguments, size_t shared,
                               cudaStream_t stream) {
  stand_in_launch();
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **arguments, size_t shared,
                             cudaStream_t stream) {
  stand_in_launch();
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *host, void **arguments) {
  stand_in_launch();
  return cudaSuccess;
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *host) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  a->binaryVersion = a->ptxVersion = 90;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks_each, const void *host, int size,
                                                                   size_t shared, unsigned flags) {
  *blocks_each = 2;
  return cudaSuccess;
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  static char constants[65536];
  *pointer = constants;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                             unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  *function = dlsym(RTLD_DEFAULT, name);
  if (result) *result = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
