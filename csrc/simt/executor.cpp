// Runs CUDA kernels on the host, one fiber a thread, and watches them.
// - Threads switch only where they wait: at barriers and calls that a warp makes together. Who goes
//   on is drawn at random.
// - Kernels are compiled with -fsanitize=thread, without its library: the compiler calls the
//   functions __tsan_* below before each access to memory that others may see.
// - __shared__ variables are thread_local; where they lie is read from this library's symbols.
// - A report names the kernel, block, threads and source lines; the launch then fails. After a wild
//   access or a deadlock it fails at once, and its fibers are never resumed.
#include "executor.h"

#define SIMT_EXECUTOR
#include <cuda_runtime.h>

#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <mutex>
#include <numeric>
#include <set>
#include <sstream>
#include <utility>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if !defined(__x86_64__)
#error "the switch between fibers is written for x86-64"
#endif

namespace rayfuse {
// as large as any device's
alignas(128) thread_local unsigned char shared_memory[227 << 10];
}  // namespace rayfuse

extern "C" {
uint3 threadIdx, blockIdx, blockDim, gridDim;

// Saves the registers that a call keeps on the stack, and the stack in *from; goes on from `to`.
void simt_switch(void** from, void* to);
}
asm(R"(
  .text
  .type simt_switch, @function
simt_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
  .size simt_switch, .-simt_switch
)");

namespace simt {
namespace {

constexpr size_t kStack = 64 << 10;
constexpr int kWarp = 32, kMostThreads = 1024;
constexpr size_t kMostDynamic = 48 << 10;

// ---- this library's own symbols

struct Symbol {
  std::string name;
  uintptr_t value;
  size_t size;
};

struct Symbols {
  std::string file;
  uintptr_t base;
  std::vector<Symbol> functions, shared;
  uintptr_t dynamic_shared = 0;

  Symbols() {
    Dl_info info;
    dladdr(reinterpret_cast<void*>(&simt_switch), &info);
    file = info.dli_fname;
    base = reinterpret_cast<uintptr_t>(info.dli_fbase);
    std::ifstream stream(file, std::ios::binary);
    const std::string bytes{std::istreambuf_iterator<char>(stream), {}};
    const auto* header = reinterpret_cast<const Elf64_Ehdr*>(bytes.data());
    const auto* sections = reinterpret_cast<const Elf64_Shdr*>(bytes.data() + header->e_shoff);
    for (int i = 0; i < header->e_shnum; ++i) {
      if (sections[i].sh_type != SHT_SYMTAB) continue;
      const char* names = bytes.data() + sections[sections[i].sh_link].sh_offset;
      const auto* symbols =
          reinterpret_cast<const Elf64_Sym*>(bytes.data() + sections[i].sh_offset);
      for (size_t s = 0; s < sections[i].sh_size / sizeof *symbols; ++s) {
        const Symbol symbol{names + symbols[s].st_name, symbols[s].st_value, symbols[s].st_size};
        const int type = ELF64_ST_TYPE(symbols[s].st_info);
        if (type == STT_FUNC) functions.push_back(symbol);
        if (type != STT_TLS) continue;
        if (symbol.name == "_ZN7rayfuse13shared_memoryE") dynamic_shared = symbol.value;
        // variables of functions of ours
        if (symbol.name.rfind("_ZZN7rayfuse", 0) == 0 ||
            symbol.name.rfind("_ZZNK7rayfuse", 0) == 0) {
          shared.push_back(symbol);
        }
      }
    }
  }

  static std::string demangled(const std::string& name) {
    int status;
    char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
    std::string out = status ? name : text;
    std::free(text);
    return out;
  }

  std::string kernel(const void* function) const {
    const uintptr_t at = reinterpret_cast<uintptr_t>(function) - base;
    for (const Symbol& symbol : functions) {
      if (symbol.value != at) continue;
      std::string name = demangled(symbol.name);
      for (const std::string word : {"void ", "rayfuse::", "(anonymous namespace)::"}) {
        for (size_t i; (i = name.find(word)) != std::string::npos;) name.erase(i, word.size());
      }
      // a parenthesis may stand among the template's arguments as well: (Form)0
      const size_t end = name.find(">(");
      return name.substr(0, end == std::string::npos ? name.find('(') : end + 1);
    }
    return "an unknown kernel";
  }

