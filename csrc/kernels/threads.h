// A pool of threads for short, equal pieces of work. Results never depend on how many threads there are: a piece is
// computed by one thread, in an order that is fixed by the problem.
#pragma once

#include <cstdint>
#include <type_traits>

namespace quern {

class ThreadPool {
 public:
  // `threads` in all, the caller's included; 0 means one for each processor that this process may use.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;

  // task(context, piece) for every piece in [0, pieces); returns when all are done. Only one thread may call at a time.
  // The first exception of a task is rethrown when no thread works any more; pieces that had not begun are left out.
  using Task = void (*)(void* context, int64_t piece);
  void run(int64_t pieces, Task task, void* context);

  // The same for anything that can be called with a piece.
  template <typename Function>
  void each(int64_t pieces, Function&& function) {
    using Bare = std::remove_reference_t<Function>;
    run(pieces, [](void* context, int64_t piece) { (*static_cast<Bare*>(context))(piece); },
        const_cast<void*>(static_cast<const void*>(&function)));
  }

 private:
  struct State;
  State* state_;
};

}  // namespace quern
