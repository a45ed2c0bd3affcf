#include "scratch.h"

#include <algorithm>
#include <cstdlib>
#include <new>
#include <vector>

#include "prefetch.h"

namespace fastkd {
namespace {

constexpr int64_t kKept = 16 << 20;  // bytes that a thread keeps at most
constexpr size_t kBlocks = 16;       // and in how many pieces: more than any call has at a time
constexpr int64_t kSpare = 4;        // times as much as is needed is not too much

struct Block {
    char* data;
    int64_t bytes;
};

// Blocks that nobody uses, the longest unused first.
class Kept {
  public:
    Kept() { blocks_.reserve(kBlocks); }  // so that giving back needs no memory
    ~Kept() {
        for (const Block& block : blocks_) std::free(block.data);
    }

    // The smallest that is large enough; none, if there is none or all are much too large.
    Block take(int64_t bytes) {
        auto best = blocks_.end();
        for (auto block = blocks_.begin(); block != blocks_.end(); ++block) {
            const bool fits = block->bytes >= bytes && block->bytes / kSpare <= bytes;
            if (fits && (best == blocks_.end() || block->bytes < best->bytes)) best = block;
        }
        if (best == blocks_.end()) return {nullptr, 0};
        const Block found = *best;
        blocks_.erase(best);
        bytes_ -= found.bytes;
        return found;
    }

    void give(Block block) {
        if (block.bytes > kKept) return std::free(block.data);
        while (bytes_ + block.bytes > kKept || blocks_.size() == kBlocks) {
            bytes_ -= blocks_.front().bytes;
            std::free(blocks_.front().data);
            blocks_.erase(blocks_.begin());
        }
        blocks_.push_back(block);
        bytes_ += block.bytes;
    }

  private:
    std::vector<Block> blocks_;
    int64_t bytes_ = 0;
};

thread_local Kept kept;

}  // namespace

Scratch::Scratch(int64_t bytes) : data_(nullptr, {0}) {
    bytes = std::max<int64_t>(1, (bytes + kLine - 1) / kLine) * kLine;
    Block block = kept.take(bytes);
    if (!block.data) block = {static_cast<char*>(std::aligned_alloc(kLine, bytes)), bytes};
    if (!block.data) throw std::bad_alloc();
    data_ = std::unique_ptr<char, Return>(block.data, {block.bytes});
}

void Scratch::Return::operator()(char* data) const { kept.give({data, bytes}); }

}  // namespace fastkd
