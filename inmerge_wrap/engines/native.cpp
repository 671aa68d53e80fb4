// Draws the pairs of many layers, and compares and blends their kernels; see native.py.
//
// A layer's weight is a matrix of C_out rows, one flattened kernel each. The plain functions of
// merging.py and merge_pass.py are the specification.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

namespace {

struct Layer {  // five words, as native.py writes them
  void *rows;
  int64_t kernels, fan_in;
  int64_t centred;  // compare the kernels without their mean
  double bound;     // a pair merges where its cosine is above it
};

struct Pairs {
  const int64_t *targets, *sources;
};

class BFloat16 {
 public:
  BFloat16() = default;
  BFloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, sizeof wide);
    // To the nearest, ties to even; a NaN must not be rounded to infinity.
    bits_ = std::isnan(value) ? 0x7FC0 : (wide + 0x7FFF + (wide >> 16 & 1)) >> 16;
  }
  operator float() const {
    const uint32_t wide = uint32_t{bits_} << 16;
    float value;
    std::memcpy(&value, &wide, sizeof value);
    return value;
  }

 private:
  uint16_t bits_;
};

template <typename Number>
Number *row(const Layer &layer, int64_t kernel) {
  return static_cast<Number *>(layer.rows) + kernel * layer.fan_in;
}

// Sums are kept in this many lanes, added up at the end: enough for the processor to work on several
// vectors at a time, and an order of summation that no vector length changes.
constexpr int64_t kLanes = 32;

template <typename Wide, typename Term>
void sum(int64_t length, Wide (&totals)[3], Term term) {
  Wide lanes[3][kLanes] = {};
  const int64_t whole = length - length % kLanes;
  for (int64_t n = 0; n < whole; n += kLanes) {
#pragma omp simd
    for (int64_t q = 0; q < kLanes; ++q) term(n + q, lanes[0][q], lanes[1][q], lanes[2][q]);
  }
  for (int64_t n = whole; n < length; ++n) {
    const int64_t q = n - whole;
    term(n, lanes[0][q], lanes[1][q], lanes[2][q]);
  }
  for (int k = 0; k < 3; ++k) {
    totals[k] = 0;
    for (int64_t q = 0; q < kLanes; ++q) totals[k] += lanes[k][q];
  }
}

template <typename Number, typename Wide>
Wide cosine(const Number *kernel, const Number *partner, int64_t fan_in, bool centred) {
  Wide totals[3], mean = 0, partner_mean = 0;
  if (centred) {
    sum<Wide>(fan_in, totals, [=](int64_t n, Wide &mine, Wide &theirs, Wide &) {
      mine += kernel[n];
      theirs += partner[n];
    });
    mean = totals[0] / fan_in;
    partner_mean = totals[1] / fan_in;
  }
  sum<Wide>(fan_in, totals, [=](int64_t n, Wide &product, Wide &square, Wide &partner_square) {
    const Wide mine = kernel[n] - mean, theirs = partner[n] - partner_mean;
    product += mine * theirs;
    square += mine * mine;
    partner_square += theirs * theirs;
  });
  const Wide norms = std::sqrt(totals[1]) * std::sqrt(totals[2]);
  const Wide one = 1;
  // 0 / 0 is NaN and stays NaN through the clamping.
  return std::isfinite(norms) ? std::clamp(totals[0] / norms, -one, one) : NAN;
}

// A pair is compared by one thread, so that the result does not depend on how many there are.
template <typename Number, typename Wide>
void compare(const Layer *layers, int64_t count, const int64_t *ends, Pairs pairs, Wide *cosines,
             int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t l = 0; l < count; ++l) {
    const Layer layer = layers[l];
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t p = l ? ends[l - 1] : 0; p < ends[l]; ++p) {
      cosines[p] = cosine<Number, Wide>(row<Number>(layer, pairs.targets[p]),
                                        row<Number>(layer, pairs.sources[p]), layer.fan_in,
                                        layer.centred);
    }
  }
}

struct Move {
  int32_t target, source, pair;
  bool opens_cycle;   // its kernel is still needed after it is written: set it aside
  bool closes_cycle;  // its partner is the kernel that was set aside
};

struct Part {  // moves that no move of another part has to wait for
  int64_t layer, begin, end, entries;
};

