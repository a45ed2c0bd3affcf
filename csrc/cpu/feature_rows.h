// Whole batches of features: the losses, and their gradients with them. See fastkd/reference/hint.py and
// attention_maps.py.
#pragma once
#include "feature.h"

namespace fastkd {

// Rows of `width` elements for cosine, elsewhere of one. The mask has a byte for each row.
struct Hint {
    Row student, teacher;
    int64_t rows, width;
    const uint8_t* mask;  // or nullptr
    Distance distance;
    float delta;
    double scale;  // 1 / what the sum is divided by
    int threads;
};
double hint_loss(const Hint&, float* gradient);

// Samples one after the other; in each, channels of positions, or positions of channels.
struct Maps {
    Row features;
    int64_t samples, channels, positions;
    bool channels_last;
};

// (samples, positions): the mean over channels of |x|^p
void attention_maps(const Maps&, float p, int threads, float* maps);

// `teacher` holds its attention maps. The paper's convention takes the length of a difference, the code's its square.
double attention_map_loss(const Maps& student, const float* teacher, float p, bool paper, double scale, int threads,
                      float* gradient);

}  // namespace fastkd
