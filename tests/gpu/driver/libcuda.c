/* A CUDA driver on host memory: PyCUDA and cuda-python's bindings load it as libcuda.so.1 where
 * there is no GPU. It is lazy, the worst a GPU may be: what is enqueued runs when somebody waits for
 * it and not before, so a missing wait shows as a wrong result. Device addresses cannot be read by
 * the host: taking one for a host address ends the process.
 *
 * double_*() are the test's side: settings, failures to come, and what is left over. */
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define ARENA ((size_t)1 << 28)
#define ALIGNMENT 512
#define POISON 0xA5
#define MAX_BLOCKS 4096
#define MAX_STREAMS 4096
#define MAX_DEPTH 64

typedef enum { COPY, FILL, WAIT } Kind;

typedef struct {
  Kind kind;
  CUdeviceptr to, from; /* device or host addresses: one space, as with unified addressing */
  void *staged;         /* pageable source, copied when it was enqueued */
  size_t size;
  unsigned char value;
  struct CUstream_st *other;
  uint64_t until;
} Op;

struct CUgraph_st {
  Op *ops;
  size_t count;
};

struct CUgraphExec_st {
  struct CUgraph_st graph;
};

struct CUstream_st {
  Op *ops; /* ops[i] has the number done + i + 1 */
  size_t count;
  uint64_t done;
  int alive, blocking;
  CUgraph capture;
  int invalidated;
  pthread_t capturing_thread;
};

struct CUevent_st {
  CUstream stream;
  uint64_t until;
};

struct CUctx_st {
  int references, alive;
};

typedef struct {
  uintptr_t start;
  size_t size;
  int device, mapped;
} Block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct CUctx_st primary;
static __thread CUcontext stack[MAX_DEPTH];
static __thread int depth;
static char *arena, *readable; /* the same memory: its device addresses, and how we reach it */
static Block blocks[MAX_BLOCKS];
static size_t block_count;
static CUstream streams[MAX_STREAMS];
static size_t stream_count;
static struct CUstream_st legacy = {.alive = 1, .blocking = 1};
static CUresult sticky;
static int spoiled; /* since then, nothing could be freed */

static struct {
  const char *name;
  int64_t value;
} settings[] = {{"devices", 1},     {"integrated", 0},    {"major", 8},
                {"minor", 7},       {"driver_version", 13000}, {"memory_bytes", (int64_t)ARENA},
                {"elsewhere_bytes", 0}};

static struct {
  int64_t retained, pushed, device_bytes, host_bytes, streams, events, graphs, executables, lost, pageable;
} counts;

static struct {
  char function[64];
  int after;
  CUresult code;
} failure;

static struct {
  const char *function;
  int64_t count;
} calls[256];

static int64_t *setting(const char *name) {
  for (size_t i = 0; i < sizeof settings / sizeof *settings; ++i)
    if (!strcmp(settings[i].name, name)) return &settings[i].value;
  fprintf(stderr, "libcuda double: there is no setting %s\n", name);
  abort();
}

/* cuMemAlloc_v2 is meant when cuMemAlloc is said. */
static int same_function(const char *symbol, const char *name) {
  size_t length = strlen(name);
  return !strncmp(symbol, name, length) && (!symbol[length] || !strncmp(symbol + length, "_v", 2));
}

