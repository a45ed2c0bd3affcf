// The pieces of losses on all pairs of rows. Included by one unit for each instruction set.
#pragma once
#include "doubles-inl.h"
#include "pairs.h"

namespace fastkd {
namespace {

FASTKD_INLINE double sum(vd x) {
#if defined(__AVX512F__)
    return _mm512_reduce_add_pd((__m512d)x);
#else
    double total = 0;
    for (int64_t i = 0; i < VD; ++i) total += x[i];
    return total;
#endif
}
// The sums of four vectors, at a third of the price of four sums.
FASTKD_INLINE void add_sums(const vd (&x)[4], double* totals) {
#if defined(__AVX512F__)
    const __m512d a = (__m512d)x[0], b = (__m512d)x[1], c = (__m512d)x[2], d = (__m512d)x[3];
    const __m512d ab = _mm512_add_pd(_mm512_unpacklo_pd(a, b), _mm512_unpackhi_pd(a, b));
    const __m512d cd = _mm512_add_pd(_mm512_unpacklo_pd(c, d), _mm512_unpackhi_pd(c, d));
    const __m256d low = _mm256_add_pd(_mm512_castpd512_pd256(ab), _mm512_extractf64x4_pd(ab, 1));
    const __m256d high = _mm256_add_pd(_mm512_castpd512_pd256(cd), _mm512_extractf64x4_pd(cd, 1));
    const __m256d sums = _mm256_add_pd(_mm256_permute2f128_pd(low, high, 0x20), _mm256_permute2f128_pd(low, high, 0x31));
    _mm256_storeu_pd(totals, _mm256_add_pd(_mm256_loadu_pd(totals), sums));
#else
    for (int64_t i = 0; i < 4; ++i) totals[i] += sum(x[i]);
#endif
}
FASTKD_INLINE vd folded(vd x) { return x; }
// Both halves, added as doubles.
FASTKD_INLINE vd folded(vf x) {
#if defined(__AVX512F__)
    const __m512 y = (__m512)x;
    return (vd)_mm512_add_pd(_mm512_cvtps_pd(_mm512_castps512_ps256(y)), _mm512_cvtps_pd(_mm512_extractf32x8_ps(y, 1)));
#else
    vd total;
    for (int64_t i = 0; i < VD; ++i) total[i] = static_cast<double>(x[i]) + x[i + VD];
    return total;
#endif
}
FASTKD_INLINE vd square_root(vd x) {
#if defined(__AVX512F__)
    return (vd)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
    return (vd)_mm256_sqrt_pd((__m256d)x);
#else
    for (int64_t i = 0; i < VD; ++i) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}
// A NaN in x stays.
FASTKD_INLINE vd clamped(vd x, vd limit) {
#if defined(__AVX512F__)
    return (vd)_mm512_max_pd((__m512d)-limit, _mm512_min_pd((__m512d)limit, (__m512d)x));
#elif defined(__AVX2__)
    return (vd)_mm256_max_pd((__m256d)-limit, _mm256_min_pd((__m256d)limit, (__m256d)x));
#else
    x = (vl)(x > limit) ? limit : x;
    return (vl)(x < -limit) ? -limit : x;
#endif
}

// A tile of pairs whose sums stay in registers.
#if defined(__AVX512F__)
constexpr int64_t kTileRows = 4, kTileColumns = 4;
#else
constexpr int64_t kTileRows = 2, kTileColumns = 4;
#endif

// Adds what `width` columns from `first` on give. Differences first: what is lost in squares and products nothing brings
// back. Beyond the last row the last one comes again.
template <class T>
FASTKD_INLINE void square_tile(const Rows<T>& x, const Rows<T>& y, int64_t i, int64_t j, int64_t first, int64_t width,
                               double sums[kTileRows][kTileColumns]) {
    const T *a[kTileRows], *b[kTileColumns];
    for (int64_t r = 0; r < kTileRows; ++r) a[r] = x.data + (i + r < x.count ? i + r : x.count - 1) * x.stride + first;
    for (int64_t c = 0; c < kTileColumns; ++c) b[c] = y.data + (j + c < y.count ? j + c : y.count - 1) * y.stride + first;
    Vector<T> squares[kTileRows][kTileColumns] = {};
    const auto add = [&](int64_t d, int64_t n) __attribute__((always_inline)) {
        Vector<T> right[kTileColumns];
#pragma GCC unroll 4
        for (int64_t c = 0; c < kTileColumns; ++c) right[c] = load(b[c] + d, n);
#pragma GCC unroll 4
        for (int64_t r = 0; r < kTileRows; ++r) {
            const Vector<T> left = load(a[r] + d, n);
#pragma GCC unroll 4
            for (int64_t c = 0; c < kTileColumns; ++c) {
                const Vector<T> difference = left - right[c];
                squares[r][c] += difference * difference;
            }
        }
    };
    int64_t d = 0;
    for (; d + kWidth<T> <= width; d += kWidth<T>) add(d, kWidth<T>);
    if (d < width) add(d, width - d);
#pragma GCC unroll 4
    for (int64_t r = 0; r < kTileRows; ++r) {
        const vd row[4] = {folded(squares[r][0]), folded(squares[r][1]), folded(squares[r][2]), folded(squares[r][3])};
        add_sums(row, sums[r]);
    }
}

static_assert(kTileColumns == 4, "sums are added by fours");

constexpr int64_t kSpan = 512;  // columns: of longer rows no tile would stay in the first-level cache, and floats
// would add up too many squares

template <class T>
void squares(const Rows<T>& x, const Rows<T>& y, int64_t width, double* out, double* mirrored, int64_t stride) {
    for (int64_t first = 0; first == 0 || first < width; first += kSpan) {
        const int64_t span = width - first < kSpan ? width - first : kSpan;
        for (int64_t j = 0; j < y.count; j += kTileColumns) {
            for (int64_t i = 0; i < x.count; i += kTileRows) {
                double tile[kTileRows][kTileColumns] = {};
                square_tile<T>(x, y, i, j, first, span, tile);
                for (int64_t r = 0; r < kTileRows && i + r < x.count; ++r) {
                    for (int64_t c = 0; c < kTileColumns && j + c < y.count; ++c) {
                        double& total = out[(i + r) * stride + j + c];
                        total = first == 0 ? tile[r][c] : total + tile[r][c];
                        if (mirrored) mirrored[(j + c) * stride + i + r] = total;
                    }
                }
            }
        }
    }
}

#if defined(__AVX512F__)
constexpr int64_t kPullRows = 6;
#else
constexpr int64_t kPullRows = 3;
#endif
template <class T>
constexpr int64_t kPull = 2 * kWidth<T>;
static_assert(kPull<float> <= kMaxColumns, "its caller has no more room");

template <class T>
FASTKD_INLINE void pull_tile(const T* const* w, const Vector<T> (*x)[2], const T* y, int64_t count, Vector<T> (*sums)[2]) {
    for (int64_t j = 0; j < count; ++j) {
        const Vector<T> low = load(y + j * kPull<T>), high = load(y + j * kPull<T> + kWidth<T>);
#pragma GCC unroll 6
        for (int64_t r = 0; r < kPullRows; ++r) {
            const Vector<T> weight = w[r][j] - Vector<T>{};
            sums[r][0] += weight * (x[r][0] - low);
            sums[r][1] += weight * (x[r][1] - high);
        }
    }
}

template <class T>
void pull(const T* w, int64_t w_stride, const Rows<T>& x, const Rows<T>& y, int64_t first, int64_t count, T* packed, T* out,
          int64_t out_stride) {
    constexpr int64_t half = kWidth<T>;
    for (int64_t j = 0; j < y.count; ++j) {
        const T* row = y.data + j * y.stride + first;
        store(packed + j * kPull<T>, load(row, count));
        store(packed + j * kPull<T> + half, load(row + half, count - half));
    }
    for (int64_t i = 0; i < x.count; i += kPullRows) {
        const T* weights[kPullRows];
        Vector<T> rows[kPullRows][2], sums[kPullRows][2] = {};
        for (int64_t r = 0; r < kPullRows; ++r) {
            const int64_t at = i + r < x.count ? i + r : x.count - 1;
            weights[r] = w + at * w_stride;
            rows[r][0] = load(x.data + at * x.stride + first, count);
            rows[r][1] = load(x.data + at * x.stride + first + half, count - half);
        }
        pull_tile<T>(weights, rows, packed, y.count, sums);
        for (int64_t r = 0; r < kPullRows && i + r < x.count; ++r) {
            T* row = out + (i + r) * out_stride + first;
            store(row, sums[r][0], count);
            store(row + half, sums[r][1], count - half);
        }
    }
}

// NaN stays: it is no coincidence.
FASTKD_INLINE vd distance(vd squares, double least) { return square_root((vl)(squares <= wide(least)) ? vd{} : squares); }

double distances(const double* squares, int64_t n, double least) {
    vd total{};
    for (int64_t j = 0; j < n; j += VD) total += distance(load(squares + j, n - j), least);
    return sum(total);
}

DistanceSums distance_row(const DistanceRow& row, double* h) {
    vd loss{}, slope{};
    for (int64_t j = 0; j < row.n; j += VD) {
        const vd mine = distance(load(row.student + j, row.n - j), row.student_least) / row.student_mean;
        const vd taught = distance(load(row.teacher + j, row.n - j), row.teacher_least) / row.teacher_mean;
        const vd error = mine - taught, bounded = clamped(error, wide(row.delta));
        loss += bounded * (error - 0.5 * bounded);
        slope += bounded * mine;
        store(h + j, bounded, row.n - j);
    }
    return {sum(loss), sum(slope)};
}

void distance_slopes(const DistanceRow& row, double shift, double* h) {
    for (int64_t j = 0; j < row.n; j += VD) {
        const vd mine = distance(load(row.student + j, row.n - j), row.student_least);
        const vd slope = (load(h + j, row.n - j) - shift) / (row.student_mean * mine);
        store(h + j, (vl)(mine == vd{}) ? vd{} : slope, row.n - j);
    }
}

struct AngleInputs {
    vd student, student_scale, teacher, teacher_scale;

