// Fibers: stacks among which one OS thread switches, with the sanitizers told of every switch.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

#if !defined(__x86_64__)
#error "cudacpu: write swap_stacks and Fiber::prepare for this processor"
#endif

// The scheduler's own functions: AddressSanitizer may not track frames that are never left, and
// ThreadSanitizer may not see the bookkeeping that the fibers of an OS thread share.
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define CUDACPU_SCHEDULER __attribute__((no_sanitize("address")))
#elif defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#define CUDACPU_SCHEDULER __attribute__((no_sanitize("thread")))
#else
#define CUDACPU_SCHEDULER
#endif

namespace cudacpu {

constexpr size_t kGuardBytes = 4096;
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// For ThreadSanitizer: what a thread did before release(tag) happens before what another does
// after acquire(tag). Nothing else orders two fibers, not even a switch from one to the other.
CUDACPU_SCHEDULER inline void release([[maybe_unused]] void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(tag);
#endif
}

CUDACPU_SCHEDULER inline void acquire([[maybe_unused]] void* tag) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(tag);
#endif
}

// Saves the callee-saved registers and the stack pointer of the caller, and returns to where the
// owner of `load` once called.
__attribute__((naked, noinline)) inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15;"
      "movq %rsp, (%rdi); movq %rsi, %rsp;"
      "popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp; ret");
}

class Fiber {
 public:
  // Makes the next switch here call `start`, which never returns. `stack` is the lowest usable
  // address. Stacks begin at different offsets in their pages, or all would share cache sets.
  CUDACPU_SCHEDULER void prepare(char* stack, size_t offset, void (*start)()) {
    auto** top = reinterpret_cast<void**>(stack + kStackBytes - offset);
    *--top = nullptr;  // the return address of `start`: it has none
    *--top = reinterpret_cast<void*>(start);
    for (int saved_register = 0; saved_register < 6; ++saved_register) *--top = nullptr;
    stack_pointer_ = top;
#if defined(__SANITIZE_ADDRESS__)
    fake_stack_ = nullptr;
    bottom_ = stack;
    size_ = kStackBytes;
#elif defined(__SANITIZE_THREAD__)
    if (!tsan_) tsan_ = __tsan_create_fiber(0);
#endif
  }

  // Makes this the fiber of the OS thread that calls, on the stack that it has.
  CUDACPU_SCHEDULER void adopt_thread() {
#if defined(__SANITIZE_ADDRESS__)
    bottom_ = nullptr;  // learned from the first switch away
#elif defined(__SANITIZE_THREAD__)
    tsan_ = __tsan_get_current_fiber();
#endif
  }

  CUDACPU_SCHEDULER void switch_to(Fiber& next) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.size_);
#elif defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(next.tsan_, __tsan_switch_to_fiber_no_sync);
#endif
    swap_stacks(&stack_pointer_, next.stack_pointer_);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack_, nullptr, nullptr);
#endif
  }

  // The first thing a started fiber does.
  CUDACPU_SCHEDULER static void arrive([[maybe_unused]] Fiber& os_thread) {
#if defined(__SANITIZE_ADDRESS__)
    const void* bottom;
    size_t size;
    __sanitizer_finish_switch_fiber(nullptr, &bottom, &size);
    if (!os_thread.bottom_) {
      os_thread.bottom_ = bottom;
      os_thread.size_ = size;
    }
#endif
  }

 private:
  void* stack_pointer_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t size_ = 0;
#elif defined(__SANITIZE_THREAD__)
  void* tsan_ = nullptr;
#endif
};

// `count` stacks, each above a page that faults, so that an overflow does not go unnoticed.
class Stacks {
 public:
  explicit Stacks(size_t count) : bytes_(count * (kGuardBytes + kStackBytes)) {
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      perror("cudacpu: no memory for the stacks");
      abort();
    }
    memory_ = static_cast<char*>(memory);
    for (size_t i = 0; i < count; ++i) mprotect((*this)[i] - kGuardBytes, kGuardBytes, PROT_NONE);
  }
  ~Stacks() {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(memory_, bytes_);  // of functions that were never left
#endif
    munmap(memory_, bytes_);
  }
  Stacks(const Stacks&) = delete;
  Stacks& operator=(const Stacks&) = delete;

  CUDACPU_SCHEDULER char* operator[](size_t i) const {
    return memory_ + i * (kGuardBytes + kStackBytes) + kGuardBytes;
  }

 private:
  size_t bytes_;
  char* memory_;
};

}  // namespace cudacpu
