// Starts translated kernels.
#pragma once

#include "device.h"

namespace ptx {

enum class Order : int { kForward, kReverse, kShuffled };  // of blocks, warps and lanes

struct Launch {
  Dim grid, block;
  uint32_t dynamic_shared;
  int large_shared;  // whether the program has asked for more than 48 KB
  const uint8_t* parameters;
};

struct Counts {
  uint64_t launches, blocks, threads;
  uint64_t loads, stores;  // of warps, global memory
  uint64_t shared_accesses, bank_conflicts;
  uint64_t stream_bytes, waits;                        // see Thread::note_load
  uint64_t first_blocks, first_threads, first_shared;  // of the first launch
};

// 32 bytes of global memory, and how often a warp asked for some of them.
struct Sector {
  uint64_t loads, stores, loaded_bytes, stored_bytes;
};

}  // namespace ptx

extern "C" const char* ptx_launch(const ptx::Kernel* kernel, const ptx::Launch* launch);
