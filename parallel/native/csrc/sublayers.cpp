// A sublayer (norm and attention, or norm and MLP) in one call, and all decoder layers in one call. They call the same kernels with the same
// arguments as Python does one by one, so results are bit-identical; with few tokens, Python between the kernels took longer than the kernels.
#include <time.h>
#include "linear.h"

extern "C" {
void manta_add_norm(float* x, const float* delta, const float* weight, float* out, long T, long D, float eps, int threads);
void manta_gate(const float* x, float* out, long T, long I, int threads);
void manta_rotate(const float* x, long stride, const float* cos, const float* sin, float* out, long T, long X, long K, int threads);
}

namespace {
// parallel/native/sublayers.py mirrors the layout of these structs. Function pointers refer to linear_*.cpp and attention*.cpp.
struct Matrix {
    void (*product)(const float*, const void*, const void*, const float*, float*, long, long, long, long, long, int);
    const void *weights, *scales;
    const float* bias;
    long inputs, padded, group, outputs;

    void multiply(const float* x, float* y, long T, int threads) const {
        product(x, weights, scales, bias, y, T, inputs, padded, group, outputs, threads);
    }
};

struct Norm {
    const float* weight;
    double eps;

    void add(float* x, const float* delta, float* out, long T, long D, int threads) const {
        manta_add_norm(x, delta, weight, out, T, D, float(eps), threads);
    }
};

struct AttentionSublayer {
    Norm norm;
    Matrix qkv, output;
    const int64_t* heads;  // see each_part
    long H, G, K, block_tokens;
    void *keys, *values;
    void (*write)(const float*, const float*, long, long, const int64_t*, void*, void*, long, long, int);
    void (*prefill)(const float*, const void*, const void*, const int32_t*, const int64_t*, const int64_t*, const int64_t*, float*, long, long, long,
                    long, long, long, int);
    void (*decode)(const float*, const void*, const void*, const int32_t*, const int64_t*, const int64_t*, float*, long, long, long, long, long, long,
                   int);
};

using AllAtOnce = void (*)(const float*, long, const int64_t*, const int64_t*, long, const void* const*, const void* const*, const void* const*,
                           const void* const*, const float*, const float*, float*, long, long, long, long, long, int);  // manta_experts_*

struct Mlp {
    Matrix up, down;
    AllAtOnce gated;
    long few_rows;  // with more rows, both products and the activation run in one pass

    void run(const float* x, float* out, long T, int threads) const {
        if (T > few_rows) {
            const int64_t count = T;
            gated(x, T, nullptr, &count, 1, &up.weights, &up.scales, &down.weights, &down.scales, nullptr, nullptr, out, down.outputs, up.padded,
                  down.inputs, down.padded, up.group, threads);
            return;
        }
        AlignedBuffer<float> gate_up(T * up.outputs), middle(T * down.inputs);
        up.multiply(x, &gate_up[0], T, threads);
        manta_gate(&gate_up[0], &middle[0], T, down.inputs, threads);
        down.multiply(&middle[0], out, T, threads);
    }
};

struct MlpSublayer {
    Norm norm;
    Mlp mlp;
};

// The experts of a layer by number; null for one held elsewhere. D: model width, I: inner width of an expert; `outer` and `inner` are D and I padded
// to whole groups.
struct Experts {
    AllAtOnce run;
    const void *const *up, *const *up_scales, *const *down, *const *down_scales;
    long count, D, outer, I, inner, group;
};

struct MoeSublayer {
    Norm norm;
    Matrix router, shared_gate;
    Mlp shared;
    Experts experts;
    long per_token, renormalise;
};

// Inputs shared by all layers of a step: T tokens of S sequences, of which the first `decodes` have one token each.
struct Batch {
    const float *cos, *sin;    // (T, K / 2)
    const int64_t* slots;      // (T)
    const int32_t* tables;     // (S, M)
    const int64_t *starts, *lengths;  // (S + 1), (S)
    long T, S, decodes, M;
};

struct Layer {
    const AttentionSublayer* attention;
    const void* mlp_sublayer;  // MlpSublayer or MoeSublayer
    long is_sparse;
};

// All-reduce over the ranks of the group; none is needed on a single rank (`exchange` is null).
struct AllReduce {
    int (*all_reduce)(void*, float*, long);
    void* exchange;
    int64_t* page;  // see parallel/last_collective.py; null: collectives are not recorded
    int64_t kind, axis;

