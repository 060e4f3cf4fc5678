// Runs the CUDA threads of one block as fibers of one OS thread. They switch only where CUDA
// threads may wait for one another, at barriers and warp collectives, so everything between two
// such points runs in one piece; ThreadSanitizer, which is told of no other order, sees what that
// hides.
#pragma once

#include <cuda_runtime_api.h>  // types and declarations only; nothing of the toolkit is linked

#include <algorithm>
#include <cstdarg>
#include <cstring>
#include <string>

#include "fiber.h"

inline thread_local uint3 threadIdx{};
inline thread_local uint3 blockIdx{};
inline thread_local dim3 blockDim{};
inline thread_local dim3 gridDim{};
constexpr int warpSize = 32;

namespace cudacpu {

constexpr unsigned kLanes = 32;
constexpr unsigned kMaxThreads = 1024;
constexpr unsigned kMaxWarps = kMaxThreads / kLanes;

// Which of the threads that can go on goes on, and which block comes next.
enum class Order { kForward, kReverse, kRandom };

// The lanes of a mask, for range-based for.
class Lanes {
 public:
  explicit Lanes(uint32_t mask) : mask_(mask) {}
  CUDACPU_SCHEDULER Lanes begin() const { return *this; }
  CUDACPU_SCHEDULER Lanes end() const { return Lanes(0); }
  CUDACPU_SCHEDULER bool operator!=(Lanes other) const { return mask_ != other.mask_; }
  CUDACPU_SCHEDULER unsigned operator*() const { return unsigned(__builtin_ctz(mask_)); }
  CUDACPU_SCHEDULER void operator++() { mask_ &= mask_ - 1; }

 private:
  uint32_t mask_;
};

// What one completed warp collective carried.
struct Exchange {
  uint64_t value[kLanes];
  uint32_t mask;    // the lanes that took part
  unsigned unread;  // how many of them have yet to read
};

// What the threads of a block say in a barrier, put together.
struct Votes {
  int count = 0;
  int all = 1;
  int any = 0;
};

class Block {
 public:
  Block() : stacks_(kMaxThreads) {}

  // The kernel that the next blocks run, called by the OS thread that will run them.
  CUDACPU_SCHEDULER void begin(dim3 grid, dim3 block, void (*kernel)(void*), void* argument,
                               Order order, uint64_t seed);

  // Runs one block. False if it failed; then error() says why, and its threads stay where they
  // stood, so the object must not be used again.
  CUDACPU_SCHEDULER bool run(uint3 index) {
    blockIdx = index;
    live_ = threads_;
    arrived_ = 0;
    votes_ = Votes{};
    for (unsigned w = 0; w < warps_; ++w) {
      const unsigned lanes = std::min(kLanes, threads_ - w * kLanes);
      warp_[w].live = lanes == kLanes ? ~0u : (1u << lanes) - 1;
      warp_[w].runnable = warp_[w].live;
      warp_[w].waiting = 0;
      for (Exchange& exchange : warp_[w].exchange) exchange.unread = 0;
    }
    for (unsigned t = 0; t < threads_; ++t) {
      thread_[t].warp = t / kLanes;
      thread_[t].lane = t % kLanes;
      thread_[t].index = {t % blockDim.x, t / blockDim.x % blockDim.y,
                          t / (blockDim.x * blockDim.y)};
      thread_[t].fiber.prepare(stacks_[t], t % 64 * 64, &Block::thread_main);
    }
    host_.fiber.adopt_thread();
    release(&start_tag_);
    resume(*pick());
    acquire(&end_tag_);
    return error_.empty();
  }

  const std::string& error() const { return error_; }

  CUDACPU_SCHEDULER unsigned lane() const { return current_->lane; }

  CUDACPU_SCHEDULER int barrier(int vote, int Votes::* result) {
    const unsigned phase = phase_;
    votes_.count += vote != 0;
    votes_.all &= vote != 0;
    votes_.any |= vote != 0;
    warp_[current_->warp].runnable &= ~(1u << current_->lane);
    release(&barrier_tag_[phase]);
    ++arrived_;
    if (arrived_ == live_) {
      release_barrier();
    } else {
      wait();
    }
    acquire(&barrier_tag_[phase]);
    return result_[phase].*result;
  }