  // The line of a kernel's source that a program counter belongs to; the executor's own headers
  // are left out.
  const std::string& line(uintptr_t pc) const {
    static std::map<uintptr_t, std::string> known;
    auto [place, is_new] = known.try_emplace(pc);
    if (is_new) place->second = find_line(pc);
    return place->second;
  }

 private:
  std::string find_line(uintptr_t pc) const {
    std::ostringstream command;
    command << "addr2line -i -e '" << file << "' 0x" << std::hex << pc - base - 1;
    std::string found = "an unknown line";
    if (FILE* pipe = popen(command.str().c_str(), "r")) {
      char text[4096];
      bool searching = true;
      while (std::fgets(text, sizeof text, pipe)) {
        std::string place = text;
        place.erase(place.find_last_not_of("\n") + 1);
        place = place.substr(0, place.find(" (discriminator"));
        if (!searching || place.find("simt/include/") != std::string::npos) continue;
        found = place.substr(place.rfind('/') + 1);
        searching = false;
      }
      pclose(pipe);
    }
    return found;
  }
};

const Symbols& symbols() {
  static const Symbols symbols;
  return symbols;
}

std::string line(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

// ---- state

struct Random {
  uint64_t state;

  uint64_t operator()() {
    state += 0x9e3779b97f4a7c15;
    uint64_t x = state;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
    x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
    return x ^ (x >> 31);
  }
  size_t below(size_t n) { return (*this)() % n; }
};

struct Range {
  uintptr_t begin, end;
  bool writable;
};

// An access to global memory; `request` is the same for the lanes of a warp that make it together.
struct Access {
  uint64_t request;
  uintptr_t address;
  int size;
};

enum class State { ready, at_barrier, in_warp_call, done };

struct Fiber {
  void* stack_pointer;
  uint3 index;
  int thread;
  State state;
  Site site;
  WarpCall call;
  uint64_t result;
  // how often this thread has come past an access
  std::vector<std::pair<uintptr_t, uint32_t>> times;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack;
#endif

  uint32_t count(uintptr_t pc) {
    for (auto& [at, n] : times) {
      if (at == pc) return n++;
    }
    times.emplace_back(pc, 1);
    return 0;
  }
};

struct Warp {
  unsigned epoch;
  std::vector<Access> accesses;
};

// One byte of shared memory: who accessed it since the last barrier.
struct Cell {
  uint32_t epoch;
  bool written_ever, write_atomic;
  int16_t writer, reader;  // threads; kNobody, or for readers kWarpOf or kMany
  uint16_t reader_warp;
  uint32_t write_epoch, read_epoch;  // the warp's
  uintptr_t write_pc, read_pc;
};
constexpr int16_t kNobody = -1, kOneWarp = -2, kMany = -3;

struct Launch {
  const void* kernel;
  std::string name;
  void (*body)(void*);
  uintptr_t call, call_end;
  int threads;
  uintptr_t tls, dynamic, dynamic_end;
  Random random;
  Counters counters = {};

  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<int> ready;
  Fiber* current = nullptr;
  void* scheduler = nullptr;
  int arrived = 0, holding = 0, finished = 0;
  uint32_t epoch = 0;
  bool aborted = false;
  std::vector<Cell> cells;  // of the dynamic memory, then of each static variable
  std::vector<Report> reports;
  std::set<std::string> reported;
};

std::mutex launching;
thread_local Launch* active = nullptr;
uint64_t seed_ = 0, launches = 0;
std::map<std::string, Counters> counters_;
std::vector<Report> reports_;
std::string last_error;
thread_local std::vector<Range> ranges;

unsigned char* stacks() {
  static auto* memory =
      static_cast<unsigned char*>(mmap(nullptr, kStack * kMostThreads, PROT_READ | PROT_WRITE,
                                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  return memory;
}

// ---- reports

std::string name_of(const uint3& i) {
  std::string name = std::to_string(i.x);
  return i.y || i.z ? "(" + name + ", " + std::to_string(i.y) + ", " + std::to_string(i.z) + ")"
                    : name;
}
std::string name_of(const Fiber& fiber) { return "thread " + name_of(fiber.index); }
std::string name_of(int thread) { return name_of(active->fibers[thread]); }

// Once for each kind and place.
void report(const std::string& kind, const std::string& place, const std::string& text) {
  Launch& run = *active;
  if (!run.reported.insert(kind + place).second) return;
  run.reports.push_back(
      {kind, run.name, run.name + ": " + kind + " in block " + name_of(blockIdx) + ": " + text});
}

// ---- fibers

void go_on(Fiber* next) {
  Launch& run = *active;
  Fiber* const here = run.current;
  void** from = here ? &here->stack_pointer : &run.scheduler;
  void* const to = next ? next->stack_pointer : run.scheduler;
  run.current = next;
  if (next) threadIdx = next->index;
#if defined(__SANITIZE_ADDRESS__)
  static const void* scheduler_stack;
  static size_t scheduler_size;
  const bool dead = here && here->state == State::done;
  void* kept = nullptr;
  __sanitizer_start_switch_fiber(dead ? nullptr : &kept,
                                 next ? stacks() + next->thread * kStack : scheduler_stack,
                                 next ? kStack : scheduler_size);
  simt_switch(from, to);
  const void* old;
  size_t size;
  __sanitizer_finish_switch_fiber(kept, &old, &size);
#else
  simt_switch(from, to);
#endif
}

// Lets another thread run; the scheduler, if none can.
void yield() {
  Launch& run = *active;
  if (run.ready.empty()) return go_on(nullptr);
  const size_t i = run.random.below(run.ready.size());
  Fiber* const next = &run.fibers[run.ready[i]];
  run.ready[i] = run.ready.back();
  run.ready.pop_back();
  if (next != run.current) go_on(next);
}

void wait(State state) {
  active->current->state = state;
  yield();
}

void wake(Fiber& fiber) {
  fiber.state = State::ready;
  active->ready.push_back(fiber.thread);
}

[[noreturn]] void abort_launch() {
  active->aborted = true;
  go_on(nullptr);
  std::abort();
}

void fiber_main() {
  Launch& run = *active;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
#endif
  run.body(reinterpret_cast<void*>(run.call));
  ++run.finished;
  run.current->state = State::done;
  yield();
  std::abort();
}

std::string where(const Fiber& fiber) {
  if (fiber.state == State::done) return "has exited";
  const std::string what = fiber.state == State::at_barrier ? "a block barrier" : fiber.call.name;
  return "waits in " + what + " at " + line(fiber.site);
}

// Nobody can go on: who waits for whom?
void report_deadlock() {
  Launch& run = *active;
  for (const Fiber& fiber : run.fibers) {
    if (fiber.state != State::in_warp_call) continue;
    const int warp = fiber.thread / kWarp * kWarp;
    for (int lane = 0; lane < kWarp; ++lane) {
      if (!(fiber.call.mask >> lane & 1)) continue;
      if (warp + lane >= run.threads) {
        return report("warp call with a wrong mask", line(fiber.site),
                      name_of(fiber) + " " + where(fiber) + " for lane " + std::to_string(lane) +
                          ", which the block does not have");
      }
      const Fiber& other = run.fibers[warp + lane];
      if (other.state == State::in_warp_call && other.call.mask == fiber.call.mask) continue;
      return report("warp call with a wrong mask", line(fiber.site),
                    name_of(fiber) + " " + where(fiber) + " for " + name_of(other) + ", which " +
                        where(other));
    }
  }
  const Fiber *waiting = nullptr, *elsewhere = nullptr;
  for (const Fiber& fiber : run.fibers)
    (fiber.state == State::at_barrier ? waiting : elsewhere) = &fiber;
  report("divergent barrier", line(waiting->site),
         name_of(*waiting) + " " + where(*waiting) + ", " + name_of(*elsewhere) + " " +
             where(*elsewhere));
}

// ---- memory

Cell* cells_of(uintptr_t address, int size, std::string* name, size_t* offset) {
  Launch& run = *active;
  if (address >= run.dynamic && address + size <= run.dynamic_end) {
    *name = "shared_memory", *offset = address - run.dynamic;
    return &run.cells[*offset];
  }
  size_t first = run.dynamic_end - run.dynamic;
  for (const Symbol& variable : symbols().shared) {
    const uintptr_t begin = run.tls + variable.value;
    if (address >= begin && address + size <= begin + variable.size) {
      *name = Symbols::demangled(variable.name), *offset = address - begin;
      return &run.cells[first + *offset];
    }
    first += variable.size;
  }
  return nullptr;
}

bool ordered(int before, uint32_t epoch_before, int now) {
  return before == now ||
         (before / kWarp == now / kWarp && epoch_before != active->warps[now / kWarp].epoch);
}

void access_shared(Cell* cells, int size, bool write, bool atomic, uintptr_t pc,
                   const std::string& variable, size_t offset) {
  Launch& run = *active;
  const int thread = run.current->thread;
  const uint32_t warp_epoch = run.warps[thread / kWarp].epoch;
  const auto race = [&](const std::string& other, uintptr_t other_pc, const char* did) {
    const std::string here = symbols().line(pc), there = symbols().line(other_pc);
    report("race", std::min(here, there) + std::max(here, there),
           name_of(thread) + (write ? " writes byte " : " reads byte ") + std::to_string(offset) +
               " of " + variable + " at " + here + ", " + other + did + there +
               ", and no barrier is between");
  };
  for (Cell* cell = cells; cell < cells + size; ++cell, ++offset) {
    if (cell->epoch != run.epoch) {
      cell->epoch = run.epoch;
      cell->writer = cell->reader = kNobody;
    }
    if (!cell->written_ever && (!write || atomic)) {
      report("uninitialised read", symbols().line(pc),
             name_of(thread) + " reads byte " + std::to_string(offset) + " of " + variable +
                 " at " + symbols().line(pc) + ", which nobody has written");
      cell->written_ever = true;
    }
    if (cell->writer != kNobody && !(atomic && cell->write_atomic) &&
        !ordered(cell->writer, cell->write_epoch, thread)) {
      race(name_of(static_cast<int>(cell->writer)), cell->write_pc, " wrote it at ");
      return;
    }
    if (write) {
      const bool together =
          cell->reader == kNobody ||
          (cell->reader >= 0 && ordered(cell->reader, cell->read_epoch, thread)) ||
          (cell->reader == kOneWarp && cell->reader_warp == thread / kWarp &&
           cell->read_epoch != warp_epoch);
      if (!together) {
        race(cell->reader >= 0 ? name_of(static_cast<int>(cell->reader)) : "several threads",
             cell->read_pc, " read it at ");
        return;
      }
      cell->written_ever = true;
      cell->write_atomic = atomic;
      cell->writer = static_cast<int16_t>(thread);
      cell->write_epoch = warp_epoch, cell->write_pc = pc;
      cell->reader = kNobody;
    } else if (cell->reader != kMany) {
      const bool nobody = cell->reader == kNobody;
      const int warp = cell->reader >= 0 ? cell->reader / kWarp : cell->reader_warp;
      if (nobody || cell->reader == thread) {
        cell->reader = static_cast<int16_t>(thread);
      } else {
        cell->reader = warp == thread / kWarp ? kOneWarp : kMany;
      }
      cell->reader_warp = static_cast<uint16_t>(thread / kWarp);
      cell->read_epoch = warp_epoch, cell->read_pc = pc;
    }
  }
}

void access(const void* memory, int size, bool write, const void* caller, bool aligned,
            bool atomic = false) {
  if (active == nullptr || active->current == nullptr) return;
  Launch& run = *active;
  Fiber& fiber = *run.current;
  const auto address = reinterpret_cast<uintptr_t>(memory),
             pc = reinterpret_cast<uintptr_t>(caller);
  const uintptr_t in_stacks = address - reinterpret_cast<uintptr_t>(stacks());
  if (in_stacks / kStack == static_cast<uintptr_t>(fiber.thread)) return;
  if (address >= run.call && address + size <= run.call_end) return;

  const std::string does = write ? " writes " : " reads ";
  const auto fatal = [&](const std::string& kind, const std::string& text) {
    report(kind, symbols().line(pc),
           name_of(fiber) + does + std::to_string(size) + " bytes at " + symbols().line(pc) + text);
    abort_launch();
  };
  if (aligned && address % size) {
    fatal("misaligned access", ", but the address is no multiple of that");
  }
  std::string variable;
  size_t offset;
  if (Cell* cells = cells_of(address, size, &variable, &offset)) {
    return access_shared(cells, size, write, atomic, pc, variable, offset);
  }
  const Range* nearest = nullptr;
  for (const Range& range : ranges) {
    if (address >= range.begin && address + size <= range.end) {
      if (write && !range.writable) {
        fatal("access out of bounds", " into a tensor that the op only reads");
      }
      const uint64_t request = (pc - symbols().base) << 32 | fiber.count(pc) << 1 | write;
      run.warps[fiber.thread / kWarp].accesses.push_back({request, address, size});
      return;
    }
    const auto distance = [&](const Range& r) {
      return address < r.begin ? r.begin - address : address - r.end;
    };
    if (!nearest || distance(range) < distance(*nearest)) nearest = &range;
  }
  if (in_stacks < kStack * kMostThreads) {
    fatal("access out of bounds", " in the stack of another thread");
  }
  if (address >= run.dynamic && address < run.dynamic + sizeof rayfuse::shared_memory) {
    fatal("access out of bounds", ", " + std::to_string(address - run.dynamic) +
                                      " bytes into dynamic shared memory of " +
                                      std::to_string(run.dynamic_end - run.dynamic) + " bytes");
  }
  if (!nearest) fatal("access out of bounds", ", and the op has no tensor");
  const auto from_begin = static_cast<int64_t>(address - nearest->begin);
  fatal("access out of bounds", ", " + std::to_string(from_begin) + " bytes from the begin of a " +
                                    "tensor of " + std::to_string(nearest->end - nearest->begin) +
                                    " bytes");
}

// The requests of a warp in one block, and the sectors they move.
void count(std::vector<Access>& accesses, Counters& sums) {
  std::sort(accesses.begin(), accesses.end(), [](const Access& a, const Access& b) {
    return std::tie(a.request, a.address) < std::tie(b.request, b.address);
  });
  for (size_t i = 0; i < accesses.size();) {
    const uint64_t request = accesses[i].request;
    int64_t bytes = 0, sectors = 0;
    uintptr_t bytes_end = 0, sectors_end = 0;
    for (; i < accesses.size() && accesses[i].request == request; ++i) {
      const Access& access = accesses[i];
      const uintptr_t end = access.address + access.size;
      bytes += std::max<int64_t>(0, end - std::max(bytes_end, access.address));
      bytes_end = std::max(bytes_end, end);
      const uintptr_t sector = std::max(sectors_end, access.address / 32);
      sectors += std::max<int64_t>(0, (end + 31) / 32 - sector);
      sectors_end = std::max(sectors_end, (end + 31) / 32);
      (request & 1 ? sums.stores : sums.loads) += 1;
    }
    (request & 1 ? sums.store_bytes : sums.load_bytes) += bytes;
    sums.requests += 1;
    sums.sectors += sectors;
    sums.ideal_sectors += (bytes + 31) / 32;
  }
  accesses.clear();
}

// ---- blocks

void run_block() {
  Launch& run = *active;
  std::memset(rayfuse::shared_memory, 0xff, run.dynamic_end - run.dynamic);
  for (const Symbol& variable : symbols().shared) {
    std::memset(reinterpret_cast<void*>(run.tls + variable.value), 0xff, variable.size);
  }
  std::fill(run.cells.begin(), run.cells.end(), Cell{});
  run.epoch = 1;
  run.arrived = run.holding = run.finished = 0;
  run.ready.clear();
  for (int i = 0; i < run.threads; ++i) {
    Fiber& fiber = run.fibers[i];
    fiber.times.clear();
    // the tops differ, so that they do not all fall on the same lines of the cache
    auto* top = reinterpret_cast<uintptr_t*>(stacks() + (i + 1) * kStack - 64 - i % 16 * 320);
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stacks() + i * kStack, kStack);
#endif
    *--top = 0;  // where a call would have put the return address
    *--top = reinterpret_cast<uintptr_t>(&fiber_main);
    for (int j = 0; j < 6; ++j) *--top = 0;
    fiber.stack_pointer = top;
    wake(fiber);
  }
  yield();
  while (!run.aborted && run.finished < run.threads) {
    report_deadlock();
    run.aborted = true;
  }
  if (run.aborted) return;
  for (Warp& warp : run.warps) count(warp.accesses, run.counters);
}

}  // namespace

// ---- what the shim calls

int block_barrier(const char* name, bool predicate, const Site& site) {
  Launch& run = *active;
  Fiber& here = *run.current;
  here.site = site;
  here.call.name = name;
  run.holding += predicate;
  if (++run.arrived < run.threads) {
    wait(State::at_barrier);
    return static_cast<int>(here.result);
  }
  for (Fiber& fiber : run.fibers) {
    const bool same = fiber.site.line() == site.line() && fiber.site.column() == site.column() &&
                      !std::strcmp(fiber.site.file_name(), site.file_name());
    if (!same) {
      report("divergent barrier", line(site),
             name_of(here) + " waits in a block barrier at " + line(site) + ", " + name_of(fiber) +
                 " in another one at " + line(fiber.site));
    }
    fiber.result = run.holding;
    if (&fiber != &here) wake(fiber);
  }
  run.arrived = run.holding = 0;
  ++run.epoch;
  ++run.counters.barriers;
  return static_cast<int>(here.result);
}

uint64_t warp_call(const WarpCall& call, const Site& site) {
  Launch& run = *active;
  Fiber& here = *run.current;
  const int lane = here.thread % kWarp, first = here.thread - lane;
  here.call = call;
  here.site = site;
  const auto wrong = [&](const std::string& text) {
    report("warp call with a wrong mask", line(site),
           name_of(here) + " calls " + call.name + " at " + line(site) + text);
    abort_launch();
  };
  if (!(call.mask >> lane & 1)) wrong(", but its mask leaves this lane out");
  if (!call.combine && !(call.mask >> call.source & 1)) {
    wrong(" and reads lane " + std::to_string(call.source) + ", which its mask leaves out");
  }
  here.state = State::in_warp_call;
  uint64_t values[kWarp] = {};
  for (unsigned lanes = call.mask; lanes; lanes &= lanes - 1) {
    const int i = __builtin_ctz(lanes);
    const Fiber* other = first + i < run.threads ? &run.fibers[first + i] : nullptr;
    if (!other || other->state != State::in_warp_call || other->call.mask != call.mask) {
      yield();
      return here.result;
    }
    values[i] = other->call.value;
  }
  const uint64_t folded = call.combine ? call.combine(values, call.mask) : 0;
  for (unsigned lanes = call.mask; lanes; lanes &= lanes - 1) {
    Fiber& other = run.fibers[first + __builtin_ctz(lanes)];
    if (other.site.line() != site.line() || std::strcmp(other.call.name, call.name)) {
      report("divergent warp call", line(site),
             name_of(here) + " calls " + call.name + " at " + line(site) + ", " + name_of(other) +
                 " " + other.call.name + " at " + line(other.site));
    }
    other.result = call.combine ? folded : values[other.call.source];
    if (&other != &here) wake(other);
  }
  here.state = State::ready;
  ++run.counters.warp_calls;
  return here.result;
}

void warp_barrier(unsigned mask, const Site& site) {
  const auto next_epoch = [](const uint64_t*, unsigned) -> uint64_t {
    return ++active->warps[active->current->thread / kWarp].epoch;
  };
  warp_call({"__syncwarp", mask, 0, 0, next_epoch}, site);
}

unsigned active_lanes() { return 1u << active->current->thread % kWarp; }

void atomic_access(const void* address, int size, const void* caller) {
  access(address, size, true, caller, true, true);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                   void* call, size_t size) {
  const std::lock_guard lock(launching);
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z;
  const int64_t threads = int64_t{block.x} * block.y * block.z;
  if (blocks == 0 || threads == 0 || threads > kMostThreads ||
      config.dynamicSmemBytes > kMostDynamic) {
    last_error = "simt: a launch needs blocks, 1 to 1024 threads, and at most 48 KiB of memory";
    return cudaErrorInvalidValue;
  }
  Launch run;
  run.kernel = kernel;
  run.name = symbols().kernel(kernel);
  run.body = body;
  run.call = reinterpret_cast<uintptr_t>(call), run.call_end = run.call + size;
  run.threads = static_cast<int>(threads);
  run.dynamic = reinterpret_cast<uintptr_t>(rayfuse::shared_memory);
  run.dynamic_end = run.dynamic + config.dynamicSmemBytes;
  run.tls = run.dynamic - symbols().dynamic_shared;
  run.random.state = seed_ * 0x2545f4914f6cdd1d + launches++;
  run.fibers.resize(threads);
  run.warps.resize((threads + kWarp - 1) / kWarp);
  for (int i = 0; i < run.threads; ++i) {
    run.fibers[i].thread = i;
    run.fibers[i].index = {i % block.x, i / block.x % block.y, i / block.x / block.y};
  }
  size_t shared_bytes = config.dynamicSmemBytes;
  for (const Symbol& variable : symbols().shared) shared_bytes += variable.size;
  run.cells.resize(shared_bytes);
  blockDim = block, gridDim = grid;

  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[run.random.below(i)]);
  active = &run;
  for (const int64_t b : order) {
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    run_block();
    if (run.aborted) break;
  }
  active = nullptr;
  run.counters.launches = 1;
  run.counters.blocks = blocks;
  run.counters.threads = blocks * threads;
  run.counters.dynamic_bytes = blocks * static_cast<int64_t>(config.dynamicSmemBytes);
  Counters& sums = counters_[run.name];
  const auto add = [&](auto... member) { ((sums.*member += run.counters.*member), ...); };
  add(&Counters::launches, &Counters::blocks, &Counters::threads, &Counters::barriers,
      &Counters::warp_calls, &Counters::dynamic_bytes, &Counters::loads, &Counters::stores,
      &Counters::load_bytes, &Counters::store_bytes, &Counters::requests, &Counters::sectors,
      &Counters::ideal_sectors);
  if (run.reports.empty()) return cudaSuccess;
  last_error = "simt: " + run.reports[0].text;
  reports_.insert(reports_.end(), run.reports.begin(), run.reports.end());
  return cudaErrorLaunchFailure;
}

void allow(const void* memory, size_t bytes, bool writable) {
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  if (bytes) ranges.push_back({begin, begin + bytes, writable});
}
void forbid_all() { ranges.clear(); }
void seed(uint64_t seed) { seed_ = seed, launches = 0; }
std::map<std::string, Counters>& counters() { return counters_; }
std::vector<Report> take_reports() { return std::exchange(reports_, {}); }

}  // namespace simt

const char* cudaGetErrorString(cudaError_t) { return simt::last_error.c_str(); }

// ---- what the compiler calls before each access (-fsanitize=thread, -fsanitize=bounds)

#define SIMT_CALLER __builtin_return_address(0)
#define SIMT_HOOKS(size)                                                                          \
  void __tsan_read##size(void* p) { simt::access(p, size, false, SIMT_CALLER, true); }            \
  void __tsan_write##size(void* p) { simt::access(p, size, true, SIMT_CALLER, true); }            \
  void __tsan_unaligned_read##size(void* p) { simt::access(p, size, false, SIMT_CALLER, false); } \
  void __tsan_unaligned_write##size(void* p) { simt::access(p, size, true, SIMT_CALLER, false); }
// host code around the kernels: no fiber runs, nothing to watch
#define SIMT_HOST_ATOMICS(bits)                                                                \
  uint##bits##_t __tsan_atomic##bits##_load(const volatile uint##bits##_t* p, int) {           \
    return __atomic_load_n(p, __ATOMIC_SEQ_CST);                                               \
  }                                                                                            \
  void __tsan_atomic##bits##_store(volatile uint##bits##_t* p, uint##bits##_t x, int) {        \
    __atomic_store_n(p, x, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                            \
  uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile uint##bits##_t* p, uint##bits##_t x, \
                                                 int) {                                        \
    return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST);                                         \
  }
