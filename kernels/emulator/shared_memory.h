// Shared memory of one block, with a shadow that finds unwritten bytes and races.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "where.h"

namespace hydra::emulator {

class SharedMemory {
 public:
  void start_launch(size_t bytes);
  void start_block();

  // Before the numbers of intervals start again.
  void forget();

  unsigned char* data() const { return data_.get(); }
  void read(const void* p, size_t bytes, Where where);
  void write(const void* p, size_t bytes, Where where);

 private:
  struct Free {
    void operator()(unsigned char* p) const;
  };

  size_t offset_of(const void* p, size_t bytes, const char* what, Where where);
  [[noreturn]] void race(size_t offset, const char* what, const char* earlier, int owner,
                         Where where);

  std::unique_ptr<unsigned char, Free> data_;
  size_t bytes_ = 0;

  // Per byte, as intervals. Before a barrier nothing else is in order with a thread of another
  // warp, so two readers of different warps stand for all: whoever writes differs from one of them.
  // Within the last reader's warp a flag says that another lane read since its last rendezvous.
  std::vector<uint32_t> writers_, readers_, readers_of_another_warp_;
};

}  // namespace hydra::emulator