static CUresult enter(const char *function, int needs_context) {
  size_t i = 0;
  while (calls[i].function && calls[i].function != function) ++i;
  calls[i].function = function;
  ++calls[i].count;
  if (failure.code && same_function(function, failure.function) && failure.after-- == 0) {
    CUresult code = failure.code;
    failure.code = CUDA_SUCCESS;
    return code;
  }
  if (!needs_context) return CUDA_SUCCESS;
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  if (!stack[depth - 1]->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  return sticky;
}

static void unlock(int *unused) {
  (void)unused;
  pthread_mutex_unlock(&lock);
}

#define BEGIN(needs_context)                                    \
  __attribute__((cleanup(unlock))) int held = 0;                \
  pthread_mutex_lock(&lock);                                    \
  (void)held;                                                   \
  CUresult entered = enter(__func__, needs_context);            \
  if (entered != CUDA_SUCCESS) return entered
#define WITH_CONTEXT BEGIN(1)
#define WITHOUT_CONTEXT BEGIN(0)

/* memory */

static Block *block_of(uintptr_t start, size_t size) {
  for (size_t i = 0; i < block_count; ++i)
    if (blocks[i].start <= start && start + size <= blocks[i].start + blocks[i].size)
      return &blocks[i];
  return NULL;
}

/* Where the host finds what a device address means; NULL if it means nothing. */
static char *reach(uintptr_t start, size_t size) {
  Block *block = block_of(start, size);
  if (!block || !(block->device || block->mapped)) return NULL;
  return block->device ? readable + (start - (uintptr_t)arena) : (char *)start;
}

static int pinned(const void *host, size_t size) {
  Block *block = block_of((uintptr_t)host, size);
  return block && !block->device;
}

static void add_block(uintptr_t start, size_t size, int device, int mapped) {
  if (block_count == MAX_BLOCKS) abort();
  blocks[block_count++] = (Block){start, size, device, mapped};
  *(device ? &counts.device_bytes : &counts.host_bytes) += (int64_t)size;
}

static void remove_block(Block *block) {
  *(block->device ? &counts.device_bytes : &counts.host_bytes) -= (int64_t)block->size;
  *block = blocks[--block_count];
}

static uintptr_t find_room(size_t size) {
  uintptr_t start = (uintptr_t)arena;
  for (size_t i = 0; i < block_count;) {
    uintptr_t end = blocks[i].start + blocks[i].size;
    if (blocks[i].device && blocks[i].start < start + size && start < end) {
      start = (end + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT;
      i = 0;
    } else {
      ++i;
    }
  }
  return start + size <= (uintptr_t)arena + ARENA ? start : 0;
}

/* streams */

static void run_until(CUstream stream, uint64_t until);

static void perform(const Op *op) {
  if (op->kind == WAIT) {
    run_until(op->other, op->until);
    return;
  }
  char *to = pinned((void *)op->to, op->size) ? (char *)op->to : reach(op->to, op->size);
  char *from = op->staged ? op->staged
               : op->kind == FILL || pinned((void *)op->from, op->size)
                   ? (char *)op->from
                   : reach(op->from, op->size);
  if (!to || (op->kind == COPY && !from))
    sticky = CUDA_ERROR_ILLEGAL_ADDRESS;
  else if (op->kind == COPY)
    memmove(to, from, op->size);
  else
    memset(to, op->value, op->size);
}

static void run_until(CUstream stream, uint64_t until) {
  while (stream->done < until && stream->count) {
    Op op = stream->ops[0];
    memmove(stream->ops, stream->ops + 1, --stream->count * sizeof(Op));
    ++stream->done;
    perform(&op);
    free(op.staged);
  }
}

static uint64_t last(CUstream stream) { return stream->done + stream->count; }

static void run_all(void) {
  run_until(&legacy, last(&legacy));
  for (size_t i = 0; i < stream_count; ++i) run_until(streams[i], last(streams[i]));
}

static void append(Op **ops, size_t *count, Op op) {
  *ops = realloc(*ops, (*count + 1) * sizeof(Op));
  (*ops)[(*count)++] = op;
}

static void enqueue(CUstream stream, Op op) {
  if (stream->capture) {
    append(&stream->capture->ops, &stream->capture->count, op);
    return;
  }
  if (stream == &legacy) {
    for (size_t i = 0; i < stream_count; ++i)
      if (streams[i]->alive && streams[i]->blocking && !streams[i]->capture)
        append(&legacy.ops, &legacy.count,
               (Op){.kind = WAIT, .other = streams[i], .until = last(streams[i])});
  } else if (stream->blocking) {
    append(&stream->ops, &stream->count,
           (Op){.kind = WAIT, .other = &legacy, .until = last(&legacy)});
  }
  append(&stream->ops, &stream->count, op);
}

static CUstream resolve(CUstream stream) {
  return stream && stream != CU_STREAM_LEGACY ? stream : &legacy;
}

static CUresult usable(CUstream stream) {
  if (stream == &legacy) return CUDA_SUCCESS;
  for (size_t i = 0; i < stream_count; ++i)
    if (streams[i] == stream && stream->alive) return CUDA_SUCCESS;
  return CUDA_ERROR_INVALID_HANDLE;
}

/* A stream that is captured cannot be waited for; trying spoils the capture. */
static CUresult waitable(CUstream stream) {
  CUresult status = usable(stream);
  if (status == CUDA_SUCCESS && stream->capture) {
    stream->invalidated = 1;
    return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  }
  return status;
}

/* Nor can this thread allocate or free, or wait for the device, while it captures. */
static CUresult safe(void) {
  for (size_t i = 0; i < stream_count; ++i)
    if (streams[i]->capture && pthread_equal(streams[i]->capturing_thread, pthread_self())) {
      streams[i]->invalidated = 1;
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
  return CUDA_SUCCESS;
}

#define CHECK(call)                                \
  do {                                             \
    CUresult checked = (call);                     \
    if (checked != CUDA_SUCCESS) return checked;   \
  } while (0)

/* devices and contexts */

CUresult cuInit(unsigned int flags) {
  WITHOUT_CONTEXT;
  (void)flags;
  if (!*setting("devices")) return CUDA_ERROR_NO_DEVICE;
  if (!arena) {
    int all = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    arena = mmap(NULL, ARENA, PROT_NONE, all, -1, 0);
    readable = mmap(NULL, ARENA, PROT_READ | PROT_WRITE, all, -1, 0);
    if (arena == MAP_FAILED || readable == MAP_FAILED) abort();
  }
  return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int *version) {
  WITHOUT_CONTEXT;
  *version = (int)*setting("driver_version");
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetCount(int *count) {
  WITHOUT_CONTEXT;
  *count = (int)*setting("devices");
  return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
  WITHOUT_CONTEXT;
  if (ordinal < 0 || ordinal >= *setting("devices")) return CUDA_ERROR_INVALID_DEVICE;
  *device = ordinal;
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int size, CUdevice device) {
  WITHOUT_CONTEXT;
  (void)device;
  snprintf(name, (size_t)size, "Driver double");
  return CUDA_SUCCESS;
}

CUresult cuDeviceComputeCapability(int *major, int *minor, CUdevice device) {
  WITHOUT_CONTEXT;
  (void)device;
  *major = (int)*setting("major");
  *minor = (int)*setting("minor");
  return CUDA_SUCCESS;
}

CUresult cuDeviceTotalMem(size_t *bytes, CUdevice device) {
  WITHOUT_CONTEXT;
  (void)device;
  *bytes = (size_t)*setting("memory_bytes");
  return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  WITHOUT_CONTEXT;
  (void)device;
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_INTEGRATED: *value = (int)*setting("integrated"); break;
    case CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY: *value = 1; break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  WITHOUT_CONTEXT;
  (void)device;
  counts.retained = ++primary.references;
  primary.alive = 1;
  *context = &primary;
  return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRelease(CUdevice device) {
  WITHOUT_CONTEXT;
  (void)device;
  if (!primary.references) return CUDA_ERROR_INVALID_CONTEXT;
  counts.retained = --primary.references;
  if (primary.references) return CUDA_SUCCESS;
  run_all();
  if (!spoiled)
    counts.lost += counts.device_bytes + counts.host_bytes + counts.streams + counts.events +
                   counts.graphs + counts.executables;
  counts.device_bytes = counts.host_bytes = counts.streams = counts.events = 0;
  counts.graphs = counts.executables = 0;
  block_count = stream_count = 0;
  primary.alive = spoiled = 0;
  sticky = CUDA_SUCCESS;
  return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
  WITHOUT_CONTEXT;
  if (context != &primary) return CUDA_ERROR_INVALID_CONTEXT;
  if (!context->alive) return CUDA_ERROR_CONTEXT_IS_DESTROYED;
  if (depth == MAX_DEPTH) return CUDA_ERROR_INVALID_VALUE;
  stack[depth++] = context;
  ++counts.pushed;
  return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
  WITHOUT_CONTEXT;
  if (!depth) return CUDA_ERROR_INVALID_CONTEXT;
  --counts.pushed;
  CUcontext popped = stack[--depth];
  if (context) *context = popped;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
  WITHOUT_CONTEXT;
  *context = depth ? stack[depth - 1] : NULL;
  return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice *device) {
  WITH_CONTEXT;
  *device = 0;
  return CUDA_SUCCESS;
}

CUresult cuCtxSynchronize(void) {
  WITH_CONTEXT;
  CHECK(safe());
  run_all();
  return sticky;
}

/* allocations */

CUresult cuMemGetInfo(size_t *available, size_t *total) {
  WITH_CONTEXT;
  *total = (size_t)*setting("memory_bytes");
  *available = *total - (size_t)(*setting("elsewhere_bytes") + counts.device_bytes);
  return CUDA_SUCCESS;
}

CUresult cuMemAlloc(CUdeviceptr *pointer, size_t size) {
  WITH_CONTEXT;
  CHECK(safe());
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  int64_t used = *setting("elsewhere_bytes") + counts.device_bytes;
  uintptr_t start = find_room(size);
  if (!start || used + (int64_t)size > *setting("memory_bytes")) return CUDA_ERROR_OUT_OF_MEMORY;
  add_block(start, size, 1, 0);
  memset(reach(start, size), POISON, size);
  *pointer = start;
  return CUDA_SUCCESS;
}

CUresult cuMemFree(CUdeviceptr pointer) {
  WITH_CONTEXT;
  CHECK(safe());
  run_all(); /* as the real one waits for the device */
  Block *block = block_of(pointer, 1);
  if (!block || !block->device || block->start != pointer) return CUDA_ERROR_INVALID_VALUE;
  memset(reach(block->start, block->size), POISON, block->size);
  remove_block(block);
  return CUDA_SUCCESS;
}

CUresult cuMemHostAlloc(void **pointer, size_t size, unsigned int flags) {
  WITH_CONTEXT;
  CHECK(safe());
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  if (posix_memalign(pointer, 4096, size)) return CUDA_ERROR_OUT_OF_MEMORY;
  memset(*pointer, POISON, size);
  add_block((uintptr_t)*pointer, size, 0, (flags & CU_MEMHOSTALLOC_DEVICEMAP) != 0);
  return CUDA_SUCCESS;
}

CUresult cuMemFreeHost(void *pointer) {
  WITH_CONTEXT;
  CHECK(safe());
  run_all();
  Block *block = block_of((uintptr_t)pointer, 1);
  if (!block || block->device || block->start != (uintptr_t)pointer) return CUDA_ERROR_INVALID_VALUE;
  remove_block(block);
  free(pointer);
  return CUDA_SUCCESS;
}

CUresult cuMemHostGetDevicePointer(CUdeviceptr *pointer, void *host, unsigned int flags) {
  WITH_CONTEXT;
  (void)flags;
  Block *block = block_of((uintptr_t)host, 1);
  if (!block || !block->mapped) return CUDA_ERROR_INVALID_VALUE;
  *pointer = (CUdeviceptr)host;
  return CUDA_SUCCESS;
}

/* copies */

static CUresult copy_async(uintptr_t to, int to_device, uintptr_t from, int from_device, size_t size,
                           CUstream stream) {
  stream = resolve(stream);
  CHECK(usable(stream));
  if ((to_device && !reach(to, size)) || (from_device && !reach(from, size)))
    return CUDA_ERROR_INVALID_VALUE;
  Op op = {.kind = COPY, .to = to, .from = from, .size = size};
  int pageable_from = !from_device && !pinned((void *)from, size);
  int pageable_to = !to_device && !pinned((void *)to, size);
  if (pageable_from || pageable_to) {
    ++counts.pageable;
    if (stream->capture) {
      stream->invalidated = 1;
      return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
    }
  }
  if (pageable_to) { /* not asynchronous then */
    run_until(stream, last(stream));
    memmove((void *)to, reach(from, size), size);
    return sticky;
  }
  if (pageable_from) op.staged = memcpy(malloc(size), (void *)from, size);
  enqueue(stream, op);
  return CUDA_SUCCESS;
}

static CUresult copy_now(uintptr_t to, int to_device, uintptr_t from, int from_device, size_t size) {
  CHECK(safe());
  enqueue(&legacy, (Op){.kind = WAIT, .other = &legacy, .until = 0});
  CHECK(copy_async(to, to_device, from, from_device, size, &legacy));
  run_until(&legacy, last(&legacy));
  return sticky;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
  WITH_CONTEXT;
  return copy_now(to, 1, (uintptr_t)from, 0, size);
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
  WITH_CONTEXT;
  return copy_now((uintptr_t)to, 0, from, 1, size);
}

CUresult cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t size) {
  WITH_CONTEXT;
  return copy_now(to, 1, from, 1, size);
}

CUresult cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  WITH_CONTEXT;
  return copy_async(to, 1, (uintptr_t)from, 0, size, stream);
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  WITH_CONTEXT;
  return copy_async((uintptr_t)to, 0, from, 1, size, stream);
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  WITH_CONTEXT;
  return copy_async(to, 1, from, 1, size, stream);
}

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
  WITH_CONTEXT;
  stream = resolve(stream);
  CHECK(usable(stream));
  if (!reach(to, size)) return CUDA_ERROR_INVALID_VALUE;
  enqueue(stream, (Op){.kind = FILL, .to = to, .size = size, .value = value});
  return CUDA_SUCCESS;
}

/* streams and events */

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
  WITH_CONTEXT;
  if (stream_count == MAX_STREAMS) abort();
  *stream = calloc(1, sizeof **stream);
  (*stream)->alive = 1;
  (*stream)->blocking = !(flags & CU_STREAM_NON_BLOCKING);
  streams[stream_count++] = *stream;
  ++counts.streams;
  return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
  WITH_CONTEXT;
  CHECK(usable(stream));
  run_until(stream, last(stream));
  stream->alive = 0; /* stays where it is: events may name it */
  stream->capture = NULL;
  --counts.streams;
  return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
  WITH_CONTEXT;
  stream = resolve(stream);
  CHECK(waitable(stream));
  run_until(stream, last(stream));
  return sticky;
}

CUresult cuStreamQuery(CUstream stream) {
  WITH_CONTEXT;
  stream = resolve(stream);
  CHECK(waitable(stream));
  return stream->count ? CUDA_ERROR_NOT_READY : CUDA_SUCCESS;
}

CUresult cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags) {
  WITH_CONTEXT;
  (void)flags;
  stream = resolve(stream);
  CHECK(usable(stream));
  if (event->stream)
    enqueue(stream, (Op){.kind = WAIT, .other = event->stream, .until = event->until});
  return CUDA_SUCCESS;
}

