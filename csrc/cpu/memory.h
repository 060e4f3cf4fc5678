// Working memory of the CPU kernels. If there is not enough, the error says for how many bytes.
#pragma once

#include <memory>
#include <vector>

#include "../binding/error.h"

namespace marginops::cpu {

template <class T>
struct Allocator {
  using value_type = T;

  Allocator() = default;
  template <class Other>
  Allocator(const Allocator<Other>&) {}

  T* allocate(size_t count) {
    try {
      return std::allocator<T>().allocate(count);
    } catch (const std::bad_alloc&) {
      fail("not enough memory: ", count * sizeof(T), " bytes for the working memory of a kernel");
    }
  }
  void deallocate(T* memory, size_t count) { std::allocator<T>().deallocate(memory, count); }

  friend bool operator==(const Allocator&, const Allocator&) { return true; }
  friend bool operator!=(const Allocator&, const Allocator&) { return false; }
};

template <class T>
using Array = std::vector<T, Allocator<T>>;

// Memory that nothing has written: an Array would write zeros.
template <class T>
std::unique_ptr<T[]> uninitialized(int64_t size) {
  try {
    return std::unique_ptr<T[]>(new T[static_cast<size_t>(size)]);
  } catch (const std::bad_alloc&) {
    fail("not enough memory: ", size, " x ", sizeof(T),
         " bytes for the working memory of a kernel");
  }
}

}  // namespace marginops::cpu