// The moves of one layer in an order in which each kernel is read by all that are drawn with it
// before it is written itself, so that nothing is copied but one kernel of each cycle of partners.
// Kernels that no chain of pairs connects are independent; parts of them have some 2^18 entries.
class Order {
 public:
  std::vector<Move> moves;
  std::vector<Part> parts;

  void make(const Layer &layer, int64_t number, int64_t begin, int64_t end, Pairs pairs,
            const bool *changed) {
    const int32_t kernels = static_cast<int32_t>(layer.kernels);
    pair_.assign(kernels, -1);
    readers_.assign(kernels, 0);
    set_.resize(kernels);
    std::iota(set_.begin(), set_.end(), 0);
    for (int64_t p = begin; p < end; ++p) {
      if (changed && !changed[p]) continue;
      const int32_t target = pairs.targets[p], source = pairs.sources[p];
      pair_[target] = p;
      ++readers_[source];
      const int32_t one = root(target), other = root(source);
      set_[std::max(one, other)] = std::min(one, other);
    }
    moves.clear();
    const auto push = [&](int32_t target, bool opens, bool closes) {
      moves.push_back({target, static_cast<int32_t>(pairs.sources[pair_[target]]), pair_[target],
                       opens, closes});
      pair_[target] = -1;
    };
    for (int32_t k = 0; k < kernels; ++k) {  // from each kernel that no pair reads, down its chain
      int32_t target = k;
      while (pair_[target] >= 0 && readers_[target] == 0) {
        push(target, false, false);
        target = moves.back().source;
        --readers_[target];  // its last reader continues from here
      }
    }
    for (int32_t first = 0; first < kernels; ++first) {  // what is left are cycles
      for (int32_t target = first; pair_[target] >= 0;) {
        push(target, target == first, false);
        target = moves.back().source;
        moves.back().closes_cycle = target == first;
      }
    }
    sort_by_set();
    split(number, layer.fan_in);
  }

 private:
  std::vector<Move> found_;
  std::vector<int32_t> pair_, readers_, set_;

  // Brings the moves of each set together and leaves their order as it is: a counting sort.
  void sort_by_set() {
    std::vector<int32_t> &begins = readers_;  // no longer in use
    std::fill(begins.begin(), begins.end(), 0);
    for (const Move &move : moves) ++begins[root(move.target)];
    int32_t end = 0;
    for (int32_t &begin : begins) begin = std::exchange(end, end + begin);
    found_.swap(moves);
    moves.resize(found_.size());
    for (const Move &move : found_) moves[begins[root(move.target)]++] = move;
  }

  int32_t root(int32_t kernel) {
    while (set_[kernel] != kernel) kernel = set_[kernel] = set_[set_[kernel]];
    return kernel;
  }

  void split(int64_t number, int64_t fan_in) {
    parts.clear();
    const int64_t total = moves.size();
    for (int64_t begin = 0; begin < total;) {
      int64_t end = begin;
      do {
        const int32_t set = root(moves[end].target);
        while (end < total && root(moves[end].target) == set) ++end;
      } while (end < total && (end - begin) * fan_in < (1 << 18));
      parts.push_back({number, begin, end, (end - begin) * fan_in});
      begin = end;
    }
  }
};

template <typename Number, typename Wide>
void blend(Number *kernel, const Number *partner, int64_t length, Wide alpha) {
#pragma omp simd
  for (int64_t e = 0; e < length; ++e) {
    const Wide mine = kernel[e], theirs = partner[e];
    kernel[e] = static_cast<Number>(alpha < Wide(0.5) ? theirs + alpha * (mine - theirs)
                                                      : mine - (mine - theirs) * (1 - alpha));
  }
}

// As torch.nanquantile, which interpolates between its neighbours.
template <typename Wide>
Wide quantile(const Wide *begin, const Wide *end, Wide share, std::vector<Wide> &known) {
  known.clear();
  std::copy_if(begin, end, std::back_inserter(known), [](Wide x) { return !std::isnan(x); });
  if (known.empty()) return std::numeric_limits<Wide>::quiet_NaN();
  const Wide rank = share * static_cast<Wide>(known.size() - 1);
  const int64_t below = static_cast<int64_t>(rank), above = std::ceil(rank);
  std::nth_element(known.begin(), known.begin() + below, known.end());
  const Wide low = known[below], weight = rank - below;
  if (above == below) return low;
  const Wide high = *std::min_element(known.begin() + above, known.end());
  return weight < Wide(0.5) ? low + weight * (high - low) : high - (high - low) * (1 - weight);
}

