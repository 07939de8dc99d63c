// Eviction policies from the literature: see cache/published.py.
#ifndef POCKETMOE_PUBLISHED_H
#define POCKETMOE_PUBLISHED_H

#include "order.h"

namespace pm {

struct Fifo : LevelledOrder {
    using LevelledOrder::LevelledOrder;
    void insert(int32_t expert) override { place(expert, 0); }
    void touch(int32_t) override {}
};

struct Lru : LevelledOrder {
    using LevelledOrder::LevelledOrder;
    void insert(int32_t expert) override { place(expert, 0); }
    void touch(int32_t expert) override { place(expert, 0); }
};

struct Lfu : LevelledOrder {
    explicit Lfu(const SlotPool& pool) : LevelledOrder(pool), uses(pool) {}
    void insert(int32_t expert) override { place(expert, uses.add(expert)); }
    void touch(int32_t expert) override { insert(expert); }
    void tick() override {
        if (!uses.tick()) return;
        for (const int32_t expert : in_order()) place(expert, uses[expert]);
    }

    UseCounts uses;
};

// What a part of the slots may hold so that at least a cycle is left for the others.
inline int64_t room_of(const SlotPool& pool, double share) {
    const int64_t part = static_cast<int64_t>(static_cast<double>(pool.slots) * share);
    return std::max<int64_t>(0, std::min(part, pool.slots - pool.cycle));
}

struct Slru : LevelledOrder {
    static constexpr double PROTECTED = 0.7;

    explicit Slru(const SlotPool& pool) : LevelledOrder(pool), safe(pool), room(room_of(pool, PROTECTED)) {}
    void insert(int32_t expert) override { place(expert, 0); }
    void touch(int32_t expert) override {
        place(expert, 1);
        safe.push(expert);
        settle();
    }
    void remove(int32_t expert) override {
        LevelledOrder::remove(expert);
        safe.remove(expert);
    }
    void resize(int64_t slots) override {
        Policy::resize(slots);
        room = room_of(pool_, PROTECTED);
        settle();
    }

    void settle() {
        while (safe.size() > room) place(safe.pop(), 0);
    }

    Queue safe;
    int64_t room;
};

struct Lru2 : Policy {
    explicit Lru2(const SlotPool& pool) : Policy(pool), last(pool.size(), 0) {}
    void insert(int32_t expert) override {
        const double before = std::exchange(last[expert], ++clock);
        set_key(expert, before > 0 ? LEVEL + before : clock);
    }
    void touch(int32_t expert) override { insert(expert); }

    std::vector<double> last;
    double clock = 0;
};

struct Lfru : LevelledOrder {
    static constexpr double PRIVILEGED = 0.5;

    explicit Lfru(const SlotPool& pool)
        : LevelledOrder(pool), uses(pool), privileged(pool), room(room_of(pool, PRIVILEGED)) {}
    void insert(int32_t expert) override { place(expert, uses.add(expert)); }
    void touch(int32_t expert) override {
        uses.add(expert);
        place(expert, UseCounts::MOST + 1);
        privileged.push(expert);
        settle();
    }
    void remove(int32_t expert) override {
        LevelledOrder::remove(expert);
        privileged.remove(expert);
    }
    void tick() override {
        if (!uses.tick()) return;
        for (const int32_t expert : in_order())
            if (!privileged.holds(expert)) place(expert, uses[expert]);
    }
    void resize(int64_t slots) override {
        Policy::resize(slots);
        room = room_of(pool_, PRIVILEGED);
        settle();
    }

    void settle() {
        while (privileged.size() > room) {
            const int32_t oldest = privileged.pop();
            place(oldest, uses[oldest]);
        }
    }

    UseCounts uses;
    Queue privileged;
    int64_t room;
};

struct WTinyLfu : LevelledOrder {
    static constexpr double WINDOW = 0.01, PROTECTED = 0.8;
    enum Part { REJECTED, PROBATION, PROTECTED_PART, WINDOW_PART, PARTS };

    explicit WTinyLfu(const SlotPool& pool) : LevelledOrder(pool), uses(pool), parts(PARTS, Queue(pool)) {
        WTinyLfu::resize(pool.slots);
    }
    void insert(int32_t expert) override {
        uses.add(expert);
        move(expert, WINDOW_PART);
        settle();
    }
    void touch(int32_t expert) override {
        uses.add(expert);
        move(expert, parts[WINDOW_PART].holds(expert) ? WINDOW_PART : PROTECTED_PART);
        settle();
    }
    void remove(int32_t expert) override {
        LevelledOrder::remove(expert);
        for (Queue& part : parts) part.remove(expert);
    }
    void tick() override { uses.tick(); }
    void resize(int64_t slots) override {
        Policy::resize(slots);
        window_room = std::max<int64_t>(1, static_cast<int64_t>(static_cast<double>(slots) * WINDOW));
        room = static_cast<int64_t>(static_cast<double>(slots - window_room) * PROTECTED);
        settle();
    }

    void settle() {
        const Queue &probation = parts[PROBATION], &safe = parts[PROTECTED_PART], &window = parts[WINDOW_PART];
        while (window.size() > window_room) {
            const int32_t newcomer = window.oldest();
            const Queue& rivals = probation.size() ? probation : safe;
            const bool loses = rivals.size() && uses[newcomer] < uses[rivals.oldest()];
            move(newcomer, loses ? REJECTED : PROBATION);
        }
        while (safe.size() > room) move(safe.oldest(), PROBATION);
    }
    void move(int32_t expert, Part to) {
        for (Queue& part : parts) part.remove(expert);
        parts[to].push(expert);
        place(expert, to);
    }

    UseCounts uses;
    std::vector<Queue> parts;
    int64_t window_room, room;
};

}  // namespace pm
#endif
