// Who is in which slot: the compiled twin of cache/manager.py and cache/eviction.py, which say what each step is about.
#ifndef POCKETMOE_CACHE_H
#define POCKETMOE_CACHE_H

#include <algorithm>
#include <functional>

#include "policy.h"

namespace pm {

// By expert; memory of the caller's, who reads all of it, and locks and unlocks, and notes arrivals, without a call.
struct Books {
    int32_t* slots;     // NOWHERE for who is not resident; only the cache writes them, but for residents that move
    int32_t* locks;     // how often each is locked
    uint8_t* arriving;  // 1 from the admission on, until the caller says otherwise
};

class Cache {
   public:
    static constexpr int32_t NOBODY = -1, NOWHERE = -1;

    // Empties the books.
    Cache(const SlotPool& pool, int32_t floor, std::unique_ptr<Policy> policy, const Books& books)
        : pool_(pool),
          floor_(floor),
          policy_(std::move(policy)),
          books_(books),
          transient_(pool.size(), NEVER),
          layers_(pool.layers),
          offers_(pool.layers, ABSENT) {
        std::fill_n(books_.slots, pool.size(), NOWHERE);
        std::fill_n(books_.locks, pool.size(), 0);
        std::fill_n(books_.arriving, pool.size(), uint8_t{0});
        find_free();
    }

    int64_t count() const { return pool_.slots - static_cast<int64_t>(free_.size()); }

    struct Found {
        int32_t hits, misses;
    };

    // Splits the distinct experts (by index of the layer) into hits and misses, each in the order of the request.
    Found lookup(int32_t layer, int32_t* indices, int64_t count, bool promoting) {
        const int32_t first = layer * pool_.experts;
        hits_.clear();
        misses_.clear();
        int32_t* const end = drop_repeats(indices, indices + count);
        for (int32_t* index = indices; index != end; index++)
            if (books_.slots[first + *index] != NOWHERE) hits_.push_back(first + *index);
        touch(layer, promoting);
        int32_t* next = indices;
        for (int32_t* index = indices; index != end; index++) {
            const int32_t expert = first + *index;
            if (books_.slots[expert] == NOWHERE || books_.arriving[expert]) misses_.push_back(*index);
            else *next++ = *index;
        }
        std::copy(misses_.begin(), misses_.end(), next);
        return {static_cast<int32_t>(next - indices), static_cast<int32_t>(misses_.size())};
    }

    struct Admission {
        int32_t slot = NOWHERE;  // if nobody may leave
        int32_t evicted = NOBODY;
    };

    Admission admit(int32_t expert, bool transient) {
        const int32_t layer = expert / pool_.experts;
        Admission admission;
        if (free_.empty()) {
            admission.evicted = victim(layer);
            if (admission.evicted == NOBODY) return admission;
            leave(admission.evicted);
            admission.slot = std::exchange(books_.slots[admission.evicted], NOWHERE);
        } else {
            admission.slot = take_free();
        }
        books_.slots[expert] = admission.slot;
        books_.arriving[expert] = 1;
        layers_[layer].residents++;
        offer(layer);
        if (transient) join_transient(expert);
        else policy_->insert(expert);
        return admission;
    }

    // Who leaves for an admission to the layer when no slot is free.
    int32_t victim(int32_t needy) {
        while (true) {
            int32_t from = needy;
            double least = ABSENT;
            for (int32_t layer = 0; layer < pool_.layers; layer++) {
                if ((layer == needy || layers_[layer].residents > floor_) && policy_->take_stale(layer)) find_head(layer);
                if (offers_[layer] < least) least = offers_[from = layer];
            }
            if (layers_[needy].rank <= least) from = needy;  // which may always give, down to nothing
            const int32_t head = layers_[from].head;
            if (head == NOBODY) return head;
            if (in_use(head)) policy_->mark_stale(from);  // since it was found
            else if (is_transient(head) || !policy_->reconsider(head)) return head;
        }
    }
    bool has_free() const { return !free_.empty(); }

    // The slot of a resident expert is free from now on.
    void release(int32_t expert) {
        leave(expert);
        free_.push_back(std::exchange(books_.slots[expert], NOWHERE));
        std::push_heap(free_.begin(), free_.end(), std::greater<int32_t>());
        books_.arriving[expert] = 0;
    }

    bool is_resident(int32_t expert) const { return books_.slots[expert] != NOWHERE; }
    bool is_transient(int32_t expert) const { return transient_[expert] != NEVER; }

    void demote(int32_t expert) {
        if (!is_resident(expert) || is_transient(expert)) return;
        policy_->remove(expert);
        join_transient(expert);
    }

    void promote(int32_t expert) {
        if (!is_transient(expert)) return;
        leave_transient(expert);
        policy_->insert(expert);
    }

