// The table of the int8 pieces. Included by one unit for each instruction set.
#pragma once
#include "int8_depthwise-inl.h"
#include "int8_float-inl.h"
#include "int8_pixels-inl.h"
#include "int8_planes-inl.h"
#include "int8_winograd-inl.h"

namespace fastkd {
namespace {

constexpr Int8Kernels int8_kernels = {
    {W, kPanels, kProductRows, kSums, kPerWord, kZero},
    int8_largest,
    int8_quantize,
    int8_quantize_bounded,
    int8_quantize_planes,
    int8_products,
    int8_transpose,
    int8_finish,
    int8_depthwise_products,
    int8_plane_products,
    int8_pixel_products,
    int8_float_products,
    int8_winograd_numbers,
    int8_winograd_products,
    int8_winograd_sums,
    int8_widen,
    int8_dequantize,
    int8_peak,
};

}  // namespace
}  // namespace fastkd
