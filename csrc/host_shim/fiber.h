// A fiber: a stack of its own and a switch to it that saves what the calling convention says a function must keep.
//
// x86-64 has eight instructions for it, other processors take ucontext (whose system call for signals costs a
// microsecond a switch). AddressSanitizer is told of every switch.

#pragma once

#include <cstddef>
#include <cstdint>
#include <sys/mman.h>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void dk_shim_switch(void **save, void *load);
#else
#include <ucontext.h>
#endif

namespace dk_shim {

class Fiber {
public:
  static constexpr size_t STACK = 256 << 10;

  Fiber() = default;  // the thread itself
  Fiber(const Fiber &) = delete;

  // Makes the next switch to this fiber call `entry`, which must never return.
  void start(void (*entry)()) {
    if (!stack_)
      stack_ = static_cast<char *>(
          mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack_, STACK);  // of frames that were left and never returned from
    fake_ = nullptr;
#endif
#if defined(__x86_64__)
    void **top = reinterpret_cast<void **>(stack_ + STACK) - 1;  // where `entry` finds its return address
    *top = nullptr;
    *--top = reinterpret_cast<void *>(entry);
    pointer_ = top - 6;  // six registers
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = STACK;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // Leaves this fiber, which runs, for another; comes back when somebody switches to this one.
  void switch_to(Fiber &next) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_, next.stack_ ? next.stack_ : next.bottom_, next.stack_ ? STACK : next.size_);
#endif
#if defined(__x86_64__)
    dk_shim_switch(&pointer_, next.pointer_);
#else
    swapcontext(&context_, &next.context_);
#endif
    arrived(this);
  }

  // What the code of a fiber does first: `self` runs now. `from`, where the thread's own stack must be learned.
  static void arrived(Fiber *self, Fiber *from = nullptr) {
#if defined(__SANITIZE_ADDRESS__)
    const void *bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(self->fake_, &bottom, &size);
    if (from && !from->stack_) from->bottom_ = bottom, from->size_ = size;
#else
    (void)self, (void)from;
#endif
  }

private:
  char *stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void *fake_ = nullptr;
  const void *bottom_ = nullptr;
  size_t size_ = 0;
#endif
#if defined(__x86_64__)
  void *pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace dk_shim
