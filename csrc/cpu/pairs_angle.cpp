// The angles at every anchor between every two rows. A tile takes all anchors of 8 x 8 pairs of rows; it adds to what its
// rows get, so that tiles that run at the same time have no rows in common.
#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "pairs_matrix.h"
#include "pairs_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr int64_t kBlockRows = 2 * kGroup;  // rows

// What the angles read, filled up to whole groups of rows and of anchors.
void pack(const double* squares, double least, int64_t n, int64_t rows, int square, int scale, double* inputs) {
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j < n; ++j) {
            double* group = inputs + (i * rows + j / kGroup * kGroup) * kAngleInputs + j % kGroup;
            const double q = squares[i * n + j];
            group[square * kGroup] = q;
            group[scale * kGroup] = q <= least ? 0 : std::sqrt(0.5 / q);
        }
    }
}

double block_pair(const AngleProblem& p, int64_t a, int64_t b) {
    const PairKernels& kernels = active_instruction_set().pairs;
    double loss = 0;
    for (int64_t j = a * kBlockRows; j < std::min(p.rows, (a + 1) * kBlockRows); j += kGroup) {
        for (int64_t k = a == b ? j : b * kBlockRows; k < std::min(p.rows, (b + 1) * kBlockRows); k += kGroup) {
            loss += kernels.angles(p, j, k) * (j == k ? 1 : 2);
        }
    }
    return loss;
}

// Every two blocks, in rounds of pairs that have no block in common: as a tournament is played. The order in which a row
// gets its sums does not depend on the threads.
double tournament(const AngleProblem& p, int threads) {
    const int64_t blocks = (p.rows + kBlockRows - 1) / kBlockRows, seats = (blocks + 1) / 2 * 2;
    const int64_t work = kBlockRows * kBlockRows * p.rows;
    std::vector<double> losses(blocks);
    double total = 0;
    const auto play = [&](int64_t pairs, const auto& pair) {
        for_each_chunk(pairs, work, threads, [&](int64_t begin, int64_t end) {
            for (int64_t t = begin; t < end; ++t) losses[t] = pair(t);
        });
        for (int64_t t = 0; t < pairs; ++t) total += losses[t];
    };
    play(blocks, [&](int64_t t) { return block_pair(p, t, t); });
    for (int64_t round = 0; round + 1 < seats; ++round) {
        play(seats / 2, [&](int64_t t) {
            const int64_t circle = seats - 1;
            const int64_t a = t == 0 ? circle : (round + t) % circle, b = (round + circle - t) % circle;
            return std::max(a, b) >= blocks ? 0 : block_pair(p, std::min(a, b), std::max(a, b));
        });
    }
    return total;
}

// P_ij of anchor i, but for the factor of what the pieces leave out.
double slope_of(const AngleProblem& p, int64_t anchor, int64_t row) {
    const int64_t group = row * p.rows + anchor / kGroup * kGroup, lane = anchor % kGroup;
    const double* sums = p.sums + group * kAngleSums + lane;
    const double scale = p.inputs[group * kAngleInputs + kStudentScale * kGroup + lane];
    return 2 * (sums[kSlopes * kGroup] - scale * scale * sums[kBentSlopes * kGroup]);
}

}  // namespace

double pair_angle_loss(const double* student, const double* teacher, int64_t n, double delta, int threads, double* slopes) {
    const int64_t rows = (n + kGroup - 1) / kGroup * kGroup;
    std::vector<double> inputs(rows * rows * kAngleInputs), sums(rows * rows * kAngleSums), opposite(rows * rows);
    pack(student, least_square(student, n), n, rows, kStudentSquare, kStudentScale, inputs.data());
    pack(teacher, least_square(teacher, n), n, rows, kTeacherSquare, kTeacherScale, inputs.data());
    const AngleProblem p = {inputs.data(), sums.data(), opposite.data(), rows, delta};
    const double loss = tournament(p, threads);
    for (int64_t i = 0; i < n; ++i) {
        for (int64_t j = 0; j <= i; ++j) {
            const double between = slope_of(p, i, j) + slope_of(p, j, i) - 2 * opposite[i * rows + j];
            slopes[i * n + j] = slopes[j * n + i] = between;
        }
    }
    return loss;
}

}  // namespace fastkd
