// Belady's rule on an estimate that similar tokens have a part in: see cache/analog.py.
#ifndef POCKETMOE_ANALOG_H
#define POCKETMOE_ANALOG_H

#include "estimates.h"

namespace pm {

struct Analog : Policy {
    explicit Analog(const SlotPool& pool)
        : Policy(pool), estimates(pool, keys()) {}

    void insert(int32_t expert) override { use(&expert, 1); }
    void touch(int32_t expert) override { use(&expert, 1); }
    void touch_all(const std::vector<int32_t>& hits) override {
        if (!hits.empty()) use(hits.data(), hits.size());
    }
    bool reconsider(int32_t expert) override {
        const int32_t layer = layer_of(expert);
        const bool changed = estimates.reconsider(layer, expert - first_of(layer));
        if (changed) mark_stale(layer);
        return changed;
    }
    void tick() override { estimates.tick(); }

    // Of one layer, at once: those of the first call in a turn have a part in its estimates.
    void use(const int32_t* experts, size_t count) {
        const int32_t layer = layer_of(*experts);
        indices.assign(experts, experts + count);
        for (int32_t& index : indices) index -= first_of(layer);
        estimates.use(layer, indices.data(), static_cast<int64_t>(count));
        mark_stale(layer);
    }

    std::vector<int32_t> indices;
    Estimates estimates;
};

}  // namespace pm
#endif
