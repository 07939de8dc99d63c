// Belady's rule on an estimate of the next use: see cache/forecast.py. Operations are in the order of the Python, so
// that both round alike.
#ifndef POCKETMOE_FORECAST_H
#define POCKETMOE_FORECAST_H

#include <cmath>

#include "policy.h"

namespace pm {

constexpr double HALF_LIFE = 48.0, SPAN = 73.0, DOUBT = 0.5;
constexpr double INSTANT = 1e-6;  // tokens between two requests

// What is left of a use after `age` tokens. The base is hidden because some compilers make exp2(x) of pow(2, x), which
// rounds differently.
inline double left_of_use(double age) {
    volatile double base = 2.0;
    return std::pow(base, -age / HALF_LIFE);
}

struct Forecast : Policy {
    static constexpr double FADE = 6.0;

    struct Uses {
        double count, last;  // decayed count at the last use, and when that was
    };

    explicit Forecast(const SlotPool& pool) : Policy(pool), uses(pool.size(), {0.0, -1.0}), turns(pool.layers, 0.0) {}

    void insert(int32_t expert) override {
        now += INSTANT;
        turns[layer_of(expert)] = token;
        Uses& past = uses[expert];
        const double kept = past.last < 0.0 ? 0.0 : past.count * left_of_use(now - past.last);
        past = {1.0 + kept, now};
        set_key(expert, std::log2(past.count) + now / FADE);
    }
    void touch(int32_t expert) override { insert(expert); }
    void tick() override { now = token += 1.0; }

    // Ranks never fall along the order of a layer, although estimates may.
    double rank(int32_t expert) const override {
        const int32_t layer = layer_of(expert);
        const double turn = turns[layer];
        double least = -ABSENT;
        for (int32_t other = first_of(layer); other < first_of(layer + 1); other++) {
            if (key(other) > key(expert)) continue;
            const double age = turn - uses[other].last;
            const double wait = SPAN * std::sqrt(age + 1.0) / (uses[other].count * left_of_use(age) + DOUBT);
            least = std::max(least, -turn - wait);
        }
        return least;
    }

    std::vector<Uses> uses;
    std::vector<double> turns;  // each layer's latest token
    double token = 0.0, now = 0.0;
};

}  // namespace pm
#endif
