// Cross-entropy of next-token logits, their divergence from a teacher's, and the gradient of both, see output_losses.py.
//
// A row of a vocabulary of 50 k fits into the second-level cache in 16 bits, so its passes cost memory once. A row is the
// work of one thread, in tiles that are added up in order: the result does not depend on the number of threads.

#include <cmath>

#include "exponential.h"
#include "tile.h"

namespace leap {
namespace {

constexpr float kPadLogit = -__builtin_inff();  // adds nothing to a sum of exponentials

// One row of logits.
struct Row {
  TileIn tile;
  int64_t base, size;
  Row(const void* data, int dtype, int64_t row, int64_t size)
      : tile{data, dtype, kPadLogit, {}}, base(row * size), size(size) {}
  const float* at(int64_t first) { return tile.at(base + first, int(std::min<int64_t>(kTile, size - first))); }
  float one(int64_t at) {
    float value;
    load_as_float(tile.data, tile.dtype, base + at, 1, &value);
    return value;
  }
  // NaN is passed over here and comes out of the sums.
  float largest() {
    F32 most = F32{} + kPadLogit;
    for (int64_t first = 0; first < size; first += kTile) {
      const float* values = at(first);
      for (int i = 0; i < kTile; i += kLanes) {
        const F32 value = load<F32>(values + i);
        most = value > most ? value : most;
      }
    }
    float result = most[0];
    for (int i = 1; i < kLanes; ++i) result = std::max(result, float(most[i]));
    return result;
  }
};

// sum exp(z - largest)
double sum_of_exponentials(Row& row, float largest) {
  double total = 0;
  for (int64_t first = 0; first < row.size; first += kTile) {
    const float* values = row.at(first);
    F32 sum{};
    for (int i = 0; i < kTile; i += kLanes) sum += exp_negative(largest - load<F32>(values + i));
    total += lane_sum(sum);
  }
  return total;
}

struct Pair {
  double student, teacher, difference;  // sum e^s, sum e^t, sum e^t (t - s), each less its largest
};

Pair sums_of_pair(Row& student, float student_largest, Row& teacher, float teacher_largest) {
  Pair total{};
  for (int64_t first = 0; first < student.size; first += kTile) {
    const float *s_tile = student.at(first), *t_tile = teacher.at(first);
    F32 s_sum{}, t_sum{}, difference{};
    for (int i = 0; i < kTile; i += kLanes) {
      const F32 s = student_largest - load<F32>(s_tile + i), t = teacher_largest - load<F32>(t_tile + i);
      const F32 q = exp_negative(t);
      s_sum += exp_negative(s);
      t_sum += q;
      difference += q == 0.0f ? F32{} : q * (s - t);  // not 0 times infinity, where both have a logit of -infinity
    }
    total.student += lane_sum(s_sum);
    total.teacher += lane_sum(t_sum);
    total.difference += lane_sum(difference);
  }
  return total;
}

}  // namespace
}  // namespace leap

using namespace leap;

// For each of `rows` rows of `size` logits: losses[rows][2] = -log p(target), 0 without one (target < 0), and
// KL(teacher || student), 0 without a teacher; log_sums[rows][2] = log sum e^s, log sum e^t.
extern "C" void leap_output_losses(const void* student, int student_dtype, const void* teacher, int teacher_dtype,
                                   const int64_t* targets, double* losses, float* log_sums, int64_t rows, int64_t size,
                                   int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    Row s(student, student_dtype, r, size);
    const float s_largest = s.largest();
    double s_log = 0, t_log = 0, divergence = 0, t_largest = 0;
    if (teacher) {
      Row t(teacher, teacher_dtype, r, size);
      t_largest = t.largest();
      const Pair sums = sums_of_pair(s, s_largest, t, float(t_largest));
      s_log = std::log(sums.student);
      t_log = std::log(sums.teacher);
      divergence = sums.difference / sums.teacher - t_log + s_log;
    } else {
      s_log = std::log(sum_of_exponentials(s, s_largest));
    }
    // s_log is NaN where any logit is; that has to be seen, with a target or without.
    losses[2 * r] = targets[r] >= 0 ? s_log + (double(s_largest) - double(s.one(targets[r]))) : s_log == s_log ? 0 : s_log;
    losses[2 * r + 1] = divergence;
    log_sums[2 * r] = float(s_largest + s_log);
    log_sums[2 * r + 1] = float(t_largest + t_log);
  }
}

// grad = (per_target + per_row) p - per_target 1_target - per_row q, per_target being 0 in rows without a target.
extern "C" void leap_output_losses_backward(const void* student, int student_dtype, const void* teacher,
                                            int teacher_dtype, const int64_t* targets, const float* log_sums,
                                            float per_target, float per_row, void* grad, int64_t rows, int64_t size,
                                            int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t r = 0; r < rows; ++r) {
    Row s(student, student_dtype, r, size), t(teacher, teacher_dtype, r, size);
    TileOut out{grad, student_dtype, {}};
    const int64_t target = targets[r];
    const float of_target = target < 0 ? 0.0f : per_target, of_p = of_target + per_row;
    const float s_log = log_sums[2 * r], t_log = log_sums[2 * r + 1];
    for (int64_t first = 0; first < size; first += kTile) {
      const int count = int(std::min<int64_t>(kTile, size - first));
      float* out_tile = out.at(r * size + first, count);
      const float* s_tile = s.at(first);
      if (teacher) {
        const float* t_tile = t.at(first);
        for (int i = 0; i < kTile; i += kLanes)
          store(out_tile + i, of_p * exp_negative(s_log - load<F32>(s_tile + i)) -
                                  per_row * exp_negative(t_log - load<F32>(t_tile + i)));
      } else {
        for (int i = 0; i < kTile; i += kLanes) store(out_tile + i, of_p * exp_negative(s_log - load<F32>(s_tile + i)));
      }
      if (first <= target && target < first + count) out_tile[target - first] -= of_target;
      out.flush(out_tile, r * size + first, count);
    }
  }
}
