// Belady's rule on an estimate that similar tokens have a part in: see cache/analog.py. Operations are in the order of
// the Python, so that both round alike.
#ifndef POCKETMOE_ANALOG_H
#define POCKETMOE_ANALOG_H

#include <algorithm>
#include <cmath>

#include "forecast.h"

namespace pm {

// The experts of the latest tokens, and what came after those that were most like the last.
class Lookback {
   public:
    explicit Lookback(const SlotPool& pool)
        : stride_((pool.cycle + COMPARED - 1) / COMPARED), chosen_(WINDOW), used_(pool.size() * WINDOW, 0) {
        const double sharpness = 2.0 / std::sqrt(static_cast<double>(pool.cycle / stride_));
        for (int32_t fewer = 0; fewer <= COMPARED; fewer++) weights_.push_back(std::exp(-sharpness * fewer));
    }

    // A token has chosen these. Adds each expert's share of the votes for what comes after the next one.
    void vote(const std::vector<int32_t>& chosen, std::vector<double>& shares) {
        const int64_t now = add(chosen);
        const std::vector<Similar> nearest = nearest_to(chosen, now);
        double total = 0.0;
        for (const Similar& token : nearest)
            for (int64_t ahead = 0; ahead < AHEAD; ahead++) total += votes(token, nearest.back(), now, ahead);
        for (const Similar& token : nearest) {
            for (int64_t ahead = 0; ahead < AHEAD; ahead++) {
                const double each = votes(token, nearest.back(), now, ahead) / std::max(total, 1e-9);
                if (each == 0.0) continue;
                for (const int32_t expert : chosen_[(token.at + AFTER + ahead) % WINDOW]) shares[expert] += each;
            }
        }
    }

   private:
    static constexpr int64_t WINDOW = 512, NEAREST = 8, COMPARED = 128;
    static constexpr int64_t AFTER = 2, AHEAD = 4;  // the first token after a similar one that votes; how many do
    static constexpr double WEIGHTS[AHEAD] = {1.0, 0.5, 0.25, 0.125};

    struct Similar {
        int32_t alike;  // experts in common
        int64_t at;
        bool operator<(const Similar& other) const {
            return alike != other.alike ? alike < other.alike : at < other.at;
        }
    };

    int64_t add(const std::vector<int32_t>& chosen) {
        const int64_t now = tokens_++ % WINDOW;
        for (const int32_t expert : chosen_[now]) used_[expert * WINDOW + now] = 0;
        for (const int32_t expert : chosen) used_[expert * WINDOW + now] = 1;
        chosen_[now] = chosen;
        return now;
    }

    // Of all tokens those most like the one at `now`, the most like it last.
    std::vector<Similar> nearest_to(const std::vector<int32_t>& chosen, int64_t now) const {
        uint8_t alike[WINDOW] = {};
        for (size_t i = 0; i < chosen.size(); i += stride_) {
            const uint8_t* const used = &used_[chosen[i] * WINDOW];
            for (int64_t at = 0; at < WINDOW; at++) alike[at] += used[at];
        }
        alike[now] = alike[(now + WINDOW - 1) % WINDOW] = 0;  // nothing that votes has come after them
        std::vector<Similar> nearest;
        for (int64_t at = 0; at < WINDOW; at++) {
            const Similar token = {alike[at], at};
            if (nearest.size() == NEAREST) {
                if (!(nearest.front() < token)) continue;
                nearest.erase(nearest.begin());
            }
            nearest.insert(std::upper_bound(nearest.begin(), nearest.end(), token), token);
        }
        return nearest;
    }

    double votes(const Similar& token, const Similar& best, int64_t now, int64_t ahead) const {
        const bool known = (now - token.at + WINDOW) % WINDOW >= AFTER + ahead;
        return known && token.alike ? weights_[best.alike - token.alike] * WEIGHTS[ahead] : 0.0;
    }

    int64_t stride_, tokens_ = 0;
    std::vector<double> weights_;               // by how many experts fewer than the nearest has in common
    std::vector<std::vector<int32_t>> chosen_;  // a ring
    std::vector<uint8_t> used_;                 // the same by expert: [expert, WINDOW], 1 where it was chosen
};

struct Analog : Policy {
    static constexpr double VOTE = 2.0;

    explicit Analog(const SlotPool& pool)
        : Policy(pool),
          lookback(pool),
          count(pool.size(), 0.0),
          last(pool.size(), NEVER),
          shares(pool.size(), 0.0),
          turns(pool.layers, -1.0),
          fade(left_of_use(1.0)) {}

    void insert(int32_t expert) override {
        const int32_t layer = layer_of(expert);
        if (turns[layer] != token) begin_turn(layer);
        const double pace = (uses(expert) + 1.0) / SPAN + VOTE * shares[expert];
        set_key(expert, INSTANT * static_cast<double>(used.size()) - 1.0 / pace);
        used.push_back(expert);
    }
    void touch(int32_t expert) override { insert(expert); }

    void tick() override {
        std::fill(shares.begin(), shares.end(), 0.0);
        if (!used.empty()) lookback.vote(used, shares);
        for (double& decayed : count) decayed *= fade;
        for (size_t i = 0; i < used.size(); i++) {
            count[used[i]] += 1.0;
            last[used[i]] = token + INSTANT * static_cast<double>(i);
        }
        token += 1.0;
        used.clear();
    }

    // Of those who are not chosen in this turn.
    void begin_turn(int32_t layer) {
        turns[layer] = token;
        for (int32_t expert = first_of(layer); expert < first_of(layer + 1); expert++) {
            if (!holds(expert)) continue;
            const double pace = uses(expert) / (SPAN * std::sqrt(token + 1.0 - last[expert])) + VOTE * shares[expert];
            set_key(expert, -1.0 / pace);
        }
    }
    double uses(int32_t expert) const { return count[expert] * fade + DOUBT; }
    double rank(int32_t expert) const override { return key(expert) - turns[layer_of(expert)]; }

    static constexpr double NEVER = -1e6;
    Lookback lookback;
    std::vector<double> count, last;  // decayed uses, and the token of the last one
    std::vector<double> shares;       // of the votes
    std::vector<double> turns;        // each layer's latest token
    std::vector<int32_t> used;        // in this token
    double token = 0.0, fade;
};

}  // namespace pm
#endif
