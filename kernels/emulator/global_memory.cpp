#include "global_memory.h"

#include <algorithm>

#include "machine.h"

namespace hydra::emulator {

namespace {

const char* name(Read how) {
  switch (how) {
    case Read::stream: return "read_stream";
    case Read::input: return "read_input";
    case Read::fresh: return "read_fresh";
  }
  return "?";
}

}  // namespace

// ---- buffers

bool GlobalMemory::Buffer::writable() const {
  return kind == HYDRA_EMULATOR_OUTPUT || kind == HYDRA_EMULATOR_UNINITIALISED;
}

std::string GlobalMemory::add(const void* p, size_t bytes, const char* name, int kind) {
  std::string title = "buffer '" + std::string(name) + "'";
  if (p == nullptr || bytes == 0) return title + " is empty. Register only buffers with bytes.";
  if (kind < HYDRA_EMULATOR_CONSTANT || kind > HYDRA_EMULATOR_UNINITIALISED) {
    return title + " has kind " + std::to_string(kind) + ", which is none. Use 0 to 3.";
  }
  auto begin = static_cast<const char*>(p);
  for (const Buffer& other : buffers_) {
    if (begin < other.begin + other.bytes && other.begin < begin + bytes) {
      return title + " overlaps buffer '" + other.name +
             "'. Register each byte once, or call hydra_emulator_clear first.";
    }
  }
  Buffer buffer{begin, bytes, name, kind, false, {}, {}};
  if (buffer.writable()) buffer.writers.resize(bytes);
  if (kind == HYDRA_EMULATOR_UNINITIALISED) buffer.initialised.resize(bytes);
  auto after = std::find_if(buffers_.begin(), buffers_.end(),
                            [&](const Buffer& other) { return other.begin > begin; });
  buffers_.insert(after, std::move(buffer));
  last_ = nullptr;
  return "";
}

void GlobalMemory::remove(const void* p) {
  buffers_.erase(std::remove_if(buffers_.begin(), buffers_.end(),
                                [&](const Buffer& buffer) { return buffer.begin == p; }),
                 buffers_.end());
  last_ = nullptr;
}

std::string GlobalMemory::overwrite(const void* p, size_t bytes, const char* what) {
  auto at = static_cast<const char*>(p);
  for (Buffer& buffer : buffers_) {
    if (at < buffer.begin || at + bytes > buffer.begin + buffer.bytes || !buffer.writable()) continue;
    if (buffer.kind == HYDRA_EMULATOR_UNINITIALISED) {
      auto first = buffer.initialised.begin() + (at - buffer.begin);
      std::fill(first, first + ptrdiff_t(bytes), true);
    }
    return "";
  }
  if (buffers_.empty()) return "";
  return describe(p, bytes, what) + ": outside of every buffer that may be written.";
}

void GlobalMemory::clear() {
  buffers_.clear();
  last_ = nullptr;
}

void GlobalMemory::start_launch() {
  for (Buffer& buffer : buffers_) {
    if (buffer.written) std::fill(buffer.writers.begin(), buffer.writers.end(), 0);
    buffer.written = false;
  }
  records_.assign(1, Record{});  // number 0 means none
}

void GlobalMemory::start_block() {
  unfenced_.clear();
  unreleased_.clear();
  count_interval_ = 0;
}

std::string GlobalMemory::describe(const void* p, size_t bytes, const char* what) const {
  std::string text = std::string(what) + " of " + std::to_string(bytes) + " bytes at ";
  if (p == nullptr) return text + "a null pointer";
  auto at = reinterpret_cast<intptr_t>(p);
  const Buffer* nearest = nullptr;
  intptr_t distance = 0;
  for (const Buffer& buffer : buffers_) {
    auto begin = reinterpret_cast<intptr_t>(buffer.begin);
    intptr_t end = begin + intptr_t(buffer.bytes);
    intptr_t d = at < begin ? begin - at : at < end ? 0 : at - end + 1;
    if (nearest == nullptr || d < distance) {
      nearest = &buffer;
      distance = d;
    }
  }
  if (nearest == nullptr) return text + "address " + std::to_string(at);
  return text + "byte " + std::to_string(at - reinterpret_cast<intptr_t>(nearest->begin)) +
         " of buffer '" + nearest->name + "' (" + std::to_string(nearest->bytes) + " bytes)";
}

GlobalMemory::Buffer* GlobalMemory::find(const void* p, size_t bytes, const char* what,
                                         Where where) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) {
    machine.fault(where, describe(p, bytes, what) +
                             ": misaligned. The address must be a multiple of the size.");
  }
  if (buffers_.empty()) return nullptr;
  auto at = static_cast<const char*>(p);
  auto holds = [&](const Buffer& buffer) {
    return at >= buffer.begin && at + bytes <= buffer.begin + buffer.bytes;
  };
  if (last_ != nullptr && holds(*last_)) return last_;
  for (Buffer& buffer : buffers_) {
    if (holds(buffer)) return last_ = &buffer;
  }
  machine.fault(where, describe(p, bytes, what) +
                           ": outside of every registered buffer; this one is the nearest.");
}

void GlobalMemory::check_previous_kernel(const void* p, size_t bytes, const char* what,
                                         Where where) {
  if (machine.thread().previous_kernel_done) return;
  machine.fault(where, describe(p, bytes, what) +
                           ": before wait_for_previous_kernel, which may still use it. "
                           "Only constant buffers may be touched before that call.");
}