CUresult cuEventCreate(CUevent *event, unsigned int flags) {
  WITH_CONTEXT;
  (void)flags;
  *event = calloc(1, sizeof **event);
  ++counts.events;
  return CUDA_SUCCESS;
}

CUresult cuEventDestroy(CUevent event) {
  WITH_CONTEXT;
  free(event);
  --counts.events;
  return CUDA_SUCCESS;
}

CUresult cuEventRecord(CUevent event, CUstream stream) {
  WITH_CONTEXT;
  stream = resolve(stream);
  CHECK(usable(stream));
  enqueue(stream, (Op){.kind = WAIT, .other = stream, .until = 0});
  event->stream = stream;
  event->until = last(stream);
  return CUDA_SUCCESS;
}

CUresult cuEventSynchronize(CUevent event) {
  WITH_CONTEXT;
  CHECK(safe());
  if (event->stream) run_until(event->stream, event->until);
  return sticky;
}

/* graphs */

CUresult cuStreamBeginCapture(CUstream stream, CUstreamCaptureMode mode) {
  WITH_CONTEXT;
  (void)mode;
  if (resolve(stream) == &legacy) return CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED;
  CHECK(usable(stream));
  if (stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  stream->capture = calloc(1, sizeof *stream->capture);
  stream->invalidated = 0;
  stream->capturing_thread = pthread_self();
  ++counts.graphs;
  return CUDA_SUCCESS;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
  WITH_CONTEXT;
  CHECK(usable(stream));
  *graph = NULL;
  if (!stream->capture) return CUDA_ERROR_ILLEGAL_STATE;
  CUgraph captured = stream->capture;
  stream->capture = NULL;
  if (stream->invalidated) {
    --counts.graphs;
    free(captured->ops);
    free(captured);
    return CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  }
  *graph = captured;
  return CUDA_SUCCESS;
}

CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus *status) {
  WITH_CONTEXT;
  CHECK(usable(resolve(stream)));
  *status = resolve(stream)->capture ? CU_STREAM_CAPTURE_STATUS_ACTIVE : CU_STREAM_CAPTURE_STATUS_NONE;
  return CUDA_SUCCESS;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
  WITH_CONTEXT;
  (void)flags;
  *executable = calloc(1, sizeof **executable);
  for (size_t i = 0; i < graph->count; ++i)
    append(&(*executable)->graph.ops, &(*executable)->graph.count, graph->ops[i]);
  ++counts.executables;
  return CUDA_SUCCESS;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
  WITH_CONTEXT;
  CHECK(usable(stream));
  for (size_t i = 0; i < executable->graph.count; ++i) enqueue(stream, executable->graph.ops[i]);
  return CUDA_SUCCESS;
}