#if !defined(__SANITIZE_ADDRESS__)
extern "C" {
#pragma GCC visibility push(hidden)
SIMT_HOOKS(1)
SIMT_HOOKS(2)
SIMT_HOOKS(4)
SIMT_HOOKS(8)
SIMT_HOOKS(16)
SIMT_HOST_ATOMICS(8)
SIMT_HOST_ATOMICS(32)
SIMT_HOST_ATOMICS(64)
void __tsan_read_range(void* p, size_t n) { simt::access(p, n, false, SIMT_CALLER, false); }
void __tsan_write_range(void* p, size_t n) { simt::access(p, n, true, SIMT_CALLER, false); }
void __tsan_vptr_update(void**, void*) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit(void*) {}
void __tsan_init() {}

void __ubsan_handle_out_of_bounds(void* data, uintptr_t index) {
  if (simt::active == nullptr || simt::active->current == nullptr) return;
  // the compiler's record begins with the place
  struct Place {
    const char* file;
    uint32_t line, column;
  };
  const Place& place = *static_cast<Place*>(data);
  const std::string file = place.file;
  const std::string line = file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line);
  simt::report("access out of bounds", line,
               simt::name_of(*simt::active->current) + " takes element " +
                   std::to_string(static_cast<int64_t>(index)) + " of a smaller array at " + line);
  simt::abort_launch();
}
#pragma GCC visibility pop
}
#endif
