// Workers wait for the next job by spinning briefly, because the next product usually follows within microseconds, and
// then sleep, because a process that waits for its user must not use a processor.
//
// A job is open from `open = true` until its caller has taken the last piece. A worker that sees an open job counts itself
// in, looks again, and takes pieces; the caller waits for those who counted themselves in only. A worker that the system
// has not scheduled meanwhile is therefore not waited for, so more threads than processors cost little.
#include "kernels/threads.h"

#include <pthread.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace quern {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::microseconds SPIN{30};
constexpr int POLLS = 64;  // pauses between two looks at the clock

void pause() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spin until `done()` or the time is up.
template <typename Done>
bool spin(Done done) {
  const auto end = Clock::now() + SPIN;
  do {
    for (int i = 0; i < POLLS; ++i) {
      if (done()) return true;
      pause();
    }
  } while (Clock::now() < end);
  return done();
}

int usable_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof set, &set) == 0 && CPU_COUNT(&set) > 0) return CPU_COUNT(&set);
  const unsigned count = std::thread::hardware_concurrency();
  return count > 0 ? static_cast<int>(count) : 1;
}

// A child process has none of its parent's threads, and finds their locks as they happened to be.
std::atomic<int> forks{0};

void count_forks() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1); });
  (void)registered;
}

}  // namespace

struct ThreadPool::State {
  int threads = 1;
  int born = 0;  // value of `forks` when the workers were started
  bool may_spin = true;

  Task task = nullptr;
  void* context = nullptr;
  int64_t pieces = 0;
  std::exception_ptr failure;  // of the job; the mutex guards it

  alignas(64) std::atomic<int64_t> next{0};
  alignas(64) std::atomic<int> inside{0};
  alignas(64) std::atomic<bool> open{false};
  std::atomic<uint32_t> epoch{0};
  std::atomic<int> sleepers{0};
  std::atomic<bool> stop{false};
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> workers;

  void take_pieces() {
    try {
      for (int64_t piece; (piece = next.fetch_add(1, std::memory_order_relaxed)) < pieces;) task(context, piece);
    } catch (...) {  // in a worker it would end the process, in the caller it would take the job from under the workers
      std::lock_guard<std::mutex> lock(mutex);
      if (!failure) failure = std::current_exception();
      next.store(pieces);
    }
  }

  void join_job() {
    inside.fetch_add(1);
    if (open.load()) take_pieces();
    inside.fetch_sub(1);
  }

  void wait_for(uint32_t seen) {
    const auto changed = [&] { return epoch.load() != seen || stop.load(); };
    if (may_spin && spin(changed)) return;
    std::unique_lock<std::mutex> lock(mutex);
    sleepers.fetch_add(1);
    wake.wait(lock, changed);
    sleepers.fetch_sub(1);
  }

  void work() {
    for (uint32_t seen = 0;;) {
      wait_for(seen);
      if (stop.load()) return;
      seen = epoch.load();
      join_job();
    }
  }

  void announce() {
    epoch.fetch_add(1);
    if (sleepers.load() == 0) return;
    { std::lock_guard<std::mutex> lock(mutex); }
    wake.notify_all();
  }

  void start() {
    born = forks.load();
    may_spin = threads <= usable_processors();
    try {
      for (int i = 1; i < threads; ++i) workers.emplace_back([this] { work(); });
    } catch (const std::system_error&) {  // the system grants no more threads: do with fewer
    }
  }
};

ThreadPool::ThreadPool(int threads) : state_(new State) {
  count_forks();
  state_->threads = threads > 0 ? threads : usable_processors();
  state_->start();
}

ThreadPool::~ThreadPool() {
  if (state_->born != forks.load()) return;  // the workers belong to the parent process; nothing of theirs may be touched
  {
    std::lock_guard<std::mutex> lock(state_->mutex);
    state_->stop.store(true);
  }
  state_->wake.notify_all();
  for (std::thread& worker : state_->workers) worker.join();
  delete state_;
}

int ThreadPool::threads() const { return state_->threads; }

void ThreadPool::run(int64_t pieces, Task task, void* context) {
  if (state_->born != forks.load()) {
    const int threads = state_->threads;
    state_ = new State;  // the old one is lost on purpose
    state_->threads = threads;
    state_->start();
  }
  State& s = *state_;
  if (pieces <= 1 || s.workers.empty()) {
    for (int64_t piece = 0; piece < pieces; ++piece) task(context, piece);
    return;
  }
  s.task = task;
  s.context = context;
  s.pieces = pieces;
  s.next.store(0);
  s.open.store(true);
  s.announce();
  s.take_pieces();
  s.open.store(false);
  const auto done = [&] { return s.inside.load() == 0; };
  if (!s.may_spin || !spin(done))
    while (!done()) std::this_thread::yield();
  if (s.failure) std::rethrow_exception(std::exchange(s.failure, nullptr));
}

}  // namespace quern
