#include "pairs_matrix.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "isa.h"
#include "pairs_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kBlockRows = 16;  // of x and of y, whose distances one thread computes
constexpr int64_t kPullBlock = 96;  // rows, whole tiles of any instruction set

int64_t blocks_of(int64_t n, int64_t block) { return (n + block - 1) / block; }

// The t-th of the blocks (i, j) with i <= j.
void upper_block(int64_t t, int64_t blocks, int64_t& i, int64_t& j) {
    for (i = 0; t >= blocks - i; ++i) t -= blocks - i;
    j = i + t;
}

const RowKernels<double>& kernels_of(double*) { return active_instruction_set().pairs.wide; }
const RowKernels<float>& kernels_of(float*) { return active_instruction_set().pairs.narrow; }

}  // namespace

template <class T>
void pair_squares(const T* x, int64_t n, const T* y, int64_t m, int64_t width, int threads, double* out) {
    const RowKernels<T>& kernels = kernels_of(static_cast<T*>(nullptr));
    const bool itself = y == nullptr;
    const int64_t rows = blocks_of(n, kBlockRows), columns = itself ? rows : blocks_of(m, kBlockRows);
    const int64_t tasks = itself ? rows * (rows + 1) / 2 : rows * columns;
    for_each_chunk(tasks, kBlockRows * kBlockRows * (width + 1), threads, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
            int64_t i = t / std::max<int64_t>(1, columns), j = t % std::max<int64_t>(1, columns);
            if (itself) upper_block(t, rows, i, j);
            i *= kBlockRows, j *= kBlockRows;
            const Rows<T> left = {x + i * width, std::min(kBlockRows, n - i), width};
            const Rows<T> right = {(itself ? x : y) + j * width, std::min(kBlockRows, m - j), width};
            double* mirrored = itself && i != j ? out + j * m + i : nullptr;
            kernels.squares(left, right, width, out + i * m + j, mirrored, m);
        }
    });
}

template <class T>
void pair_pull(const T* w, const T* x, int64_t n, const T* y, int64_t m, int64_t width, int threads, T* out) {
    const RowKernels<T>& kernels = kernels_of(static_cast<T*>(nullptr));
    const int64_t rows = blocks_of(n, kPullBlock), columns = blocks_of(width, kernels.columns);
    for_each_chunk(rows * columns, kPullBlock * kernels.columns * (m + 1), threads, [&](int64_t begin, int64_t end) {
        std::vector<T> packed(m * kMaxColumns);
        for (int64_t t = begin; t < end; ++t) {
            const int64_t i = t / columns * kPullBlock, first = t % columns * kernels.columns;
            const Rows<T> strip = {x + i * width, std::min(kPullBlock, n - i), width}, all = {y, m, width};
            kernels.pull(w + i * m, m, strip, all, first, std::min(kernels.columns, width - first), packed.data(),
                         out + i * width, width);
        }
    });
}

template void pair_squares(const double*, int64_t, const double*, int64_t, int64_t, int, double*);
template void pair_squares(const float*, int64_t, const float*, int64_t, int64_t, int, double*);
template void pair_pull(const double*, const double*, int64_t, const double*, int64_t, int64_t, int, double*);
template void pair_pull(const float*, const float*, int64_t, const float*, int64_t, int64_t, int, float*);

double least_square(const double* squares, int64_t n) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) {
        double row = 0;
        for (int64_t j = 0; j < n; ++j) row += squares[i * n + j];
        total += row;
    }
    return kCoincident * kCoincident * total / std::max<int64_t>(1, n * (n - 1));
}

namespace {

double mean_distance(const double* squares, int64_t n, double least) {
    double total = 0;
    for (int64_t i = 0; i < n; ++i) total += active_instruction_set().pairs.distances(squares + i * n, n, least);
    return total == 0 ? std::numeric_limits<double>::infinity() : total / (n * (n - 1));
}

}  // namespace

double pair_distance_loss(const double* student, const double* teacher, int64_t n, double delta, int threads, double* slopes) {
    const PairKernels& kernels = active_instruction_set().pairs;
    const double student_least = least_square(student, n), teacher_least = least_square(teacher, n);
    const double student_mean = mean_distance(student, n, student_least);
    const double teacher_mean = mean_distance(teacher, n, teacher_least);
    const auto row = [&](int64_t i) {
        return DistanceRow{student + i * n, teacher + i * n, n, student_least, teacher_least, student_mean, teacher_mean, delta};
    };
    std::vector<DistanceSums> sums(n);
    for_each_chunk(n, n, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) sums[i] = kernels.distance_row(row(i), slopes + i * n);
    });
    DistanceSums total = {};
    for (const DistanceSums& one : sums) total.loss += one.loss, total.slope += one.slope;
    const double shift = total.slope / std::max<int64_t>(1, n * (n - 1));
    for_each_chunk(n, n, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) kernels.distance_slopes(row(i), shift, slopes + i * n);
    });
    return total.loss;
}

}  // namespace fastkd
