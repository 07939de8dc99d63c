// Sets of small numbers.
#ifndef POCKETMOE_SETS_H
#define POCKETMOE_SETS_H

#include <algorithm>
#include <cstdint>
#include <vector>
#if defined(_MSC_VER)
#include <intrin.h>
#endif

namespace pm {

inline int64_t lowest_bit(uint64_t word) {
#if defined(_MSC_VER)
    unsigned long at;
    _BitScanForward64(&at, word);
    return at;
#else
    return __builtin_ctzll(word);
#endif
}

// Each as its bits, one set after the other.
class Sets {
   public:
    void assign(int64_t sets, int64_t most) {
        words_ = (most + 63) / 64;
        bits_.assign(sets * words_, 0);
    }
    bool empty() const { return bits_.empty(); }
    bool has(int64_t set, uint64_t number) const { return bits_[set * words_ + number / 64] >> (number % 64) & 1; }
    void insert(int64_t set, int64_t number) { word(set, number) |= bit(number); }
    void erase(int64_t set, int64_t number) { word(set, number) &= ~bit(number); }
    void clear(int64_t set) { std::fill_n(&bits_[set * words_], words_, uint64_t{0}); }
    template <class Visit>
    void each(int64_t set, const Visit& visit) const {
        for (int64_t i = 0; i < words_; i++)
            for (uint64_t left = bits_[set * words_ + i]; left; left &= left - 1) visit(64 * i + lowest_bit(left));
    }

   private:
    uint64_t& word(int64_t set, int64_t number) { return bits_[set * words_ + number / 64]; }
    static uint64_t bit(int64_t number) { return uint64_t{1} << (number % 64); }

    int64_t words_ = 0;
    std::vector<uint64_t> bits_;
};

}  // namespace pm
#endif
