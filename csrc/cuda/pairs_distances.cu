// Squared distances from inner products, and the loss of distances.
#include "launch.cuh"
#include "pairs.h"
#include "pairs_device.cuh"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostBlocks = 512;  // of a sum: every block of the next kernel adds up what these leave
// Of |x_i|^2 + |x_j|^2, in double: a squared distance above has lost fewer than 20 of its 53 bits.
constexpr double kFewDigits = 1e-6;

struct Distances {
    const double* products;
    Rows x, y;
    double* squares;
    int64_t d;
    bool own;
};

// A warp has 32 columns of a row. Of one batch it has the upper triangle, and writes the lower one, too.
__global__ void __launch_bounds__(kThreads) square_distances(Distances p) {
    const int64_t chunks = (p.y.count + 31) / 32, warps = int64_t{gridDim.x} * (kThreads / 32);
    const int lane = threadIdx.x % 32;
    for (int64_t w = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32; w < p.x.count * chunks; w += warps) {
        const int64_t i = w / chunks, first = w % chunks * 32, j = first + lane, at = i * p.y.count + j;
        if (p.own && first + 31 < i) continue;
        const bool mine = j < p.y.count && !(p.own && j < i);
        double square = 0, lengths = 0;
        if (mine && !(p.own && j == i)) {
            lengths = p.x.square_lengths[i] + p.y.square_lengths[j];
            square = lengths - 2 * p.products[at];
        }
        for (unsigned close = __ballot_sync(kAllLanes, square < kFewDigits * lengths); close != 0; close &= close - 1) {
            const int which = __ffs(close) - 1;
            const double *a = p.x.data + i * p.d, *b = p.y.data + (first + which) * p.d;
            double sum = 0;
            for (int64_t e = lane; e < p.d; e += 32) sum += (a[e] - b[e]) * (a[e] - b[e]);
            sum = warp_sum(sum);
            if (lane == which) square = sum;
        }
        if (mine) p.squares[at] = square;
        if (mine && p.own) p.squares[j * p.y.count + i] = square;
    }
}

constexpr int kPulled = 8;  // rows of a block, whose threads are the columns
constexpr int kPullThreads = 128;

struct Pull {
    const double *weights, *x, *y;
    double* out;
    int64_t n, m, d;
};

__global__ void __launch_bounds__(kPullThreads) pull_rows(Pull p) {
    __shared__ double weights[kPulled][kPullThreads];
    const int64_t column = int64_t{blockIdx.x} * kPullThreads + threadIdx.x, first = int64_t{blockIdx.y} * kPulled;
    const int64_t rows = min(int64_t{kPulled}, p.n - first);
    const bool mine = column < p.d;
    double x[kPulled], sum[kPulled];
#pragma unroll
    for (int r = 0; r < kPulled; ++r) x[r] = mine && r < rows ? p.x[(first + r) * p.d + column] : 0.0, sum[r] = 0;
    for (int64_t begin = 0; begin < p.m; begin += kPullThreads) {
        const int64_t j = begin + threadIdx.x, count = min(int64_t{kPullThreads}, p.m - begin);
        __syncthreads();  // the weights before have been used
#pragma unroll
        for (int r = 0; r < kPulled; ++r) weights[r][threadIdx.x] = r < rows && j < p.m ? p.weights[(first + r) * p.m + j] : 0.0;
        __syncthreads();
        for (int64_t e = 0; e < count && mine; ++e) {
            const double y = p.y[(begin + e) * p.d + column];
#pragma unroll
            for (int r = 0; r < kPulled; ++r) sum[r] += weights[r][e] * (x[r] - y);
        }
    }
    for (int r = 0; r < rows && mine; ++r) p.out[(first + r) * p.d + column] = sum[r];
}

struct Compare {
    SquaredDistances squares;
    double delta;
    double *student_sums, *teacher_sums, *losses, *spreads;  // one for each block
    double* slopes;
    int64_t blocks;
};

// Distances, or 0 for rows that coincide.
struct Distance {
    double threshold;
    __device__ Distance(double sum, int64_t n, double coincident) : threshold(coincident_square(coincident, mean_square(sum, n))) {}
    __device__ double operator()(double square) const { return square <= threshold ? 0.0 : sqrt(square); }
};

// The sum of what the blocks of an earlier kernel left, in all threads.
__device__ inline double sum_of_blocks(const double* sums, int64_t blocks, double* scratch) {
    double sum = 0;
    for (int64_t b = threadIdx.x; b < blocks; b += kThreads) sum += sums[b];
    sum = block_sum(sum, scratch);
    if (threadIdx.x == 0) scratch[0] = sum;
    __syncthreads();
    return scratch[0];
}

