// How soon each expert is expected to be used: see cache/analog.py. Operations are in the order of the Python, so that
// both round alike; votes are whole numbers, which add up to the same in any order.
#ifndef POCKETMOE_ESTIMATES_H
#define POCKETMOE_ESTIMATES_H

#include <algorithm>
#include <array>
#include <cmath>

#include "forecast.h"
#include "sets.h"

namespace pm {

class Estimates {
   public:
    // `ranks`: by expert, layer after layer, ABSENT for who is not resident; the owner's, who may make any ABSENT.
    Estimates(const SlotPool& pool, double* ranks)
        : cycle_(pool.cycle),
          sharpness_(SHARPNESS / std::sqrt(static_cast<double>(std::max<int64_t>(pool.cycle, 1)))),
          likeness_(WINDOW, 0) {
        for (int32_t layer = 0; layer < pool.layers; layer++, ranks += pool.experts)
            layers_.emplace_back(ranks, pool.experts);
    }

    // Residents of a layer are chosen in this token.
    void use(int32_t index, const int32_t* experts, int64_t count) {
        Layer& layer = layers_[index];
        const bool begins = layer.turn != token_;
        if (begins) enter(layer);
        for (int64_t i = 0; i < count; i++)
            if (layer.last[experts[i]] < token_) choose(layer, experts[i]);
        if (begins) estimate(layer);
        for (int64_t i = 0; i < count; i++) {
            const int32_t expert = experts[i];
            const double instant = INSTANT * static_cast<double>(used_++);
            layer.last[expert] = token_ + instant;
            layer.ranks[expert] = instant - wait(layer.uses[expert], layer.shares[expert], SPAN) - token_;
        }
    }

    void tick() {
        if (used_ > 0) remember(used_ <= cycle_);
        token_ += 1.0;
        used_ = 0;
    }

   private:
    static constexpr int64_t WINDOW = 512, NEAREST = 8, AHEAD = 4;  // tokens
    static constexpr double VOTE = 2.0, SHARPNESS = 1.5, NEVER = -1e6;
    static constexpr double UNIT = 1 << 20;  // a vote of the nearest
    static constexpr uint16_t TWICE = 2;     // counts what this token has chosen

    struct Layer {
        Layer(double* ranks, int32_t experts) : ranks(ranks), experts(experts) {}

        double* ranks;
        int32_t experts;
        double turn = -1.0;                        // the token of the latest
        std::vector<double> uses, last, shares;  // by expert: decayed uses, the latest, and the share of the votes
        Sets used;                               // by expert: the tokens that chose it, of a ring
        Sets latest;                             // the same by token
        std::vector<int32_t> chosen;             // in this token
        std::vector<uint16_t> now, then;         // [WINDOW]: experts in common in this token, and in the one before
    };

    struct Similar {
        int32_t alike;
        int64_t at;
        bool operator<(const Similar& other) const {
            return alike != other.alike ? alike < other.alike : at < other.at;
        }
    };

    using Nearest = std::array<Similar, NEAREST>;

    // From now on the layer counts with what it chooses in this token, no longer with what it chose in the last.
    void enter(Layer& layer) {
        if (layer.latest.empty()) {  // memory only for layers that are used
            const size_t experts = layer.experts;
            layer.uses.assign(experts, 0.0);
            layer.last.assign(experts, NEVER);
            layer.shares.assign(experts, 0.0);
            layer.used.assign(layer.experts, WINDOW);
            layer.now.assign(WINDOW, 0);
            layer.then.assign(WINDOW, 0);
            layer.latest.assign(WINDOW, layer.experts);
        }
        for (int64_t at = 0; at < WINDOW; at++) likeness_[at] -= layer.then[at];
        const double kept = left_of_use(token_ - std::exchange(layer.turn, token_));
        for (double& uses : layer.uses) uses *= kept;
    }

    void choose(Layer& layer, int32_t expert) {
        layer.used.each(expert, [&](int64_t at) {
            layer.now[at] += 1;
            likeness_[at] += TWICE;
        });
        layer.chosen.push_back(expert);
        layer.uses[expert] += 1.0;
    }

