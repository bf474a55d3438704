// From what M heads say to one answer and its uncertainty, in fp32 and in a fixed order.
//
//   logits [M, B, C] -> mean_prob [B, C], predictive_entropy [B], expected_entropy [B],
//                       mutual_information [B], variation_ratio [B]
//   kSoftmax   p_m = softmax(logits_m)       H(p) = - sum_c p log p
//   kSigmoid   p_m = sigmoid(logits_m)       H(p) = - sum_c p log p + (1 - p) log(1 - p)
//              predictive_entropy = H(mean_m p_m)          expected_entropy = mean_m H(p_m)
//              mutual_information = max(0, difference)
//              variation_ratio: share of heads whose argmax is not that of mean_prob; for kSigmoid
//              share of (head, class) whose p > 0.5 is not that of mean_prob
//   kGaussian  params [M, B, 2 D], means first, then log variances -> mean [B, D],
//              aleatoric_variance = mean_m exp(log variance_m), epistemic_variance = var_m mean_m
//
// Logits in fp32, fp16 or bf16, any alignment; entropies in nats. Read twice for kSoftmax, the
// second time from L2: 2 M B C elements; written B C + 4 B floats.
//
// A block takes `rows` rows of the batch in three passes, with barriers between:
//   1. each (row, head): log-sum-exp, entropy, argmax, by 1 thread, a warp, or the block;
//   2. each (row, class): mean over the heads, by `class_threads` threads a row;
//   3. each row: the scalars.
// Where one row would keep a single block busy for long, 1 and 2 become two kernels, and the last
// block of a row to arrive adds up what the others left (summary_kernels.cuh).
#pragma once

#include "platform.cuh"

namespace hydra {

enum class Summary : int { kNone, kSoftmax, kSigmoid, kGaussian };
enum class Real : int { kFloat, kHalf, kBfloat };

// log sum_c exp(logit) in two parts: where logits are large, their sum would swallow the second.
struct HeadStatistics {
  float top;      // the largest logit
  float log_sum;  // log sum_c exp(logit - top)
  float entropy;
  int vote;
};

// What a stretch of classes adds to its row.
struct RowPart {
  float predictive;
  float expected;  // kSigmoid
  int disagreements;  // kSigmoid
  float best;
  int winner;
};

struct SummaryParameters {
  Summary kind;
  Real type;
  const void* logits;
  int heads, batch, outputs;
  float* mean;                // mean_prob [B, C], or mean [B, D]
  float* predictive_entropy;  // [B], or aleatoric_variance [B, D]
  float* expected_entropy;    // [B], or epistemic_variance [B, D]
  float* mutual_information;  // [B]
  float* variation_ratio;     // [B]
  // How the work is shared out.
  int rows;           // of the batch that a block takes at once
  int head_threads;   // per (row, head): 1, 32 or the whole block
  int class_threads;  // per row: a power of 2, at most the block
  int slices;         // blocks that share the classes of a row
  HeadStatistics* statistics;  // [B, M], when slices > 1
  RowPart* parts;              // [B, slices], when slices > 1
  uint32_t* counters;          // [B] when slices > 1: 0 before and after
};

// Shared memory that a block of `threads` needs for `rows` rows of `heads` heads.
HYDRA_HOST_DEVICE int summary_shared_bytes(int rows, int heads, int threads) {
  return rows * heads * int(sizeof(HeadStatistics)) + threads / 32 * int(sizeof(RowPart)) + 16;
}

class SummaryBlock {
 public:
  HYDRA_DEVICE SummaryBlock(const SummaryParameters& parameters, unsigned char* shared)
      : p_(parameters),
        statistics_(reinterpret_cast<HeadStatistics*>(shared)),
        parts_(reinterpret_cast<RowPart*>(shared + p_.rows * p_.heads * sizeof(HeadStatistics))) {}

  // Rows first … end - 1 of the batch, from logits to every output.
  HYDRA_DEVICE void rows(int first, int end) {
    if (p_.kind == Summary::kGaussian) return gaussian(first, end);
    for (int row = first; row < end; row += p_.rows) {
      const int count = min(p_.rows, end - row);
      if (p_.kind == Summary::kSoftmax) {
        read_heads(row, count);
        sync_block();
      }
      const int together = block_threads() / p_.class_threads;
      for (int r = 0; r < count; r += together) {
        const int mine = r + thread_index() / p_.class_threads;
        const bool exists = mine < count;
        RowPart part = classes(row + mine, exists ? mine : 0, 0, exists ? p_.outputs : 0);
        finish(row + mine, exists ? mine : 0, part, exists);
      }
      sync_block();  // before the statistics are overwritten
    }
  }

