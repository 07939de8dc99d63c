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
        : cycle_(std::max<int64_t>(pool.cycle, 1)),
          spread_(std::sqrt(static_cast<double>(cycle_))),
          likeness_(WINDOW, 0) {
        for (int32_t layer = 0; layer < pool.layers; layer++, ranks += pool.experts)
            layers_.emplace_back(ranks, pool.experts);
    }

    // Residents of a layer are chosen in this token.
    void use(int32_t index, const int32_t* experts, int64_t count) {
        Layer& layer = layers_[index];
        const bool begins = layer.turn < token_;
        if (begins) enter(layer);
        for (int64_t i = 0; i < count; i++)
            if (layer.last[experts[i]] < token_) choose(layer, experts[i]);
        if (begins) estimate(layer);
        for (int64_t i = 0; i < count; i++) {
            layer.last[experts[i]] = time();
            used_++;
            reconsider(index, experts[i]);
        }
    }

    // Gives a resident its rank by the votes as they are now; returns whether it had another one.
    bool reconsider(int32_t index, int32_t expert) {
        Layer& layer = layers_[index];
        const int64_t over = layer.turn >= token_;  // the layer's turn: it uses nothing more before the next token
        int64_t votes = 0;
        for (const Voter& voter : voters_)  // a factor of 0 or 1, but quicker
            votes += voter.votes & -static_cast<int64_t>(layer.used.has(expert, (voter.at + over) & (WINDOW - 1)));
        const double rank = this->rank(layer, expert, static_cast<double>(votes));
        return std::exchange(layer.ranks[expert], rank) != rank;
    }

    void tick() {
        if (used_ > 0) remember(used_ <= cycle_);
        token_ += 1.0;
        used_ = 0;
    }

   private:
    static constexpr int64_t WINDOW = 512, NEAREST = 8, AHEAD = 6;  // tokens
    static constexpr double VOTE = 2.0, NEVER = -1e6;
    static constexpr double UNIT = 1 << 20;   // a vote of the nearest
    static constexpr uint16_t THREEFOLD = 3;  // counts what this token has chosen

    struct Layer {
        Layer(double* ranks, int32_t experts) : ranks(ranks), experts(experts) {}

        double* ranks;
        int32_t experts;
        double turn = -1.0;                // when the latest began
        std::vector<double> uses, last;    // by expert: decayed uses, and the latest
        Sets used;                         // by expert: the tokens that chose it, of a ring
        Sets latest;                       // the same by token
        std::vector<uint16_t> now, then;   // [WINDOW]: experts in common in this token, and in the one before
    };

    struct Similar {
        int32_t alike;
        int64_t at;
        bool operator<(const Similar& other) const {
            return alike != other.alike ? alike < other.alike : at < other.at;
        }
    };

    // Votes with what it used for what this token uses, and for the next with what the token after it used.
    struct Voter {
        int64_t at, votes;
    };

    using Nearest = std::array<Similar, NEAREST>;

    // From now on the layer counts with what it chooses in this token, no longer with what it chose in the last.
    void enter(Layer& layer) {
        if (layer.latest.empty()) {  // memory only for layers that are used
            const size_t experts = layer.experts;
            layer.uses.assign(experts, 0.0);
            layer.last.assign(experts, NEVER);
            layer.used.assign(layer.experts, WINDOW);
            layer.now.assign(WINDOW, 0);
            layer.then.assign(WINDOW, 0);
            layer.latest.assign(WINDOW, layer.experts);
        }
        for (int64_t at = 0; at < WINDOW; at++) likeness_[at] -= layer.then[at];
        const double kept = left_of_use(time() - layer.turn);
        layer.turn = time();
        for (double& uses : layer.uses) uses *= kept;
    }

    void choose(Layer& layer, int32_t expert) {
        layer.used.each(expert, [&](int64_t at) {
            layer.now[at] += 1;
            likeness_[at] += THREEFOLD;
        });
        layer.used.insert(expert, now());
        layer.latest.insert(now(), expert);
        layer.uses[expert] += 1.0;
    }

    // New votes, and new ranks for the layer's residents. All are computed, so that compilers take several at a time.
    void estimate(Layer& layer) {
        poll();
        votes_.assign(layer.experts, 0.0);
        for (const Voter& voter : voters_) {
            const double votes = static_cast<double>(voter.votes);
            layer.latest.each((voter.at + 1) % WINDOW, [&](int64_t expert) { votes_[expert] += votes; });
        }
        double* const ranks = layer.ranks;
        const double* const votes = votes_.data();
        for (int32_t expert = 0; expert < layer.experts; expert++) {
            const double rank = this->rank(layer, expert, votes[expert]);
            ranks[expert] = ranks[expert] == ABSENT ? ABSENT : rank;
        }
    }

    // Minus the token of the next use, of which one in `span` tokens is expected for each past one.
    double rank(const Layer& layer, int32_t expert, double votes) const {
        const double span = SPAN * std::sqrt(layer.turn - layer.last[expert] + 1.0);
        return -span / (layer.uses[expert] + DOUBT + VOTE * (votes / all_) * span) - layer.turn;
    }

    // Who votes for this token, and how much they count.
    void poll() {
        voters_.clear();
        int64_t all = 0;
        const Nearest nearest = find_nearest();
        for (const Similar& token : nearest) {
            if (token.alike == 0) continue;
            const int64_t votes = std::llround(UNIT * std::exp((token.alike - nearest.back().alike) / spread_));
            const int64_t age = (now() - token.at + WINDOW) % WINDOW;
            for (int64_t ahead = 0; ahead < std::min(AHEAD, age); ahead++) {
                voters_.push_back({(token.at + ahead) % WINDOW, votes << (AHEAD - ahead)});
                all += voters_.back().votes;
            }
        }
        all_ = static_cast<double>(std::max<int64_t>(all, 1));
    }

    // Of all tokens those most like this one, the most like it last.
    Nearest find_nearest() const {
        Nearest nearest;
        nearest.fill({0, -1});
        const int64_t present = now();
        for (int64_t at = 0; at < WINDOW; at++) {
            if (likeness_[at] < std::max(nearest.front().alike, 1) || at == present) continue;
            const Similar token = {likeness_[at], at};
            const auto place = std::lower_bound(nearest.begin(), nearest.end(), token);
            std::move(nearest.begin() + 1, place, nearest.begin());
            *(place - 1) = token;
        }
        return nearest;
    }

    // The token joins the latest ones, unless it is a prompt, which is like no token. The next takes the oldest's place.
    void remember(bool as_token) {
        tokens_ += as_token;
        for (Voter& voter : voters_) voter.at = (voter.at + 1) % WINDOW;
        std::fill(likeness_.begin(), likeness_.end(), uint16_t{0});
        for (Layer& layer : layers_) {
            if (layer.latest.empty()) continue;
            layer.latest.each(now(), [&](int64_t expert) { layer.used.erase(expert, now()); });
            layer.latest.clear(now());
            std::rotate_copy(layer.now.begin(), layer.now.end() - 1, layer.now.end(), layer.then.begin());
            if (!as_token) std::fill(layer.then.begin(), layer.then.end(), uint16_t{0});
            std::fill(layer.now.begin(), layer.now.end(), uint16_t{0});
            for (int64_t at = 0; at < WINDOW; at++) likeness_[at] += layer.then[at];
        }
    }

    int64_t now() const { return tokens_ % WINDOW; }  // the place of this token

    // In tokens: this one, and how much of it has been used.
    double time() const {
        return token_ + static_cast<double>(std::min(used_, cycle_ - 1)) / static_cast<double>(cycle_);
    }

    const int64_t cycle_;
    const double spread_;  // of the experts in common: the root of what can be
    std::vector<Layer> layers_;
    std::vector<uint16_t> likeness_;  // [WINDOW]: experts in common with this token and, in other layers, the last
    std::vector<double> votes_;       // of one layer; whole numbers
    std::vector<Voter> voters_;
    double all_ = 1.0;                // votes, one at least
    int64_t tokens_ = 0;              // that were remembered
    int64_t used_ = 0;                // experts in this token
    double token_ = 0.0;
};

}  // namespace pm
#endif
