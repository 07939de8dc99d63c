// Eviction policies: the compiled twins of those in cache/policy.py, which say what each is about.
#ifndef POCKETMOE_POLICY_H
#define POCKETMOE_POLICY_H

#include <algorithm>
#include <cstdint>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

namespace pm {

constexpr double ABSENT = std::numeric_limits<double>::infinity();

// Experts are numbered layer by layer: layer * experts + index.
struct SlotPool {
    int32_t layers, experts;  // experts per layer
    int64_t slots;
    int64_t cycle;  // experts that a token touches, at most

    int32_t size() const { return layers * experts; }
};

// Residents have a key each; of a layer the lowest leaves first, of equals the lowest expert.
class Policy {
   public:
    explicit Policy(const SlotPool& pool) : pool_(pool), keys_(pool.size(), ABSENT), stale_(pool.layers, 1) {}
    virtual ~Policy() = default;

    virtual void insert(int32_t expert) = 0;
    virtual void touch(int32_t expert) = 0;
    virtual void touch_all(const std::vector<int32_t>& hits) {  // of one layer
        for (const int32_t expert : hits) touch(expert);
    }
    virtual void remove(int32_t expert) { set_key(expert, ABSENT); }
    virtual bool reconsider(int32_t) { return false; }
    virtual void tick() {}

    virtual void resize(int64_t slots) { pool_.slots = slots; }

    // Within its layer; ABSENT for who is not held.
    double key(int32_t expert) const { return keys_[expert]; }
    bool holds(int32_t expert) const { return keys_[expert] != ABSENT; }

    // Among all layers.
    virtual double rank(int32_t expert) const { return keys_[expert]; }

    // Of the layer's experts that are not in use the one that leaves first, -1 where there is none; sets `passed` where
    // one in use would leave before it.
    template <class Key, class InUse>
    int32_t first(int32_t layer, const Key& key, const InUse& in_use, bool& passed) const {
        double least = ABSENT, least_in_use = ABSENT;
        int32_t found = -1;
        for (int32_t expert = first_of(layer); expert < first_of(layer + 1); expert++) {
            const double place = key(expert);
            if (!(place < least)) continue;
            if (in_use(expert)) least_in_use = std::min(least_in_use, place);
            else least = place, found = expert;
        }
        passed |= least_in_use != ABSENT && least_in_use <= least;  // an equal that was seen before `found` is lower
        return found;
    }

    // Whether the order of the layer may have changed since this was last asked.
    bool take_stale(int32_t layer) { return std::exchange(stale_[layer], uint8_t{0}) != 0; }
    void mark_stale(int32_t layer) { stale_[layer] = 1; }

   protected:
    void set_key(int32_t expert, double key) {
        keys_[expert] = key;
        mark_stale(layer_of(expert));
    }
    double* keys() { return keys_.data(); }
    int32_t layer_of(int32_t expert) const { return expert / pool_.experts; }
    int32_t first_of(int32_t layer) const { return layer * pool_.experts; }

    SlotPool pool_;

   private:
    std::vector<double> keys_;
    std::vector<uint8_t> stale_;
};

// Null for a name that is not known.
std::unique_ptr<Policy> make_policy(const char* name, const SlotPool& pool);

}  // namespace pm
#endif
