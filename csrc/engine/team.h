// Threads that work on one token together: they start in a microsecond and meet in less, because between layers they spin.
//
// Spinning is bounded: a thread that has waited long sleeps until it is woken, so that an idle engine costs nothing and another
// process that wants the core gets it.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <thread>
#include <vector>

namespace bimos {

class Team {
 public:
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }

  // Whether the threads are of this process: they do not live on in one that was forked off.
  bool alive() const;

  // task(rank, context) for every rank, rank 0 in the caller's thread; returns when all are done. One call at a time. What a rank
  // throws is thrown here, when no rank is at work any more; those that wait for it to come to a meeting are sent home.
  void run(void (*task)(int rank, void* context), void* context);

  // Waits, within a task, for every other rank to come here.
  void meet();

 private:
  struct Abandoned {};  // thrown by `meet` where another rank has failed

  void work(int rank);
  void attempt(int rank);
  void end();

  const int size_;
  const int64_t process_;
  const int spins_;
  std::vector<std::thread> threads_;
  void (*task_)(int, void*) = nullptr;
  void* context_ = nullptr;
  alignas(64) std::atomic<uint32_t> call_{0};    // counts tasks
  alignas(64) std::atomic<uint32_t> done_{0};    // ranks that have finished this task
  alignas(64) std::atomic<uint32_t> arrived_{0};  // ranks at the meeting point
  alignas(64) std::atomic<uint32_t> meeting_{0};  // counts meetings
  std::atomic<bool> failed_{false};              // a rank has thrown, and nobody waits for it
  std::exception_ptr error_;                     // what the first one has
  std::atomic<bool> stop_{false};
};

}  // namespace bimos
