#pragma once
#include <cstdint>

namespace faults {

enum Fault {
    kReverse, kNoBarrier, kSomeBarrier, kUnwritten, kWriteAfterRead, kWriteBeyond, kReadBeyond, kTwoWriters, kReadOfOther, kBlocks, kSum,
    kSomeLanes, kMisaligned, kCopy, kNoWait, kNoBarrierAfterWait, kCopyOverRead, kCopyOverCopy, kEndBeforeCopy, kMisalignedCopy, kCopyBeyond,
};

int run(int fault, uintptr_t in, uintptr_t out, unsigned blocks, unsigned threads);

}  // namespace faults
