#include "shared_memory.h"

#include <cstdlib>
#include <cstring>

#include "machine.h"

namespace hydra::emulator {

namespace {

// On a reader: another lane of its warp has read since the warp last met.
constexpr uint32_t kSeveral = 1u << 31;

}  // namespace

void SharedMemory::Free::operator()(unsigned char* p) const { std::free(p); }

void SharedMemory::start_launch(size_t bytes) {
  // Exactly this many, so that AddressSanitizer sees an access past the end too.
  void* p = nullptr;
  if (posix_memalign(&p, 16, bytes) != 0) std::abort();
  data_.reset(static_cast<unsigned char*>(p));
  bytes_ = bytes;
  if (writers_.size() < bytes) {
    writers_.resize(bytes);
    readers_.resize(bytes);
    readers_of_another_warp_.resize(bytes);
  }
}

void SharedMemory::start_block() {
  if (bytes_ > 0) std::memset(data_.get(), 0xCD, bytes_);
}

void SharedMemory::forget() {
  writers_.assign(writers_.size(), 0);
  readers_.assign(readers_.size(), 0);
  readers_of_another_warp_.assign(readers_.size(), 0);
}

size_t SharedMemory::offset_of(const void* p, size_t bytes, const char* what, Where where) {
  auto begin = reinterpret_cast<intptr_t>(data_.get()), at = reinterpret_cast<intptr_t>(p);
  intptr_t offset = at - begin;
  bool outside = offset < 0 || size_t(offset) + bytes > bytes_;
  if (!outside && at % intptr_t(bytes) == 0) return size_t(offset);
  std::string text = std::string(what) + " of " + std::to_string(bytes) + " bytes at byte " +
                     std::to_string(offset) + " of shared memory (" + std::to_string(bytes_) +
                     " bytes): ";
  if (outside) machine.fault(where, text + "outside. Ask for more shared_bytes or fix the index.");
  machine.fault(where, text + "misaligned. The offset must be a multiple of the size.");
}

void SharedMemory::race(size_t offset, const char* what, const char* earlier, int owner,
                        Where where) {
  machine.fault(where, std::string(what) + " at byte " + std::to_string(offset) +
                           " of shared memory (" + std::to_string(bytes_) + " bytes): race with " +
                           earlier + " thread " + std::to_string(owner) + " (warp " +
                           std::to_string(owner / kLanes) + ", lane " +
                           std::to_string(owner % kLanes) + "). Put a sync_block between them.");
}

void SharedMemory::read(const void* p, size_t bytes, Where where) {
  machine.counters.shared_read_bytes += bytes;
  size_t offset = offset_of(p, bytes, "read_shared", where);
  const uint32_t now = machine.interval(), synced = machine.synced();
  const Thread& me = machine.thread();
  for (size_t i = offset; i < offset + bytes; ++i) {
    uint32_t writer = writers_[i];
    if (writer < machine.block_start()) {
      machine.fault(where, "read_shared at byte " + std::to_string(i) + " of shared memory (" +
                               std::to_string(bytes_) +
                               " bytes): no thread of this block has written it.");
    }
    if (writer >= synced && !machine.before(writer, machine.owner(writer))) {
      race(i, "read_shared", "a write by", machine.owner(writer), where);
    }
    uint32_t last = readers_[i] & ~kSeveral;
    if (last == now) continue;
    uint32_t several = 0;
    if (last >= synced) {
      int owner = machine.owner(last);
      if (owner / kLanes != me.warp()) {
        readers_of_another_warp_[i] = last;
      } else if (owner != me.index && last >= machine.warp().met) {
        several = kSeveral;
      }
    }
    readers_[i] = now | several;
  }
}

void SharedMemory::write(const void* p, size_t bytes, Where where) {
  machine.counters.shared_written_bytes += bytes;
  size_t offset = offset_of(p, bytes, "write_shared", where);
  const uint32_t now = machine.interval(), synced = machine.synced();
  for (size_t i = offset; i < offset + bytes; ++i) {
    uint32_t writer = writers_[i];
    if (writer >= synced && !machine.before(writer, machine.owner(writer))) {
      race(i, "write_shared", "a write by", machine.owner(writer), where);
    }
    uint32_t reader = readers_[i] & ~kSeveral;
    if (reader >= synced) {
      int owner = machine.owner(reader);
      if (!machine.before(reader, owner)) race(i, "write_shared", "a read by", owner, where);
      if ((readers_[i] & kSeveral) != 0 && reader >= machine.warp().met) {
        race(i, "write_shared", "reads by other lanes of the warp, besides", owner, where);
      }
      uint32_t other = readers_of_another_warp_[i];
      if (other >= synced) race(i, "write_shared", "a read by", machine.owner(other), where);
    }
    writers_[i] = now;
  }
}

}  // namespace hydra::emulator
