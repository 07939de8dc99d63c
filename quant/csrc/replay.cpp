// pm_replay and pm_lru_depths: the compiled twins of what cache/replay.py describes and does.
#include <algorithm>
#include <cstring>
#include <new>
#include <queue>

#include "cache.h"
#include "pocketmoe_cpu.h"

namespace pm {
namespace {

// The steps of one sequence, one after the other.
class Steps {
   public:
    explicit Steps(const pm_requests& requests) : requests_(requests) {}

    int64_t count() const { return requests_.tokens * requests_.layers; }
    int32_t layer(int64_t step) const { return static_cast<int32_t>(step % requests_.layers); }

    // The numbers of the experts of a step; good until the next call.
    const std::vector<int32_t>& operator[](int64_t step) {
        experts_.clear();
        const int32_t* const chosen = requests_.chosen + step * requests_.top_k;
        for (int32_t i = 0; i < requests_.top_k; i++)
            if (chosen[i] >= 0) experts_.push_back(layer(step) * requests_.experts + chosen[i]);
        return experts_;
    }

   private:
    const pm_requests& requests_;
    std::vector<int32_t> experts_;
};

// Every read arrives at once.
void replay(const pm_requests& requests, const SlotPool& pool, std::unique_ptr<Policy> policy, int32_t* misses) {
    std::vector<int32_t> slots(pool.size()), locks(pool.size());
    std::vector<uint8_t> arriving(pool.size());
    Cache cache(pool, requests.top_k, std::move(policy), {slots.data(), locks.data(), arriving.data()});
    std::vector<int32_t> indices;
    Steps steps(requests);
    for (int64_t at = 0; at < steps.count(); at++) {
        const int32_t layer = steps.layer(at), first = layer * requests.experts;
        const auto& step = steps[at];
        indices.clear();
        for (const int32_t expert : step) indices.push_back(expert - first);
        const Cache::Found found = cache.lookup(layer, indices.data(), static_cast<int64_t>(indices.size()), true);
        misses[at] = found.misses;
        if (found.misses) {
            for (const int32_t expert : step) locks[expert] = 1;
            for (int32_t i = 0; i < found.misses; i++) cache.admit(first + indices[found.hits + i], false);
            for (const int32_t expert : step) locks[expert] = arriving[expert] = 0;
        }
        if (layer == requests.layers - 1) cache.tick();
    }
}

// Belady's MIN. The heap holds every next use that was ever known, the furthest on top; those that have come lie in the
// past and so never on top.
void optimum(const pm_requests& requests, const SlotPool& pool, int32_t* misses) {
    struct Use {
        int64_t step;
        int32_t expert;
        bool operator<(const Use& other) const { return step < other.step; }
    };
    Steps steps(requests);
    std::vector<int64_t> upcoming(pool.size(), steps.count()), next_uses;
    for (int64_t at = steps.count() - 1; at >= 0; at--) {
        const auto& step = steps[at];
        for (auto expert = step.rbegin(); expert != step.rend(); ++expert)
            next_uses.push_back(std::exchange(upcoming[*expert], at));
    }
    std::vector<uint8_t> resident(pool.size(), 0);
    std::priority_queue<Use> uses;
    int64_t free = pool.slots;
    for (int64_t at = 0; at < steps.count(); at++) {
        const auto& step = steps[at];
        misses[at] = 0;
        for (const int32_t expert : step) {
            if (resident[expert]) continue;
            misses[at]++;
            resident[expert] = 1;
            if (free > 0) {
                free--;
                continue;
            }
            resident[uses.top().expert] = 0;
            uses.pop();
        }
        for (const int32_t expert : step) {
            uses.push({next_uses.back(), expert});
            next_uses.pop_back();
        }
    }
}

// When each expert was used last: a Fenwick tree of ones at those times, so that later ones are quickly counted.
class LatestUses {
   public:
    LatestUses(int32_t experts, int64_t most) : last_(experts, NEVER), ones_(most, 0) {}

    void use(int32_t expert) {
        if (last_[expert] == NEVER) experts_++;
        else add(last_[expert], -1);
        add(last_[expert] = now_++, 1);
    }

    // The place of an expert among those that were used, from 1 for the latest; 0 if it never was.
    int32_t place(int32_t expert) const {
        int32_t until = 0;
        for (int64_t at = last_[expert]; at >= 0; at = (at & (at + 1)) - 1) until += ones_[at];
        return last_[expert] == NEVER ? 0 : experts_ - until + 1;
    }

   private:
    static constexpr int64_t NEVER = -1;

    void add(int64_t time, int32_t change) {
        for (auto at = static_cast<size_t>(time); at < ones_.size(); at |= at + 1) ones_[at] += change;
    }

    std::vector<int64_t> last_;
    std::vector<int32_t> ones_;
    int64_t now_ = 0;
    int32_t experts_ = 0;
};

// The places in Mattson's stack, which Bennett and Kruskal (1975) keep in such a tree.
void lru_depths(const pm_requests& requests, int32_t* depths) {
    Steps steps(requests);
    LatestUses uses(requests.layers * requests.experts, steps.count() * requests.top_k);
    for (int64_t at = 0; at < steps.count(); at++, depths += requests.top_k) {
        const auto& step = steps[at];
        std::fill_n(depths, requests.top_k, 0);
        for (size_t i = 0; i < step.size(); i++) depths[i] = uses.place(step[i]);
        for (const int32_t expert : step) uses.use(expert);
    }
}

bool is_valid(const pm_requests& r) {
    if (r.tokens < 0 || r.layers < 1 || r.top_k < 1 || r.experts < 1) return false;
    if (static_cast<int64_t>(r.layers) * r.experts > std::numeric_limits<int32_t>::max()) return false;
    const int32_t* chosen = r.chosen;
    for (int64_t row = 0; row < r.tokens * r.layers; row++) {
        int32_t before = -1;
        for (int32_t i = 0; i < r.top_k; i++, chosen++) {
            if (*chosen < 0) continue;
            if (*chosen <= before || *chosen >= r.experts) return false;
            before = *chosen;
        }
    }
    return true;
}

}  // namespace
}  // namespace pm

extern "C" {

int32_t pm_replay(const pm_requests* requests, const char* policy, int64_t slots, int32_t* misses) try {
    const int64_t cycle = static_cast<int64_t>(requests->layers) * requests->top_k;
    if (!pm::is_valid(*requests) || slots < cycle) return PM_BAD_ARGUMENT;
    const pm::SlotPool pool = {requests->layers, requests->experts, slots, cycle};
    if (std::strcmp(policy, "belady") == 0) {
        pm::optimum(*requests, pool, misses);
        return PM_OK;
    }
    std::unique_ptr<pm::Policy> made = pm::make_policy(policy, pool);
    if (!made) return PM_BAD_ARGUMENT;
    pm::replay(*requests, pool, std::move(made), misses);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

int32_t pm_lru_depths(const pm_requests* requests, int32_t* depths) try {
    if (!pm::is_valid(*requests)) return PM_BAD_ARGUMENT;
    pm::lru_depths(*requests, depths);
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

}  // extern "C"
