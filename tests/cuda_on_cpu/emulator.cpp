// Runs the threads of a grid as fibers on the calling thread, in an order drawn at random wherever CUDA leaves it open, and
// refuses what a GPU would let pass: barriers that do not match, shuffles whose lanes are not there, grids beyond the limits.
// What it refuses comes back as the launch's error, with the places in the source. docs/emulator.md says what it shows and what not.
//
//   EMULATOR_SEED=n      draws other orders (default 0; "in order": threads and blocks by their numbers)
//   EMULATOR_GRID=x,y    cuts grids down to x and y blocks where the kernel goes on by gridDim, so that small inputs turn twice
//   EMULATOR_RESIDENT=n  blocks that run at a time (default 2)
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <vector>

#include "fiber.h"
#include "kernels.h"

#if defined(EMULATOR_THREAD)
extern "C" void __tsan_acquire(void*);
extern "C" void __tsan_release(void*);
#else
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
#endif

namespace emulator {
namespace {

constexpr size_t kMostShared = 48 << 10, kRedZone = 64;
constexpr unsigned kWarp = 32, kMostThreads = 1024, kMostVariables = 32, kMostMeetings = 8;

struct Block;

struct Thread {
  Fiber fiber;
  Block* block = nullptr;
  unsigned id = 0;
  unsigned priority = 0;
  uint64_t shuffled = 0;  // what the last shuffle brought
  bool exited = false;
  const char* file = nullptr;  // where it waits
  int line = 0;
};

// The lanes of a warp that have come to a shuffle with the same mask.
struct Meeting {
  unsigned mask = 0, arrived = 0;
  uint64_t value[kWarp];
  int source[kWarp];
  const char* file = nullptr;
  int line = 0;
};

// Of a kernel's shared variables the one that `key` names, in one block.
struct Shared {
  const void* key;
  char* address;
};

struct Warp {
  unsigned count = 0;
  Meeting meetings[kMostMeetings];
};

// While threads run, nothing here allocates: a sanitizer would take that for the kernel's own doing.
struct Block {
  uint3 index;
  std::deque<Thread> threads;
  std::vector<Warp> warps;
  unsigned waiting = 0, exited = 0, phase = 0;
  const char* file = nullptr;  // of the barrier that threads wait at
  int line = 0;
  char sync[2];  // what the barriers of even and of odd phases order memory by, for the thread sanitizer
  std::unique_ptr<char[]> shared;
  size_t used = 0, with_zones = 0;
  unsigned variables = 0;
  Shared variable[kMostVariables];
};

struct Grid {
  std::string kernel;
  dim3 blocks, block;
  void (*call)(const void*);
  const void* context;
  std::vector<Thread*> runnable;
  bool by_priority = false;
  std::string error;
  char begin = 0, end = 0;  // what launches order memory by

  bool later(const Thread* a, const Thread* b) const { return a->priority < b->priority; }

