// What the published policies are made of: see cache/order.py.
#ifndef POCKETMOE_ORDER_H
#define POCKETMOE_ORDER_H

#include <algorithm>

#include "policy.h"

namespace pm {

// Added to the key of who must stay longer. Keys count placements below it, and are whole numbers below 2^53.
constexpr double LEVEL = 281474976710656.0;  // 2^48

// Residents by level, then by placement.
class LevelledOrder : public Policy {
   public:
    using Policy::Policy;

   protected:
    void place(int32_t expert, int32_t level) { set_key(expert, level * LEVEL + ++clock_); }

    // All residents, who leaves first comes first.
    std::vector<int32_t> in_order() const {
        std::vector<int32_t> residents;
        for (int32_t expert = 0; expert < pool_.size(); expert++)
            if (holds(expert)) residents.push_back(expert);
        std::sort(residents.begin(), residents.end(), [this](int32_t a, int32_t b) { return key(a) < key(b); });
        return residents;
    }

   private:
    double clock_ = 0;
};

// Some of the experts, oldest first.
class Queue {
   public:
    explicit Queue(const SlotPool& pool) : end_(pool.size()), next_(end_ + 1, NONE), previous_(end_ + 1, NONE) {
        next_[end_] = previous_[end_] = end_;
    }

    int64_t size() const { return size_; }
    int32_t oldest() const { return next_[end_]; }
    bool holds(int32_t expert) const { return next_[expert] != NONE; }

    void push(int32_t expert) {
        remove(expert);
        previous_[expert] = previous_[end_], next_[expert] = end_;
        next_[previous_[expert]] = previous_[end_] = expert;
        size_++;
    }

    void remove(int32_t expert) {
        if (!holds(expert)) return;
        next_[previous_[expert]] = next_[expert];
        previous_[next_[expert]] = previous_[expert];
        next_[expert] = NONE;
        size_--;
    }

    int32_t pop() {
        const int32_t expert = oldest();
        remove(expert);
        return expert;
    }

   private:
    static constexpr int32_t NONE = -1;
    int32_t end_;
    std::vector<int32_t> next_, previous_;
    int64_t size_ = 0;
};

// How often each expert was used, resident or not; halved now and then.
class UseCounts {
   public:
    static constexpr int32_t MOST = 15, HALVE_AFTER = 64;

    explicit UseCounts(const SlotPool& pool) : counts_(pool.size(), 0) {}

    int32_t operator[](int32_t expert) const { return counts_[expert]; }
    int32_t add(int32_t expert) { return counts_[expert] = std::min(counts_[expert] + 1, MOST); }

    // True when the counts have just been halved.
    bool tick() {
        if (++age_ % HALVE_AFTER) return false;
        for (int32_t& count : counts_) count /= 2;
        return true;
    }

   private:
    std::vector<int32_t> counts_;
    int64_t age_ = 0;
};

}  // namespace pm
#endif
