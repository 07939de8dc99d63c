// pm_cache_*: the books of a tier of experts while a model runs.
#include "cache.h"

#include <new>

#include "pocketmoe_cpu.h"

struct pm_cache {
    pm::SlotPool pool;
    pm::Cache cache;

    bool has(int32_t layer, const int32_t* indices, int64_t count) const {
        const auto exists = [this](int32_t index) { return index >= 0 && index < pool.experts; };
        return layer >= 0 && layer < pool.layers && std::all_of(indices, indices + count, exists);
    }
    bool holds(int32_t expert) const { return expert >= 0 && expert < pool.size() && cache.is_resident(expert); }
};

namespace {

template <class Call>
int32_t guarded(bool valid, const Call& call) try {
    if (!valid) return PM_BAD_ARGUMENT;
    call();
    return PM_OK;
} catch (const std::bad_alloc&) {
    return PM_OUT_OF_MEMORY;
}

}  // namespace

extern "C" {

pm_cache* pm_cache_create(const char* policy, const pm_cache_spec* spec) try {
    const pm::SlotPool pool = {spec->layers, spec->experts, spec->capacity, spec->cycle};
    std::unique_ptr<pm::Policy> made = pm::make_policy(policy, pool);
    if (!made) return nullptr;
    const pm::Books books = {spec->slots, spec->locks, spec->arriving};
    return new pm_cache{pool, pm::Cache(pool, spec->floor, std::move(made), books)};
} catch (const std::bad_alloc&) {
    return nullptr;
}

void pm_cache_destroy(pm_cache* cache) { delete cache; }

int64_t pm_cache_count(const pm_cache* cache) { return cache->cache.count(); }

int32_t pm_cache_lookup(pm_cache* cache, int32_t layer, int32_t* indices, int64_t count, int32_t promote,
                        int32_t* misses) {
    int32_t hits = 0;
    const int32_t status = guarded(cache->has(layer, indices, count), [&] {
        const pm::Cache::Found found = cache->cache.lookup(layer, indices, count, promote != 0);
        hits = found.hits;
        *misses = found.misses;
    });
    return status == PM_OK ? hits : -status;
}

int32_t pm_cache_use(pm_cache* cache, int32_t steps, const int32_t* layers, const int32_t* counts, int32_t* indices) {
    for (int32_t step = 0; step < steps; indices += counts[step++]) {
        int32_t misses = 0;
        const int32_t hits = pm_cache_lookup(cache, layers[step], indices, counts[step], true, &misses);
        if (hits != counts[step]) return hits < 0 ? -hits : PM_BAD_ARGUMENT;
    }
    return PM_OK;
}

int32_t pm_cache_admit(pm_cache* cache, int32_t layer, const int32_t* indices, int64_t count, int32_t transient,
                       int32_t* slots, int32_t* evicted) {
    int32_t admitted = 0;
    const int32_t status = guarded(cache->has(layer, indices, count), [&] {
        for (; admitted < count; admitted++) {
            const int32_t expert = layer * cache->pool.experts + indices[admitted];
            if (cache->cache.is_resident(expert)) return;
            const pm::Cache::Admission admission = cache->cache.admit(expert, transient != 0);
            if (admission.slot == pm::Cache::NOWHERE) return;
            slots[admitted] = admission.slot;
            evicted[admitted] = admission.evicted;
        }
    });
    return status == PM_OK ? admitted : -status;
}

int32_t pm_cache_victim(pm_cache* cache, int32_t layer) {
    if (!cache->has(layer, nullptr, 0) || cache->cache.has_free()) return pm::Cache::NOBODY;
    return cache->cache.victim(layer);
}

int32_t pm_cache_release(pm_cache* cache, int32_t expert) {
    return guarded(cache->holds(expert), [&] { cache->cache.release(expert); });
}

int32_t pm_cache_is_transient(const pm_cache* cache, int32_t expert) {
    return cache->holds(expert) && cache->cache.is_transient(expert);
}

int32_t pm_cache_demote(pm_cache* cache, int32_t expert) {
    return guarded(cache->holds(expert), [&] { cache->cache.demote(expert); });
}

int32_t pm_cache_promote(pm_cache* cache, int32_t expert) {
    return guarded(cache->holds(expert), [&] { cache->cache.promote(expert); });
}

int32_t pm_cache_tick(pm_cache* cache) {
    return guarded(true, [&] { cache->cache.tick(); });
}

int32_t pm_cache_resize(pm_cache* cache, int64_t capacity) {
    return guarded(capacity >= 0, [&] { cache->cache.resize(capacity); });
}

int32_t pm_cache_order(const pm_cache* cache, int32_t* experts) {
    return guarded(true, [&] { cache->cache.order(experts); });
}

}  // extern "C"
