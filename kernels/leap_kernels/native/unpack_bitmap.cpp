// The dense matrix of a BMP128 matrix (see bmp128.py): for many rows of x, where a dense product is the faster one.

#include <cstdint>
#include <cstring>

namespace {

// T is any type of the values' size: they are copied bit for bit.
template <typename T>
void unpack(const uint32_t* bits, const int32_t* off, const int64_t* row_base, const T* vals, T* dense, int64_t rows,
            int64_t columns, int threads) {
  const int64_t groups = (columns + 127) / 128;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    T* target = dense + row * columns;
    std::memset(target, 0, size_t(columns) * sizeof(T));
    if (groups == 0) continue;
    const T* v = vals + off[row * groups] + (row_base ? row_base[row] : 0);
    const uint32_t* words = bits + 4 * row * groups;
    for (int64_t w = 0; w < 4 * groups; ++w) {
      for (uint32_t word = words[w]; word != 0; word &= word - 1) target[32 * w + __builtin_ctz(word)] = *v++;
    }
  }
}

}  // namespace

extern "C" void leap_unpack_bitmap(const uint32_t* bits, const int32_t* off, const int64_t* row_base, const void* vals,
                                   void* dense, int64_t rows, int64_t columns, int value_bytes, int threads) {
  if (value_bytes == 2) {
    unpack(bits, off, row_base, static_cast<const uint16_t*>(vals), static_cast<uint16_t*>(dense), rows, columns,
           threads);
  } else {
    unpack(bits, off, row_base, static_cast<const uint32_t*>(vals), static_cast<uint32_t*>(dense), rows, columns,
           threads);
  }
}
