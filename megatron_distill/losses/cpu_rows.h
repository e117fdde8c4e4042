// How cpu_kernels.cpp walks over rows of logits: in blocks of columns, by several threads, and back into memory.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>

#include "cpu_vectors.h"

enum Type : int32_t { F32 = 0, BF16 = 1, F16 = 2 };

// Rows of a tensor with unit stride between columns. `stride` is in elements.
struct Rows {
    char* data;
    int64_t stride;
    int32_t type;

    inline int size() const { return type == F32 ? 4 : 2; }
    inline char* at(int64_t row, int64_t column) const { return data + (row * stride + column) * size(); }
};

namespace {

inline float half_to_float(uint16_t h) {
    uint32_t sign = uint32_t(h & 0x8000) << 16, magnitude = h & 0x7fff, bits;
    if (magnitude >= 0x7c00) bits = 0x7f800000 | (magnitude & 0x3ff) << 13;
    else {
        bits = magnitude << 13;
        float f;
        std::memcpy(&f, &bits, 4);
        f *= 0x1p112f;  // rebias the exponent; exact, denormals included
        std::memcpy(&bits, &f, 4);
    }
    bits |= sign;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

inline uint16_t float_to_half(float f) {
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    uint16_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return sign | 0x7e00;
    if (bits >= 0x477ff000) return sign | 0x7c00;
    if (bits < 0x38800000) {  // a denormal of the half: let the float unit round it
        float magnitude, shifted;
        std::memcpy(&magnitude, &bits, 4);
        shifted = magnitude + 0.5f;
        uint32_t rounded;
        std::memcpy(&rounded, &shifted, 4);
        return sign | uint16_t(rounded - 0x3f000000);
    }
    return sign | uint16_t((bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

// Rounded to bf16 in the upper half of each word; the lower half is to be dropped.
inline Word round_to_bf16(Vec v) {
    Word bits = (Word)v;
    Word rounded = bits + 0x7fff + ((bits >> 16) & 1);
    return v == v ? rounded : Word{} + 0x7fc00000u;
}

inline uint16_t float_to_bf16(float f) { return uint16_t(round_to_bf16(fill(f))[0] >> 16); }

inline float from_bf16(uint16_t half) {
    uint32_t bits = uint32_t(half) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return f;
}

// Some columns of a row as floats: where they lie if they lie there as whole vectors of floats, else staged in `values`.
struct Block {
    const Rows rows;
    const int64_t row;
    alignas(64) float values[BLOCK];
    const char* from;
    const char* next;
    const float* read;
    int padded;  // columns up to whole vectors; those past the end are -inf, which every sum ignores

    Block(const Rows& rows, int64_t row) : rows(rows), row(row) {}

    inline void open(int64_t start, int n) {
        from = rows.at(row, start);
        next = rows.at(row, start + n);
    }

    inline void stage(int64_t start, int n) {
        open(start, n);
        padded = (n + LANES - 1) / LANES * LANES;
        read = values;
        int i = 0;
        if (rows.type == F32 && n == padded) {
            read = (const float*)from;
            return;
        }
        if (rows.type == F32) std::memcpy(values, from, (i = n) * 4);
        if (rows.type == BF16) {
            for (; i + LANES <= n; i += LANES)
                store(values + i, __builtin_convertvector(load<Half>(from + i * 2), Word) << 16);
            for (; i < n; i++) values[i] = from_bf16(load<uint16_t>(from + i * 2));
        }
        for (; i < n; i++) values[i] = half_to_float(load<uint16_t>(from + i * 2));
        for (; i < padded; i++) values[i] = -INF;
    }

    inline Vec at(int i) const { return load<Vec>(read + i); }

    // Of 2 * LANES columns in bf16 those with an even and those with an odd number, straight from the opened row.
    inline Vec even(int i) const { return (Vec)(load<Word>(from + i * 2) << 16); }
    inline Vec odd(int i) const { return (Vec)(load<Word>(from + i * 2) & 0xffff0000u); }

    // The row's next block: a processor's own prefetching stops at the end of a page.
    inline void fetch(int i) const { __builtin_prefetch(next + i * rows.size()); }

    // NaN is passed over.
    inline float max() const {
        Vec tops[4] = {fill(-INF), fill(-INF), fill(-INF), fill(-INF)};
        int i = 0;
        for (; i + 4 * LANES <= padded; i += 4 * LANES)
            for (int j = 0; j < 4; j++) tops[j] = larger(at(i + j * LANES), tops[j]);
        for (; i < padded; i += LANES) tops[0] = larger(at(i), tops[0]);
        return maximum(larger(larger(tops[0], tops[1]), larger(tops[2], tops[3])));
    }
};

// Chosen columns of a row in ascending order, read block by block.
struct Chosen {
    const int64_t* columns;
    int64_t count, next = 0;

    inline void block_out(Block& block, int64_t start, int64_t stop) {
        if (next == count || columns[next] >= stop) return;
        if (block.read != block.values) std::memcpy(block.values, block.read, block.padded * 4);
        block.read = block.values;
        for (; next < count && columns[next] < stop; next++) block.values[columns[next] - start] = -INF;
    }
};

std::vector<int64_t> true_columns(const uint8_t* mask, int64_t num_columns) {
    std::vector<int64_t> columns;
    if (!mask) return columns;
    for (const uint8_t* p = mask; (p = (const uint8_t*)std::memchr(p, 1, mask + num_columns - p)); p++)
        columns.push_back(p - mask);
    return columns;
}

template <class Function>
void for_each_row(int64_t num_rows, int64_t num_columns, int threads, Function function) {
    int64_t parts = std::min<int64_t>({threads, num_rows, 1 + num_rows * num_columns / (1 << 18)});
    auto walk = [&](int64_t part) {
#if defined(__SSE2__)
        unsigned int mode = _mm_getcsr();
        _mm_setcsr(mode | 0x8000);  // results too small for a normal number are 0: a processor takes a detour for them
#endif
        for (int64_t row = part * num_rows / parts; row < (part + 1) * num_rows / parts; row++) function(row);
#if defined(__SSE2__)
        _mm_setcsr(mode);
        _mm_sfence();  // streamed gradients are visible to whoever joins us
#endif
    };
    std::vector<std::thread> others;
    for (int64_t part = 1; part < parts; part++) others.emplace_back(walk, part);
    if (parts > 0) walk(0);
    for (auto& other : others) other.join();
}

template <class Function>
inline void for_each_block(int64_t num_columns, Function function) {
    for (int64_t start = 0; start < num_columns; start += BLOCK)
        function(start, int(std::min<int64_t>(BLOCK, num_columns - start)));
}

// A block of a row of gradients, made here and then written at once: streaming stores that alternate with arithmetic reach
// memory as pieces of lines.
struct OutBlock {
    const Rows& rows;
    alignas(64) char made[BLOCK * 4];

    explicit OutBlock(const Rows& rows) : rows(rows) {}

    // `past_caches`: to an address that is a whole number of vectors.
    inline void write(char* to, int n, bool past_caches) const {
        int i = 0, bytes = n * rows.size();
        if (past_caches)
            for (; i + LANES * 4 <= bytes; i += LANES * 4) stream(to + i, load<Vec>(made + i));
        std::memcpy(to + i, made + i, bytes - i);
    }

    // From floats to the rows' type, in place.
    inline void narrow(int n) {
        if (rows.type == F32) return;
        for (int i = 0; i < n; i++) {
            float value = load<float>(made + i * 4);
            store(made + i * 2, rows.type == F16 ? float_to_half(value) : float_to_bf16(value));
        }
    }
};

// Write a function of each column of the `in` into a row of `out`, past the caches if `streams`. Blocks begin, but for the
// first, where streaming stores may.
template <class Function, class... In>
inline void write_row(const Rows& out, int64_t row, int64_t num_columns, bool streams, Function function, In&... in) {
    OutBlock block(out);
    const bool pairs = ((out.type == BF16) && ... && (in.rows.type == BF16));
    const int64_t misaligned = ((uintptr_t)out.at(row, 0) % 64) / out.size();
    for (int64_t start = 0, n; start < num_columns; start += n) {
        n = std::min(start == 0 ? BLOCK - misaligned : BLOCK, num_columns - start);
        if (pairs && n % (2 * LANES) == 0) {
            (in.open(start, n), ...);
            for (int i = 0; i < n; i += 2 * LANES) {
                (in.fetch(i), ...);
                Word even = round_to_bf16(function(in.even(i)...)), odd = round_to_bf16(function(in.odd(i)...));
                store(block.made + i * 2, even >> 16 | (odd & 0xffff0000u));
            }
        } else {
            (in.stage(start, n), ...);
            for (int i = 0; i < n; i += LANES) {
                (in.fetch(i), ...);
                store(block.made + i * 4, function(in.at(i)...));
            }
            block.narrow(int(n));
        }
        block.write(out.at(row, start), int(n), streams && (start > 0 || misaligned == 0));
    }
}

inline bool worth_streaming(const Rows& out, const Rows& in, int64_t num_rows, int64_t num_columns) {
    return out.data != in.data && num_rows * num_columns * (out.size()) >= (16 << 20);
}

inline double or_zero(double maximum) { return maximum == -INF ? 0.0 : maximum; }
inline double weighted(double weight, double value) { return weight == 0 ? 0.0 : weight * value; }

// Running sum over one model's part of a row, rescaled as the maximum grows: see merge_statistics.
struct Mass {
    double max = -INF, sum = 0;

    // How far the old sum's maximum lies below the new one (<= 0), after which `max` is the new one.
    inline double raise(double to) {
        double next = to > max ? to : max, shift = max - or_zero(next);
        max = next;
        return sum == 0 ? 0 : shift;
    }
};

inline double rescaled(double shift_by, double mass, double inner, double moved_by) {
    return weighted(std::exp(shift_by), weighted(mass, moved_by) + inner);
}

}  // namespace