void GlobalMemory::check_initialised(const Buffer& buffer, size_t offset, size_t bytes,
                                     const char* what, Where where) {
  if (buffer.kind != HYDRA_EMULATOR_UNINITIALISED) return;
  for (size_t i = offset; i < offset + bytes; ++i) {
    if (buffer.initialised[i]) continue;
    machine.fault(where, describe(buffer.begin + offset, bytes, what) + ": byte " +
                             std::to_string(i) + " has never been written.");
  }
}

// ---- accesses

void GlobalMemory::read(const void* p, size_t bytes, Read how, Where where) {
  (how == Read::stream  ? machine.counters.stream_bytes
   : how == Read::input ? machine.counters.input_bytes
                        : machine.counters.fresh_bytes) += bytes;
  const Buffer* buffer = find(p, bytes, name(how), where);
  if (buffer == nullptr || buffer->kind == HYDRA_EMULATOR_CONSTANT) return;
  check_previous_kernel(p, bytes, name(how), where);
  size_t offset = size_t(static_cast<const char*>(p) - buffer->begin);
  check_initialised(*buffer, offset, bytes, name(how), where);
  if (!buffer->written) return;
  uint32_t checked = 0;
  for (size_t i = offset; i < offset + bytes; ++i) {
    uint32_t writer = buffer->writers[i];
    if (writer == checked || writer == 0) continue;
    checked = writer;
    const Record& record = records_[writer];
    std::string problem;
    if (how != Read::fresh) {
      problem = "the read-only cache may hold older bytes. Use read_fresh.";
    } else {
      problem = disorder(record);
    }
    if (problem.empty()) continue;
    machine.fault(where, describe(p, bytes, name(how)) + ": written in this launch by " +
                             writer_of(record) + "; " + problem);
  }
}

void GlobalMemory::write(const void* p, size_t bytes, Where where) {
  machine.counters.written_bytes += bytes;
  Buffer* buffer = find(p, bytes, "write_global", where);
  if (buffer == nullptr) return;
  check_writable(*buffer, p, bytes, "write_global", where);
  size_t offset = size_t(static_cast<const char*>(p) - buffer->begin);
  buffer->written = true;
  uint32_t mine = record();
  for (size_t i = offset; i < offset + bytes; ++i) {
    uint32_t writer = buffer->writers[i];
    if (writer != 0 && writer != mine) {
      std::string problem = disorder(records_[writer]);
      if (!problem.empty()) {
        machine.fault(where, describe(p, bytes, "write_global") +
                                 ": also written in this launch by " + writer_of(records_[writer]) +
                                 "; " + problem);
      }
    }
    buffer->writers[i] = mine;
    if (buffer->kind == HYDRA_EMULATOR_UNINITIALISED) buffer->initialised[i] = true;
  }
}

void GlobalMemory::check_writable(const Buffer& buffer, const void* p, size_t bytes,
                                  const char* what, Where where) {
  if (!buffer.writable()) {
    machine.fault(where, describe(p, bytes, what) +
                             ": the buffer is read-only. Register it as output, or fix the index.");
  }
  check_previous_kernel(p, bytes, what, where);
}

// ---- order between blocks: write, fence, count_up; count_up, read

void GlobalMemory::fence() {
  Thread& me = machine.thread();
  me.writes = 0;  // what follows is not fenced
  uint32_t now = machine.interval();
  auto kept = unfenced_.begin();
  for (uint32_t number : unfenced_) {
    Record& record = records_[number];
    if (machine.before(record.interval, record.thread)) {
      record.fenced = true;
      record.fencer = me.index;
      record.fence_interval = now;
      unreleased_.push_back(number);
    } else {
      *kept++ = number;
    }
  }
  unfenced_.erase(kept, unfenced_.end());
}

void GlobalMemory::count_up(const void* p, Where where) {
  constexpr size_t bytes = sizeof(uint32_t);
  if (const Buffer* buffer = find(p, bytes, "count_up", where)) {
    check_writable(*buffer, p, bytes, "count_up", where);
    size_t offset = size_t(static_cast<const char*>(p) - buffer->begin);
    check_initialised(*buffer, offset, bytes, "count_up", where);
  }
  auto kept = unreleased_.begin();
  for (uint32_t number : unreleased_) {
    Record& record = records_[number];
    record.released = machine.before(record.fence_interval, record.fencer);
    if (!record.released) *kept++ = number;
  }
  unreleased_.erase(kept, unreleased_.end());
  if (count_interval_ == 0) count_interval_ = machine.interval();
  machine.thread().counted = true;
}

std::string GlobalMemory::disorder(const Record& record) const {
  if (record.block == machine.block_number()) {
    if (machine.before(record.interval, record.thread)) return "";
    return "put a sync_block between them.";
  }
  if (!record.fenced) return "no fence since then in that block.";
  if (!record.released) return "no count_up after the fence in that block.";
  bool counted = machine.thread().counted ||
                 (count_interval_ != 0 && count_interval_ < machine.synced());
  return counted ? "" : "no count_up before this in this block, which could run first.";
}

uint32_t GlobalMemory::record() {
  Thread& me = machine.thread();
  uint32_t now = machine.interval();
  if (me.writes == 0 || records_[me.writes].interval != now) {
    me.writes = uint32_t(records_.size());
    Record record{};
    record.block = machine.block_number();
    record.thread = me.index;
    record.interval = now;
    records_.push_back(record);
    unfenced_.push_back(me.writes);
  }
  return me.writes;
}

std::string GlobalMemory::writer_of(const Record& record) const {
  const dim3& grid = machine.grid();
  std::string block = "(" + std::to_string(record.block % grid.x) + ", " +
                      std::to_string(record.block / grid.x % grid.y) + ", " +
                      std::to_string(record.block / grid.x / grid.y) + ")";
  return "thread " + std::to_string(record.thread) + " of block " + block;
}

}  // namespace hydra::emulator
