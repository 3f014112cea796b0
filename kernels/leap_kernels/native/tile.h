// Tensors of any storage type a tile of floats at a time.
#pragma once

#include <algorithm>

#include "simd.h"

namespace leap {

constexpr int kTile = 1024;  // elements whose inputs, words and outputs stay in the first-level cache

inline double lane_sum(F32 v) {
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += double(v[i]);
  return sum;
}

// A tile of a tensor as floats: the tensor itself where it already is that, else a converted (and padded) copy.
struct TileIn {
  const void* data;
  int dtype;
  float pad;
  float buffer[kTile];
  const float* at(int64_t first, int count) {
    if (dtype == kFloat32 && count == kTile) return static_cast<const float*>(data) + first;
    load_as_float(data, dtype, first, count, buffer);
    std::fill(buffer + count, buffer + kTile, pad);
    return buffer;
  }
};

struct TileOut {
  void* data;
  int dtype;
  float buffer[kTile];
  float* at(int64_t first, int count) {
    return dtype == kFloat32 && count == kTile ? static_cast<float*>(data) + first : buffer;
  }
  void flush(const float* written, int64_t first, int count) {
    if (written == buffer) store_from_float(buffer, dtype, first, count, data);
  }
};

}  // namespace leap
