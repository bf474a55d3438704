#include "fibers.h"

#include <sys/mman.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#ifdef __has_feature
#if __has_feature(address_sanitizer) && !defined(__SANITIZE_ADDRESS__)
#define __SANITIZE_ADDRESS__
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace hydra::emulator {

namespace {

// Room for unoptimised kernels with AddressSanitizer; only touched pages cost memory.
constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 64 * 1024;  // a multiple of every page size in use

#ifdef __SANITIZE_ADDRESS__
Context* left = nullptr;  // the last one that switched away

void announce(Context& from, Context& to, bool for_good) {
  left = &from;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
}

void announce_arrival(void* fake_stack) {
  __sanitizer_finish_switch_fiber(fake_stack, &left->stack, &left->stack_bytes);
}
#else
void announce(Context&, Context&, bool) {}
void announce_arrival(void*) {}
#endif

}  // namespace

#ifdef HYDRA_PORTABLE_FIBERS

static void jump(Context& from, Context& to) { swapcontext(&from.saved, &to.saved); }

static void set_up(Context& context, void (*entry)()) {
  getcontext(&context.saved);
  context.saved.uc_stack.ss_sp = const_cast<void*>(context.stack);
  context.saved.uc_stack.ss_size = context.stack_bytes;
  context.saved.uc_link = nullptr;
  makecontext(&context.saved, entry, 0);
}

#else

// Saves what a call must preserve, stores the stack pointer, and undoes the same on the other stack.
extern "C" void hydra_switch_stacks(void** save, void* load);
asm(R"(
  .text
  .globl hydra_switch_stacks
  .hidden hydra_switch_stacks
  .type hydra_switch_stacks, @function
hydra_switch_stacks:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size hydra_switch_stacks, . - hydra_switch_stacks
)");

static void jump(Context& from, Context& to) {
  hydra_switch_stacks(&from.stack_pointer, to.stack_pointer);
}

static void set_up(Context& context, void (*entry)()) {
  uintptr_t top = reinterpret_cast<uintptr_t>(context.stack) + context.stack_bytes;
  // Six registers, the address to return to, and a null one for `entry` itself, whose stack pointer
  // must then be 8 below a multiple of 16.
  void** frame = reinterpret_cast<void**>(top - 16) - 6;
  std::memset(frame, 0, 8 * sizeof *frame);
  frame[6] = reinterpret_cast<void*>(entry);
  context.stack_pointer = frame;
}

#endif

void prepare(Context& context, void (*entry)()) {
#ifdef __SANITIZE_ADDRESS__
  // A fiber that was left for good leaves its frames poisoned.
  __asan_unpoison_memory_region(context.stack, context.stack_bytes);
#endif
  context.fake_stack = nullptr;
  set_up(context, entry);
}

void switch_context(Context& from, Context& to) {
  announce(from, to, false);
  jump(from, to);
  announce_arrival(from.fake_stack);
}

void leave(Context& from, Context& to) {
  announce(from, to, true);
  jump(from, to);
}

void arrive() { announce_arrival(nullptr); }

void Stacks::assign(Context& context, size_t index) {
  while (stacks_.size() <= index) {
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, kGuardBytes, PROT_NONE) != 0) {
      std::perror("hydra emulator: no memory for the stack of a thread");
      std::abort();
    }
    stacks_.push_back(static_cast<char*>(p) + kGuardBytes);
  }
  // Tops at equal offsets would share the same few sets of every cache.
  size_t shift = index % 32 * 512;
  context.stack = stacks_[index];
  context.stack_bytes = kStackBytes - shift;
}

}  // namespace hydra::emulator
