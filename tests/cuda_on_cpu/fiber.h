// A stack of its own for each emulated thread, and the switch from one to another: some ten nanoseconds by hand on x86-64,
// some hundreds by ucontext elsewhere (EMULATOR_UCONTEXT asks for it there too, to test it). The sanitizers are told of every
// switch. Their builds define EMULATOR_ADDRESS or EMULATOR_THREAD; this file itself is never instrumented.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <vector>

#if !defined(__x86_64__) && !defined(EMULATOR_UCONTEXT)
#define EMULATOR_UCONTEXT
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif
#if defined(EMULATOR_ADDRESS)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(EMULATOR_THREAD)
#include <sanitizer/tsan_interface.h>
#endif

#if !defined(EMULATOR_UCONTEXT)
// Saves the registers that a function must keep and the stack pointer in *from, and goes on where `to` was saved.
extern "C" void emulator_switch(void** from, void* to);
__asm__(R"(
.text
.globl emulator_switch
.hidden emulator_switch
.type emulator_switch,@function
emulator_switch:
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
.size emulator_switch,.-emulator_switch
)");
#endif

namespace emulator {

class Fiber {
 public:
  static constexpr size_t kStack = 128 << 10;

  Fiber() = default;
  Fiber(const Fiber&) = delete;

  // Prepares a call of entry(), which must not return, on a stack of its own.
  void start(void (*entry)()) {
    stack_ = take_stack();
#if defined(EMULATOR_UCONTEXT)
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_;
    context_.uc_stack.ss_size = kStack;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#else
    auto** top = reinterpret_cast<void**>(static_cast<char*>(stack_) + kStack) - 3;  // aligned as after a call
    *top = nullptr;
    *--top = reinterpret_cast<void*>(entry);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack_pointer_ = top;
#endif
#if defined(EMULATOR_THREAD)
    tsan_ = __tsan_create_fiber(0);
#endif
  }

  // Gives the stack back; the fiber never runs again.
  void end() {
    if (!stack_) return;
#if defined(EMULATOR_THREAD)
    __tsan_destroy_fiber(tsan_);
    munmap(stack_, kStack);  // another fiber on this memory would seem to race with this one
#else
    free_stacks().push_back(stack_);
#endif
    stack_ = nullptr;
  }

  // For the fiber that the thread of the operating system runs already.
  void adopt() {
#if defined(EMULATOR_THREAD)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  // Leaves this fiber, which runs now, for another one; returns when something switches back. `for_good`: it never will.
  void switch_to(Fiber& other, [[maybe_unused]] bool for_good = false) {
#if defined(EMULATOR_ADDRESS)
    const void* bottom = other.stack_ ? other.stack_ : other.bottom_;
    __sanitizer_start_switch_fiber(for_good ? nullptr : &fake_stack_, bottom, other.stack_ ? kStack : other.size_);
    left_ = this;
#endif
#if defined(EMULATOR_THREAD)
    __tsan_switch_to_fiber(other.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMULATOR_UCONTEXT)
    swapcontext(&context_, &other.context_);
#else
    emulator_switch(&stack_pointer_, other.stack_pointer_);
#endif
    arrived(fake_stack_);
  }

  // The first thing that entry() calls.
  static void arrived([[maybe_unused]] void* fake_stack = nullptr) {
#if defined(EMULATOR_ADDRESS)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(fake_stack, &bottom, &size);
    if (!left_->stack_) {
      left_->bottom_ = bottom;
      left_->size_ = size;
    }
#endif
  }

 private:
  static std::vector<void*>& free_stacks() {
    static std::vector<void*> stacks;
    return stacks;
  }

  static void* take_stack() {
    std::vector<void*>& stacks = free_stacks();
    if (!stacks.empty()) {
      void* stack = stacks.back();
      stacks.pop_back();
#if defined(EMULATOR_ADDRESS)
      __asan_unpoison_memory_region(stack, kStack);
#endif
      return stack;
    }
    void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (stack == MAP_FAILED) std::abort();
#if !defined(EMULATOR_THREAD)
    mprotect(stack, 4096, PROT_NONE);  // what overflows ends the process
#endif
    return stack;
  }

  void* stack_ = nullptr;  // null for the one that was adopted
  void* fake_stack_ = nullptr;
#if defined(EMULATOR_UCONTEXT)
  ucontext_t context_;
#else
  void* stack_pointer_ = nullptr;
#endif
#if defined(EMULATOR_THREAD)
  void* tsan_ = nullptr;
#endif
#if defined(EMULATOR_ADDRESS)
  const void* bottom_ = nullptr;  // of the stack of the one that was adopted
  size_t size_ = 0;
  static inline Fiber* left_ = nullptr;
#endif
};

}  // namespace emulator
