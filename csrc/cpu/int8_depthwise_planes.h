// Convolutions of each channel by itself, of planes: they stay planes on the whole way to the output.
#pragma once
#include "int8_layers.h"

namespace fastkd {

// Of one part (int8_pack.h).
void int8_depthwise_planes(const Int8Layer&, const Int8Images&, const Packing&);

}  // namespace fastkd