  // Every lane of `mask` that has not exited calls this with the same mask and operation, and
  // gets the values of all of them. Only some collectives also order memory.
  CUDACPU_SCHEDULER const Exchange& collective(uint32_t mask, const char* operation, uint64_t value,
                                               bool orders_memory = false) {
    Warp& warp = warp_[current_->warp];
    Arrival& own = warp.arrival[current_->lane];
    const uint32_t self = 1u << current_->lane;
    if (!(mask & self)) fail("%s(0x%08x): the calling lane is not in the mask", operation, mask);
    own = {mask, operation, value, 0};
    warp.waiting |= self;
    if (orders_memory) release(&own);
    if (!complete(warp, mask, operation)) {
      warp.runnable &= ~self;
      wait();
    }
    Exchange& exchange = warp.exchange[own.slot];
    if (orders_memory) {
      for (unsigned lane : Lanes(exchange.mask)) acquire(&warp.arrival[lane]);
    }
    --exchange.unread;  // the values stay until this lane waits again
    return exchange;
  }

  // Ends the launch with an error that names this thread.
  [[noreturn]] CUDACPU_SCHEDULER __attribute__((format(printf, 2, 3))) void fail(const char* format,
                                                                                 ...) {
    char text[512];
    const int length =
        snprintf(text, sizeof text, "block (%u,%u,%u) thread (%u,%u,%u): ", blockIdx.x, blockIdx.y,
                 blockIdx.z, threadIdx.x, threadIdx.y, threadIdx.z);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(text + length, sizeof text - length, format, arguments);
    va_end(arguments);
    error_ = text;
    release(&end_tag_);
    resume(host_);
    __builtin_unreachable();
  }

 private:
  struct Thread {
    Fiber fiber;
    uint3 index{};
    unsigned warp = 0;
    unsigned lane = 0;
  };

  struct Arrival {  // a lane in a collective
    uint32_t mask;
    const char* operation;
    uint64_t value;
    unsigned slot;  // of the exchange that completed it
  };

  struct Warp {
    uint32_t live;
    uint32_t runnable;
    uint32_t waiting;  // in a collective
    Arrival arrival[kLanes];
    Exchange exchange[kLanes];
  };

  CUDACPU_SCHEDULER static void thread_main();

  CUDACPU_SCHEDULER void resume(Thread& next) {
    Thread& previous = *current_;
    current_ = &next;
    threadIdx = next.index;
    previous.fiber.switch_to(next.fiber);
  }

  CUDACPU_SCHEDULER void wait() {
    Thread* next = pick();
    if (!next) deadlock();
    resume(*next);
  }

  CUDACPU_SCHEDULER unsigned random(unsigned below) {
    random_ = random_ * 6364136223846793005u + 1442695040888963407u;
    return unsigned(random_ >> 33) % below;
  }

  // A thread that can go on, or null if none can.
  CUDACPU_SCHEDULER Thread* pick() {
    const bool reverse = order_ == Order::kReverse;
    const bool shuffled = order_ == Order::kRandom;
    const unsigned edge = reverse ? warps_ - 1 : 0;
    const unsigned start = shuffled ? random(warps_) : current_ == &host_ ? edge : current_->warp;
    const unsigned turn = shuffled ? random(kLanes) : 0;
    for (unsigned n = 0; n < warps_; ++n) {
      const unsigned w = (reverse ? start + warps_ - n : start + n) % warps_;
      const uint32_t runnable = warp_[w].runnable;
      if (!runnable) continue;
      const uint32_t turned = runnable >> turn | runnable << (-turn % kLanes);
      const unsigned lane = reverse ? kLanes - 1 - unsigned(__builtin_clz(runnable))
                                    : (unsigned(__builtin_ctz(turned)) + turn) % kLanes;
      return &thread_[w * kLanes + lane];
    }
    return nullptr;
  }

  CUDACPU_SCHEDULER void release_barrier() {
    result_[phase_] = votes_;
    phase_ ^= 1;
    votes_ = Votes{};
    arrived_ = 0;
    for (unsigned w = 0; w < warps_; ++w) warp_[w].runnable = warp_[w].live;
  }

