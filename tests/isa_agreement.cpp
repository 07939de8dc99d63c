// Runs every kernel on each instruction set that the library has and this processor can, against the plain C++ one on
// the same random input. Built by tests/test_cross_isa.py, for another processor too; a line for each disagreement.
#include <stdio.h>
#include <stdlib.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <vector>

#include "layout.h"
#include "pocketmoe_cpu.h"

namespace {

// What is handed out stays until the end of a case.
struct Random {
    uint64_t state;
    std::deque<std::vector<float>> kept;
    std::deque<std::vector<uint8_t>> packed;

    explicit Random(uint64_t seed) : state(seed * 2654435761u + 88172645463325252ull) {}
    uint64_t bits() {
        state ^= state << 13, state ^= state >> 7, state ^= state << 17;
        return state >> 16;
    }
    float one() { return static_cast<float>(bits() % 20001) / 10000.0f - 1.0f; }
    float* floats(int64_t n, float scale = 1.0f, float around = 0.0f) {
        kept.emplace_back(n);
        for (float& x : kept.back()) x = around + scale * one();
        return kept.back().data();
    }
    pm_matrix matrix(int32_t rows, int32_t cols, int32_t format, bool bias = false) {
        pm_matrix m = {nullptr, bias ? floats(rows) : nullptr, rows, cols, format, 32};
        if (format == PM_FLOAT32) {
            m.data = floats(int64_t{rows} * cols, 1.7f / sqrtf(static_cast<float>(cols)));
            return m;
        }
        m.data = pack(pm::Matrix(m));
        return m;
    }
    const uint8_t* pack(const pm::Matrix& matrix) {
        packed.emplace_back(matrix.blocks() * matrix.block_bytes());
        fill(matrix, packed.back().data());
        return packed.back().data();
    }
    // All codes are weights but INT8's 0, which would be -128. Scales are near 2^-9 for 8 bits and 2^-5 for 4, minima
    // near -7.5 scales.
    void fill(const pm::Matrix& matrix, uint8_t* to) {
        const int64_t scales = matrix.weight_groups() * pm::ROW_BLOCK;
        for (int64_t b = 0; b < matrix.blocks(); b++, to += matrix.block_bytes()) {
            for (int64_t i = 0; i < matrix.block_bytes(); i++) to[i] = static_cast<uint8_t>(1 + bits() % 255);
            for (int64_t i = 0; i < scales; i++) {
                const uint16_t scale = (matrix.format == PM_INT8 ? 0x1800 : 0x2800) + bits() % 1024;
                const uint16_t minimum = 0xB380 + bits() % 256;
                const uint16_t word = static_cast<uint16_t>(0x9800 + (bits() % 32 << 6) + 26 + bits() % 9);
                if (matrix.format == PM_INT4_ZERO_POINT) memcpy(to + 2 * i, &word, 2);
                else if (matrix.format == PM_MXFP4) to[i] = static_cast<uint8_t>(121 + bits() % 3);
                else memcpy(to + 2 * i, &scale, 2);
                if (matrix.format == PM_INT4_ASYMMETRIC) memcpy(to + 2 * (scales + i), &minimum, 2);
            }
        }
    }
};

struct Result {
    std::vector<float> values;
    std::vector<int32_t> choices;

