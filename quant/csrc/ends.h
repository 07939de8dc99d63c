// How the attention half of a layer begins and ends, whatever the attention between; for code that holds the
// context's lock.
#ifndef POCKETMOE_ENDS_H
#define POCKETMOE_ENDS_H

#include "context.h"

namespace pm {

constexpr int64_t HEADS_PER_ITEM = 4;  // that share keys and values; few enough that many cores find work

// Scratch that `finish` needs, in floats.
int64_t ends_floats(const pm_ends& ends, int64_t hidden);

// x += delta, normed = norm(x).
void begin(pm_context& context, const pm_ends& ends, int64_t hidden, const pm_token& token);

// x += output(attended); then the guess, the norm and the router's choice.
void finish(pm_context& context, const pm_ends& ends, const float* attended, float* scratch, const pm_token& token);

// The place of the value with that index in keys or values.
inline void* cached(const pm_token& token, void* values, int64_t index) {
    return static_cast<uint8_t*>(values) + index * (token.half ? 2 : 4);
}

// Whether the place for the token is one.
inline bool has_room(const pm_token& token) {
    return token.first >= 0 && token.position >= token.first && token.position < token.capacity;
}

}  // namespace pm
#endif
