// A small pool of worker threads for regions of a few hundred microseconds on machines that do other things too.
//
// A region is a sequence of phases, a phase a number of items. Each thread first takes the items of its own contiguous
// share, so that it reads memory in order, then helps with the others' shares, then goes on to the next phase. The
// caller takes part, and returns when every item is done: it waits only for items that some thread has begun, so a
// worker that the system has put aside costs nothing but its help. There is no barrier between phases: a body whose
// item needs results of an earlier phase counts them and calls `wait_for`, which cannot deadlock, because a thread that
// begins an item of a phase has seen all items of the earlier phases begun.
//
// Between regions workers spin if lately most regions came soon after one another, and sleep otherwise. When all
// processors are busy, Linux likes to wake a worker on its waker's processor, where it would take turns with the caller
// instead of helping; such a worker moves away.
#ifndef POCKETMOE_POOL_H
#define POCKETMOE_POOL_H

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

namespace pm {

constexpr int MAX_PHASES = 3;

using Body = void (*)(void* region, int phase, int64_t item, int thread);

class Pool {
public:
    explicit Pool(int threads);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }

    // Runs body(region, phase, item, thread) for all items of all phases. `items` has MAX_PHASES counts. `work` is an
    // estimate in bytes of memory read or the like, which decides whether the workers take part. One call at a time.
    void run(Body body, void* region, const int64_t* items, int64_t work);

    // The first item of a thread's own share; `thread` may be threads() for the end of the last share.
    int64_t share_begin(int64_t items, int thread) const { return items * thread / threads_; }

    // Waits until `counter` has reached `value`.
    static void wait_for(const std::atomic<int64_t>& counter, int64_t value);

private:
    // The next free item of one thread's share, tagged with the region, so that a worker that wakes up late
    // cannot take an item of a region that it knows nothing about.
    struct alignas(64) Share {
        std::atomic<uint64_t> next{0};
    };

    void help(int thread, uint32_t region);
    void worker(int thread);
    void sleep_while(uint32_t seen);  // region_ == seen
    void wake_all();
    void leave_callers_cpu();

    const int threads_;
    std::unique_ptr<Share[]> shares_;  // [phase][thread]
    std::atomic<Body> body_{nullptr};
    std::atomic<void*> argument_{nullptr};
    std::atomic<int64_t> items_[MAX_PHASES] = {};
    alignas(64) std::atomic<uint32_t> region_{0};
    std::atomic<int32_t> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::atomic<int64_t> spin_ns_;
    std::atomic<int32_t> caller_cpu_{-1};
    std::atomic<int32_t> caller_thread_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    int64_t last_end_ns_ = 0;
    int32_t short_gaps_ = 0;  // which part of the latest gaps between regions spinning would have bridged, 0..256
    int64_t owner_;  // process id: a forked child has no workers to join
    struct Sleep;
    std::unique_ptr<Sleep> sleep_;
    std::vector<std::thread> workers_;
};

}  // namespace pm
#endif