    FASTKD_INLINE AngleInputs at(const double* p) {
        return {load(p + kStudentSquare * kGroup), load(p + kStudentScale * kGroup), load(p + kTeacherSquare * kGroup),
                load(p + kTeacherScale * kGroup)};
    }
};

// Half a tile's columns: what is read and added up of them stays in registers while all rows pass.
constexpr int64_t kColumns = 4;

template <bool itself>
FASTKD_INLINE vd angle_columns(const AngleProblem& p, int64_t j, int64_t k, int64_t at, int64_t sums_at, vd (*opposite)[kGroup], int64_t column) {
    const int64_t groups = p.rows / kGroup, stride = groups * kAngleInputs * kGroup, sums_stride = groups * kAngleSums * kGroup;
    const vd limit = wide(p.delta);
    AngleInputs right[kColumns];
    vd slopes[kColumns] = {}, bent[kColumns] = {}, loss{};
#pragma GCC unroll 4
    for (int64_t c = 0; c < kColumns; ++c) right[c] = AngleInputs::at(p.inputs + (k + column + c) * stride + at);
    for (int64_t r = 0; r < kGroup; ++r) {
        const double* row = p.inputs + (j + r) * stride;
        const AngleInputs left = AngleInputs::at(row + at);
        // Q_jk of student and teacher: anchor k of row j.
        const double* between = row + k / kGroup * kAngleInputs * kGroup + column;
        double* sums = p.sums + (j + r) * sums_stride + sums_at;
        vd row_slopes{}, row_bent{};
#pragma GCC unroll 4
        for (int64_t c = 0; c < kColumns; ++c) {
            const vd mine = left.student_scale * right[c].student_scale, theirs = left.teacher_scale * right[c].teacher_scale;
            const vd bend = left.student + right[c].student - between[kStudentSquare * kGroup + c];
            const vd taught = left.teacher + right[c].teacher - between[kTeacherSquare * kGroup + c];
            const vd error = bend * mine - taught * theirs, h = clamped(error, limit), slope = h * mine;
            loss += h * (error - 0.5 * h);
            row_slopes += slope;
            row_bent += slope * bend;
            slopes[c] += slope;
            bent[c] += slope * bend;
            opposite[r][column + c] += slope;
        }
        store(sums + kSlopes * kGroup, load(sums + kSlopes * kGroup) + row_slopes);
        store(sums + kBentSlopes * kGroup, load(sums + kBentSlopes * kGroup) + row_bent);
    }
    if (itself) return loss;  // the other order has its own pair
    for (int64_t c = 0; c < kColumns; ++c) {
        double* sums = p.sums + (k + column + c) * sums_stride + sums_at;
        store(sums + kSlopes * kGroup, load(sums + kSlopes * kGroup) + slopes[c]);
        store(sums + kBentSlopes * kGroup, load(sums + kBentSlopes * kGroup) + bent[c]);
    }
    return loss;
}

template <bool itself>
static double angle_tile(const AngleProblem& p, int64_t j, int64_t k) {
    vd opposite[kGroup][kGroup] = {}, loss{};
    for (int64_t group = 0; group < p.rows / kGroup; ++group) {
        for (int64_t lane = 0; lane < kGroup; lane += VD) {
            for (int64_t column = 0; column < kGroup; column += kColumns) {
                const int64_t at = group * kAngleInputs * kGroup + lane, sums_at = group * kAngleSums * kGroup + lane;
                loss += angle_columns<itself>(p, j, k, at, sums_at, opposite, column);
            }
        }
    }
    for (int64_t r = 0; r < kGroup; ++r) {
        for (int64_t c = 0; c < kGroup; ++c) {
            const double total = sum(opposite[r][c]);
            p.opposite[(j + r) * p.rows + k + c] = total;
            if (!itself) p.opposite[(k + c) * p.rows + j + r] = total;
        }
    }
    return sum(loss);
}

double angles(const AngleProblem& p, int64_t j, int64_t k) { return j == k ? angle_tile<true>(p, j, k) : angle_tile<false>(p, j, k); }

}  // namespace
}  // namespace fastkd