CUresult cuGraphExecDestroy(CUgraphExec executable) {
  WITH_CONTEXT;
  free(executable->graph.ops);
  free(executable);
  --counts.executables;
  return CUDA_SUCCESS;
}

CUresult cuGraphDestroy(CUgraph graph) {
  WITH_CONTEXT;
  free(graph->ops);
  free(graph);
  --counts.graphs;
  return CUDA_SUCCESS;
}

/* names */

CUresult cuGetErrorString(CUresult error, const char **text) {
  switch (error) {
    case CUDA_ERROR_OUT_OF_MEMORY: *text = "out of memory"; break;
    case CUDA_ERROR_INVALID_VALUE: *text = "invalid argument"; break;
    case CUDA_ERROR_INVALID_CONTEXT: *text = "invalid device context"; break;
    case CUDA_ERROR_CONTEXT_IS_DESTROYED: *text = "context is destroyed"; break;
    case CUDA_ERROR_ILLEGAL_ADDRESS: *text = "an illegal memory access was encountered"; break;
    case CUDA_ERROR_NO_DEVICE: *text = "no CUDA-capable device is detected"; break;
    case CUDA_ERROR_LAUNCH_FAILED: *text = "unspecified launch failure"; break;
    default: *text = "an error without a text in the double";
  }
  return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **text) {
  return cuGetErrorString(error, text);
}

