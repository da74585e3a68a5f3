// Draws the next token of each row of logits. The reference is engine/run/sampling/filters.py, and engine/run/noise.py for the noise: the same
// integer arithmetic, so that a row's token depends neither on the order of sums nor on the other rows.
#include <cstring>
#include <numeric>
#include "candidates.h"

namespace {
constexpr int WEIGHT_BITS = 44;
constexpr long BLOCK = 512;  // ids whose weights are summed in double, which is exact up to 2^53
constexpr long CHUNK = 32 * BLOCK;
constexpr long STRETCH = 64;  // ids
constexpr long FIRST_CANDIDATES = 128, MORE_CANDIDATES = 64;  // without top-k; beyond it, so that ties with the last are seen
constexpr long MOST_CANDIDATES = 16384;  // a flat row that needs more is sorted as a whole

// Parameters of a row; parallel/native/sampling.py writes them.
struct Row {
    int64_t seed, choice, position, top_k, mode;
    double temperature, top_p, min_p;

    double scale() const { return 1.4426950408889634 / std::max(temperature, 1e-300); }
    bool is_greedy() const { return mode == 0; }
    bool is_unfiltered() const { return mode == 3; }
    bool needs_total(long N) const { return is_unfiltered() || (top_k >= N && top_p < 1); }  // the weight of all N ids
};

// out (count rounded up to DOUBLES): 2^WEIGHT_BITS for the highest logit and in proportion for the others, rounded down. 2^x by a polynomial of
// degree 13 on [-1/2, 1/2] (coefficients ln(2)^k / k!), to about an ulp.
void weights_of(const float* x, long count, double highest, double scale, double* out) {
    constexpr double C[] = {1.0, 0.6931471805599453, 0.2402265069591007, 0.055504108664821576, 0.009618129107628477,
                            0.0013333558146428441, 0.00015403530393381606, 1.5252733804059838e-05, 1.3215486790144305e-06, 1.0178086009239696e-07,
                            7.054911620801121e-09, 4.44553827187081e-10, 2.5678435993488196e-11, 1.3691488853904124e-12};
    const auto some = [&](const float* from, double* to) {
        // not a weight but its logarithm; below 0 the weight is 0
        const Doubles bits = maximum(multiply_add(subtract(load_doubles(from), broadcast_double(highest)), broadcast_double(scale),
                                                  broadcast_double(WEIGHT_BITS)), broadcast_double(-1));
        const Doubles whole = rounded(bits), rest = subtract(bits, whole);
        Doubles power = broadcast_double(C[13]);
        unrolled<13>([&](auto k) INLINED { power = multiply_add(power, rest, broadcast_double(C[12 - k])); });
        store_doubles(to, rounded_down(times_power_of_2(power, whole)));
    };
    long i = 0;
    for (; i + DOUBLES <= count; i += DOUBLES) some(x + i, out + i);
    if (i == count) return;
    float last[DOUBLES];
    for (int lane = 0; lane < DOUBLES; ++lane) last[lane] = i + lane < count ? x[i + lane] : LOWEST;
    some(last, out + i);
}

// Philox4x32-10; see engine/run/noise.py.
double uniform(const Row& row) {
    uint32_t c[4] = {uint32_t(row.position), uint32_t(row.choice), 0, 0}, k[2] = {uint32_t(row.seed), uint32_t(uint64_t(row.seed) >> 32)};
    for (int round = 0; round < 10; ++round, k[0] += 0x9E3779B9, k[1] += 0xBB67AE85) {
        const uint64_t first = uint64_t(c[0]) * 0xD2511F53, second = uint64_t(c[2]) * 0xCD9E8D57;
        c[0] = uint32_t(second >> 32) ^ c[1] ^ k[0];
        c[2] = uint32_t(first >> 32) ^ c[3] ^ k[1];
        c[1] = uint32_t(second), c[3] = uint32_t(first);
    }
    return (double(uint64_t(c[0]) << 20 | c[1] >> 12) + 0.5) * 0x1p-52;
}

int64_t target_of(const Row& row, int64_t total) { return std::min(int64_t(uniform(row) * double(total)), total - 1); }

// Draws from all ids. sums[b] is the weight of block b.
long draw_unfiltered(const Row& row, const float* x, long N, double highest, const int64_t* sums, long blocks) {
    int64_t left = target_of(row, std::accumulate(sums, sums + blocks, int64_t(0)));
    long block = 0;
    while (left >= sums[block]) left -= sums[block++];
    double weights[BLOCK];
    const long first = block * BLOCK;
    weights_of(x + first, std::min(BLOCK, N - first), highest, row.scale(), weights);
    long at = 0;
    while (left >= int64_t(weights[at])) left -= int64_t(weights[at++]);
    return first + at;
}

// Draws among the ids that the filters keep; -1 if these might be more than the `count` highest. `total` is the weight of all ids, needed for top-p
// without top-k.
long draw_among(const Row& row, const float* x, long N, long count, const std::vector<float>& most, int64_t total) {
    std::vector<float> values(count);
    std::vector<int64_t> ids(count);
    if (count < N) candidates(x, N, count, STRETCH, most, values.data(), ids.data());
    else std::copy(x, x + N, values.begin()), std::iota(ids.begin(), ids.end(), 0);
    struct Candidate {
        float value;
        int32_t at;
    };
    std::vector<Candidate> falling(count);  // sorted with their values: looking these up would take longer
    for (long i = 0; i < count; ++i) falling[i] = {values[i], int32_t(i)};
    std::sort(falling.begin(), falling.end(), [](Candidate a, Candidate b) { return a.value > b.value || (a.value == b.value && a.at < b.at); });
    std::vector<int32_t> order(count);
    std::vector<float> ordered(count);
    std::vector<double> weights(count + DOUBLES);
    for (long i = 0; i < count; ++i) ordered[i] = falling[i].value, order[i] = falling[i].at;
    weights_of(ordered.data(), count, ordered[0], row.scale(), weights.data());

    if (row.top_k < N || row.top_p >= 1) {
        total = 0;
        for (long i = 0; i < std::min(long(row.top_k), count); ++i) total += int64_t(weights[i]);
    }
    const double below = row.top_p * double(total), least = row.min_p * double(1LL << WEIGHT_BITS);
    long kept = 0;
    int64_t sum = 0;  // of the kept
    while (kept < std::min(long(row.top_k), count) && double(sum) < below && weights[kept] >= least && weights[kept] > 0) sum += int64_t(weights[kept++]);
    if (!kept) sum = int64_t(weights[kept++]);
    const long certain = count == N ? N : std::partition_point(ordered.begin(), ordered.end(), [&](float v) { return v > ordered.back(); }) - ordered.begin();
    if (kept > certain || !(row.top_k <= count || row.top_k >= N || row.top_p >= 1)) return -1;

    std::sort(order.begin(), order.begin() + kept);  // the draw runs in the order of ids
    std::vector<double> by_id(kept + DOUBLES);
    for (long i = 0; i < kept; ++i) ordered[i] = values[order[i]];
    const double highest = *std::max_element(ordered.begin(), ordered.begin() + kept);
    weights_of(ordered.data(), kept, highest, row.scale(), by_id.data());
    int64_t left = target_of(row, sum);
    long at = 0;
    while (left >= int64_t(by_id[at])) left -= int64_t(by_id[at++]);
    return ids[order[at]];
}

// `most`: the maxima of STRETCH ids each.
long draw_filtered(const Row& row, const float* x, long N, const std::vector<float>& most, int64_t total) {
    const long wanted = row.top_k < N ? long(row.top_k) + MORE_CANDIDATES : FIRST_CANDIDATES;
    for (long count = std::min(wanted, N);; count = 8 * count > MOST_CANDIDATES ? N : std::min(8 * count, N))
        if (const long id = draw_among(row, x, N, count, most, total); id >= 0) return id;
}
}  // namespace

