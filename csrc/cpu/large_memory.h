// Large outputs and gradients, in memory that was one before. The allocator takes 32 MB and more
// fresh from the system at each call, which clears new pages: for 604 MB that takes 13 ms, and
// writing them 8 (2 threads, huge pages). So the last four blocks that nobody uses any more stay
// for the next call. What goes beyond the last 256 MB of them is marked free, so that the system
// takes it back where it runs short; not the rest, as marking interrupts every processor for each
// huge page, which a loop whose blocks come and go would pay for each time (docs/features.md).
#pragma once

#include "../common.h"

#include <array>
#include <mutex>
#include <new>

#if defined(__linux__)
// torch has it from 2.11 on
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t storage_offset,
    int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle* out, int32_t layout,
    const uint8_t* opaque_metadata, int64_t opaque_metadata_size,
    void (*deleter)(void* data, void* context), void* context);
#endif

namespace rayfuse {

#if defined(__linux__)
class LargeMemory {
 public:
  static constexpr int64_t kBytes = int64_t{32} << 20, kUnmarkedBytes = int64_t{256} << 20;

  struct Block {
    void* memory = nullptr;
    int64_t bytes = 0;
  };

  // Never destroyed: tensors outlive static objects.
  static LargeMemory& instance() {
    static LargeMemory* const memory = new LargeMemory;
    return *memory;
  }

  Block take(int64_t bytes) {
    {
      const std::lock_guard lock(mutex_);
      for (Block& block : idle_) {
        if (block.bytes >= bytes && block.bytes <= bytes + bytes / 8) {
          return std::exchange(block, {});
        }
      }
    }
    return map(bytes);
  }

  // The oldest makes room.
  void give(Block block) {
    const int64_t given = block.bytes;
    const std::lock_guard lock(mutex_);
    for (Block& older : idle_) std::swap(block, older);
    unmap(block);
    int64_t bytes = 0;
    for (const Block& idle : idle_) {
      bytes += idle.bytes;
      // what was beyond the last ones before has been marked then
      const bool goes_beyond = bytes > kUnmarkedBytes && bytes - given <= kUnmarkedBytes;
      if (goes_beyond) madvise(idle.memory, idle.bytes, MADV_FREE);
    }
  }

  void release() {
    const std::lock_guard lock(mutex_);
    for (Block& block : idle_) unmap(std::exchange(block, {}));
  }

 private:
  // From the system itself: what malloc has carved from its own heap it does not give back.
  static Block map(int64_t bytes) {
    constexpr int64_t kHugePage = int64_t{2} << 20;
    const int64_t whole = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const mapped = mmap(nullptr, whole + kHugePage, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw std::bad_alloc();
    // what lies around the huge pages
    auto* const begin = static_cast<char*>(mapped);
    const int64_t before = -reinterpret_cast<uintptr_t>(begin) % kHugePage;
    if (before > 0) munmap(begin, before);
    munmap(begin + before + whole, kHugePage - before);
    prefer_huge_pages(begin + before, whole);
    return {begin + before, whole};
  }
  static void unmap(const Block& block) {
    if (block.memory) munmap(block.memory, block.bytes);
  }

  std::mutex mutex_;
  std::array<Block, 4> idle_;
};
#endif

// For Python, by name.
extern "C" __attribute__((used, visibility("default"))) inline void rayfuse_release_memory() {
#if defined(__linux__)
  LargeMemory::instance().release();
#endif
}

// Whether a tensor of so many bytes lies where another was before.
inline bool is_large(int64_t bytes) {
#if defined(__linux__)
  return bytes >= LargeMemory::kBytes && torch_from_blob;
#else
  return false;
#endif
}
inline bool is_large(const Tensor& x) { return is_large(x.numel() * x.element_size()); }

// Like `empty`, on the CPU.
inline Tensor large_empty(const Tensor& like, const std::vector<int64_t>& sizes, int32_t dtype) {
#if defined(__linux__)
  std::vector<int64_t> strides(sizes.size());
  int64_t count = 1;
  for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
  const int64_t bytes = count * aoti_torch_dtype_element_size(dtype);
  if (is_large(bytes)) {
    auto* const block = new LargeMemory::Block(LargeMemory::instance().take(bytes));
    AtenTensorHandle out;
    STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(
        block->memory, sizes.size(), sizes.data(), strides.data(), 0, dtype,
        aoti_torch_device_type_cpu(), like.get_device_index(), &out, aoti_torch_layout_strided(),
        nullptr, 0,
        [](void*, void* context) {
          auto* const block = static_cast<LargeMemory::Block*>(context);
          LargeMemory::instance().give(*block);
          delete block;
        },
        block));
    return Tensor(out);
  }
#endif
  return empty(like, sizes, dtype);
}

// Like `empty_gradient`.
inline Tensor large_gradient(const Tensor& x, int64_t needs, int i) {
  if (!(needs >> i & 1)) return empty_gradient(x, needs, i);
  return large_empty(x, {x.sizes().begin(), x.sizes().end()}, dtype_of(x));
}
inline Tensor large_gradient(const std::optional<Tensor>& x, const Tensor& like, int64_t needs,
                             int i) {
  return x ? large_gradient(*x, needs, i) : empty_gradient(x, like, needs, i);
}

}  // namespace rayfuse
