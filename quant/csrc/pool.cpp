#include "pool.h"

#include <chrono>
#include <system_error>

#if defined(_WIN32)
#include <process.h>
#define PM_PROCESS_ID() _getpid()
#else
#include <unistd.h>
#define PM_PROCESS_ID() getpid()
#endif

#if defined(__linux__)
#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#else
#include <condition_variable>
#include <mutex>
#endif

#if defined(__x86_64__) || defined(_M_X64)
#include <immintrin.h>
#define PM_PAUSE() _mm_pause()
#elif defined(__aarch64__)
#define PM_PAUSE() __asm__ __volatile__("yield")
#else
#define PM_PAUSE() std::this_thread::yield()
#endif

namespace pm {
namespace {

// How long a worker spins when most regions follow one another within that time, and when not. Waking it from sleep
// costs the caller some 10 microseconds, and the worker some 50 before it helps.
constexpr int64_t LONG_SPIN_NS = 200000;
constexpr int64_t SHORT_SPIN_NS = 5000;
// From here on a spinning worker offers its core to others each time that it looks. Without that, spinning slows
// torch's own threads between our calls by a third; with it, not at all.
constexpr int64_t POLITE_NS = 20000;
// A worker that comes back from that later than this has taken the core from someone who needs it, and goes to sleep.
constexpr int64_t PREEMPTED_NS = 50000;

// Less work than this the caller does alone; with less than this, sleeping workers are left asleep. In bytes.
constexpr int64_t SERIAL_WORK = 64 * 1024;
constexpr int64_t WAKE_WORK = 1024 * 1024;

int64_t now_ns() {
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
}

constexpr uint64_t tagged(uint32_t region, int64_t item) {
    return static_cast<uint64_t>(region) << 32 | static_cast<uint64_t>(item);
}

}  // namespace

#if defined(__linux__)
struct Pool::Sleep {};

void Pool::sleep_while(uint32_t seen) {
    while (region_.load() == seen)
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&region_), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void Pool::wake_all() {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&region_), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
}

