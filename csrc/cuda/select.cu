#include "select_launch.h"

#include <type_traits>

#include "select_sorted.cuh"
#include "select_unsorted.cuh"

namespace marginops::cuda {
namespace {

template <class Scalar>
ScoresView<Scalar> view(const Vector& scores) {
  return {static_cast<const Scalar*>(scores.data), scores.stride, scores.size};
}

// Enough blocks to fill the device, each with a few thousand scores.
unsigned stream_blocks(int64_t n) {
  return blocks_for(n, 8 * kStreamBlock, int64_t{4} * multiprocessors());
}

template <class Number>
struct SelectWorkspace {
  SelectState<Number>* state;
  WarpCount* counts;
  size_t size;

  SelectWorkspace(int64_t n, void* memory) {
    Workspace workspace(memory);
    state = workspace.take<SelectState<Number>>(1);
    counts = workspace.take<WarpCount>(int64_t{stream_blocks(n)} * (kStreamBlock / kWarp));
    size = workspace.size();
  }
};

}  // namespace

bool fits_one_block(int64_t n, int64_t k) {
  return k == 0 || (n <= kOneBlockMost && k <= kSortedMost);
}

cudaError_t select_sorted(const Vector& scores, int64_t k, void* values, int64_t* index,
                          cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  return with_scalar(scores.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    return launch(select_sorted_kernel<Scalar>, 1, kSelectBlock, stream, view<Scalar>(scores), k,
                  static_cast<Scalar*>(values), index);
  });
}

size_t select_workspace_bytes(const Vector& scores) {
  return scores.dtype == Dtype::kFloat64 ? SelectWorkspace<uint64_t>(scores.size, nullptr).size
                                         : SelectWorkspace<uint32_t>(scores.size, nullptr).size;
}

cudaError_t select_unsorted(const Vector& scores, int64_t k, void* key, int64_t* index,
                            void* memory, cudaStream_t stream) {
  if (k == 0) return cudaSuccess;
  return with_scalar(scores.dtype, [&](auto scalar) {
    using Scalar = decltype(scalar);
    using Number = Key<Scalar>;
    const SelectWorkspace<Number> workspace(scores.size, memory);
    const ScoresView<Scalar> all = view<Scalar>(scores);
    const unsigned blocks = stream_blocks(scores.size);
    const unsigned clear_blocks = blocks_for(kKeyLevels<Number> * kDigits, kStreamBlock);
    cudaError_t error =
        launch(select_clear_kernel<Number>, clear_blocks, kStreamBlock, stream, workspace.state, k);
    for (int level = 0; level < kKeyLevels<Number> && error == cudaSuccess; ++level)
      error = launch(select_histogram_kernel<Scalar>, blocks, kStreamBlock, stream, all, level,
                     workspace.state);
    if (error == cudaSuccess)
      error = launch(select_count_kernel<Scalar>, blocks, kStreamBlock, stream, all,
                     workspace.state, workspace.counts);
    if (error == cudaSuccess)
      error =
          launch(select_write_kernel<Scalar>, blocks, kStreamBlock, stream, all, workspace.state,
                 workspace.counts, static_cast<std::make_signed_t<Number>*>(key), index);
    return error;
  });
}

}  // namespace marginops::cuda
