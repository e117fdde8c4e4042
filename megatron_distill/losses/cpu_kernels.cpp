// The kernels of kernels.py for a CPU: one read of the logits from memory per pass, everything between in the caches.
//
// A row is walked in blocks, which are read as floats from where they lie or staged as such: first for the maximum, then
// for the arithmetic, which meanwhile fetches the block to come, so that memory and arithmetic take their time together.
// Sums are kept per lane within a block and in double across blocks. Rows are independent, so results do not depend on
// the number of threads.
//
// Built by cpu_kernels.py:  c++ -O3 -march=native -shared -fPIC -std=c++17 -pthread cpu_kernels.cpp

#include "cpu_rows.h"

extern "C" {

// 1 if the library was built with the AVX-512 path.
int32_t has_avx512() { return LANES == 16; }

void kl_statistics(const Rows* z, const Rows* t, const uint8_t* excluded, int64_t T, int64_t V, float scale, float* out,
                   int32_t threads) {
    const auto out_of = true_columns(excluded, V);
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row), b(*t, row);
        Mass A, B;
        double z_gap = 0, t_gap = 0, z_self = 0, t_self = 0;
        Chosen in_z{out_of.data(), int64_t(out_of.size())}, in_t = in_z;
        for_each_block(V, [&](int64_t start, int n) {
            a.stage(start, n);
            b.stage(start, n);
            in_z.block_out(a, start, start + n);
            in_t.block_out(b, start, start + n);
            double da = A.raise(a.max() * scale), db = B.raise(b.max() * scale);
            if (da != 0 || db != 0) {
                z_gap = rescaled(da, A.sum, z_gap, da - db);
                t_gap = rescaled(db, B.sum, t_gap, db - da);
                z_self = rescaled(da, A.sum, z_self, da);
                t_self = rescaled(db, B.sum, t_self, db);
                A.sum *= std::exp(da);
                B.sum *= std::exp(db);
            }
            const Vec max_z = fill(or_zero(A.max)), max_t = fill(or_zero(B.max));
            Vec mass_z{}, mass_t{}, gap_z{}, gap_t{}, self_z{}, self_t{};
            auto add_up = [&](auto add) {
                mass_z = mass_t = gap_z = gap_t = self_z = self_t = Vec{};
                for (int i = 0; i < a.padded; i += LANES) {
                    a.fetch(i);
                    b.fetch(i);
                    Vec x = a.at(i) * scale - max_z, y = b.at(i) * scale - max_t, gap = x - y;
                    Vec exp_x = exp(x), exp_y = exp(y);
                    mass_z += exp_x;
                    mass_t += exp_y;
                    gap_z = add(gap_z, exp_x, gap);
                    gap_t = add(gap_t, exp_y, -gap);
                    self_z = add(self_z, exp_x, x);
                    self_t = add(self_t, exp_y, y);
                }
                return sum(gap_z + gap_t + self_z + self_t);
            };
            // 0 * inf is rare: the sums that heed it are taken where the plain ones came to NaN.
            if (std::isnan(add_up(add_product))) add_up(add_weighted);
            A.sum += sum(mass_z);
            B.sum += sum(mass_t);
            z_gap += sum(gap_z);
            t_gap += sum(gap_t);
            z_self += sum(self_z);
            t_self += sum(self_t);
        });
        const double numbers[] = {A.max, A.sum, B.max, B.sum, z_gap, t_gap, z_self, t_self};
        for (int i = 0; i < 8; i++) out[row * 8 + i] = float(numbers[i]);
    });
}

// normalisers [T, 5], weight [T], upstream [T]: see kernels.py.
void kl_gradient(const Rows* out, const Rows* z, const Rows* t, int64_t T, int64_t V, const float* normalisers,
                 const float* weight, const float* upstream, float scale, int32_t threads) {
    const bool streams = worth_streaming(*out, *z, T, V);
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row), b(*t, row);
        const float* norm = normalisers + row * 5;
        const Vec max_z = fill(norm[0]), log_z = fill(norm[1]), max_t = fill(norm[2]), log_t = fill(norm[3]);
        const float u = upstream[row] * scale, w = weight[row];
        const Vec kl = fill(norm[4]), forward = fill(u * (1 - w)), reverse = fill(u * w);
        auto gradient = [&](Vec x, Vec y) {
            Vec log_q = x * scale - max_z - log_z, log_p = y * scale - max_t - log_t;
            Vec q = exp(log_q), p = exp(log_p);
            return add_weighted((q - p) * forward, q * reverse, log_q - log_p - kl);
        };
        write_row(*out, row, V, streams, gradient, a, b);
    });
}