    int sum_over_ranks(float* x, long count) const {
        if (!exchange) return 0;
        if (page) {
            timespec now;
            clock_gettime(CLOCK_MONOTONIC, &now);
            page[1] = kind; page[2] = axis; page[3] = count; page[4] = now.tv_sec * 1'000'000'000 + now.tv_nsec;
            ++page[0];
        }
        return all_reduce(exchange, x, count);
    }
};

// The id of an expert that is among `ids` and not held here, or -1.
long missing_expert(const Experts& experts, const int64_t* ids, long count) {
    for (long i = 0; i < count; ++i)
        if (ids[i] >= experts.count || (ids[i] >= 0 && !experts.up[ids[i]])) return ids[i];
    return -1;
}

// out (N, D) = out * out_scales (N; null: zeros) + the weighted sum of each row's experts, all of which are held here. See manta_weighted_experts.
void add_weighted_experts(const Experts& all, const float* x, const int64_t* ids, const float* weights, const float* out_scales, float* out, long N,
                          long A, int threads) {
    std::vector<int64_t> counts(all.count), used;
    for (long a = 0; a < N * A; ++a)
        if (ids[a] >= 0) ++counts[ids[a]];
    std::vector<long> next(all.count);
    std::vector<const void*> up, up_scales, down, down_scales;
    long total = 0;
    for (long e = 0; e < all.count; total += counts[e++]) {
        next[e] = total;
        if (!counts[e]) continue;
        used.push_back(counts[e]);
        up.push_back(all.up[e]); up_scales.push_back(all.up_scales[e]); down.push_back(all.down[e]); down_scales.push_back(all.down_scales[e]);
    }
    AlignedBuffer<int64_t> rows(total);
    AlignedBuffer<float> of_rows(total);  // (the address is not null if there are none)
    for (long a = 0; a < N * A; ++a) {
        if (ids[a] < 0) continue;
        const long sorted = next[ids[a]]++;
        rows[sorted] = a / A;
        of_rows[sorted] = weights[a];
    }
    all.run(x, N, &rows[0], used.data(), used.size(), up.data(), up_scales.data(), down.data(), down_scales.data(), &of_rows[0], out_scales, out,
            all.D, all.outer, all.I, all.inner, all.group, threads);
}
}  // namespace

