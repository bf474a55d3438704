// A line of the kernel, for messages.
#pragma once

namespace hydra::emulator {

struct Where {
  const char* file = "";
  int line = 0;

  // As a default argument this is the line of the caller.
  static constexpr Where here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

}  // namespace hydra::emulator