struct Mixture {
    float p_weight, q_weight, p_share;
};

}  // extern "C"

namespace {

// The least that the mixture's probability counts as. Where it is less, so are the column's term and gradient.
constexpr float LEAST = std::numeric_limits<float>::min();

struct Terms {
    Vec q, term, slope;
};

inline Terms mixture_terms(Vec log_q, Vec log_p, const Mixture& mix) {
    const float share = mix.p_share, rest = 1.0f - mix.p_share;
    Vec q = exp(log_q), p = exp(log_p);
    Vec per_m = reciprocal(larger(fill(LEAST), share * p + rest * q)), gap = (p - q) * per_m;
    Vec share_q = q * per_m, share_p = p * per_m, slope = (-rest * mix.p_weight) * share_p;
    Vec term = (mix.q_weight * share - mix.p_weight * rest) * (p - q);  // sums to 0: see mixture_terms in kernels.py
    if (mix.q_weight != 0) {
        Vec log_share_q = log_share(share_q, -share * gap);
        term += mix.q_weight * q * log_share_q;
        slope += mix.q_weight * (log_share_q + 1.0f - rest * share_q);
    }
    if (mix.p_weight != 0) term += mix.p_weight * p * log_share(share_p, rest * gap);
    return {q, term, slope};
}

// The gradient needs no term, hence not its logarithm.
inline Terms mixture_slope(Vec log_q, Vec log_p, const Mixture& mix) {
    const float share = mix.p_share, rest = 1.0f - mix.p_share;
    Vec q = exp(log_q), p = exp(log_p);
    Vec per_m = reciprocal(larger(fill(LEAST), share * p + rest * q));
    Vec share_q = q * per_m, slope = (-rest * mix.p_weight) * (p * per_m);
    if (mix.q_weight != 0)
        slope += mix.q_weight * (log_share(share_q, -share * ((p - q) * per_m)) + 1.0f - rest * share_q);
    return {q, Vec{}, slope};
}

}  // namespace

extern "C" {

void mixture_statistics(const Rows* z, const Rows* t, const uint8_t* excluded, int64_t T, int64_t V,
                        const float* normalisers, const Mixture* mixture, float scale, float* out, int32_t threads) {
    const auto out_of = true_columns(excluded, V);
    const Mixture mix = *mixture;
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row), b(*t, row);
        const float* norm = normalisers + row * 5;
        const Vec max_z = fill(norm[0]), log_z = fill(norm[1]), max_t = fill(norm[2]), log_t = fill(norm[3]);
        double divergence = 0, mean_slope = 0;
        Chosen in_z{out_of.data(), int64_t(out_of.size())}, in_t = in_z;
        for_each_block(V, [&](int64_t start, int n) {
            a.stage(start, n);
            b.stage(start, n);
            in_z.block_out(a, start, start + n);
            in_t.block_out(b, start, start + n);
            Vec total{}, slopes{};
            for (int i = 0; i < a.padded; i += LANES) {
                a.fetch(i);
                b.fetch(i);
                Vec log_q = a.at(i) * scale - max_z - log_z, log_p = b.at(i) * scale - max_t - log_t;
                Terms terms = mixture_terms(log_q, log_p, mix);
                total += terms.term;
                slopes += terms.q * terms.slope;
            }
            divergence += sum(total);
            mean_slope += sum(slopes);
        });
        out[row * 2] = float(divergence);
        out[row * 2 + 1] = float(mean_slope);
    });
}

void mixture_gradient(const Rows* out, const Rows* z, const Rows* t, int64_t T, int64_t V, const float* normalisers,
                      const float* mean_slope, const float* upstream, const Mixture* mixture, float scale,
                      int32_t threads) {
    const bool streams = worth_streaming(*out, *z, T, V);
    const Mixture mix = *mixture;
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row), b(*t, row);
        const float* norm = normalisers + row * 5;
        const Vec max_z = fill(norm[0]), log_z = fill(norm[1]), max_t = fill(norm[2]), log_t = fill(norm[3]);
        const Vec mean = fill(mean_slope[row]), u = fill(upstream[row] * scale);
        auto gradient = [&](Vec x, Vec y) {
            Vec log_q = x * scale - max_z - log_z, log_p = y * scale - max_t - log_t;
            Terms terms = mixture_slope(log_q, log_p, mix);
            return terms.q * (terms.slope - mean) * u;
        };
        write_row(*out, row, V, streams, gradient, a, b);
    });
}

