// A driver's library that answers as the macros say, so that the real calls are made without a GPU.
#include <string.h>

typedef struct {
  unsigned long long total, free, used;
} Memory;

static int refused(const char *function) { return strcmp(function, REFUSES) == 0 ? 3 : 0; }

const char *nvmlErrorString(int status) { return status == 3 ? "Not Supported" : "Unknown Error"; }

int nvmlInit_v2(void) { return refused("nvmlInit_v2"); }

int nvmlShutdown(void) { return 0; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
  strncpy(version, "580.65.06", length);
  return 0;
}

int nvmlSystemGetCudaDriverVersion_v2(int *version) {
  *version = 13020;
  return 0;
}

int nvmlDeviceGetCount_v2(unsigned *count) {
  *count = COUNT;
  return 0;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
  *device = (void *)(unsigned long)(index + 1);
  return index < COUNT ? 0 : 2;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
  strncpy(name, device == (void *)1 ? NAME : "another", length);
  return 0;
}

int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) {
  *major = CAPABILITY / 10;
  *minor = CAPABILITY % 10;
  return device ? 0 : 2;
}

int nvmlDeviceGetMemoryInfo(void *device, Memory *memory) {
  memory->total = MEMORY_MIB * 1024ull * 1024ull;
  memory->used = 1ull << 30;
  memory->free = memory->total - memory->used;
  return refused("nvmlDeviceGetMemoryInfo");
}

#ifndef OLD
int nvmlDeviceGetNumGpuCores(void *device, unsigned *cores) {
  *cores = 6144;
  return refused("nvmlDeviceGetNumGpuCores");
}
#endif

int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned *clock) {
  // Graphics, SM, memory, video.
  const unsigned clocks[] = {1, 1560, 7001, 2};
  *clock = clocks[type];
  return refused("nvmlDeviceGetMaxClockInfo");
}

int nvmlDeviceGetMemoryBusWidth(void *device, unsigned *bits) {
  *bits = 256;
  return refused("nvmlDeviceGetMemoryBusWidth");
}
