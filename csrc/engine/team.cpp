#include "team.h"

#include <unistd.h>

#include <utility>

namespace bimos {
namespace {

constexpr int kSpins = 20000;  // some hundred microseconds
constexpr int kFewSpins = 50;  // where threads are more than cores, who spins keeps out whom it waits for

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Until `value` is no longer `old`.
void wait_while(const std::atomic<uint32_t>& value, uint32_t old, int spins) {
  for (int spin = 0; spin < spins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int size)
    : size_(size), process_(getpid()), spins_(size <= static_cast<int>(std::thread::hardware_concurrency()) ? kSpins : kFewSpins) {
  try {
    for (int rank = 1; rank < size; ++rank) threads_.emplace_back(&Team::work, this, rank);
  } catch (...) {  // the system has no more threads to give
    end();
    throw;
  }
}

Team::~Team() {
  if (alive()) {
    end();
  } else {
    // Of another process: nobody to wait for, and their handles may by now be those of this one's threads. Left as they are.
    new std::vector<std::thread>(std::move(threads_));
  }
}

void Team::end() {
  stop_.store(true);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  for (auto& thread : threads_) thread.join();
}

bool Team::alive() const { return getpid() == process_; }

void Team::run(void (*task)(int, void*), void* context) {
  if (size_ == 1) return task(0, context);
  task_ = task;
  context_ = context;
  done_.store(0, std::memory_order_relaxed);
  call_.fetch_add(1, std::memory_order_release);
  call_.notify_all();
  attempt(0);
  const auto others = static_cast<uint32_t>(size_ - 1);
  for (uint32_t done = done_.load(std::memory_order_acquire); done != others; done = done_.load(std::memory_order_acquire)) {
    wait_while(done_, done, spins_);
  }
  if (!failed_.load(std::memory_order_relaxed)) return;
  arrived_.store(0, std::memory_order_relaxed);
  failed_.store(false, std::memory_order_relaxed);
  std::rethrow_exception(std::exchange(error_, nullptr));
}

void Team::attempt(int rank) {
  try {
    task_(rank, context_);
  } catch (const Abandoned&) {
  } catch (...) {
    if (failed_.exchange(true)) return;  // another rank was first
    error_ = std::current_exception();
    meeting_.fetch_add(1, std::memory_order_release);  // after `failed_`: who sees the new number sees that, too
    meeting_.notify_all();
  }
}

void Team::meet() {
  if (size_ == 1) return;
  const uint32_t meeting = meeting_.load(std::memory_order_acquire);
  if (failed_.load(std::memory_order_relaxed)) throw Abandoned();
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    meeting_.fetch_add(1, std::memory_order_release);
    meeting_.notify_all();
  } else {
    wait_while(meeting_, meeting, spins_);
    if (failed_.load(std::memory_order_relaxed)) throw Abandoned();
  }
}

void Team::work(int rank) {
  uint32_t seen = 0;
  for (;;) {
    wait_while(call_, seen, spins_);
    ++seen;
    if (stop_.load()) return;
    attempt(rank);
    done_.fetch_add(1, std::memory_order_acq_rel);
    done_.notify_one();
  }
}

}  // namespace bimos