// Of the columns that are not among `chosen` [T, N] (V: none); N = 0 for all columns.
void softmax_statistics(const Rows* z, int64_t T, int64_t V, const int64_t* chosen, int64_t N, float scale, float* out,
                        int32_t threads) {
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row);
        Mass A;
        double self = 0;
        std::vector<int64_t> columns(chosen + row * N, chosen + (row + 1) * N);
        std::sort(columns.begin(), columns.end());
        Chosen left_out{columns.data(), N};
        for_each_block(V, [&](int64_t start, int n) {
            a.stage(start, n);
            left_out.block_out(a, start, start + n);
            if (double da = A.raise(a.max() * scale); da != 0) {
                self = rescaled(da, A.sum, self, da);
                A.sum *= std::exp(da);
            }
            const Vec max_z = fill(or_zero(A.max));
            Vec mass{}, inner{};
            auto add_up = [&](auto add) {
                mass = inner = Vec{};
                for (int i = 0; i < a.padded; i += LANES) {
                    a.fetch(i);
                    Vec x = a.at(i) * scale - max_z, exp_x = exp(x);
                    mass += exp_x;
                    inner = add(inner, exp_x, x);
                }
                return sum(inner);
            };
            if (std::isnan(add_up(add_product))) add_up(add_weighted);
            A.sum += sum(mass);
            self += sum(inner);
        });
        out[row * 3] = float(A.max);
        out[row * 3 + 1] = float(A.sum);
        out[row * 3 + 2] = float(self);
    });
}

// normalisers [T, 2]; upstream, entropy_upstream, entropy [T].
void softmax_gradient(const Rows* out, const Rows* z, int64_t T, int64_t V, const float* normalisers,
                      const float* upstream, const float* entropy_upstream, const float* entropy, float scale,
                      int32_t threads) {
    const bool streams = worth_streaming(*out, *z, T, V);
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row);
        const Vec max_z = fill(normalisers[row * 2]), log_z = fill(normalisers[row * 2 + 1]);
        const Vec u = fill(upstream[row] * scale), v = fill(-entropy_upstream[row] * scale), h = fill(entropy[row]);
        auto gradient = [&](Vec x) {
            Vec log_q = x * scale - max_z - log_z, q = exp(log_q);
            return add_weighted(u * q, v, weighted(q, log_q + h));
        };
        write_row(*out, row, V, streams, gradient, a);
    });
}

// chosen [T, N] (V: none), chosen_grad [T, N], rest [T, 3], upstream [T].
void rest_gradient(const Rows* out, const Rows* z, int64_t T, int64_t V, const int64_t* chosen, const float* chosen_grad,
                   int64_t N, const float* rest, const float* upstream, float scale, int32_t threads) {
    const bool streams = worth_streaming(*out, *z, T, V);
    for_each_row(T, V, threads, [&](int64_t row) {
        Block a(*z, row);
        const Vec max_z = fill(rest[row * 3]), log_z = fill(rest[row * 3 + 1]);
        const float u = upstream[row] * scale;
        const Vec factor = fill(rest[row * 3 + 2] * u);
        auto gradient = [&](Vec x) {
            Vec log_q = x * scale - max_z - log_z;
            // Chosen columns may lie far above the rest; what comes of them here is overwritten below.
            return exp(smaller(fill(80.0f), log_q)) * factor;
        };
        write_row(*out, row, V, streams, gradient, a);
#if defined(__SSE2__)
        _mm_sfence();  // what was streamed comes before what now overwrites it
#endif
        OutBlock one(*out);
        for (int64_t i = row * N; i < (row + 1) * N; i++) {
            if (chosen[i] >= V) continue;
            store(one.made, chosen_grad[i] * u);
            one.narrow(1);
            one.write(out->at(row, chosen[i]), 1, false);
        }
    });
}

}  // extern "C"
