// Steps of whole images, each by its own largest magnitude.
#pragma once
#include "int8_layers.h"

namespace fastkd {

// 0 bits, if there is nothing.
uint32_t largest_of(const uint32_t* bits, int64_t count);

// Of `count` images of so many numbers, from number `first` on.
void find_image_steps(const Int8Layer&, int64_t size, int64_t first, int64_t count, float* steps);

}  // namespace fastkd