extern "C" {

// x (T, D) += delta, which may be null; out (T, D) = attention(norm(x)). Writes keys and values to the cache.
void manta_attention_sublayer(const AttentionSublayer* sublayer, const Batch* batch, float* x, const float* delta, float* out, int threads) {
    const auto& [norm, qkv, output, heads, H, G, K, block_tokens, keys, values, write, prefill, decode] = *sublayer;
    const long T = batch->T, width = (H + 2 * G) * K, decodes = batch->decodes, M = batch->M;
    AlignedBuffer<float> qkv_rows(T * width);
    {
        AlignedBuffer<float> normed(T * qkv.inputs);
        norm.add(x, delta, &normed[0], T, qkv.inputs, threads);
        qkv.multiply(&normed[0], &qkv_rows[0], T, threads);
    }
    AlignedBuffer<float> q(T * H * K), k(T * G * K), attended(T * H * K);
    manta_rotate(&qkv_rows[0], width, batch->cos, batch->sin, &q[0], T, H, K, threads);
    manta_rotate(&qkv_rows[H * K], width, batch->cos, batch->sin, &k[0], T, G, K, threads);
    write(&k[0], &qkv_rows[(H + G) * K], G * K, width, batch->slots, keys, values, T, G * K, threads);
    if (decodes)
        decode(&q[0], keys, values, batch->tables, batch->lengths, heads, &attended[0], decodes, H, G, K, M, block_tokens, threads);
    if (decodes < batch->S)
        prefill(&q[0], keys, values, batch->tables + decodes * M, batch->starts + decodes, batch->lengths + decodes, heads, &attended[0],
                batch->S - decodes, H, G, K, M, block_tokens, threads);
    output.multiply(&attended[0], out, T, threads);
}

// x (T, D) += delta, which may be null; out (T, D) = mlp(norm(x)).
void manta_mlp_sublayer(const MlpSublayer* sublayer, float* x, const float* delta, float* out, long T, int threads) {
    const long D = sublayer->mlp.up.inputs;
    AlignedBuffer<float> normed(T * D);
    sublayer->norm.add(x, delta, &normed[0], T, D, threads);
    sublayer->mlp.run(&normed[0], out, T, threads);
}

// out (N, D): for each row of x, the sum of its experts with the weights (N, A) of ids (N, A), in the order of experts. A negative id is computed
// elsewhere and adds nothing. Returns -1, or the id of an expert that is not held here; then nothing was computed.
long manta_weighted_experts(const Experts* all, const float* x, const int64_t* ids, const float* weights, float* out, long N, long A, int threads) {
    const long missing = missing_expert(*all, ids, N * A);
    if (missing < 0) add_weighted_experts(*all, x, ids, weights, nullptr, out, N, A, threads);
    return missing;
}

// Chooses the top A of E experts by their logits, with their probabilities by a softmax over all experts; the first among equals.
class ExpertChoice {
    const long E, A;
    const bool renormalise;
    std::vector<float> probabilities;  // of the last token, as `taken`
    std::vector<char> taken;

public:
    ExpertChoice(long E, long A, bool renormalise) : E(E), A(A), renormalise(renormalise) {}

    // For one token: E logits, A ids, A weights.
    void choose(const float* logits, int64_t* ids, float* weights) {
        probabilities.assign(logits, logits + E);
        const float most = *std::max_element(probabilities.begin(), probabilities.end());
        float total = 0, chosen = 0;
        for (float& each : probabilities) total += each = std::exp(each - most);
        taken.assign(E, false);
        for (long a = 0; a < A; ++a) {
            long best = -1;
            for (long e = 0; e < E; ++e)
                if (!taken[e] && (best < 0 || probabilities[e] > probabilities[best])) best = e;
            taken[best] = true;
            ids[a] = best;
            chosen += weights[a] = probabilities[best] / total;
        }
        if (renormalise)
            for (long a = 0; a < A; ++a) weights[a] /= chosen;
    }
};

// x (T, D) += delta, which may be null; out (T, D) = sigmoid(shared_gate(norm(x))) * shared(norm(x)) + experts(norm(x)). Returns as
// manta_weighted_experts does; with a missing expert `out` is not written.
long manta_moe_sublayer(const MoeSublayer* sublayer, float* x, const float* delta, float* out, long T, int threads) {
    const auto& [norm, router, shared_gate, shared, experts, A, renormalise] = *sublayer;
    const long D = router.inputs, E = router.outputs;
    AlignedBuffer<float> normed(T * D), logits(T * E), weights(T * A), gates(T);
    AlignedBuffer<int64_t> ids(T * A);
    norm.add(x, delta, &normed[0], T, D, threads);
    router.multiply(&normed[0], &logits[0], T, threads);
    constexpr long ROWS_AT_ONCE = 32;
    parallel_for((T + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE, T * E > SERIAL_NUMBERS / 8 ? threads : 1, [&](long part) {
        ExpertChoice experts_of_token(E, A, renormalise);
        for (long t = part * ROWS_AT_ONCE; t < std::min(T, (part + 1) * ROWS_AT_ONCE); ++t)
            experts_of_token.choose(&logits[t * E], &ids[t * A], &weights[t * A]);
    });
    const long missing = missing_expert(experts, &ids[0], T * A);
    if (missing >= 0) return missing;
    shared_gate.multiply(&normed[0], &gates[0], T, threads);
    for (long t = 0; t < T; ++t) gates[t] = 1 / (1 + std::exp(-gates[t]));
    shared.run(&normed[0], out, T, threads);
    add_weighted_experts(experts, &normed[0], &ids[0], &weights[0], &gates[0], out, T, A, threads);
    return -1;
}

// Runs x (T, D) through all layers; what is then still to be added to x is left in delta (T, D). Returns 0 on success, a positive Outcome of
// shared_memory_collectives.cpp if a sum over ranks failed, or -1 - the id of a missing expert.
long manta_layers(const Layer* layers, long count, const AllReduce* all_reduce, const Batch* batch, float* x, float* delta, long D, int threads) {
    const long T = batch->T;
    for (long l = 0; l < count; ++l) {
        const auto& [attention, mlp_sublayer, is_sparse] = layers[l];
        manta_attention_sublayer(attention, batch, x, l ? delta : nullptr, delta, threads);  // a sublayer reads delta before it overwrites it
        if (const int outcome = all_reduce->sum_over_ranks(delta, T * D)) return outcome;
        if (is_sparse) {  // sparse layers are complete on each rank: no sum
            const long missing = manta_moe_sublayer((const MoeSublayer*)mlp_sublayer, x, delta, delta, T, threads);
            if (missing >= 0) return -1 - missing;
            continue;
        }
        manta_mlp_sublayer((const MlpSublayer*)mlp_sublayer, x, delta, delta, T, threads);
        if (const int outcome = all_reduce->sum_over_ranks(delta, T * D)) return outcome;
    }
    return 0;
}
}