  // Carries out a collective if all the lanes it waits for have come, each for the same one.
  CUDACPU_SCHEDULER bool complete(Warp& warp, uint32_t mask, const char* operation) {
    const uint32_t lanes = mask & warp.live;
    if ((warp.waiting & lanes) != lanes) return false;
    for (unsigned lane : Lanes(lanes)) {
      const Arrival& arrival = warp.arrival[lane];
      const bool same = arrival.operation == operation || !strcmp(arrival.operation, operation);
      if (arrival.mask != mask || !same) return false;
    }
    unsigned slot = 0;
    while (warp.exchange[slot].unread) ++slot;  // a lane leaves at most one unread: 32 suffice
    Exchange& exchange = warp.exchange[slot];
    exchange.mask = lanes;
    exchange.unread = unsigned(__builtin_popcount(lanes));
    for (unsigned lane : Lanes(lanes)) {
      exchange.value[lane] = warp.arrival[lane].value;
      warp.arrival[lane].slot = slot;
    }
    warp.waiting &= ~lanes;
    warp.runnable |= lanes;
    return true;
  }

  [[noreturn]] CUDACPU_SCHEDULER void exit_thread() {
    Warp& warp = warp_[current_->warp];
    warp.live &= ~(1u << current_->lane);
    warp.runnable &= ~(1u << current_->lane);
    for (unsigned lane : Lanes(warp.waiting)) {  // nobody waits for a thread that has exited
      const Arrival& arrival = warp.arrival[lane];
      if (warp.waiting >> lane & 1) complete(warp, arrival.mask, arrival.operation);
    }
    --live_;
    if (live_ && arrived_ == live_) release_barrier();
    Thread* next = live_ ? pick() : &host_;
    if (!next) deadlock();
    resume(*next);
    __builtin_unreachable();
  }

  [[noreturn]] CUDACPU_SCHEDULER void deadlock() {
    char who[320] = "";
    size_t length = 0;
    for (unsigned w = 0; w < warps_; ++w) {
      uint32_t told = 0;
      for (unsigned lane : Lanes(warp_[w].waiting)) {
        const Arrival& arrival = warp_[w].arrival[lane];
        if (told >> lane & 1 || length + 100 > sizeof who) continue;
        told |= arrival.mask;
        length += size_t(snprintf(
            who + length, sizeof who - length, "; of warp %u lanes 0x%08x wait in %s(0x%08x)", w,
            arrival.mask & warp_[w].waiting, arrival.operation, arrival.mask));
      }
    }
    fail("deadlock: %u of %u live threads wait in a block barrier%s", arrived_, live_, who);
  }

  Stacks stacks_;
  Thread host_;
  Thread thread_[kMaxThreads];
  Warp warp_[kMaxWarps];
  Thread* current_ = &host_;
  unsigned threads_ = 0;
  unsigned warps_ = 0;
  unsigned live_ = 0;
  unsigned arrived_ = 0;  // at the block barrier
  unsigned phase_ = 0;    // barriers alternate between two results: a slow thread may read late
  Votes votes_;
  Votes result_[2];
  void (*kernel_)(void*) = nullptr;
  void* argument_ = nullptr;
  Order order_ = Order::kForward;
  uint64_t random_ = 0;
  std::string error_;
  char start_tag_ = 0;
  char end_tag_ = 0;
  char barrier_tag_[2] = {};
};

inline thread_local Block* current_block = nullptr;

CUDACPU_SCHEDULER inline void Block::begin(dim3 grid, dim3 block, void (*kernel)(void*),
                                           void* argument, Order order, uint64_t seed) {
  current_block = this;
  gridDim = grid;
  blockDim = block;
  threads_ = block.x * block.y * block.z;
  warps_ = (threads_ + kLanes - 1) / kLanes;
  kernel_ = kernel;
  argument_ = argument;
  order_ = order;
  random_ = seed;
}

CUDACPU_SCHEDULER inline void Block::thread_main() {
  Block& block = *current_block;
  Fiber::arrive(block.host_.fiber);
  acquire(&block.start_tag_);
  block.kernel_(block.argument_);
  release(&block.end_tag_);
  block.exit_thread();
}

}  // namespace cudacpu