__global__ void __launch_bounds__(kThreads) add_distances(Compare p) {
    __shared__ double scratch[kThreads / 32];
    const SquaredDistances& q = p.squares;
    const Distance student(*q.student_sum, q.n, q.coincident), teacher(*q.teacher_sum, q.n, q.coincident);
    double of_student = 0, of_teacher = 0;
    for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < q.n * q.n; e += p.blocks * kThreads) {
        of_student += student(q.student[e]), of_teacher += teacher(q.teacher[e]);
    }
    of_student = block_sum(of_student, scratch);
    of_teacher = block_sum(of_teacher, scratch);
    if (threadIdx.x == 0) p.student_sums[blockIdx.x] = of_student, p.teacher_sums[blockIdx.x] = of_teacher;
}

// How far two relative distances are apart, and the slope of Huber's function there.
struct Error {
    double distance, relative, error, slope;
};

class Errors {
  public:
    __device__ Errors(const Compare& p, double* scratch)
        : q_(p.squares), delta_(p.delta), student_(*q_.student_sum, q_.n, q_.coincident), teacher_(*q_.teacher_sum, q_.n, q_.coincident) {
        const double pairs = static_cast<double>(q_.n) * static_cast<double>(q_.n - 1);
        student_mean_ = sum_of_blocks(p.student_sums, p.blocks, scratch) / pairs;
        teacher_mean_ = sum_of_blocks(p.teacher_sums, p.blocks, scratch) / pairs;
    }

    __device__ Error operator()(int64_t e) const {
        const double distance = student_(q_.student[e]), taught = teacher_(q_.teacher[e]);
        const double relative = distance == 0 ? 0.0 : distance / student_mean_;
        const double error = relative - (taught == 0 ? 0.0 : taught / teacher_mean_);
        return {distance, relative, error, fmin(fmax(error, -delta_), delta_)};
    }

    __device__ double student_mean() const { return student_mean_; }

  private:
    const SquaredDistances& q_;
    double delta_;
    Distance student_, teacher_;
    double student_mean_, teacher_mean_;
};

__global__ void __launch_bounds__(kThreads) compare_distances(Compare p) {
    __shared__ double scratch[kThreads / 32];
    const Errors errors(p, scratch);
    const int64_t n = p.squares.n;
    double loss = 0, spread = 0;
    for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < n * n; e += p.blocks * kThreads) {
        const Error at = errors(e);
        loss += at.slope * (at.error - 0.5 * at.slope);
        spread += at.slope * at.relative;
    }
    loss = block_sum(loss, scratch);
    spread = block_sum(spread, scratch);
    if (threadIdx.x == 0) p.losses[blockIdx.x] = loss, p.spreads[blockIdx.x] = spread;
}

__global__ void __launch_bounds__(kThreads) finish_distances(Compare p, double* loss) {
    __shared__ double scratch[kThreads / 32];
    const int64_t n = p.squares.n;
    const double sum = sum_of_blocks(p.losses, p.blocks, scratch);
    if (blockIdx.x == 0 && threadIdx.x == 0) *loss = sum;
    if (p.slopes == nullptr) return;
    const Errors errors(p, scratch);
    const double spread = sum_of_blocks(p.spreads, p.blocks, scratch) / (static_cast<double>(n) * static_cast<double>(n - 1));
    for (int64_t e = int64_t{blockIdx.x} * kThreads + threadIdx.x; e < n * n; e += p.blocks * kThreads) {
        const Error at = errors(e);
        p.slopes[e] = at.distance == 0 ? 0.0 : (at.slope - spread) / (errors.student_mean() * at.distance);
    }
}

int64_t blocks_of_sums(int64_t n) { return std::min(kMostBlocks, divide_up(n * n, 4 * kThreads)); }

}  // namespace

int squared_distances(const double* products, const Rows& x, const Rows& y, int64_t d, bool own, double* squares, void* stream) {
    Launcher launch(stream);
    const int64_t warps = x.count * divide_up(y.count, 32);
    const Distances p = {products, x, y, squares, d, own};
    launch(square_distances, blocks_for(warps, kThreads / 32), kThreads, p);
    return launch.error();
}

int pull(const double* weights, const double* x, int64_t n, const double* y, int64_t m, int64_t d, double* out, void* stream) {
    Launcher launch(stream);
    const dim3 grid(static_cast<unsigned>(divide_up(d, kPullThreads)), static_cast<unsigned>(divide_up(n, kPulled)));
    launch(pull_rows, grid, kPullThreads, Pull{weights, x, y, out, n, m, d});
    return launch.error();
}

int64_t distance_loss_scratch(int64_t n) { return 4 * blocks_of_sums(n) * static_cast<int64_t>(sizeof(double)); }

int distance_loss(const SquaredDistances& squares, double delta, double* loss, double* slopes, void* scratch, void* stream) {
    const int64_t blocks = blocks_of_sums(squares.n);
    double* sums = static_cast<double*>(scratch);
    const Compare p = {squares, delta, sums, sums + blocks, sums + 2 * blocks, sums + 3 * blocks, slopes, blocks};
    const auto grid = static_cast<unsigned>(blocks);
    Launcher launch(stream);
    launch(add_distances, grid, kThreads, p);
    launch(compare_distances, grid, kThreads, p);
    launch(finish_distances, slopes == nullptr ? 1 : grid, kThreads, p, loss);
    return launch.error();
}

}  // namespace fastkd::cuda
