#include "feature_rows.h"

#include <cmath>
#include <numeric>
#include <vector>

#include "isa.h"
#include "logit_task.h"
#include "threads.h"

namespace fastkd {
namespace {

constexpr double kShortest = 1e-12;  // SHORTEST in fastkd/_unit_rows.py

Row at(const Row& row, int64_t element) {
    return {static_cast<const char*>(row.data) + element * (row.dtype == Dtype::float32 ? 4 : 2), row.dtype};
}

double total(const std::vector<double>& parts) { return std::accumulate(parts.begin(), parts.end(), 0.0); }

// Of a row whose squares are beyond a float, from those of a part of it.
double length_of(const Row& row, int64_t n) {
    constexpr float kPart = 0x1p-96f;
    const auto length = [&](float factor) { return std::sqrt(active_instruction_set().feature.sum_powers(row, factor, 2, n)); };
    const double whole = length(1);
    return std::isinf(whole) ? length(kPart) / kPart : whole;
}

double cosine(const Hint& hint, int64_t row, float* gradient) {
    const FeatureKernels& kernels = active_instruction_set().feature;
    const int64_t n = hint.width;
    const Row s = at(hint.student, row * n), t = at(hint.teacher, row * n);
    const bool counts = !hint.mask || hint.mask[row];
    const double length = counts ? length_of(s, n) : 0;
    const double other_length = counts ? length_of(t, n) : 0;
    if (length <= kShortest || other_length <= kShortest) {
        if (gradient) std::fill_n(gradient, n, 0.0f);
        return counts;
    }
    const float a = static_cast<float>(length), b = static_cast<float>(other_length);
    const double value = 0.5 * kernels.difference(s, a, t, b, n);
    if (gradient) {
        kernels.combination(s, a, t, b, n, static_cast<float>(1 - value), static_cast<float>(hint.scale / length), gradient);
    }
    return value;
}

// The attention of one sample.
void attention_map(const Maps& maps, int64_t sample, float p, float* out) {
    const FeatureKernels& kernels = active_instruction_set().feature;
    const int64_t channels = maps.channels, positions = maps.positions, first = sample * channels * positions;
    if (maps.channels_last) {
        for (int64_t i = 0; i < positions; ++i) {
            out[i] = static_cast<float>(kernels.sum_powers(at(maps.features, first + i * channels), 1, p, channels));
        }
    } else {
        std::fill_n(out, positions, 0.0f);
        for (int64_t c = 0; c < channels; ++c) {
            kernels.add_powers(at(maps.features, first + c * positions), p, positions, out);
        }
    }
    const float divisor = static_cast<float>(std::max<int64_t>(1, channels));
    for (int64_t i = 0; i < positions; ++i) out[i] /= divisor;
}

double length_of(const float* map, int64_t n) {
    double squares = 0;
    for (int64_t i = 0; i < n; ++i) squares += static_cast<double>(map[i]) * map[i];
    return std::sqrt(squares);
}

// What one sample adds to the loss; `map` becomes the derivative by the student's own map, times `factor`.
double compare_maps(float* map, const float* teacher, int64_t n, bool paper, double factor) {
    const double length = length_of(map, n), other_length = length_of(teacher, n);
    const bool zero = length <= kShortest, other_zero = other_length <= kShortest;
    const auto direction = [&](int64_t i) { return zero ? 0 : map[i] / length; };
    const auto difference = [&](int64_t i) { return direction(i) - (other_zero ? 0 : teacher[i] / other_length); };
    double squares = 0, radial = 0;
    for (int64_t i = 0; i < n; ++i) {
        squares += difference(i) * difference(i);
        radial += difference(i) * direction(i);
    }
    const double distance = std::sqrt(squares);
    const double outer = zero || (paper && distance == 0) ? 0 : factor / length * (paper ? 1 / distance : 2);
    for (int64_t i = 0; i < n; ++i) map[i] = static_cast<float>(outer * (difference(i) - direction(i) * radial));
    return paper ? distance : squares;
}

void map_gradient(const Maps& maps, int64_t sample, float p, const float* slope, float* gradient) {
    const FeatureKernels& kernels = active_instruction_set().feature;
    const int64_t rows = maps.channels_last ? maps.positions : maps.channels;
    const int64_t width = maps.channels_last ? maps.channels : maps.positions;
    for (int64_t row = sample * rows; row < (sample + 1) * rows; ++row) {
        const float* mine = maps.channels_last ? slope + (row - sample * rows) : slope;
        kernels.power_gradient(at(maps.features, row * width), p, width, mine, maps.channels_last, gradient + row * width);
    }
}

}  // namespace

double hint_loss(const Hint& hint, float* gradient) {
    constexpr int64_t kBlock = 8192;  // elements that are summed by one thread, in one order
    if (gradient) prefer_huge_pages(gradient, hint.rows * hint.width * 4);
    if (hint.distance == Distance::cosine) {
        std::vector<double> parts(hint.rows);
        for_each_chunk(hint.rows, hint.width, hint.threads, [&](int64_t begin, int64_t end) {
            for (int64_t i = begin; i < end; ++i) parts[i] = cosine(hint, i, gradient ? gradient + i * hint.width : nullptr);
        });
        return total(parts) * hint.scale;
    }
    const FeatureKernels& kernels = active_instruction_set().feature;
    std::vector<double> parts((hint.rows + kBlock - 1) / kBlock);
    for_each_chunk(parts.size(), kBlock, hint.threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
            const int64_t first = i * kBlock, n = std::min(kBlock, hint.rows - first);
            parts[i] = kernels.distance(hint.distance, hint.delta, at(hint.student, first), at(hint.teacher, first),
                                        hint.mask ? hint.mask + first : nullptr, n, static_cast<float>(hint.scale),
                                        gradient ? gradient + first : nullptr);
        }
    });
    return total(parts) * hint.scale;
}

void attention_maps(const Maps& maps, float p, int threads, float* out) {
    for_each_chunk(maps.samples, maps.channels * maps.positions, threads, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) attention_map(maps, i, p, out + i * maps.positions);
    });
}

double attention_map_loss(const Maps& student, const float* teacher, float p, bool paper, double scale, int threads,
                      float* gradient) {
    const int64_t positions = student.positions;
    if (gradient) prefer_huge_pages(gradient, student.samples * student.channels * positions * 4);
    std::vector<double> parts(student.samples);
    const double factor = scale * p / static_cast<double>(std::max<int64_t>(1, student.channels));
    for_each_chunk(student.samples, student.channels * positions, threads, [&](int64_t begin, int64_t end) {
        std::vector<float> map(positions);
        for (int64_t i = begin; i < end; ++i) {
            attention_map(student, i, p, map.data());
            parts[i] = compare_maps(map.data(), teacher + i * positions, positions, paper, factor);
            // The sample is still in the second-level cache.
            if (gradient) map_gradient(student, i, p, map.data(), gradient);
        }
    });
    return total(parts) * scale;
}

}  // namespace fastkd