    void add(const float* x, int64_t n) { values.insert(values.end(), x, x + n); }
};

int failures = 0, compared = 0;

// `bound` is a share of the largest value. Choices count only where no rounding can decide between them.
void compare(const char* isa, const char* what, int index, const Result& want, const Result& got, float bound) {
    float largest = 0, worst = 0;
    for (float x : want.values) largest = std::max(largest, std::fabs(x));
    bool broken = !std::isfinite(largest) || want.values.size() != got.values.size();
    for (size_t i = 0; !broken && i < want.values.size(); i++) {
        const float difference = std::fabs(want.values[i] - got.values[i]);
        broken = !std::isfinite(difference);
        worst = std::max(worst, difference);
    }
    compared++;
    if (!broken && worst <= bound * largest && want.choices == got.choices) return;
    failures++;
    printf("%s: %s %d is off by %g of %g%s\n", isa, what, index, worst, largest,
           want.choices == got.choices ? "" : ", and chose others");
}

// float16 of small integers over 64, so that both sides of a cache start alike.
std::vector<uint8_t> cache(Random& random, int64_t n, bool half) {
    std::vector<uint8_t> bytes(n * (half ? 2 : 4));
    for (int64_t i = 0; i < n; i++) {
        const uint16_t h = static_cast<uint16_t>((random.bits() & 1) << 15 | (0x3000 + random.bits() % 2560));
        const float f = random.one();
        memcpy(bytes.data() + i * (half ? 2 : 4), half ? static_cast<const void*>(&h) : &f, half ? 2 : 4);
    }
    return bytes;
}

float half_value(uint16_t h) {
    const float magnitude = std::ldexp(static_cast<float>((h & 1023) | (h & 0x7C00 ? 1024 : 0)),
                                       std::max(h >> 10 & 31, 1) - 25);
    return h & 0x8000 ? -magnitude : magnitude;
}

// Everything that a step of attention writes.
template <typename Spec, typename Run>
Result step(pm_context* context, const Spec& spec, Run run, Random random, int64_t hidden, int64_t key_size,
            int64_t value_size, int64_t rows, int64_t position, int64_t first, bool half) {
    const int64_t capacity = position + 3;
    std::vector<uint8_t> keys = cache(random, rows * capacity * key_size, half);
    std::vector<uint8_t> values = cache(random, rows * capacity * value_size, half);
    float* const x = random.floats(hidden);
    std::vector<float> normed(hidden), weights(8);
    std::vector<int32_t> experts(8), guess(8);
    pm_token token = {};
    token.x = x, token.delta = random.floats(hidden);
    token.cosine = random.floats(64), token.sine = random.floats(64);
    token.keys = keys.data(), token.values = values.data(), token.half = half;
    token.capacity = capacity, token.first = first, token.position = position;
    token.normed = normed.data(), token.weights = weights.data();
    token.experts = experts.data(), token.guess = guess.data();
    Result result;
    const int32_t status = run(context, &spec, &token);
    if (status) printf("status %d\n", status), failures++;
    for (const std::vector<uint8_t>* bytes : {&keys, &values})
        for (size_t i = 0; i < bytes->size(); i += half ? 2 : 4) {
            uint16_t h;
            float f;
            memcpy(&h, bytes->data() + i, 2), memcpy(&f, bytes->data() + i, half ? 2 : 4);
            result.values.push_back(half ? half_value(h) : f);
        }
    result.add(x, hidden), result.add(normed.data(), hidden), result.add(weights.data(), 8);
    result.choices = experts;
    result.choices.insert(result.choices.end(), guess.begin(), guess.end());
    return result;
}

pm_router router(Random& random, int32_t hidden, int index) {
    pm_router r = {};
    r.weight = random.floats(16 * hidden), r.experts = 16, r.top_k = 4, r.scale = 1.5f;
    r.bias = index % 2 ? random.floats(16) : nullptr;
    r.scoring = index % 3 ? PM_SOFTMAX : PM_SIGMOID, r.normalize = index % 2;
    r.correction = index % 3 ? nullptr : random.floats(16);
    if (index % 4 == 3) r.groups = 4, r.top_groups = 2, r.group_best = 2;
    return r;
}

pm_ends ends(Random& random, pm_matrix output, const pm_router* router) {
    const int32_t hidden = output.rows;
    return {output,  random.floats(hidden, 0.1f, 1.0f), random.floats(hidden, 0.1f, 1.0f), router,
            random.floats(hidden, 0.1f, 1.0f), router, 1e-5f, 1e-5f, 1e-5f};
}

float bound_of(int32_t format, bool half) { return format != PM_FLOAT32 ? 2e-2f : half ? 1e-3f : 2e-5f; }

Result attention(pm_context* context, int index, int32_t format, bool half) {
    // hidden, heads, KV heads, head_dim, rotary pairs, cached, first
    static const int shapes[][7] = {{64, 8, 2, 16, 8, 9, 0},     {37, 3, 3, 14, 5, 21, 0},
                                    {48, 5, 1, 24, 6, 70, 0},    {96, 6, 3, 20, 10, 3, 0},
                                    {80, 4, 2, 64, 32, 150, 90}, {256, 4, 2, 128, 64, 0, 0}};
    const int* const n = shapes[index];
    Random random(index + 1);
    const pm_router choice = router(random, n[0], index);
    pm_attention_spec s = {};
    s.query = random.matrix(n[1] * n[3], n[0], format, index % 2);
    s.key = random.matrix(n[2] * n[3], n[0], format, index % 2);
    s.value = random.matrix(n[2] * n[3], n[0], format, index % 2);
    s.ends = ends(random, random.matrix(n[0], n[1] * n[3], format), format == PM_FLOAT32 && !half ? &choice : nullptr);
    s.heads = n[1], s.kv_heads = n[2], s.head_dim = n[3], s.rotary_pairs = n[4], s.scaling = 0.3f;
    s.whole_norms = index == 3, s.qk_epsilon = 1e-3f, s.clip = index == 3 ? 0.4f : 0.0f;
    if (index >= 2) {
        s.query_norm = random.floats(n[1] * n[3], 0.1f, 1.0f);
        s.key_norm = random.floats(n[2] * n[3], 0.1f, 1.0f);
    }
    if (index == 4) s.sinks = random.floats(n[1]);
    return step(context, s, pm_attention, random, n[0], n[3], n[3], n[2], n[5], n[6], half);
}

Result latent_attention(pm_context* context, int index, int32_t format, bool half) {
    // hidden, heads, plain, rotary pairs, latent, value_dim, latent query, cached
    static const int shapes[][8] = {{64, 4, 16, 4, 32, 16, 0, 9},   {37, 3, 10, 3, 21, 12, 19, 30},
                                    {128, 5, 64, 16, 96, 64, 48, 130}, {96, 2, 24, 8, 40, 20, 0, 0}};
    const int* const n = shapes[index];
    Random random(index + 100);
    const pm_router choice = router(random, n[0], index);
    pm_latent_spec s = {};
    const int turned = 2 * n[3];
    if (n[6]) s.query_down = random.matrix(n[6], n[0], format), s.query_norm = random.floats(n[6], 0.1f, 1.0f);
    s.query = random.matrix(n[1] * (n[2] + turned), n[6] ? n[6] : n[0], format);
    s.latent_down = random.matrix(n[4] + turned, n[0], format), s.latent_norm = random.floats(n[4], 0.1f, 1.0f);
    pm_matrix* const ups[2] = {&s.key_up, &s.value_up};
    int64_t* const strides[2] = {&s.key_up_stride, &s.value_up_stride};
    for (int i = 0; i < 2; i++) {  // the heads' matrices, one after the other
        const int32_t rows = i ? n[5] : n[4], cols = i ? n[4] : n[2];
        if (format == PM_FLOAT32) {
            *ups[i] = random.matrix(rows * n[1], cols, format);
            *strides[i] = int64_t{rows} * cols * 4;
        } else {
            const pm::Matrix one(rows, cols, format, 32);
            *strides[i] = one.blocks() * one.block_bytes();
            random.packed.emplace_back(*strides[i] * n[1]);
            for (int h = 0; h < n[1]; h++) random.fill(one, random.packed.back().data() + h * *strides[i]);
            *ups[i] = {random.packed.back().data(), nullptr, rows, cols, format, 32};
        }
        ups[i]->rows = rows;
    }
    s.ends = ends(random, random.matrix(n[0], n[1] * n[5], format), format == PM_FLOAT32 && !half ? &choice : nullptr);
    s.heads = n[1], s.rotary_pairs = n[3], s.rotation = index % 3;
    s.query_epsilon = s.latent_epsilon = 1e-5f, s.scaling = 0.2f;
    return step(context, s, pm_latent_attention, random, n[0], n[4], turned, 1, n[7], 0, half);
}

Result linear(pm_context* context, int index, int32_t format, bool) {
    const int tokens[] = {1, 2, 5, 33}, rows[] = {16, 37, 128, 50}, cols[] = {32, 50, 96, 257};
    Random random(index + 200);
    const pm_matrix m = random.matrix(rows[index], cols[index], format, index % 2);
    std::vector<float> y(tokens[index] * rows[index]);
    failures += pm_linear(context, &m, random.floats(tokens[index] * cols[index]), tokens[index], y.data()) != PM_OK;
    return {y, {}};
}

Result mlp(pm_context* context, int index, int32_t format, bool add) {
    static const int activations[] = {PM_SILU, PM_GPT_OSS, PM_GELU_TANH, PM_SILU_CLAMP};
    const int32_t hidden = 50 + 32 * index, inner = 83;
    Random random(index + 300);
    const pm_mlp_spec s = {random.matrix(inner, hidden, format), random.matrix(inner, hidden, format),
                           random.matrix(hidden, inner, format), index % 2 ? random.floats(hidden) : nullptr,
                           activations[index], 1.7f, 7.0f};
    float* const y = random.floats(hidden);
    failures += pm_mlp(context, &s, random.floats(hidden), add, y) != PM_OK;
    return {{y, y + hidden}, {}};
}

Result experts(pm_context* context, int index, int32_t format, bool) {
    static const int activations[] = {PM_SILU, PM_GPT_OSS, PM_GELU_TANH, PM_SILU_CLAMP};
    const int32_t hidden = 96, inner = 70, rows = index % 2 ? 9 : 1;
    Random random(index + 400);
    const pm::Matrix up(inner, hidden, format, 32), down(hidden, inner, format, 32);
    const int64_t size = up.blocks() * up.block_bytes();
    std::vector<uint8_t> record(2 * size + down.blocks() * down.block_bytes());
    random.fill(up, record.data()), random.fill(up, record.data() + size), random.fill(down, record.data() + 2 * size);
    const pm_expert_spec s = {0, size, 2 * size, -1, -1, -1, hidden, inner, format, 32, activations[index], 1.7f, 7.0f};
    std::vector<int32_t> tokens(rows);
    for (int32_t i = 0; i < rows; i++) tokens[i] = i;
    const pm_job job = {record.data(), 0, rows};
    std::vector<float> out(rows * hidden);
    const float* const x = random.floats(rows * hidden);
    failures += pm_experts(context, &s, x, rows, tokens.data(), rows, &job, 1, out.data()) != PM_OK;
    return {out, {}};
}

struct Case {
    const char* name;
    Result (*run)(pm_context*, int, int32_t, bool);
    int count;
    std::vector<int32_t> formats;
};

}  // namespace

