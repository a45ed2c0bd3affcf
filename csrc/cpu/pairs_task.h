// What the passes over squared distances share.
#pragma once
#include <cstdint>

namespace fastkd {

constexpr double kCoincident = 1e-6;  // COINCIDENT of fastkd/_pairs.py

// Rows are coincident where their squared distance is not greater than this.
double least_square(const double* squares, int64_t n);

}  // namespace fastkd
