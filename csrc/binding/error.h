// Errors of the bindings. Each becomes a RuntimeError that holds one sentence for the user, without
// the place in the sources: a library may come from the cache of another installation.
#pragma once

#include <torch/csrc/stable/library.h>

#include <new>
#include <sstream>
#include <stdexcept>
#include <string>

// torch >= 2.13 keeps its words for an error that crosses its C interface. In older releases the
// function is null.
extern "C" __attribute__((weak)) const char* torch_exception_get_what_without_backtrace();

namespace marginops {

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// The message is evaluated only if the condition does not hold.
#define MARGINOPS_CHECK(condition, ...)               \
  do {                                                \
    if (!(condition)) ::marginops::fail(__VA_ARGS__); \
  } while (false)

// Fails with the words of torch for the error of the function that has just returned, or else with
// `otherwise`.
[[noreturn]] inline void fail_like_torch(const std::string& otherwise) {
  const char* words = nullptr;
  if (torch_exception_get_what_without_backtrace != nullptr) {
    words = torch_exception_get_what_without_backtrace();
  }
  fail(words != nullptr && *words != '\0' ? words : otherwise.c_str());
}

// A boxed kernel whose errors have words for the user.
template <void (*kKernel)(StableIValue*, uint64_t, uint64_t)>
void worded(StableIValue* stack, uint64_t inputs, uint64_t outputs) {
  try {
    kKernel(stack, inputs, outputs);
  } catch (const std::bad_alloc&) {
    fail("not enough memory for the call of a kernel");
  } catch (const std::length_error&) {
    fail("not enough memory: more bytes than a process can address for the working memory");
  }
}

#define MARGINOPS_BOX(function) (&::marginops::worded<TORCH_BOX(function)>)

}  // namespace marginops
