// The cases that harness.py writes: one launcher call each. Every array lies in a buffer of exactly
// its size, so that AddressSanitizer sees any access beyond it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

// Memory as cudaMalloc gives it: 256-byte aligned, and with any content.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, bytes)) throw std::bad_alloc();
    memory_.reset(static_cast<char*>(memory));
    memset(memory, 0xA5, bytes);
  }
  char* data() const { return memory_.get(); }
  size_t bytes() const { return bytes_; }

 private:
  struct Free {
    void operator()(char* memory) const { free(memory); }
  };
  size_t bytes_;
  std::unique_ptr<char, Free> memory_;
};

struct Array {
  Buffer buffer;
  std::string dtype;
  size_t offset_bytes = 0;
  std::vector<int64_t> shape;
  std::vector<int64_t> stride;  // in elements

  void* data() const { return buffer.data() + offset_bytes; }
};

inline size_t element_bytes(const std::string& dtype) {
  return dtype == "bool" ? 1 : dtype.back() == '6' ? 2 : dtype.back() == '2' ? 4 : 8;
}

struct Case {
  std::string op;
  std::map<std::string, int64_t> ints;
  std::map<std::string, double> reals;
  std::map<std::string, Array> arrays;
  std::vector<std::string> outputs;  // names in the order of the results

  const Array* find(const std::string& name) const {
    const auto found = arrays.find(name);
    return found == arrays.end() ? nullptr : &found->second;
  }
  const Array& array(const std::string& name) const {
    if (const Array* found = find(name)) return *found;
    throw std::runtime_error(op + ": there is no array " + name);
  }
  template <class T>
  T* output(const std::string& name) const {
    const Array* found = find(name);
    return found ? static_cast<T*>(found->data()) : nullptr;
  }
};

class CaseReader {
 public:
  CaseReader(const char* cases, const char* data) : cases_(cases), data_(data, std::ios::binary) {
    if (!cases_ || !data_) throw std::runtime_error("cannot open the cases or their data");
  }

  bool next(Case& result) {
    result = Case{};
    std::string word, name;
    while (cases_ >> word) {
      if (word == "run") return true;
      cases_ >> name;
      if (word == "case") {
        result.op = name;
      } else if (word == "int") {
        cases_ >> result.ints[name];
      } else if (word == "real") {
        cases_ >> word;
        result.reals[name] = strtod(word.c_str(), nullptr);
      } else if (word == "input") {
        result.arrays.emplace(name, read_input());
      } else if (word == "output") {
        result.arrays.emplace(name, read_output());
        result.outputs.push_back(name);
      } else {
        throw std::runtime_error("unknown word in the cases: " + word);
      }
    }
    return false;
  }

 private:
  Array read_input() {
    std::string dtype;
    size_t bytes = 0, offset = 0, dimensions = 0;
    cases_ >> dtype >> bytes >> offset >> dimensions;
    Array array{Buffer(bytes), dtype, offset * element_bytes(dtype), {}, {}};
    array.shape.resize(dimensions);
    array.stride.resize(dimensions);
    for (int64_t& size : array.shape) cases_ >> size;
    for (int64_t& stride : array.stride) cases_ >> stride;
    if (!data_.read(array.buffer.data(), std::streamsize(bytes))) {
      throw std::runtime_error("the data end early");
    }
    return array;
  }

  Array read_output() {
    std::string dtype;
    size_t bytes = 0;
    cases_ >> dtype >> bytes;
    return Array{Buffer(bytes), dtype, 0, {}, {}};
  }

  std::ifstream cases_;
  std::ifstream data_;
};