constexpr int64_t kAlone = 1 << 15;  // so few entries are done before a second thread wakes up

enum Decision { kGiven, kBound, kQuantile };

// The whole pass over some layers: each pair is compared, and blended at once if it is similar, while
// its rows are still in the cache. `merged` is given or found, as `decision` says.
template <typename Number, typename Wide>
void merge(const Layer *layers, int64_t count, const int64_t *ends, Pairs pairs, Wide *cosines,
           bool *merged, Decision decision, Wide share, Wide alpha, bool skip, Number *kept,
           int threads) {
  if (decision == kQuantile) compare<Number, Wide>(layers, count, ends, pairs, cosines, threads);
  static thread_local std::vector<Order> orders;  // their memory is reused in the next step
  static thread_local std::vector<Part> parts;
  if (orders.size() < static_cast<size_t>(count)) orders.resize(count);
  std::vector<int64_t> kept_at(count, 0);
  int64_t widest = 0;
  for (int64_t l = 0, end = 0; l < count; ++l) {
    kept_at[l] = end;
    end += (ends[l] - (l ? ends[l - 1] : 0)) * layers[l].fan_in;
    widest = std::max(widest, layers[l].fan_in);
    if (l + 1 == count && end < kAlone) threads = 1;
  }
  Order *const order_of = orders.data();
  std::vector<Part> &all = parts;
#pragma omp parallel num_threads(threads)
  {
    std::vector<Wide> known;
#pragma omp for schedule(dynamic, 1)
    for (int64_t l = 0; l < count; ++l) {
      const int64_t begin = l ? ends[l - 1] : 0;
      if (decision == kQuantile) {
        const Wide bound = quantile(cosines + begin, cosines + ends[l], share, known);
        for (int64_t p = begin; p < ends[l]; ++p) merged[p] = !skip && cosines[p] >= bound;
      }
      order_of[l].make(layers[l], l, begin, ends[l], pairs,
                       decision == kBound ? nullptr : merged);
    }
#pragma omp single
    {
      all.clear();
      for (int64_t l = 0; l < count; ++l) {
        all.insert(all.end(), order_of[l].parts.begin(), order_of[l].parts.end());
      }
      // The largest first, so that the threads finish together.
      std::stable_sort(all.begin(), all.end(), [](const Part &one, const Part &other) {
        return one.entries > other.entries;
      });
    }
    std::vector<Number> aside(widest);
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t n = 0; n < static_cast<int64_t>(all.size()); ++n) {
      const Part part = all[n];
      const Layer &layer = layers[part.layer];
      const int64_t length = layer.fan_in, begin = part.layer ? ends[part.layer - 1] : 0;
      bool is_aside = false;
      for (int64_t m = part.begin; m < part.end; ++m) {
        const Move &move = order_of[part.layer].moves[m];
        Number *kernel = row<Number>(layer, move.target);
        const Number *partner = row<Number>(layer, move.source);
        if (move.opens_cycle) is_aside = false;
        if (move.closes_cycle && is_aside) partner = aside.data();
        if (decision == kBound) {
          const Wide found = cosine<Number, Wide>(kernel, partner, length, layer.centred);
          cosines[move.pair] = found;
          merged[move.pair] = !skip && found > static_cast<Wide>(layer.bound);
        }
        if (!merged[move.pair]) continue;
        if (move.opens_cycle) {
          std::copy_n(kernel, length, aside.data());
          is_aside = true;
        }
        if (kept) {
          std::copy_n(kernel, length, kept + kept_at[part.layer] + (move.pair - begin) * length);
        }
        blend<Number, Wide>(kernel, partner, length, alpha);
      }
    }
  }
}

