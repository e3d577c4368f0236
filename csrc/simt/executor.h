// What the tests see of the executor; executor.cpp says how it works.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace simt {

// Of one kernel, summed over its launches. A request is what the lanes of a warp access together; a
// byte counts once in it, and its ideal is the number of 32-byte sectors that its bytes would fill.
struct Counters {
  int64_t launches, blocks, threads, barriers, warp_calls;
  int64_t dynamic_bytes;  // of shared memory, in all blocks
  int64_t loads, stores, load_bytes, store_bytes;
  int64_t requests, sectors, ideal_sectors;
};

struct Report {
  std::string kind, kernel, text;
};

// Memory of a tensor that the op under way may read, or write.
void allow(const void* memory, size_t bytes, bool writable);
void forbid_all();

// Blocks and threads run in an order that depends on the seed and the number of launches since.
void seed(uint64_t seed);
std::map<std::string, Counters>& counters();
// All since the last call.
std::vector<Report> take_reports();

}  // namespace simt