    // Of those who are not chosen in this turn. All are computed, so that compilers take several at a time.
    void estimate(Layer& layer) {
        vote(layer);
        double* const ranks = layer.ranks;
        const double *const uses = layer.uses.data(), *const last = layer.last.data(), *const shares = layer.shares.data();
        const double token = token_;
        for (int32_t expert = 0; expert < layer.experts; expert++) {
            const double span = SPAN * std::sqrt(token - last[expert] + 1.0);
            const double rank = -wait(uses[expert], shares[expert], span) - token;
            ranks[expert] = ranks[expert] == ABSENT ? ABSENT : rank;
        }
    }

    // Tokens until the next use, of which one in `span` is expected for each past one.
    static double wait(double uses, double share, double span) { return span / (uses + DOUBT + VOTE * share * span); }

    // Each expert's share, 0 to 1, of the votes for what comes next.
    void vote(Layer& layer) {
        double total = 0.0;
        votes_.assign(layer.experts, 0.0);
        const Nearest nearest = find_nearest();
        for (const Similar& token : nearest) {
            if (token.alike == 0) continue;
            const double weight = std::exp(-sharpness_ * (nearest.back().alike - token.alike));
            const int64_t votes = std::llround(UNIT * weight);
            const int64_t known = (tokens_ - token.at - 1 + WINDOW) % WINDOW;  // tokens after it
            for (int64_t ahead = 1; ahead <= std::min(AHEAD, known); ahead++) {
                const double each = static_cast<double>(votes << (AHEAD - ahead));
                total += each;
                layer.latest.each((token.at + ahead) % WINDOW, [&](int64_t expert) { votes_[expert] += each; });
            }
        }
        const double all = std::max(total, 1.0), *const votes = votes_.data();
        double* const shares = layer.shares.data();
        for (int32_t expert = 0; expert < layer.experts; expert++) shares[expert] = votes[expert] / all;
    }

    // Of all tokens those most like this one, the most like it last.
    Nearest find_nearest() const {
        const int64_t now = tokens_ % WINDOW, before = (now + WINDOW - 1) % WINDOW;  // nothing has come after those
        Nearest nearest;
        nearest.fill({0, -1});
        for (int64_t at = 0; at < WINDOW; at++) {
            if (likeness_[at] < std::max(nearest.front().alike, 1) || at == now || at == before) continue;
            const Similar token = {likeness_[at], at};
            const auto place = std::lower_bound(nearest.begin(), nearest.end(), token);
            std::move(nearest.begin() + 1, place, nearest.begin());
            *(place - 1) = token;
        }
        return nearest;
    }

    // The token joins the latest ones, unless it is a prompt, which is like no token.
    void remember(bool as_token) {
        const int64_t now = tokens_ % WINDOW;
        std::fill(likeness_.begin(), likeness_.end(), uint16_t{0});
        for (Layer& layer : layers_) {
            if (layer.latest.empty()) continue;
            if (as_token) {
                layer.latest.each(now, [&](int64_t expert) { layer.used.erase(expert, now); });
                layer.latest.clear(now);
                for (const int32_t expert : layer.chosen) {
                    layer.used.insert(expert, now);
                    layer.latest.insert(now, expert);
                }
                std::rotate_copy(layer.now.begin(), layer.now.end() - 1, layer.now.end(), layer.then.begin());
            } else {
                std::fill(layer.then.begin(), layer.then.end(), uint16_t{0});
            }
            std::fill(layer.now.begin(), layer.now.end(), uint16_t{0});
            layer.chosen.clear();
            for (int64_t at = 0; at < WINDOW; at++) likeness_[at] += layer.then[at];
        }
        tokens_ += as_token;
    }

    const int64_t cycle_;
    const double sharpness_;  // overlaps spread like the root of what can overlap
    std::vector<Layer> layers_;
    std::vector<uint16_t> likeness_;  // [WINDOW]: experts in common with this token and, in other layers, the last
    std::vector<double> votes_;       // of one layer; whole numbers
    int64_t tokens_ = 0;              // that were remembered
    int64_t used_ = 0;                // experts in this token
    double token_ = 0.0;
};

}  // namespace pm
#endif
