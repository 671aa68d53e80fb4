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

struct Layer {  // seven words, as native.py writes them
  void *rows;
  int64_t kernels, fan_in;
  int64_t group_size;  // partners are drawn among so many kernels
  int64_t stream;      // of random numbers
  int64_t centred;     // compare the kernels without their mean
  double bound;        // a pair merges where its cosine is above it
};

struct Table {  // seven words, as native.py writes them
  const Layer *layers;
  int64_t count;
  int64_t *ends;               // where the pairs of each layer end; the next layer's begin there
  int64_t *targets, *sources;  // of each pair, as the cosines and decisions
  void *cosines;
  bool *merged;

  int64_t begin(int64_t layer) const { return layer ? ends[layer - 1] : 0; }
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
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
      for (int64_t q = 0; q < half; ++q) lanes[k][q] += lanes[k][q + half];
    }
    totals[k] = lanes[k][0];
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
void compare(const Table &table, int threads) {
  Wide *const cosines = static_cast<Wide *>(table.cosines);
#pragma omp parallel num_threads(threads)
  for (int64_t l = 0; l < table.count; ++l) {
    const Layer layer = table.layers[l];
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t p = table.begin(l); p < table.ends[l]; ++p) {
      cosines[p] = cosine<Number, Wide>(row<Number>(layer, table.targets[p]),
                                        row<Number>(layer, table.sources[p]), layer.fan_in,
                                        layer.centred);
    }
  }
}

// The merge weight with which the blend moves a kernel by `step` times its norm along the line to its
// partner: merging.signed_weight.
template <typename Number, typename Wide>
Wide signed_weight(const Number *kernel, const Number *partner, int64_t fan_in, Wide step) {
  Wide totals[3];
  sum<Wide>(fan_in, totals, [=](int64_t n, Wide &square, Wide &distance, Wide &) {
    const Wide mine = kernel[n], between = partner[n] - mine;
    square += mine * mine;
    distance += between * between;
  });
  const Wide norm = std::sqrt(totals[0]), distance = std::sqrt(totals[1]);
  return distance > 0 ? 1 - step * norm / distance : Wide(1);
}

// -- random numbers -------------------------------------------------------------------------------

// What pairs.mix makes of (seed, step, stream).
uint32_t mix(uint64_t seed, uint64_t step, uint64_t stream) {
  uint64_t state = 0;
  for (const uint64_t number : {seed, step, stream}) {
    state += number + 0x9E3779B97F4A7C15;
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9;
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB;
    state ^= state >> 31;
  }
  return state >> 32;
}

// Draws the numbers of PyTorch's CPU generator with the same seed: merging.draw_pairs. Returns how
// many pairs there are.
int64_t draw_pairs(int64_t kernels, int64_t group_size, float probability, uint32_t seed,
                   int64_t *targets, int64_t *sources) {
  std::mt19937 generator(seed);
  const uint32_t size = group_size;
  int64_t end = 0;
  for (int64_t kernel = 0; kernel < kernels; ++kernel) {
    const float chance = (static_cast<uint32_t>(generator()) & 0xFFFFFF) * 0x1p-24f;
    targets[end] = kernel;
    end += chance < probability && size > 1;
  }
  for (int64_t n = 0; n < end; ++n) {
    const uint32_t target = targets[n], place = target % size;
    const uint32_t moved = place + 1 + static_cast<uint32_t>(generator()) % (size - 1);
    sources[n] = target - place + (moved < size ? moved : moved - size);
  }
  return end;
}

