// Belady's rule on an estimate that similar tokens have a part in: see cache/analog.py.
#ifndef POCKETMOE_ANALOG_H
#define POCKETMOE_ANALOG_H

#include "estimates.h"

namespace pm {

struct Analog : Policy {
    explicit Analog(const SlotPool& pool)
        : Policy(pool), estimates(pool, keys()) {}

    void insert(int32_t expert) override { use({expert}); }
    void touch(int32_t expert) override { use({expert}); }
    void touch_all(const std::vector<int32_t>& hits) override {
        if (!hits.empty()) use(hits);
    }
    bool reconsider(int32_t expert) override {
        const int32_t layer = layer_of(expert);
        const bool changed = estimates.reconsider(layer, expert - first_of(layer));
        if (changed) mark_stale(layer);
        return changed;
    }
    void tick() override { estimates.tick(); }

    // Of one layer, at once: those of the first call in a turn have a part in its estimates.
    void use(std::vector<int32_t> experts) {
        const int32_t layer = layer_of(experts.front());
        for (int32_t& expert : experts) expert -= first_of(layer);
        estimates.use(layer, experts.data(), static_cast<int64_t>(experts.size()));
        mark_stale(layer);
    }

    Estimates estimates;
};

}  // namespace pm
#endif
