// A rank that throws: the caller gets it, nobody waits for ever, and the team works on.
#include <atomic>
#include <cstdio>
#include <new>
#include <stdexcept>
#include <string>

#include "../engine/team.h"

namespace {

struct Work {
  bimos::Team& team;
  int thrower, at;  // rank and meeting; rank -1: nobody throws
  std::atomic<int> meetings{0};
};

constexpr int kMeetings = 20;

void task(int rank, void* context) {
  Work& work = *static_cast<Work*>(context);
  for (int i = 0; i < kMeetings; ++i) {
    if (rank == work.thrower && i == work.at) throw std::bad_alloc();
    work.team.meet();
    work.meetings.fetch_add(1);
  }
}

int failures = 0;

void expect(bool good, const std::string& what) {
  if (good) return;
  std::printf("failed: %s\n", what.c_str());
  ++failures;
}

}  // namespace

int main() {
  for (const int size : {1, 2, 3}) {
    bimos::Team team(size);
    for (int round = 0; round < 12; ++round) {
      const int thrower = round % (size + 1) - 1, at = round * 7 % kMeetings;
      Work work{team, thrower, at};
      bool caught = false;
      try {
        team.run(task, &work);
      } catch (const std::bad_alloc&) {
        caught = true;
      }
      const std::string where = std::to_string(size) + " threads, rank " + std::to_string(thrower) + " at meeting " + std::to_string(at);
      expect(caught == (thrower >= 0), where + ": what was thrown is not what was caught");
      const int met = work.meetings.load();
      expect(thrower < 0 ? met == size * kMeetings : met <= size * at, where + ": " + std::to_string(met) + " passed meetings");
    }
    for (int thrower = 0; thrower < size; ++thrower) {  // what one rank throws is what the caller gets, while the others wait for it
      struct Thrower {
        bimos::Team& team;
        int rank;
      } one{team, thrower};
      try {
        team.run(
            [](int rank, void* context) {
              auto& which = *static_cast<Thrower*>(context);
              if (rank == which.rank) throw std::runtime_error(std::to_string(rank));
              which.team.meet();
            },
            &one);
        expect(false, "nothing was thrown");
      } catch (const std::runtime_error& error) {
        expect(std::stoi(error.what()) == thrower, "another error");
      }
    }
  }
  std::puts(failures == 0 ? "good" : "bad");
  return failures == 0 ? 0 : 1;
}
