// Stacks and the switch between them. x86-64 switches in a few instructions; elsewhere, or with
// HYDRA_PORTABLE_FIBERS, swapcontext does it with a system call each time.
#pragma once

#include <cstddef>
#include <vector>

#if !defined(__x86_64__) && !defined(HYDRA_PORTABLE_FIBERS)
#define HYDRA_PORTABLE_FIBERS
#endif
#ifdef HYDRA_PORTABLE_FIBERS
#include <ucontext.h>
#endif

namespace hydra::emulator {

// A place where execution can go on. A default one belongs to the host's own stack.
struct Context {
#ifdef HYDRA_PORTABLE_FIBERS
  ucontext_t saved;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;  // lowest byte, for AddressSanitizer
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
};

// Makes `context` start `entry` on its stack; `entry` must not return.
void prepare(Context& context, void (*entry)());

// Goes on at `to`; returns when someone switches back to `from`.
void switch_context(Context& from, Context& to);

// Goes on at `to` for good.
void leave(Context& from, Context& to);

// First statement of every entry.
void arrive();

// Stacks with a guard page below each, kept until the process ends.
class Stacks {
 public:
  // Gives `context` the stack number `index`.
  void assign(Context& context, size_t index);

 private:
  std::vector<char*> stacks_;
};

}  // namespace hydra::emulator
