// Convolutions of 3 x 3 taps by Winograd's minimal filtering: 4 x 4 outputs from 36 products of transformed numbers and
// transformed weights, where the sum of their taps has 144 (A. Lavin and S. Gray, "Fast algorithms for convolutional neural
// networks", 2016, F(4 x 4, 3 x 3)). In integers, without an error: int8_winograd-inl.h says how. Products are of 16 bits, of
// which an instruction takes half as many as of 8.
#pragma once
#include "int8_layers.h"

namespace fastkd {

// Weights of each block of panels (int8_pack.h), for each position one after the other, as those of a layer of one tap and of
// numbers of 16 bits.
class WinogradPacking {
  public:
    explicit WinogradPacking(const Packing& p)
        : words((p.shape.terms + 1) / 2), panel_bytes(p.layout.lanes * 4 * (1 + words)),
          bytes(p.panels * kWinogradPositions * panel_bytes), p_(p) {}

    int64_t panels(int64_t block) const { return p_.first_panel(block + 1) - p_.first_panel(block); }
    int64_t offset(int64_t block, int64_t position) const {
        return (p_.first_panel(block) * kWinogradPositions + panels(block) * position) * panel_bytes;
    }

    const int64_t words;  // of a row
    const int64_t panel_bytes, bytes;

  private:
    const Packing& p_;
};

// Returns whether every sum that numbers can make with these weights is one that this way can tell from all others; if not,
// what was written is of no use.
bool int8_winograd_pack(const Packing&, const int8_t* weight, char* packed, int threads);

// Whether there is such a way, and it is the faster one.
bool int8_winograd_pays(const Int8Images&, const Packing&, int threads);

// Of one group, with steps and distances of 1.
void int8_winograd(const Int8Layer&, const Int8Images&, const Packing&);

}  // namespace fastkd