    void tick() { policy_->tick(); }

    // All residents lie in slots below `slots`.
    void resize(int64_t slots) {
        pool_.slots = slots;
        find_free();
        policy_->resize(slots);
    }

    // All residents, who leaves first comes first, whoever is in use and whatever the floors are.
    void order(int32_t* experts) const {
        struct Place {
            double rank, key;
            int32_t expert;
            bool operator<(const Place& other) const { return rank != other.rank ? rank < other.rank : key < other.key; }
        };
        std::vector<Place> residents;
        for (int32_t expert = 0; expert < pool_.size(); expert++)
            if (is_resident(expert)) residents.push_back({rank(expert), policy_->key(expert), expert});
        std::stable_sort(residents.begin(), residents.end());
        for (const Place& resident : residents) *experts++ = resident.expert;
    }

   private:
    // Of who is not transient. Those who are have ranks from -2^52 on, below all that a policy gives.
    static constexpr double NEVER = 0.0, FIRST = -4503599627370496.0;

    struct Layer {
        int64_t residents = 0, transient = 0;
        int32_t head = NOBODY;  // who leaves next, unless the policy has marked the layer
        double rank = ABSENT;   // of the head
    };

    bool in_use(int32_t expert) const { return books_.locks[expert] != 0 || books_.arriving[expert] != 0; }

    double rank(int32_t expert) const { return is_transient(expert) ? transient_[expert] : policy_->rank(expert); }

    // What the layer gives to others.
    void offer(int32_t layer) { offers_[layer] = layers_[layer].residents > floor_ ? layers_[layer].rank : ABSENT; }

    // Of the layer's residents that are not in use. Who is passed over may leave as soon as nobody uses it.
    void find_head(int32_t layer) {
        Layer& known = layers_[layer];
        const auto used = [this](int32_t expert) { return in_use(expert); };
        const auto transient = [this](int32_t expert) { return is_transient(expert) ? transient_[expert] : ABSENT; };
        const auto settled = [this](int32_t expert) { return policy_->key(expert); };
        bool passed = false;
        known.head = known.transient > 0 ? policy_->first(layer, transient, used, passed) : NOBODY;
        if (known.head == NOBODY) known.head = policy_->first(layer, settled, used, passed);
        known.rank = known.head == NOBODY ? ABSENT : rank(known.head);
        offer(layer);
        if (passed) policy_->mark_stale(layer);
    }

    void touch(int32_t layer, bool promoting) {
        if (layers_[layer].transient == 0) return policy_->touch_all(hits_);
        for (const int32_t expert : hits_) {
            if (!is_transient(expert)) policy_->touch_all({expert});
            else if (promoting) promote(expert);
        }
    }

    void join_transient(int32_t expert) {
        transient_[expert] = ++clock_;
        layers_[expert / pool_.experts].transient++;
        policy_->mark_stale(expert / pool_.experts);
    }

    void leave_transient(int32_t expert) {
        transient_[expert] = NEVER;
        layers_[expert / pool_.experts].transient--;
        policy_->mark_stale(expert / pool_.experts);
    }

    // The order of who leaves next; the slot is left to the caller.
    void leave(int32_t expert) {
        if (is_transient(expert)) leave_transient(expert);
        else policy_->remove(expert);
        layers_[expert / pool_.experts].residents--;
        offer(expert / pool_.experts);
    }

    int32_t take_free() {
        std::pop_heap(free_.begin(), free_.end(), std::greater<int32_t>());
        const int32_t slot = free_.back();
        free_.pop_back();
        return slot;
    }

    void find_free() {
        std::vector<uint8_t> taken(pool_.slots, 0);
        for (int32_t expert = 0; expert < pool_.size(); expert++)
            if (is_resident(expert)) taken[books_.slots[expert]] = 1;
        free_.clear();
        for (int32_t slot = 0; slot < static_cast<int32_t>(pool_.slots); slot++)
            if (!taken[slot]) free_.push_back(slot);  // ascending, which is a heap
    }

    static int32_t* drop_repeats(int32_t* first, int32_t* last) {
        int32_t* end = first;
        for (int32_t* item = first; item != last; item++)
            if (std::find(first, end, *item) == end) *end++ = *item;
        return end;
    }

    SlotPool pool_;
    const int32_t floor_;
    const std::unique_ptr<Policy> policy_;
    const Books books_;
    std::vector<double> transient_;  // by expert: the rank, ascending as they became so
    std::vector<Layer> layers_;
    std::vector<double> offers_;          // by layer: the head's rank, ABSENT at the floor
    std::vector<int32_t> free_;           // a heap, the lowest slot on top
    std::vector<int32_t> hits_, misses_;  // of the latest lookup
    double clock_ = FIRST;
};

}  // namespace pm
#endif