/* Newer symbols carry a suffix; each function here exists in one version. */
CUresult cuGetProcAddress(const char *symbol, void **function, int version, cuuint64_t flags,
                          CUdriverProcAddressQueryResult *found) {
  static const char *suffixes[] = {"_v3", "_v2", ""};
  void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  (void)version;
  (void)flags;
  *function = NULL;
  for (size_t i = 0; i < 3 && !*function; ++i) {
    char name[128];
    snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
    *function = dlsym(self, name);
  }
  if (found)
    *found = *function ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *function ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

/* the test's side */

void double_set(const char *name, int64_t value) { *setting(name) = value; }

int64_t double_get(const char *name) { return *setting(name); }

/* The call after `after` further ones of a function fails, once. */
void double_fail(const char *function, int after, int code) {
  snprintf(failure.function, sizeof failure.function, "%s", function);
  failure.after = after;
  failure.code = (CUresult)code;
}

/* From now on everything that needs a context fails, as after an illegal access. */
void double_stick(int code) {
  sticky = (CUresult)code;
  spoiled = 1;
}

/* What is left over, in the order of `counts`; `pushed` is of all threads. */
void double_counts(int64_t *values) { memcpy(values, &counts, sizeof counts); }

int64_t double_calls(const char *function) {
  for (size_t i = 0; calls[i].function; ++i)
    if (same_function(calls[i].function, function)) return calls[i].count;
  return 0;
}
