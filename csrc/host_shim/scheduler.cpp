#include "scheduler.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <memory>

#include "fiber.h"

#if defined(__x86_64__)
asm(R"(
.text
.globl dk_shim_switch
.hidden dk_shim_switch
.type dk_shim_switch, @function
dk_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size dk_shim_switch, .-dk_shim_switch
)");
#endif

namespace dk_shim {

Thread *current;
uint3 block_index;
dim3 block_size, grid_size;

namespace {

constexpr int GUARD = 256;  // bytes on either side of shared memory
constexpr unsigned char CANARY = 0xA5, UNWRITTEN = 0xFF;  // every float of these bytes is NaN
constexpr int MOST_THREADS = 1024;

struct Warp {
  void *slots[WARP];
  void (*action)(void **);
  int arrived;
};

Fiber host;
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Thread> threads;
std::vector<int> ready, at_barrier;  // ready: who can run, in the order in which they will, last first
Warp warps[MOST_THREADS / WARP];
int finished;
bool failed;
char message[512];
std::vector<unsigned char> memory;
unsigned char *shared;
const std::function<void()> *kernel;
uint64_t state = 1;

unsigned random_below(unsigned n) {  // splitmix64
  uint64_t z = (state += 0x9E3779B97F4A7C15u);
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return static_cast<unsigned>(((z ^ (z >> 31)) >> 32) * n >> 32);
}

void make_ready(const int *who, int count) {
  size_t first = ready.size();
  ready.insert(ready.end(), who, who + count);
  for (int i = count - 1; i > 0; --i) std::swap(ready[first + i], ready[first + random_below(i + 1)]);
  if (first) std::swap(ready.back(), ready[random_below(ready.size())]);
}

void run_next() {  // leaves the current thread, which waits or has finished
  Fiber &self = *fibers[current->linear];
  if (ready.empty()) return self.switch_to(host);
  int next = ready.back();
  ready.pop_back();
  if (next == current->linear) return;
  current = &threads[next];
  self.switch_to(*fibers[next]);
}

void thread_main() {
  Fiber::arrived(fibers[current->linear].get(), &host);
  (*kernel)();
  if (!current->open.empty()) fail("a thread ended with copies that it never committed");
  ++finished;
  run_next();
  __builtin_unreachable();
}

void make_threads(int count) {
  threads.resize(count);
  while (static_cast<int>(fibers.size()) < count) fibers.emplace_back(new Fiber);
}

void run_block(int count) {
  finished = 0;
  at_barrier.clear();
  ready.clear();
  std::vector<int> all(count);
  for (int i = 0; i < count; ++i) {
    threads[i].index = {static_cast<unsigned>(i), 0, 0};
    threads[i].linear = i;
    threads[i].committed.clear();
    threads[i].open.clear();
    fibers[i]->start(thread_main);
    all[i] = i;
  }
  for (int w = 0; w < count / WARP; ++w) warps[w].arrived = 0;
  make_ready(all.data(), count);
  int first = ready.back();
  ready.pop_back();
  current = &threads[first];
  host.switch_to(*fibers[first]);
  if (!failed && finished != count)
    std::snprintf(message, sizeof message, "block (%u, %u, %u): %d threads wait at __syncthreads, %d have ended, and "
                  "the rest wait for their warp", block_index.x, block_index.y, block_index.z,
                  static_cast<int>(at_barrier.size()), finished), failed = true;
}

void check_guards() {
#if !defined(__SANITIZE_ADDRESS__)
  for (int i = 0; i < GUARD && !failed; ++i)
    if (memory[i] != CANARY || memory[memory.size() - 1 - i] != CANARY)
      std::snprintf(message, sizeof message, "block (%u, %u, %u) wrote outside its shared memory", block_index.x,
                    block_index.y, block_index.z), failed = true;
#endif
}

}  // namespace

void fail(const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  failed = true;
  fibers[current->linear]->switch_to(host);
  __builtin_unreachable();
}

void sync_threads() {
  at_barrier.push_back(current->linear);
  if (at_barrier.size() == threads.size()) {
    make_ready(at_barrier.data(), static_cast<int>(at_barrier.size()));
    at_barrier.clear();
  }
  run_next();
}

void meet(void *slot, void (*action)(void **)) {
  int first = current->linear / WARP * WARP;
  Warp &warp = warps[first / WARP];
  if (warp.arrived && warp.action != action) fail("the lanes of a warp meet at different operations");
  warp.action = action;
  warp.slots[current->linear - first] = slot;
  if (++warp.arrived == WARP) {
    warp.arrived = 0;
    action(warp.slots);
    int lanes[WARP];
    for (int i = 0; i < WARP; ++i) lanes[i] = first + i;
    make_ready(lanes, WARP);
  }
  run_next();
}

unsigned char *shared_memory() { return shared; }

const char *last_error() { return message; }

int run(dim3 grid, int count, size_t shared_bytes, const std::function<void()> &body) {
  failed = false;
  kernel = &body;
  grid_size = grid;
  block_size = dim3(count);
  make_threads(count);
  memory.assign(shared_bytes + 2 * GUARD + 128, CANARY);
  unsigned char *base = memory.data() + GUARD;
  shared = base + (128 - reinterpret_cast<uintptr_t>(base) % 128) % 128;
  memory.resize(shared - memory.data() + shared_bytes + GUARD);
  if (count % WARP || count > MOST_THREADS || shared_bytes > (48 << 10)) {
    std::snprintf(message, sizeof message, "a launch of %d threads with %zu bytes of shared memory", count, shared_bytes);
    return LAUNCH_FAILED;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory.data(), shared - memory.data());
  __asan_poison_memory_region(shared + shared_bytes, GUARD);
#endif
  for (block_index.z = 0; block_index.z < grid.z; ++block_index.z)
    for (block_index.y = 0; block_index.y < grid.y; ++block_index.y)
      for (block_index.x = 0; block_index.x < grid.x && !failed; ++block_index.x) {
        std::memset(shared, UNWRITTEN, shared_bytes);
        run_block(count);
        check_guards();
      }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory.data(), memory.size());
#endif
  if (failed) std::fprintf(stderr, "host shim: %s\n", message);
  return failed ? LAUNCH_FAILED : 0;
}

}  // namespace dk_shim

extern "C" __attribute__((visibility("default"))) void dk_shim_seed(uint64_t seed) { dk_shim::state = seed; }
