// pm_replay and pm_lru_depths: the compiled twins of what cache/replay.py describes and does.
#include <algorithm>
#include <cstring>
#include <new>
#include <queue>

#include "pocketmoe_cpu.h"
#include "policy.h"

namespace pm {
namespace {

// Residents under a policy, with a floor for each layer.
class Cache {
   public:
    Cache(const SlotPool& pool, int32_t floor, Policy& policy)
        : pool_(pool),
          floor_(floor),
          policy_(policy),
          free_(pool.slots),
          locked_(pool.size(), 0),
          layers_(pool.layers) {}

    // Requests the experts of one layer in one token; returns how many were missing.
    int32_t serve(int32_t layer, const std::vector<int32_t>& step) {
        hits_.clear();
        missing_.clear();
        for (const int32_t expert : step) (policy_.holds(expert) ? hits_ : missing_).push_back(expert);
        policy_.touch_all(hits_);
        if (missing_.empty()) return 0;
        lock(layer, step, true);
        for (const int32_t expert : missing_) {
            if (free_ > 0) free_--;
            else evict(layer);
            policy_.insert(expert);
            layers_[layer].residents++;
        }
        lock(layer, step, false);
        return static_cast<int32_t>(missing_.size());
    }

   private:
    struct Layer {
        int64_t residents = 0;
        Victim next;
    };

    void lock(int32_t layer, const std::vector<int32_t>& step, bool held) {
        for (const int32_t expert : step) locked_[expert] = held;
        policy_.mark_stale(layer);
    }

    // Of all layers above their floor, and the one that needs the slot, who has the lowest rank; that one of equals.
    void evict(int32_t needy) {
        int32_t from = needy;
        double least = ABSENT;
        for (int32_t layer = 0; layer < pool_.layers; layer++) {
            Layer& known = layers_[layer];
            if (policy_.take_stale(layer)) known.next = policy_.next_victim(layer, locked_.data());
            if (known.residents > floor_ && known.next.rank < least) from = layer, least = known.next.rank;
        }
        if (layers_[needy].next.rank <= least) from = needy;
        policy_.remove(layers_[from].next.expert);
        layers_[from].residents--;
    }

    const SlotPool pool_;
    const int32_t floor_;
    Policy& policy_;
    int64_t free_;
    std::vector<uint8_t> locked_;  // by expert
    std::vector<Layer> layers_;
    std::vector<int32_t> hits_, missing_;
};

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

void replay(const pm_requests& requests, const SlotPool& pool, Policy& policy, int32_t* misses) {
    Cache cache(pool, requests.top_k, policy);
    Steps steps(requests);
    for (int64_t at = 0; at < steps.count(); at++) {
        misses[at] = cache.serve(steps.layer(at), steps[at]);
        if (steps.layer(at) == requests.layers - 1) policy.tick();
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
    const std::unique_ptr<pm::Policy> made = pm::make_policy(policy, pool);
    if (!made) return PM_BAD_ARGUMENT;
    pm::replay(*requests, pool, *made, misses);
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
