// Checks every access to global memory against the buffers that the harness registered.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "where.h"

namespace hydra::emulator {

// How a kernel reads: through the read-only cache, or past L1.
enum class Read { stream, input, fresh };

class GlobalMemory {
 public:
  // An empty string, or why not.
  std::string add(const void* p, size_t bytes, const char* name, int kind);
  void remove(const void* p);
  void clear();
  // Between launches, by the host: an empty string, or why not.
  std::string overwrite(const void* p, size_t bytes, const char* what);

  void start_launch();
  void start_block();

  void read(const void* p, size_t bytes, Read how, Where where);
  void write(const void* p, size_t bytes, Where where);
  void fence();
  void count_up(const void* p, Where where);

 private:
  struct Buffer {
    const char* begin;
    size_t bytes;
    std::string name;
    int kind;
    bool written;                    // in this launch
    std::vector<uint32_t> writers;   // per byte: a record of this launch, or 0
    std::vector<bool> initialised;   // per byte, if the kind asks for it

    bool writable() const;
  };

  // Writes of one thread in one interval.
  struct Record {
    uint32_t block;
    int thread;
    uint32_t interval;
    bool fenced;
    bool released;  // fenced, and then count_up
    int fencer;
    uint32_t fence_interval;
  };

  // "read_input of 4 bytes at byte 64 of buffer 'x' (64 bytes)"
  std::string describe(const void* p, size_t bytes, const char* what) const;
  // Null if no buffer is registered at all.
  Buffer* find(const void* p, size_t bytes, const char* what, Where where);
  void check_previous_kernel(const void* p, size_t bytes, const char* what, Where where);
  void check_initialised(const Buffer& buffer, size_t offset, size_t bytes, const char* what,
                         Where where);
  void check_writable(const Buffer& buffer, const void* p, size_t bytes, const char* what,
                      Where where);
  // Why what `record` says does not surely come before what the running thread does; or empty.
  std::string disorder(const Record& record) const;
  uint32_t record();
  std::string writer_of(const Record& record) const;

  std::vector<Buffer> buffers_;  // by address
  Buffer* last_ = nullptr;
  std::vector<Record> records_;
  std::vector<uint32_t> unfenced_, unreleased_;  // records of this block
  uint32_t count_interval_ = 0;                  // of the first count_up in this block
};

}  // namespace hydra::emulator
