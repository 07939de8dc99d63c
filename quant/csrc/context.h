// A context: the pool, the instruction set, and scratch memory that grows and is kept.
#ifndef POCKETMOE_CONTEXT_H
#define POCKETMOE_CONTEXT_H

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>

#include "isa.h"
#include "pocketmoe_cpu.h"
#include "pool.h"

namespace pm {

// Memory for trivially constructible elements, aligned to a cache line; contents are lost when it grows.
class Scratch {
public:
    Scratch() = default;
    ~Scratch() { release(); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    template <typename T>
    T* get(int64_t count) {
        const size_t wanted = static_cast<size_t>(count) * sizeof(T);
        if (wanted > size_) {
            release();
            const size_t size = wanted + wanted / 4;
            data_ = ::operator new(size, std::align_val_t(64));  // throws std::bad_alloc; the API functions catch it
            size_ = size;
        }
        return static_cast<T*>(data_);
    }

private:
    void release() {
        if (data_) ::operator delete(data_, std::align_val_t(64));
        data_ = nullptr;
        size_ = 0;
    }

    void* data_ = nullptr;
    size_t size_ = 0;
};

}  // namespace pm

struct pm_context {
    std::mutex mutex;
    const pm::Isa* isa = nullptr;
    std::unique_ptr<pm::Pool> pool;
    pm::Scratch tokens;    // quantised input rows
    pm::Scratch hidden;    // quantised activations between the projections
    pm::Scratch progress;  // per job: counters and item ranges
    pm::Scratch floats;    // a token's queries, scores and the like
    pm::Scratch parts;     // a token's experts: rows, places, jobs and outputs
};

#endif