  void make_runnable(Thread* thread) {
    runnable.push_back(thread);
    if (by_priority) {
      std::push_heap(runnable.begin(), runnable.end(), [this](Thread* a, Thread* b) { return later(a, b); });
    }
  }
};

std::mutex one_at_a_time;
Grid* grid = nullptr;
Thread* now = nullptr;
Fiber scheduler;
uint64_t launches = 0;  // since the last restart, to draw another order for each
thread_local std::string last_error;
thread_local cudaError_t last_code = cudaSuccess;

struct Count {
  std::string name;
  uint64_t launches = 0, most_blocks = 0, most_threads = 0;
};

// The library's kernels with what has been launched of them.
std::map<const void*, Count>& counts() {
  static std::map<const void*, Count> counts = [] {
    std::map<const void*, Count> found;
    for (const auto& [address, name] : kernels_of_library(reinterpret_cast<const void*>(&counts)))
      found[address].name = name;
    return found;
  }();
  return counts;
}

std::string text(const char* format, ...) {
  char buffer[1000];
  va_list list;
  va_start(list, format);
  vsnprintf(buffer, sizeof buffer, format, list);
  va_end(list);
  return buffer;
}

std::string name_of(const Thread& thread) {
  const uint3 b = thread.block->index;
  return text("block (%u, %u, %u), thread %u of ", b.x, b.y, b.z, thread.id) + grid->kernel;
}

// Ends the launch with an error. The other threads are left where they are.
void fail(const std::string& what) {
  if (grid->error.empty()) grid->error = what + ", in " + name_of(*now);
  now->fiber.switch_to(scheduler, true);
}

void entry() {
  Fiber::arrived();
  __tsan_acquire(&grid->begin);
  grid->call(grid->context);
  Thread& thread = *now;
  Block& block = *thread.block;
  thread.exited = true;
  ++block.exited;
  if (block.waiting) fail(text("a thread ends while others wait at %s:%d", block.file, block.line));
  __tsan_release(&grid->end);
  thread.fiber.switch_to(scheduler, true);
}

#if defined(EMULATOR_ADDRESS) || defined(EMULATOR_THREAD)
constexpr bool kReuse = false;
#else
constexpr bool kReuse = true;
#endif

// Blocks that have run, whose memory the next ones take over; under a sanitizer each has memory of its own until the end.
std::vector<std::unique_ptr<Block>> used_blocks;

std::unique_ptr<Block> new_block(uint64_t number, unsigned threads) {
  std::unique_ptr<Block> block;
  if (kReuse && !used_blocks.empty()) {
    block = std::move(used_blocks.back());
    used_blocks.pop_back();
  } else {
    block = std::make_unique<Block>();
    block->shared.reset(new char[2 * kMostShared]);
  }
#if defined(EMULATOR_ADDRESS)
  __asan_poison_memory_region(block->shared.get(), 2 * kMostShared);
#endif
  const dim3 blocks = grid->blocks;
  block->index = {unsigned(number % blocks.x), unsigned(number / blocks.x % blocks.y),
                  unsigned(number / blocks.x / blocks.y)};
  block->waiting = block->exited = 0;
  block->used = block->with_zones = 0;
  block->variables = 0;
  block->warps.resize((threads + kWarp - 1) / kWarp);
  for (Warp& warp : block->warps) warp.count = 0;
  while (block->threads.size() > threads) block->threads.pop_back();
  while (block->threads.size() < threads) block->threads.emplace_back();
  unsigned id = 0;
  for (Thread& thread : block->threads) {
    thread.block = block.get();
    thread.id = id++;
    thread.exited = false;
    thread.fiber.start(entry);
  }
  return block;
}

void end(std::unique_ptr<Block> block) {
  for (Thread& thread : block->threads) thread.fiber.end();
  used_blocks.push_back(std::move(block));
}

const char* environment(const char* name, const char* otherwise) {
  const char* value = std::getenv(name);
  return value ? value : otherwise;
}

// Blocks come in an order of their own that nobody has to keep: a walk by a step without a divisor in common with their number.
uint64_t common_divisor(uint64_t a, uint64_t b) { return b ? common_divisor(b, a % b) : a; }

// How the next thread is chosen among those that can run.
enum Policy {
  kAnyThread,  // each is as likely as any other
  kAnyThreadToo,  // the same: so half of the launches are without priorities
  kWarpPriorities,  // a warp that can run starves those of lower priority: what is read late shows
  kThreadPriorities  // so does a thread
};

void run_grid(uint64_t blocks, unsigned threads) {
  const std::string seed = environment("EMULATOR_SEED", "0");
  const bool in_order = seed == "in order";
  const size_t resident = std::strtoul(environment("EMULATOR_RESIDENT", "2"), nullptr, 10);
  std::minstd_rand random(in_order ? 1 : std::strtoul(seed.c_str(), nullptr, 10) * 7919 + ++launches);
  random.discard(8);
  uint64_t step = 1, at = 0;
  if (!in_order && blocks > 1) {
    at = random() % blocks;
    do step = 1 + random() % blocks;
    while (common_divisor(step, blocks) != 1);
  }
  const unsigned policy = in_order ? unsigned(kAnyThread) : random() % 4;
  grid->by_priority = policy >= kWarpPriorities;
  std::vector<std::unique_ptr<Block>> running;
  std::vector<Thread*>& runnable = grid->runnable;
  runnable.reserve(resident * threads);
  std::vector<unsigned> warp_priority(kMostThreads / kWarp);
  uint64_t started = 0;
  while (grid->error.empty()) {
    for (; started < blocks && running.size() < resident; ++started, at = (at + step) % blocks) {
      running.push_back(new_block(at, threads));
      for (unsigned& priority : warp_priority) priority = random();
      for (Thread& thread : running.back()->threads) {
        thread.priority = policy == kWarpPriorities ? warp_priority[thread.id / kWarp] : random();
        grid->make_runnable(&thread);
      }
    }
    if (running.empty()) break;
    if (runnable.empty()) {
      const auto& waiting = running.front()->threads;
      now = const_cast<Thread*>(&*std::find_if(waiting.begin(), waiting.end(), [](const Thread& t) { return !t.exited; }));
      grid->error =
          text("deadlock: a thread waits at %s:%d for others that never come, in ", now->file, now->line) + name_of(*now);
      break;
    }
    if (grid->by_priority) {
      std::pop_heap(runnable.begin(), runnable.end(), [](Thread* a, Thread* b) { return grid->later(a, b); });
      now = runnable.back();
      runnable.pop_back();
    } else if (in_order) {
      now = runnable.front();
      runnable.erase(runnable.begin());
    } else {
      std::swap(runnable[random() % runnable.size()], runnable.back());
      now = runnable.back();
      runnable.pop_back();
    }
    scheduler.switch_to(now->fiber);
    if (!now->exited || now->block->exited != threads) continue;
    const auto done =
        std::find_if(running.begin(), running.end(), [](const auto& block) { return block.get() == now->block; });
    end(std::move(*done));
    running.erase(done);
  }
  for (auto& block : running) end(std::move(block));
}

int64_t most_blocks(int which) {
  int64_t most[] = {0x7fffffff, 65535};
  if (const char* asked = std::getenv("EMULATOR_GRID")) {
    int64_t x = 0, y = 0;
    if (std::sscanf(asked, "%ld,%ld", &x, &y) == 2 && x > 0 && y > 0) {
      most[0] = std::min(most[0], x);
      most[1] = std::min(most[1], y);
    }
  }
  return most[which];
}

cudaError_t refuse(cudaError_t code, const std::string& why) {
  last_code = code;
  last_error = why;
  return code;
}

void wait_at(const char* file, int line) {
  now->file = file;
  now->line = line;
  now->fiber.switch_to(scheduler);
}

bool elsewhere(const char* file, int line, const char* other, int other_line) {
  return line != other_line || std::strcmp(file, other) != 0;
}

}  // namespace

uint3 thread_index() {
  const dim3 size = grid->block;
  return {now->id % size.x, now->id / size.x % size.y, now->id / size.x / size.y};
}
uint3 block_index() { return now->block->index; }
uint3 block_size() { return {grid->block.x, grid->block.y, grid->block.z}; }
uint3 grid_size() { return {grid->blocks.x, grid->blocks.y, grid->blocks.z}; }
int lane() { return static_cast<int>(now->id % kWarp); }

void barrier(const char* file, int line) {
  Block& block = *now->block;
  if (block.exited) fail(text("a barrier at %s:%d after a thread has ended", file, line));
  if (block.waiting && elsewhere(file, line, block.file, block.line)) {
    fail(text("threads wait at different barriers, %s:%d and %s:%d", block.file, block.line, file, line));
  }
  block.file = file;
  block.line = line;
  char* sync = &block.sync[block.phase % 2];
  __tsan_release(sync);
  if (++block.waiting == block.threads.size()) {
    block.waiting = 0;
    ++block.phase;
    for (Thread& thread : block.threads) grid->make_runnable(&thread);
  }
  wait_at(file, line);
  __tsan_acquire(sync);
}

// Orders no memory, as CUDA's own does not promise to. A lane that is not there gives a NaN.
uint64_t shuffle(unsigned mask, uint64_t bits, int source, const char* file, int line) {
  Thread& thread = *now;
  Block& block = *thread.block;
  const unsigned lane = thread.id % kWarp, warp = thread.id / kWarp;
  const unsigned there = std::min(kWarp, static_cast<unsigned>(block.threads.size()) - warp * kWarp);
  if (!(mask >> lane & 1)) fail(text("a shuffle at %s:%d whose mask %08x lacks the lane that calls it", file, line, mask));
  if (there < kWarp) mask &= (1u << there) - 1;
  Warp& of_warp = block.warps[warp];
  unsigned which = 0;
  while (which < of_warp.count && of_warp.meetings[which].mask != mask) ++which;
  if (which == kMostMeetings) fail(text("a warp's %u-th mask of shuffles, at %s:%d", kMostMeetings + 1, file, line));
  Meeting& meeting = of_warp.meetings[which];
  if (which == of_warp.count) {
    ++of_warp.count;
    meeting.mask = mask;
    meeting.arrived = 0;
  }
  if (meeting.arrived && elsewhere(file, line, meeting.file, meeting.line)) {
    fail(text("lanes of a warp meet in different shuffles, %s:%d and %s:%d", meeting.file, meeting.line, file, line));
  }
  meeting.file = file;
  meeting.line = line;
  meeting.value[lane] = bits;
  meeting.source[lane] = source;
  meeting.arrived |= 1u << lane;
  if (meeting.arrived == mask) {
    for (unsigned i = 0; i < there; ++i) {
      if (!(mask >> i & 1)) continue;
      const int from = meeting.source[i];
      Thread& other = block.threads[warp * kWarp + i];
      other.shuffled = from >= 0 && from < int(kWarp) && mask >> from & 1 ? meeting.value[from] : ~uint64_t(0);
      grid->make_runnable(&other);
    }
    meeting.arrived = 0;
  }
  wait_at(file, line);
  return thread.shuffled;
}

void* shared(const void* key, size_t bytes, size_t alignment) {
  Block& block = *now->block;
  for (unsigned i = 0; i < block.variables; ++i) {
    if (block.variable[i].key == key) return block.variable[i].address;
  }
  block.used += bytes;
  const size_t begin = (block.with_zones + kRedZone + alignment - 1) / alignment * alignment;
  if (block.used > kMostShared) {
    fail(text("%zu bytes of shared memory, more than the %zu that a kernel may have", block.used, kMostShared));
  }
  block.with_zones = begin + bytes;
  char* address = block.shared.get() + begin;
  if (block.variables == kMostVariables) fail(text("more than %u shared variables", kMostVariables));
  block.variable[block.variables++] = {key, address};
#if defined(EMULATOR_ADDRESS)
  __asan_unpoison_memory_region(address, bytes);
#endif
  // NaNs, since shared memory begins as anything, and some beyond it. By a loop: a sanitizer would take memset for the kernel's.
  for (size_t i = 0; i < bytes + kRedZone; ++i) static_cast<volatile char*>(address)[i] = static_cast<char>(0xff);
  return address;
}

cudaError_t launch(const void* kernel, const cudaLaunchConfig_t& config, void (*call)(const void*), const void* context) {
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  Count& count = counts()[kernel];
  const dim3 blocks = config.gridDim, block = config.blockDim;
  const uint64_t all_blocks = uint64_t(blocks.x) * blocks.y * blocks.z, threads = uint64_t(block.x) * block.y * block.z;
  if (all_blocks == 0 || threads == 0 || threads > kMostThreads || block.z > 64 || blocks.x > 0x7fffffffu ||
      blocks.y > 65535 || blocks.z > 65535 || config.dynamicSmemBytes > kMostShared) {
    return refuse(cudaErrorInvalidConfiguration,
                  text("invalid configuration argument: %u x %u x %u blocks of %u x %u x %u threads of ", blocks.x, blocks.y,
                       blocks.z, block.x, block.y, block.z) +
                      count.name);
  }
  ++count.launches;
  count.most_blocks = std::max(count.most_blocks, all_blocks);
  count.most_threads = std::max(count.most_threads, all_blocks * threads);
  Grid this_grid{count.name, blocks, block, call, context, {}, false, {}};
  grid = &this_grid;
  scheduler.adopt();
  __tsan_release(&this_grid.begin);
  run_grid(all_blocks, static_cast<unsigned>(threads));
  __tsan_acquire(&this_grid.end);
  if (!kReuse) used_blocks.clear();
  grid = nullptr;
  return this_grid.error.empty() ? cudaSuccess : refuse(cudaErrorLaunchFailure, this_grid.error);
}

}  // namespace emulator

namespace grid_limits {
int64_t most_blocks_x() { return emulator::most_blocks(0); }
int64_t most_blocks_y() { return emulator::most_blocks(1); }
}  // namespace grid_limits

cudaError_t cudaGetLastError() {
  const cudaError_t code = emulator::last_code;
  emulator::last_code = cudaSuccess;
  return code;
}
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : emulator::last_error.c_str();
}

// ---- for the tests: what ran ----

#define EMULATOR_EXPORT extern "C" __attribute__((visibility("default")))

// Draws the same orders again as after the library was loaded.
EMULATOR_EXPORT void emulator_restart() { emulator::launches = 0; }

// Returns a line per kernel of the library: its name, its launches, the most blocks and the most threads of one, between tabs.
EMULATOR_EXPORT const char* emulator_counts() {
  static std::string lines;
  lines.clear();
  for (const auto& [address, count] : emulator::counts()) {
    lines += count.name + emulator::text("\t%lu\t%lu\t%lu\n", count.launches, count.most_blocks, count.most_threads);
  }
  return lines.c_str();
}
