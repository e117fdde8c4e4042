// What a CPU server computes for a whole batch at once where published SGLang takes Python, or dozens of passes over memory.
//
// A token and a head of keys, or a row of hashes, is one piece of work, done by one thread in one order: what comes out depends
// on its sequence alone, whatever else is in the batch, wherever a prefix was cut and however many threads there are.
//
// Built by server_kernels.py.

#include <vector>

#include "../losses/cpu_rows.h"

namespace {

template <Type type> inline float number(const char* from) {
    if constexpr (type == F32) return load<float>(from);
    else return type == BF16 ? from_bf16(load<uint16_t>(from)) : half_to_float(load<uint16_t>(from));
}

// A vector of numbers of type `type`, of which there are n; past the end, zeros.
template <Type type> inline Vec read(const char* from, int64_t n) {
    if constexpr (type == F32)
        if (n >= LANES) return load<Vec>(from);
    if constexpr (type == BF16)
        if (n >= LANES) return (Vec)(__builtin_convertvector(load<Half>(from), Word) << 16);
    Vec v{};
    for (int i = 0; i < LANES && i < n; i++) v[i] = number<type>(from + i * (type == F32 ? 4 : 2));
    return v;
}

template <Type type> inline void write(char* to, const float* values, int64_t n) {
    for (int64_t i = 0; i < n; i++) {
        if constexpr (type == F32) store(to + i * 4, values[i]);
        else store(to + i * 2, type == BF16 ? float_to_bf16(values[i]) : float_to_half(values[i]));
    }
}

inline int64_t whole(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

}  // namespace

// A tensor [rows, heads, width], the last two dimensions contiguous.
struct Heads {
    char* data;
    int64_t stride;  // between rows, in elements
    int64_t heads, width;
};

namespace {

// Sequence b's tokens lie at slots[request[b] * slots_stride + position] of the cache; the last `new_tokens[b]` of its
// `length[b]` ask, in rows one after another, and each sees itself and at most `window` tokens before it (all if < 0).
template <Type type>
void attend(const Heads& query, const Heads& key, const Heads& value, const Heads& out, const int32_t* slots,
            int64_t slots_stride, const int64_t* request, const int64_t* length, const int64_t* new_tokens, int64_t sequences,
            int64_t window, float scale, int32_t threads) {
    constexpr int64_t size = type == F32 ? 4 : 2;
    struct Row { const int32_t* slots; int64_t length; };
    std::vector<Row> rows;
    int64_t longest = 0;
    for (int64_t b = 0; b < sequences; b++)
        for (int64_t past = length[b] - new_tokens[b]; past < length[b]; past++) {
            int64_t seen = window < 0 ? past + 1 : std::min(past, window) + 1;
            rows.push_back({slots + request[b] * slots_stride + past + 1 - seen, seen});
            longest = std::max(longest, seen);
        }
    const int64_t shared = query.heads / key.heads, width = whole(query.width), out_width = whole(value.width);
    for_each_row(int64_t(rows.size()) * key.heads, longest * shared * (width + out_width) / 4, threads, [&](int64_t item) {
        const Row& row = rows[item / key.heads];
        const int64_t head = item % key.heads, padded = whole(row.length), number = item / key.heads;
        thread_local std::vector<float> room;
        room.resize(size_t(shared * (width + padded + out_width)));
        float *asked = room.data(), *scores = asked + shared * width, *sums = scores + shared * padded;
        for (int64_t g = 0; g < shared; g++) {
            const char* q = query.data + (number * query.stride + (head * shared + g) * query.width) * size;
            for (int64_t j = 0; j < width; j += LANES)
                store(asked + g * width + j, read<type>(q + j * size, query.width - j) * scale);
        }
        for (int64_t p = 0; p < row.length; p++) {
            const char* k = key.data + (row.slots[p] * key.stride + head * key.width) * size;
            for (int64_t g = 0; g < shared; g++) {
                Vec dot{};
                for (int64_t j = 0; j < width; j += LANES)
                    dot += load<Vec>(asked + g * width + j) * read<type>(k + j * size, key.width - j);
                scores[g * padded + p] = sum(dot);
            }
        }
        for (int64_t g = 0; g < shared; g++) {
            float* score = scores + g * padded;
            for (int64_t p = row.length; p < padded; p++) score[p] = -INF;
            Vec top = fill(-INF), mass{};
            for (int64_t p = 0; p < padded; p += LANES) top = larger(load<Vec>(score + p), top);
            const Vec max = fill(maximum(top));
            for (int64_t p = 0; p < padded; p += LANES) {
                Vec weight = exp(load<Vec>(score + p) - max);
                store(score + p, weight);
                mass += weight;
            }
            const float norm = 1 / sum(mass);
            for (int64_t p = 0; p < row.length; p++) score[p] *= norm;
        }
        std::fill(sums, sums + shared * out_width, 0.0f);
        for (int64_t p = 0; p < row.length; p++) {
            const char* v = value.data + (row.slots[p] * value.stride + head * value.width) * size;
            for (int64_t g = 0; g < shared; g++) {
                const Vec weight = fill(scores[g * padded + p]);
                for (int64_t j = 0; j < out_width; j += LANES) {
                    float* to = sums + g * out_width + j;
                    store(to, load<Vec>(to) + weight * read<type>(v + j * size, value.width - j));
                }
            }
        }
        for (int64_t g = 0; g < shared; g++)
            write<type>(out.data + (number * out.stride + (head * shared + g) * value.width) * size, sums + g * out_width,
                        value.width);
    });
}

}  // namespace

extern "C" void attention(const Heads* query, const Heads* key, const Heads* value, const Heads* out, int64_t type,
                          const int32_t* slots, int64_t slots_stride, const int64_t* request, const int64_t* length,
                          const int64_t* new_tokens, int64_t sequences, int64_t window, float scale, int32_t threads) {
    auto run = type == F32 ? attend<F32> : type == BF16 ? attend<BF16> : attend<F16>;
    run(*query, *key, *value, *out, slots, slots_stride, request, length, new_tokens, sequences, window, scale, threads);
}

namespace {

inline uint32_t rotated(uint32_t word, int bits) { return word << bits | word >> (32 - bits); }

// Mix one block of four bytes into the state.
inline uint32_t absorb(uint32_t state, uint32_t block) {
    block = rotated(block * 0xCC9E2D51u, 15) * 0x1B873593u;
    return rotated(state ^ block, 13) * 5 + 0xE6546B64u;
}

}  // namespace

// MurmurHash3_x86_32 with seed 0 of (seed, position, column), sixteen bytes: see seeded_sampling.py.
extern "C" void murmur_hash32(const int64_t* seeds, const int64_t* positions, const int64_t* columns, int64_t num_rows,
                              int64_t num_columns, uint32_t* out, int32_t threads) {
    for_each_row(num_rows, num_columns, threads, [&](int64_t row) {
        const uint64_t seed = uint64_t(seeds[row]);
        const uint32_t state = absorb(absorb(absorb(0, uint32_t(seed)), uint32_t(seed >> 32)), uint32_t(positions[row]));
        uint32_t* to = out + row * num_columns;
        for (int64_t j = 0; j < num_columns; j++) {
            uint32_t hash = absorb(state, uint32_t(columns[j])) ^ 16;  // the number of bytes hashed
            hash = (hash ^ hash >> 16) * 0x85EBCA6Bu;
            hash = (hash ^ hash >> 13) * 0xC2B2AE35u;
            to[j] = hash ^ hash >> 16;
        }
    });
}
