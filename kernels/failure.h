// Failures of the C interface: a status, and a sentence for the thread that asked.
#pragma once

#include <cstdarg>
#include <cstdio>

#include "hydra_kernels.h"

namespace hydra {

inline char* error_text() {
  static thread_local char text[512] = "";
  return text;
}

// What happened, why, and what to do, as printf would have it.
__attribute__((format(printf, 2, 3))) inline hydra_status failure(hydra_status status,
                                                                  const char* format, ...) {
  va_list values;
  va_start(values, format);
  std::vsnprintf(error_text(), 512, format, values);
  va_end(values);
  return status;
}

}  // namespace hydra