void Pool::leave_callers_cpu() {
    const int cpu = caller_cpu_.load(std::memory_order_relaxed);
    if (cpu < 0 || cpu >= CPU_SETSIZE || sched_getcpu() != cpu) return;
    cpu_set_t allowed;
    if (sched_getaffinity(caller_thread_.load(std::memory_order_relaxed), sizeof allowed, &allowed) != 0) return;
    CPU_CLR(cpu, &allowed);
    if (CPU_COUNT(&allowed) > 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
void Pool::leave_callers_cpu() {}

struct Pool::Sleep {
    std::mutex mutex;
    std::condition_variable changed;
};

void Pool::sleep_while(uint32_t seen) {
    std::unique_lock<std::mutex> lock(sleep_->mutex);
    sleep_->changed.wait(lock, [&] { return region_.load() != seen; });
}

void Pool::wake_all() {
    { std::lock_guard<std::mutex> lock(sleep_->mutex); }
    sleep_->changed.notify_all();
}
#endif

Pool::Pool(int threads)
    : threads_(threads < 1 ? 1 : threads),
      shares_(new Share[static_cast<size_t>(MAX_PHASES) * threads_]),
      spin_ns_(SHORT_SPIN_NS),
      owner_(PM_PROCESS_ID()),
      sleep_(new Sleep) {
    try {
        for (int t = 1; t < threads_; t++) workers_.emplace_back([this, t] { worker(t); });
    } catch (const std::system_error&) {
        // The system has no more threads for us. Shares without a thread are done by the others.
    }
}

Pool::~Pool() {
    stop_.store(true);
    region_.fetch_add(1);
    if (owner_ != PM_PROCESS_ID()) {
        for (std::thread& thread : workers_) thread.detach();
        (void)sleep_.release();  // its condition variable may wait forever for waiters that exist no more
        return;
    }
    wake_all();
    for (std::thread& thread : workers_) thread.join();
}

void Pool::run(Body body, void* region, const int64_t* items, int64_t work) {
    if (work < SERIAL_WORK || threads_ == 1) {
        for (int phase = 0; phase < MAX_PHASES; phase++)
            for (int64_t item = 0; item < items[phase]; item++) body(region, phase, item, 0);
        return;
    }
    short_gaps_ += ((now_ns() - last_end_ns_ < LONG_SPIN_NS ? 256 : 0) - short_gaps_) / 8;
    spin_ns_.store(short_gaps_ > 128 ? LONG_SPIN_NS : SHORT_SPIN_NS, std::memory_order_relaxed);
#if defined(__linux__)
    caller_cpu_.store(sched_getcpu(), std::memory_order_relaxed);
    thread_local const int32_t thread_id = static_cast<int32_t>(syscall(SYS_gettid));
    caller_thread_.store(thread_id, std::memory_order_relaxed);
#endif
    const uint32_t number = region_.load(std::memory_order_relaxed) + 1;
    int64_t total = 0;
    body_.store(body, std::memory_order_relaxed);
    argument_.store(region, std::memory_order_relaxed);
    done_.store(0, std::memory_order_relaxed);
    for (int phase = 0; phase < MAX_PHASES; phase++) {
        for (int t = 0; t < threads_; t++) {
            const uint64_t first = tagged(number, share_begin(items[phase], t));
            shares_[phase * threads_ + t].next.store(first, std::memory_order_release);
        }
        // After the shares: a late worker that sees this count also sees that the shares are not its region's.
        items_[phase].store(items[phase], std::memory_order_release);
        total += items[phase];
    }
    region_.store(number);  // sequentially consistent, as is the workers' count of sleepers: one sees the other
    if (work >= WAKE_WORK && sleepers_.load() > 0) wake_all();
    help(0, number);
    wait_for(done_, total);
    last_end_ns_ = now_ns();
}

void Pool::help(int thread, uint32_t region) {
    const Body body = body_.load(std::memory_order_relaxed);
    void* const argument = argument_.load(std::memory_order_relaxed);
    for (int phase = 0; phase < MAX_PHASES; phase++) {
        const int64_t items = items_[phase].load(std::memory_order_acquire);
        for (int i = 0; i < threads_; i++) {
            const int owner = (thread + i) % threads_;
            const uint64_t end = tagged(region, share_begin(items, owner + 1));
            std::atomic<uint64_t>& next = shares_[phase * threads_ + owner].next;
            uint64_t item = next.load(std::memory_order_acquire);
            while (item >> 32 == region && item < end) {
                if (!next.compare_exchange_weak(item, item + 1, std::memory_order_acq_rel)) continue;
                body(argument, phase, static_cast<int64_t>(item & 0xFFFFFFFFu), thread);
                done_.fetch_add(1, std::memory_order_release);
                item = next.load(std::memory_order_acquire);
            }
        }
    }
}

void Pool::worker(int thread) {
    uint32_t seen = 0;
    for (;;) {
        const int64_t spin_ns = spin_ns_.load(std::memory_order_relaxed);
        const int64_t begin_ns = now_ns();
        int64_t last_ns = begin_ns;
        while (region_.load(std::memory_order_acquire) == seen) {
            for (int i = 0; i < 16; i++) PM_PAUSE();
            if (last_ns - begin_ns > POLITE_NS) std::this_thread::yield();
            const int64_t time_ns = now_ns();
            if (time_ns - begin_ns < spin_ns && time_ns - last_ns < PREEMPTED_NS) {
                last_ns = time_ns;
                continue;
            }
            sleepers_.fetch_add(1);
            sleep_while(seen);
            sleepers_.fetch_sub(1);
        }
        if (stop_.load()) return;
        seen = region_.load(std::memory_order_acquire);
        leave_callers_cpu();
        help(thread, seen);
    }
}

void Pool::wait_for(const std::atomic<int64_t>& counter, int64_t value) {
    for (int spins = 0; counter.load(std::memory_order_acquire) < value; spins++) {
        if (spins < 2000) {
            PM_PAUSE();
        } else {
            std::this_thread::yield();  // whoever holds the item may be waiting for this very core
        }
    }
}

}  // namespace pm
