// Runs the blocks of a grid on CUDACPU_WORKERS OS threads, each block to its end.
//
// CUDACPU_ORDER=forward, reverse or a number (the seed of a random order) says which thread of a
// block goes on, of those that can, and in which order a worker takes its blocks.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <random>
#include <thread>
#include <vector>

#include "block.h"

namespace cudacpu {

struct Settings {
  Order order = Order::kForward;
  uint64_t seed = 0;
  unsigned workers = 2;

  static Settings from_environment() {
    Settings settings;
    if (const char* order = getenv("CUDACPU_ORDER")) {
      const bool named = *order == 'f' || *order == 'r';
      settings.order = *order == 'r' ? Order::kReverse : named ? Order::kForward : Order::kRandom;
      settings.seed = named ? 0 : strtoull(order, nullptr, 10);
    }
    if (const char* workers = getenv("CUDACPU_WORKERS")) {
      settings.workers = std::max(1u, unsigned(strtoul(workers, nullptr, 10)));
    }
    return settings;
  }
};

// Why the last launch failed.
inline std::string& launch_error() {
  static std::string text;
  return text;
}

class Grid {
 public:
  Grid(dim3 grid, dim3 block, void (*kernel)(void*), void* argument)
      : grid_(grid), block_(block), kernel_(kernel), argument_(argument) {}

  cudaError_t run() {
    std::vector<std::thread> workers;
    for (unsigned worker = 1; worker < settings_.workers; ++worker) {
      workers.emplace_back([this, worker] { work(worker); });
    }
    work(0);
    for (std::thread& worker : workers) worker.join();
    if (!failed_) return cudaSuccess;
    fprintf(stderr, "cudacpu: %s\n", launch_error().c_str());
    return cudaErrorLaunchFailure;
  }

 private:
  // Worker w takes blocks w, w + workers, ...: neighbours always run on different OS threads, with
  // nothing that orders them, so ThreadSanitizer sees a race between them in every run.
  std::vector<uint64_t> blocks_of(unsigned worker) const {
    const uint64_t blocks = uint64_t(grid_.x) * grid_.y * grid_.z;
    std::vector<uint64_t> own;
    for (uint64_t b = worker; b < blocks; b += settings_.workers) own.push_back(b);
    if (settings_.order == Order::kReverse) std::reverse(own.begin(), own.end());
    if (settings_.order == Order::kRandom) {
      std::shuffle(own.begin(), own.end(), std::mt19937_64(settings_.seed));
    }
    return own;
  }

  void work(unsigned worker) {
    const std::vector<uint64_t> blocks = blocks_of(worker);
    if (blocks.empty()) return;
    std::unique_ptr<Block> block = take_block();
    block->begin(grid_, block_, kernel_, argument_, settings_.order, settings_.seed + worker);
    for (uint64_t b : blocks) {
      if (failed_) break;
      const uint64_t row = b / grid_.x;
      if (block->run({unsigned(b % grid_.x), unsigned(row % grid_.y), unsigned(row / grid_.y)})) {
        continue;
      }
      const std::lock_guard<std::mutex> lock(mutex());
      launch_error() = block->error();
      failed_ = true;
      return;
    }
    const std::lock_guard<std::mutex> lock(mutex());
    pool().push_back(std::move(block));
  }

  static std::unique_ptr<Block> take_block() {
    const std::lock_guard<std::mutex> lock(mutex());
    if (pool().empty()) return std::make_unique<Block>();
    std::unique_ptr<Block> block = std::move(pool().back());
    pool().pop_back();
    return block;
  }

  using Blocks = std::vector<std::unique_ptr<Block>>;
  static std::mutex& mutex() {
    static std::mutex value;
    return value;
  }
  static Blocks& pool() {
    static Blocks value;
    return value;
  }

  const dim3 grid_;
  const dim3 block_;
  void (*const kernel_)(void*);
  void* const argument_;
  const Settings settings_ = Settings::from_environment();
  std::atomic<bool> failed_{false};
};

}  // namespace cudacpu
