// Draws, compares and blends the kernels of many layers in one call each; see native.py.
//
// A layer's weight is a matrix of C_out rows, one flattened kernel each. The plain functions of
// merging.py are the specification.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

namespace {

struct Layer {  // five int64, as native.py writes them
  void *rows;
  int64_t fan_in;
  int64_t begin, end;  // its pairs in the arrays of all pairs
  int64_t centred;     // compare the kernels without their mean
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

// Sums are kept in so many lanes, added up in the end: enough for the processor to work on several
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
  // 0 / 0 is NaN and stays it through the clamping.
  return std::isfinite(norms) ? std::clamp(totals[0] / norms, -one, one) : NAN;
}

// A pair is compared by one thread, so that the result does not depend on how many there are.
template <typename Number, typename Wide>
void compare(const Layer *layers, int64_t count, Pairs pairs, Wide *cosines, int threads) {
#pragma omp parallel num_threads(threads)
  for (int64_t l = 0; l < count; ++l) {
    const Layer layer = layers[l];
#pragma omp for schedule(dynamic, 8) nowait
    for (int64_t p = layer.begin; p < layer.end; ++p) {
      cosines[p] = cosine<Number, Wide>(row<Number>(layer, pairs.targets[p]),
                                        row<Number>(layer, pairs.sources[p]), layer.fan_in,
                                        layer.centred);
    }
  }
}

struct Move {
  int64_t target, source;
  bool opens_cycle;   // its kernel is still needed after it is written: set it aside
  bool closes_cycle;  // its partner is the kernel that was set aside
};

// An order in which each kernel is read by all that blend with it before it is written itself, so
// that nothing is copied but one kernel of each cycle of partners.
std::vector<Move> in_order(const Layer &layer, Pairs pairs, const bool *changed) {
  int64_t kernels = 0;
  for (int64_t p = layer.begin; p < layer.end; ++p) {
    kernels = std::max({kernels, pairs.targets[p] + 1, pairs.sources[p] + 1});
  }
  std::vector<int64_t> partner(kernels, -1), readers(kernels, 0), ready;
  for (int64_t p = layer.begin; p < layer.end; ++p) {
    if (changed[p]) {
      partner[pairs.targets[p]] = pairs.sources[p];
      ++readers[pairs.sources[p]];
    }
  }
  for (int64_t k = 0; k < kernels; ++k) {
    if (partner[k] >= 0 && readers[k] == 0) ready.push_back(k);
  }
  std::vector<Move> order;
  while (!ready.empty()) {
    const int64_t target = ready.back(), source = partner[target];
    ready.pop_back();
    order.push_back({target, source, false, false});
    partner[target] = -1;
    if (--readers[source] == 0 && partner[source] >= 0) ready.push_back(source);
  }
  for (int64_t first = 0; first < kernels; ++first) {  // what is left are cycles
    for (int64_t target = first; partner[target] >= 0;) {
      const int64_t source = partner[target];
      order.push_back({target, source, target == first, source == first});
      partner[target] = -1;
      target = source;
    }
  }
  return order;
}

constexpr int64_t kSpan = 2048;  // entries of a kernel that one thread blends at a time

// alpha * kernel + (1 - alpha) * partner where changed, for all layers; says which were written.
template <typename Number, typename Wide>
void blend(const Layer *layers, int64_t count, Pairs pairs, const bool *changed, Wide alpha,
           bool *written, int threads) {
  std::vector<std::vector<Move>> orders;
  struct Part {
    int64_t layer, begin, end;
  };
  std::vector<Part> parts;  // no entry of a kernel depends on another, so any split will do
  for (int64_t l = 0; l < count; ++l) {
    orders.push_back(in_order(layers[l], pairs, changed));
    written[l] = !orders[l].empty();
    if (!written[l]) continue;
    for (int64_t begin = 0; begin < layers[l].fan_in; begin += kSpan) {
      parts.push_back({l, begin, std::min(begin + kSpan, layers[l].fan_in)});
    }
  }
  const int64_t total = parts.size();
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (int64_t n = 0; n < total; ++n) {
    const Part part = parts[n];
    const int64_t length = part.end - part.begin;
    Number aside[kSpan];
    for (const Move &step : orders[part.layer]) {
      Number *kernel = row<Number>(layers[part.layer], step.target) + part.begin;
      const Number *partner = row<Number>(layers[part.layer], step.source) + part.begin;
      if (step.closes_cycle) {
        partner = step.opens_cycle ? kernel : aside;
      } else if (step.opens_cycle) {
        std::memcpy(aside, kernel, length * sizeof(Number));
      }
#pragma omp simd
      for (int64_t e = 0; e < length; ++e) {
        const Wide mine = kernel[e], theirs = partner[e];
        kernel[e] = static_cast<Number>(alpha < Wide(0.5) ? theirs + alpha * (mine - theirs)
                                                          : mine - (mine - theirs) * (1 - alpha));
      }
    }
  }
}

}  // namespace

// Draws what PyTorch's CPU generator of the same seeds does. Fills the rows of `pairs` (layer,
// target, source; each of `room` places) from the left.
extern "C" void draw_layers(const int64_t *kernels, const int64_t *group_sizes,
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
}

#define INMERGE_FUNCTIONS(name, Number, Wide)                                                      \
  extern "C" void compare_##name(const Layer *layers, const int64_t *targets,                      \
                                 const int64_t *sources, Wide *cosines, int64_t count,             \
                                 int threads) {                                                    \
    compare<Number, Wide>(layers, count, {targets, sources}, cosines, threads);                    \
  }                                                                                                \
  extern "C" void blend_##name(const Layer *layers, const int64_t *targets,                        \
                               const int64_t *sources, const bool *changed, int64_t count,         \
                               double alpha, bool *written, int threads) {                         \
    blend<Number, Wide>(layers, count, {targets, sources}, changed, static_cast<Wide>(alpha),      \
                        written, threads);                                                         \
  }

INMERGE_FUNCTIONS(float32, float, float)
INMERGE_FUNCTIONS(float64, double, double)
INMERGE_FUNCTIONS(bfloat16, BFloat16, float)
