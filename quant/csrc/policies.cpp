// The policies by name: see cache/policy.py.
#include <cstring>

#include "analog.h"
#include "forecast.h"
#include "published.h"

namespace pm {
namespace {

template <class Kind>
std::unique_ptr<Policy> make(const SlotPool& pool) {
    return std::make_unique<Kind>(pool);
}

struct Named {
    const char* name;
    std::unique_ptr<Policy> (*make)(const SlotPool& pool);
};

constexpr Named POLICIES[] = {
    {"analog", make<Analog>}, {"forecast", make<Forecast>}, {"lru", make<Lru>},
    {"lfu", make<Lfu>},       {"slru", make<Slru>},         {"lru2", make<Lru2>},
    {"lfru", make<Lfru>},     {"wtinylfu", make<WTinyLfu>}, {"fifo", make<Fifo>},
};

}  // namespace

std::unique_ptr<Policy> make_policy(const char* name, const SlotPool& pool) {
    for (const Named& policy : POLICIES)
        if (std::strcmp(policy.name, name) == 0) return policy.make(pool);
    return nullptr;
}

}  // namespace pm