constexpr int64_t kAlone = 1 << 15;  // so few entries are done before a second thread wakes up
// Draws the pairs of all layers, each with a generator of its own.
void draw(const Table &table, uint64_t seed, uint64_t step, float probability, int threads) {
  std::vector<int64_t> places(table.count), drawn(table.count);
  for (int64_t l = 1; l < table.count; ++l) places[l] = places[l - 1] + table.layers[l - 1].kernels;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t l = 0; l < table.count; ++l) {
    const Layer &layer = table.layers[l];
    drawn[l] = draw_pairs(layer.kernels, layer.group_size, probability,
                          mix(seed, step, layer.stream), table.targets + places[l],
                          table.sources + places[l]);
  }
  int64_t end = 0;
  for (int64_t l = 0; l < table.count; ++l) {  // close the gaps
    std::copy_n(table.targets + places[l], drawn[l], table.targets + end);
    std::copy_n(table.sources + places[l], drawn[l], table.sources + end);
    table.ends[l] = end += drawn[l];
  }
}

constexpr uint64_t kDirectionStream = uint64_t{1} << 40;

// Draws for each pair of a layer whether its kernel moves toward its partner, 1, or away, -1.
void draw_signs(uint64_t seed, uint64_t step, int64_t stream, int64_t pairs, int8_t *signs) {
  std::mt19937 generator(mix(seed, step, kDirectionStream + stream));
  for (int64_t p = 0; p < pairs; ++p) signs[p] = generator() % 2 ? 1 : -1;
}

// -- the pass -------------------------------------------------------------------------------------

struct Move {
  int32_t target, source, pair;
  bool opens_cycle;   // its kernel is still needed after it is written: set it aside
  bool closes_cycle;  // its partner is the kernel that was set aside
};

struct Part {  // moves that no move of another part has to wait for
  int64_t layer, begin, end, entries;
};

constexpr int64_t kPart = 1 << 18;  // entries of a part, about: enough to outweigh handing it out

// The moves of one layer in an order in which each kernel is read by all that are drawn with it
// before it is written itself, so that nothing is copied but one kernel of each cycle of partners.
// Kernels that no chain of pairs connects are independent: a large layer is split into parts of them.
class Order {
 public:
  std::vector<Move> moves;
  std::vector<Part> parts;