  // One (row, head) by the whole block, into global memory.
  HYDRA_DEVICE void head(int row, int head) {
    const HeadStatistics result = statistics_of(row, head, block_threads());
    if (thread_index() != 0) return;
    HeadStatistics* to = p_.statistics + int64_t(row) * p_.heads + head;
    write_global(&to->top, result.top);
    write_global(&to->log_sum, result.log_sum);
    write_global(&to->entropy, result.entropy);
    write_global(&to->vote, result.vote);
  }

  // One slice of the classes of a row; the last slice to arrive finishes the row.
  HYDRA_DEVICE void slice(int row, int slice) {
    if (p_.kind == Summary::kSoftmax) {
      for (int m = thread_index(); m < p_.heads; m += block_threads()) {
        const HeadStatistics* from = p_.statistics + int64_t(row) * p_.heads + m;
        write_statistics(m, {read_fresh(&from->top), read_fresh(&from->log_sum),
                             read_fresh(&from->entropy), read_fresh(&from->vote)});
      }
      sync_block();
    }
    const int per_slice = (p_.outputs + p_.slices - 1) / p_.slices;
    const int begin = min(slice * per_slice, p_.outputs);
    RowPart part = classes(row, 0, begin, min(begin + per_slice, p_.outputs));
    if (thread_index() == 0) {
      RowPart* to = p_.parts + int64_t(row) * p_.slices + slice;
      write_global(&to->predictive, part.predictive);
      write_global(&to->expected, part.expected);
      write_global(&to->disagreements, part.disagreements);
      write_global(&to->best, part.best);
      write_global(&to->winner, part.winner);
    }
    if (!last_to_arrive(p_.counters + row, p_.slices, reinterpret_cast<int*>(parts_))) return;
    part = {0, 0, 0, -1, 0};
    for (int s = thread_index(); s < p_.slices; s += block_threads()) {
      const RowPart* from = p_.parts + int64_t(row) * p_.slices + s;
      part = joined(part, {read_fresh(&from->predictive), read_fresh(&from->expected),
                           read_fresh(&from->disagreements), read_fresh(&from->best),
                           read_fresh(&from->winner)});
    }
    finish(row, 0, reduced(part, p_.class_threads), true);
  }

  // Whether this block is the last of `blocks` to come here; what the others wrote before is then
  // seen by `read_fresh`. The counter is 0 again afterwards, ready for the next launch.
  HYDRA_DEVICE static bool last_to_arrive(uint32_t* counter, int blocks, int* shared) {
    fence();
    sync_block();
    if (thread_index() == 0) {
      write_shared(shared, int(count_up(counter, blocks - 1) == uint32_t(blocks - 1)));
    }
    sync_block();
    const bool last = read_shared(shared) != 0;
    if (last) fence();
    sync_block();  // before `shared` is used for something else
    return last;
  }

 private:
  // As many loads are on their way at once: one after the other the latency of L2 would be all the
  // time that a summary takes.
  static constexpr int kTogether = 8;

  HYDRA_DEVICE int64_t index_of(int head, int row, int c) const {
    return (int64_t(head) * p_.batch + row) * p_.outputs + c;
  }