// The outcome of the pairs of each layer, in four rows of `sums`: how many merged, how many have no
// cosine, the sum of the cosines and the largest.
template <typename Wide>
void add_up(int64_t count, const int64_t *ends, const Wide *cosines, const bool *merged,
            double *sums) {
  for (int64_t l = 0, p = 0; l < count; ++l) {
    double changed = 0, undefined = 0, total = 0, largest = -2;  // below every cosine
    for (; p < ends[l]; ++p) {
      changed += merged[p];
      if (std::isnan(cosines[p])) {
        ++undefined;
      } else {
        total += cosines[p];
        largest = std::max<double>(largest, cosines[p]);
      }
    }
    sums[l] = changed;
    sums[count + l] = undefined;
    sums[2 * count + l] = total;
    sums[3 * count + l] = largest;
  }
}

}  // namespace

// The seed of each layer: what pairs.mix makes of (seed, step, stream).
extern "C" void mix_seeds(const int64_t *streams, int64_t count, uint64_t seed, uint64_t step,
                          int64_t *seeds) {
  for (int64_t l = 0; l < count; ++l) {
    uint64_t state = 0;
    for (const uint64_t number : {seed, step, static_cast<uint64_t>(streams[l])}) {
      state += number + 0x9E3779B97F4A7C15;
      state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
      state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
      state ^= state >> 31;
    }
    seeds[l] = state >> 32;
  }
}

// Draws the same numbers as PyTorch's CPU generator with the same seeds. Fills the rows of `pairs` (layer,
// target, source; each of `room` places) from the left, and returns how many pairs there are.
extern "C" int64_t draw_layers(const int64_t *kernels, const int64_t *group_sizes,
                               const int64_t *seeds, int64_t count, float probability,
                               int64_t *pairs, int64_t room, int64_t *lengths) {
  int64_t *layers = pairs, *targets = pairs + room, *sources = pairs + 2 * room;
  int64_t end = 0;
  for (int64_t layer = 0; layer < count; ++layer) {
    const int64_t size = group_sizes[layer], begin = end;
    std::mt19937 generator(static_cast<uint32_t>(seeds[layer]));
    for (int64_t kernel = 0; kernel < kernels[layer]; ++kernel) {
      const float chance = (generator() & 0xFFFFFF) * 0x1p-24f;
      if (chance < probability && size > 1) targets[end++] = kernel;
    }
    for (int64_t n = begin; n < end; ++n) {
      const int64_t place = targets[n] % size, shift = 1 + generator() % (size - 1);
      layers[n] = layer;
      sources[n] = targets[n] - place + (place + shift) % size;
    }
    lengths[layer] = end - begin;
  }
  return end;
}

// Restores the kernels of some layers that `merge` has saved.
extern "C" void put_back(const Layer *layers, int64_t count, const int64_t *ends,
                         const int64_t *targets, const bool *merged, const char *kept,
                         int64_t entry_size, int threads) {
#pragma omp parallel num_threads(threads) firstprivate(kept)
  for (int64_t l = 0; l < count; ++l) {
    const int64_t begin = l ? ends[l - 1] : 0, size = layers[l].fan_in * entry_size;
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t p = begin; p < ends[l]; ++p) {
      if (!merged[p]) continue;
      std::memcpy(static_cast<char *>(layers[l].rows) + targets[p] * size, kept + (p - begin) * size,
                  size);
    }
    kept += (ends[l] - begin) * size;
  }
}

#define INMERGE_FUNCTIONS(name, Number, Wide)                                                      \
  extern "C" void compare_##name(const Layer *layers, int64_t count, const int64_t *ends,          \
                                 const int64_t *targets, const int64_t *sources, Wide *cosines,    \
                                 int threads) {                                                    \
    compare<Number, Wide>(layers, count, ends, {targets, sources}, cosines, threads);              \
  }                                                                                                \
  extern "C" void merge_##name(const Layer *layers, int64_t count, const int64_t *ends,            \
                               const int64_t *targets, const int64_t *sources, Wide *cosines,      \
                               bool *merged, int decision, double share, double alpha, bool skip,  \
                               Number *kept, double *sums, int threads) {                            \
    merge<Number, Wide>(layers, count, ends, {targets, sources}, cosines, merged,                  \
                        static_cast<Decision>(decision), static_cast<Wide>(share),                 \
                        static_cast<Wide>(alpha), skip, kept, threads);                            \
    if (sums) add_up(count, ends, cosines, merged, sums);                                       \
  }

INMERGE_FUNCTIONS(float32, float, float)
INMERGE_FUNCTIONS(float64, double, double)
INMERGE_FUNCTIONS(bfloat16, BFloat16, float)