// x (R, N), rows `stride` apart. report (2, R): the drawn id of each row, and whether its highest logit is finite; if it is not, the id is arbitrary.
extern "C" void manta_draw(const float* x, long stride, const Row* rows, int64_t* report, long R, long N, int threads) {
    std::vector<float> highest(R);
    std::vector<std::vector<float>> most(R);  // see draw_filtered
    parallel_for(R, R * N > SERIAL_NUMBERS ? threads : 1, [&](long r) {
        if (rows[r].is_greedy() || rows[r].is_unfiltered()) highest[r] = highest_at(x + r * stride, N, report + r);
        else {
            most[r].resize((N + STRETCH - 1) / STRETCH);
            const bool not_numbers = stretch_maxima(x + r * stride, N, STRETCH, most[r].data());
            highest[r] = not_numbers ? NAN : *std::max_element(most[r].begin(), most[r].end());
            report[r] = 0;
        }
        report[R + r] = std::isfinite(highest[r]);
    });
    std::vector<long> drawn, summed;  // rows
    for (long r = 0; r < R; ++r) {
        if (rows[r].is_greedy() || !report[R + r]) continue;
        drawn.push_back(r);
        if (rows[r].needs_total(N)) summed.push_back(r);
    }
    const long blocks = (N + BLOCK - 1) / BLOCK, chunks = (N + CHUNK - 1) / CHUNK;
    std::vector<int64_t> sums(summed.empty() ? 0 : R * blocks);
    parallel_for(summed.size() * chunks, threads, [&](long task) {
        const long r = summed[task / chunks], first = task % chunks * (CHUNK / BLOCK);
        for (long b = first; b < std::min(blocks, first + CHUNK / BLOCK); ++b) {
            double weights[BLOCK], lanes[8] = {};
            const long count = std::min(BLOCK, N - b * BLOCK);
            weights_of(x + r * stride + b * BLOCK, count, highest[r], rows[r].scale(), weights);
            std::fill(weights + count, weights + BLOCK, 0.0);
            for (long i = 0; i < BLOCK; i += 8)
                for (int lane = 0; lane < 8; ++lane) lanes[lane] += weights[i + lane];
            sums[r * blocks + b] = int64_t(std::accumulate(lanes, lanes + 8, 0.0));
        }
    });
    parallel_for(drawn.size(), threads, [&](long task) {
        const long r = drawn[task];
        const float* row = x + r * stride;
        const int64_t* of_blocks = sums.data() + r * blocks;
        if (rows[r].is_unfiltered()) report[r] = draw_unfiltered(rows[r], row, N, highest[r], of_blocks, blocks);
        else report[r] = draw_filtered(rows[r], row, N, most[r], rows[r].needs_total(N) ? std::accumulate(of_blocks, of_blocks + blocks, int64_t(0)) : 0);
    });
}