  // Logits index, index + step, …, `count` of them or kTogether.
  HYDRA_DEVICE void read(float (&logits)[kTogether], int64_t index, int64_t step, int count) const {
    if (p_.type == Real::kFloat) {
      const float* from = static_cast<const float*>(p_.logits) + index;
      HYDRA_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        logits[i] = i < count ? read_fresh(from + i * step) : 0.0f;
      }
      return;
    }
    const uint16_t* from = static_cast<const uint16_t*>(p_.logits) + index;
    uint16_t bits[kTogether];
    HYDRA_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      bits[i] = i < count ? read_fresh(from + i * step) : uint16_t(0);
    }
    HYDRA_UNROLL
    for (int i = 0; i < kTogether; ++i) {
      logits[i] = p_.type == Real::kHalf ? half_to_float(bits[i]) : bfloat_to_float(bits[i]);
    }
  }

  // Those of one class, of heads `first` and on; returns how many.
  HYDRA_DEVICE int read_class(float (&logits)[kTogether], int first, int row, int c) const {
    const int count = min(kTogether, p_.heads - first);
    read(logits, index_of(first, row, c), int64_t(p_.batch) * p_.outputs, count);
    return count;
  }

  // ---- over a group of threads: a power of 2 up to a warp by shuffles, more through shared memory

  HYDRA_DEVICE static RowPart joined(RowPart a, RowPart b) {
    const bool second = b.best > a.best || (b.best == a.best && b.winner < a.winner);
    return {a.predictive + b.predictive, a.expected + b.expected, a.disagreements + b.disagreements,
            second ? b.best : a.best, second ? b.winner : a.winner};
  }

  // Every thread of the group gets the sum over the group, always added in the same order. Called
  // by all threads of the block when `threads` is more than a warp.
  HYDRA_DEVICE RowPart reduced(RowPart v, int threads) {
    for (int mask = 1; mask < min(threads, 32); mask *= 2) {
      v = joined(v, {shuffle_xor(v.predictive, mask), shuffle_xor(v.expected, mask),
                     shuffle_xor(v.disagreements, mask), shuffle_xor(v.best, mask),
                     shuffle_xor(v.winner, mask)});
    }
    if (threads <= 32) return v;
    const int warp = thread_index() / 32, first = thread_index() / threads * (threads / 32);
    sync_block();  // the last round has been read
    if (thread_index() % 32 == 0) write_part(warp, v);
    sync_block();
    v = read_part(first);
    for (int w = 1; w < threads / 32; ++w) v = joined(v, read_part(first + w));
    return v;
  }

  HYDRA_DEVICE void write_part(int index, RowPart v) {
    write_shared(&parts_[index].predictive, v.predictive);
    write_shared(&parts_[index].expected, v.expected);
    write_shared(&parts_[index].disagreements, v.disagreements);
    write_shared(&parts_[index].best, v.best);
    write_shared(&parts_[index].winner, v.winner);
  }
  HYDRA_DEVICE RowPart read_part(int index) const {
    const RowPart* from = parts_ + index;
    return {read_shared(&from->predictive), read_shared(&from->expected),
            read_shared(&from->disagreements), read_shared(&from->best),
            read_shared(&from->winner)};
  }
  HYDRA_DEVICE void write_statistics(int index, HeadStatistics v) {
    write_shared(&statistics_[index].top, v.top);
    write_shared(&statistics_[index].log_sum, v.log_sum);
    write_shared(&statistics_[index].entropy, v.entropy);
    write_shared(&statistics_[index].vote, v.vote);
  }

  // ---- 1. heads

  // Relative to the largest logit, so that nothing overflows:
  //   S = sum exp(l - top), W = sum (l - top) exp(l - top), log_sum = log S, H = log S - W/S
  HYDRA_DEVICE HeadStatistics statistics_of(int row, int head, int threads) {
    const int start = thread_index() % threads, stride = kTogether * threads;
    const int64_t from = index_of(head, row, 0);
    float logits[kTogether];
    float top = -INFINITY;
    int vote = p_.outputs;
    for (int first = start; first < p_.outputs; first += stride) {
      const int count = (p_.outputs - first + threads - 1) / threads;
      read(logits, from + first, threads, count);
      HYDRA_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        if (i < count && (logits[i] > top || vote == p_.outputs)) {
          top = logits[i];
          vote = first + i * threads;
        }
      }
    }
    const RowPart best = reduced({0, 0, 0, top, vote}, threads);
    RowPart sum = {0, 0, 0, 0, 0};
    for (int first = start; first < p_.outputs; first += stride) {
      const int count = (p_.outputs - first + threads - 1) / threads;
      if (p_.outputs > stride) read(logits, from + first, threads, count);  // else they are here
      HYDRA_UNROLL
      for (int i = 0; i < kTogether; ++i) {
        if (i >= count) break;
        const float below = logits[i] - best.best;
        const float e = expf(below);
        sum.predictive += e;
        sum.expected += e > 0 ? below * e : e;  // -inf * 0 counts as 0; NaN stays
      }
    }
    sum = reduced(sum, threads);
    const float log_s = logf(sum.predictive);
    return {best.best, log_s, log_s - sum.expected / sum.predictive, best.winner};
  }

  HYDRA_DEVICE void read_heads(int row, int count) {
    const int threads = p_.head_threads, together = block_threads() / threads;
    const int items = count * p_.heads;
    // With a warp or less per item each warp goes its own way; a block goes together.
    for (int item = thread_index() / threads; item < items; item += together) {
      const HeadStatistics result = statistics_of(row + item / p_.heads, item % p_.heads, threads);
      if (thread_index() % threads == 0) write_statistics(item, result);
    }
  }

  // ---- 2. classes

  HYDRA_DEVICE static float entropy_term(float p) { return p > 0 ? -p * logf(p) : p * 0.0f; }

  // Entropy of a coin with this logit: log(1 + e^-|l|) + |l| e^-|l| / (1 + e^-|l|).
  HYDRA_DEVICE static float coin_entropy(float l) {
    const float size = fabsf(l), e = expf(-size);
    return log1pf(e) + (e > 0 ? size * e / (1 + e) : 0.0f);
  }

  HYDRA_DEVICE RowPart classes(int row, int slot, int begin, int end) {
    RowPart part = {0, 0, 0, -1, 0};
    const float share = 1.0f / p_.heads;
    float logits[kTogether];
    for (int c = begin + thread_index() % p_.class_threads; c < end; c += p_.class_threads) {
      float mean = 0;
      if (p_.kind == Summary::kSoftmax) {
        for (int first = 0; first < p_.heads; first += kTogether) {
          const int count = read_class(logits, first, row, c);
          HYDRA_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            if (i >= count) break;
            const HeadStatistics* head = statistics_ + slot * p_.heads + first + i;
            mean += expf(logits[i] - read_shared(&head->top) - read_shared(&head->log_sum));
          }
        }
        mean *= share;
        part.predictive += entropy_term(mean);
      } else {
        float expected = 0;
        int yes = 0;
        for (int first = 0; first < p_.heads; first += kTogether) {
          const int count = read_class(logits, first, row, c);
          HYDRA_UNROLL
          for (int i = 0; i < kTogether; ++i) {
            if (i >= count) break;
            mean += 1.0f / (1.0f + expf(-logits[i]));
            expected += coin_entropy(logits[i]);
            yes += logits[i] > 0;
          }
        }
        mean *= share;
        part.predictive += entropy_term(mean) + (mean < 1 ? -(1 - mean) * log1pf(-mean) : 0.0f);
        part.expected += expected * share;
        part.disagreements += mean > 0.5f ? p_.heads - yes : yes;
      }
      write_global(p_.mean + int64_t(row) * p_.outputs + c, mean);
      if (mean > part.best) {
        part.best = mean;
        part.winner = c;
      }
    }
    return reduced(part, p_.class_threads);
  }

  // ---- 3. rows

  HYDRA_DEVICE void finish(int row, int slot, RowPart part, bool exists) {
    const float share = 1.0f / p_.heads;
    float expected = part.expected, ratio = float(part.disagreements) * share / p_.outputs;
    if (p_.kind == Summary::kSoftmax) {
      RowPart votes = {0, 0, 0, 0, 0};
      for (int m = thread_index() % p_.class_threads; m < p_.heads; m += p_.class_threads) {
        votes.expected += read_shared(&statistics_[slot * p_.heads + m].entropy);
        votes.disagreements += read_shared(&statistics_[slot * p_.heads + m].vote) != part.winner;
      }
      votes = reduced(votes, p_.class_threads);
      expected = votes.expected * share;
      ratio = float(votes.disagreements) * share;
    }
    if (!exists || thread_index() % p_.class_threads != 0) return;
    write_global(p_.predictive_entropy + row, part.predictive);
    write_global(p_.expected_entropy + row, expected);
    const float difference = part.predictive - expected;
    write_global(p_.mutual_information + row, difference < 0 ? 0.0f : difference);
    write_global(p_.variation_ratio + row, ratio);
  }

  HYDRA_DEVICE void gaussian(int first, int end) {
    const int dims = p_.outputs / 2;
    const float share = 1.0f / p_.heads;
    for (int i = thread_index(); i < (end - first) * dims; i += block_threads()) {
      const int row = first + i / dims, d = i % dims;
      float mean = 0, aleatoric = 0, epistemic = 0;
      float means[kTogether], log_variances[kTogether];
      for (int m = 0; m < p_.heads; m += kTogether) {
        const int count = read_class(means, m, row, d);
        read_class(log_variances, m, row, dims + d);
        HYDRA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          if (i >= count) break;
          mean += means[i];
          aleatoric += expf(log_variances[i]);
        }
      }
      mean *= share;
      for (int m = 0; m < p_.heads; m += kTogether) {
        const int count = min(kTogether, p_.heads - m);
        if (p_.heads > kTogether) read_class(means, m, row, d);  // else they are here
        HYDRA_UNROLL
        for (int i = 0; i < kTogether; ++i) {
          if (i >= count) break;
          const float offset = means[i] - mean;
          epistemic += offset * offset;
        }
      }
      write_global(p_.mean + int64_t(row) * dims + d, mean);
      write_global(p_.predictive_entropy + int64_t(row) * dims + d, aleatoric * share);
      write_global(p_.expected_entropy + int64_t(row) * dims + d, epistemic * share);
    }
  }

  const SummaryParameters& p_;
  HeadStatistics* statistics_;
  RowPart* parts_;
};

}  // namespace hydra