  // Without `changed` all pairs move.
  void make(const Table &table, int64_t number, const bool *changed) {
    const Layer &layer = table.layers[number];
    const int64_t begin = table.begin(number), end = table.ends[number];
    const int32_t kernels = static_cast<int32_t>(layer.kernels);
    const bool splits = (end - begin) * layer.fan_in > kPart;
    pair_.assign(kernels, -1);
    readers_.assign(kernels, 0);
    if (splits) {
      set_.resize(kernels);
      std::iota(set_.begin(), set_.end(), 0);
    }
    for (int64_t p = begin; p < end; ++p) {
      if (changed && !changed[p]) continue;
      const int32_t target = table.targets[p], source = table.sources[p];
      pair_[target] = p;
      ++readers_[source];
      if (splits) {
        const int32_t one = root(target), other = root(source);
        set_[std::max(one, other)] = std::min(one, other);
      }
    }
    moves.clear();
    const auto push = [&](int32_t target, bool opens, bool closes) {
      const int32_t pair = pair_[target];
      moves.push_back({target, static_cast<int32_t>(table.sources[pair]), pair, opens, closes});
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
    parts.clear();
    if (splits) {
      sort_by_set();
      split(number, layer.fan_in);
    } else if (!moves.empty()) {
      const int64_t count = moves.size();
      parts.push_back({number, 0, count, count * layer.fan_in});
    }
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
    const int64_t total = moves.size();
    for (int64_t begin = 0; begin < total;) {
      int64_t end = begin;
      do {
        const int32_t set = root(moves[end].target);
        while (end < total && root(moves[end].target) == set) ++end;
      } while (end < total && (end - begin) * fan_in < kPart);
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

// Starts to load a kernel that is needed soon; the processor itself follows a long one.
template <typename Number>
void fetch(const Number *kernel, int64_t fan_in) {
  const char *place = reinterpret_cast<const char *>(kernel);
  const char *const end = place + std::min<int64_t>(fan_in * sizeof(Number), 1024);
  for (; place < end; place += 64) __builtin_prefetch(place);
}

enum Decision { kGiven, kBound, kQuantile };

struct Rule {
  bool draws;         // first draw the pairs, each kernel with this probability
  float probability;
  Decision decision;  // whether `merged` is given, or how it is found
  double share;       // the quantile
  bool skip;          // merge nothing
  double alpha;
  bool is_signed;  // instead of `alpha`, move each kernel by `radius` along the line to its partner,
  double radius;   // toward it or away from it as its layer's generator says
  uint64_t seed, step;
};

// Each pair is compared, and blended at once if it is similar, while its rows are still in the cache.
template <typename Number, typename Wide>
void merge(const Table &table, const Rule &rule, Number *kept, int threads) {
  const Layer *const layers = table.layers;
  const int64_t count = table.count;
  Wide *const cosines = static_cast<Wide *>(table.cosines);
  bool *const merged = table.merged;
  if (rule.decision == kQuantile) compare<Number, Wide>(table, threads);
  static thread_local std::vector<Order> orders;  // their memory is reused in the next step
  static thread_local std::vector<Part> parts;
  static thread_local std::vector<int8_t> signs;
  if (orders.size() < static_cast<size_t>(count)) orders.resize(count);
  if (rule.is_signed) signs.resize(table.ends[count - 1]);
  std::vector<int64_t> kept_at(count);
  int64_t widest = 0, entries = 0;
  for (int64_t l = 0; l < count; ++l) {
    kept_at[l] = entries;
    entries += (table.ends[l] - table.begin(l)) * layers[l].fan_in;
    widest = std::max(widest, layers[l].fan_in);
  }
  if (entries < kAlone) threads = 1;
  Order *const order_of = orders.data();
  std::vector<Part> &all = parts;
  int8_t *const sign_of = signs.data();
#pragma omp parallel num_threads(threads)
  {
    std::vector<Wide> known;
#pragma omp for schedule(dynamic, 1)
    for (int64_t l = 0; l < count; ++l) {
      const int64_t begin = table.begin(l), end = table.ends[l];
      if (rule.decision == kQuantile) {
        const Wide bound = quantile<Wide>(cosines + begin, cosines + end, rule.share, known);
        for (int64_t p = begin; p < end; ++p) merged[p] = !rule.skip && cosines[p] >= bound;
      }
      if (rule.is_signed) {
        draw_signs(rule.seed, rule.step, layers[l].stream, end - begin, sign_of + begin);
      }
      order_of[l].make(table, l, rule.decision == kBound ? nullptr : merged);
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
      const Move *const moves = order_of[part.layer].moves.data();
      const int64_t length = layer.fan_in;
      bool is_aside = false;
      for (int64_t m = part.begin; m < part.end; ++m) {
        const Move &move = moves[m];
        if (m + 1 < part.end) {
          fetch(row<Number>(layer, moves[m + 1].target), length);
          fetch(row<Number>(layer, moves[m + 1].source), length);
        }
        Number *kernel = row<Number>(layer, move.target);
        const Number *partner = row<Number>(layer, move.source);
        if (move.opens_cycle) is_aside = false;
        if (move.closes_cycle && is_aside) partner = aside.data();
        if (rule.decision == kBound) {
          const Wide found = cosine<Number, Wide>(kernel, partner, length, layer.centred);
          cosines[move.pair] = found;
          merged[move.pair] = !rule.skip && found > static_cast<Wide>(layer.bound);
        }
        if (!merged[move.pair]) continue;
        if (move.opens_cycle) {
          std::copy_n(kernel, length, aside.data());
          is_aside = true;
        }
        if (kept) {
          const int64_t place = move.pair - table.begin(part.layer);
          std::copy_n(kernel, length, kept + kept_at[part.layer] + place * length);
        }
        Wide alpha = rule.alpha;
        if (rule.is_signed) {
          const Wide step = sign_of[move.pair] * static_cast<Wide>(rule.radius);
          alpha = signed_weight<Number, Wide>(kernel, partner, length, step);
        }
        blend<Number, Wide>(kernel, partner, length, alpha);
      }
    }
  }
}

// The outcome of the pairs of each layer, in five rows of `sums`: how many there are, how many merged,
// how many have no cosine, the sum of the cosines and the largest.
template <typename Wide>
void add_up(const Table &table, double *sums) {
  const Wide *const cosines = static_cast<const Wide *>(table.cosines);
  const int64_t count = table.count;
  for (int64_t l = 0; l < count; ++l) {
    double changed = 0, undefined = 0, total = 0, largest = -2;  // below every cosine
    for (int64_t p = table.begin(l); p < table.ends[l]; ++p) {
      changed += table.merged[p];
      if (std::isnan(cosines[p])) {
        ++undefined;
      } else {
        total += cosines[p];
        largest = std::max<double>(largest, cosines[p]);
      }
    }
    sums[l] = table.ends[l] - table.begin(l);
    sums[count + l] = changed;
    sums[2 * count + l] = undefined;
    sums[3 * count + l] = total;
    sums[4 * count + l] = largest;
  }
}

}  // namespace

// Draws the pairs of all layers into `table`, which has room for as many as there are kernels.
extern "C" void draw(const Table *table, uint64_t seed, uint64_t step, float probability,
                     int threads) {
  draw(*table, seed, step, probability, threads);
}

// Draws the pairs of one layer with a generator of this seed; returns how many there are.
extern "C" int64_t draw_layer(int64_t kernels, int64_t group_size, float probability, uint32_t seed,
                              int64_t *targets, int64_t *sources) {
  return draw_pairs(kernels, group_size, probability, seed, targets, sources);
}

// Draws the signs of the pairs of several layers, one layer after the other.
extern "C" void draw_signs(int64_t layers, const int64_t *streams, const int64_t *pairs,
                           uint64_t seed, uint64_t step, int8_t *signs) {
  for (int64_t l = 0; l < layers; signs += pairs[l++]) {
    draw_signs(seed, step, streams[l], pairs[l], signs);
  }
}

// Restores the kernels of some layers that a pass has saved.
extern "C" void put_back(const Table *table, const char *kept, int64_t entry_size, int threads) {
#pragma omp parallel num_threads(threads) firstprivate(kept)
  for (int64_t l = 0; l < table->count; ++l) {
    const int64_t begin = table->begin(l), end = table->ends[l];
    const int64_t size = table->layers[l].fan_in * entry_size;
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t p = begin; p < end; ++p) {
      if (!table->merged[p]) continue;
      std::memcpy(static_cast<char *>(table->layers[l].rows) + table->targets[p] * size,
                  kept + (p - begin) * size, size);
    }
    kept += (end - begin) * size;
  }
}

#define INMERGE_FUNCTIONS(name, Number, Wide)                                                      \
  extern "C" void compare_##name(const Table *table, int threads) {                                \
    compare<Number, Wide>(*table, threads);                                                        \
  }                                                                                                \
  extern "C" void change_##name(const Table *table, double alpha, int threads) {                   \
    const Rule rule = {false, 0, kGiven, 0, false, alpha, false, 0, 0, 0};                         \
    merge<Number, Wide>(*table, rule, nullptr, threads);                                           \
  }                                                                                                \
  extern "C" void pass_##name(const Table *table, const Rule *rule, Number *kept, double *sums,    \
                              int threads) {                                                       \
    if (rule->draws) draw(*table, rule->seed, rule->step, rule->probability, threads);             \
    merge<Number, Wide>(*table, *rule, kept, threads);                                             \
    add_up<Wide>(*table, sums);                                                                    \
  }

INMERGE_FUNCTIONS(float32, float, float)
INMERGE_FUNCTIONS(float64, double, double)
INMERGE_FUNCTIONS(bfloat16, BFloat16, float)