int main() {
    const std::vector<int32_t> trunk = {PM_FLOAT32, PM_INT8, PM_INT4};
    const std::vector<int32_t> all = {PM_INT4, PM_INT4_ASYMMETRIC, PM_INT4_ZERO_POINT, PM_INT8, PM_MXFP4};
    const Case cases[] = {{"attention", attention, 6, trunk}, {"latent attention", latent_attention, 4, trunk},
                          {"linear", linear, 4, all}, {"mlp", mlp, 4, trunk}, {"experts", experts, 4, all}};
    pm_context* const plain = pm_create(2, "portable");
    for (int32_t i = 0; const char* name = pm_isa_name(i); i++) {
        if (!plain || !pm_isa_usable(i) || !strcmp(name, "portable")) continue;
        pm_context* const context = pm_create(2, name);
        for (const Case& c : cases)
            for (int index = 0; index < c.count; index++)
                for (int32_t format : c.formats)
                    for (bool flag : {false, true}) {
                        const bool exact = c.run == linear, half = flag && c.run != mlp;
                        compare(name, c.name, 100 * index + 10 * format + flag, c.run(plain, index, format, flag),
                                c.run(context, index, format, flag), exact ? 1e-6f : bound_of(format, half));
                    }
        pm_destroy(context);
        printf("%s: %d comparisons, %d failures\n", name, compared, failures);
        compared = 0;
    }
    return failures != 0;
}
