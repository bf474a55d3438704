#include "plan.h"

#include <algorithm>
#include <cstring>
#include <type_traits>

namespace hydra::plugin {

namespace {

enum Form : int32_t { kPreferred = 0, kChain = 1, kLayers = 2 };
enum Summary : int32_t { kNone = 0, kBehind = 1, kAlone = 2 };
enum Variant : int32_t { kChosen, kMore, kLess, kOther, kFewerRows, kVariants };

static_assert(std::has_unique_object_representations_v<Launches>, "launches are compared as bytes");

struct Tactic {
  int32_t form, summary, variant;

  explicit Tactic(int32_t id) : form(id & 3), summary(id >> 2 & 3), variant(id >> 4) {}
};

int32_t id_of(int32_t form, int32_t summary, int32_t variant) {
  return form | summary << 2 | variant << 4;
}

bool has_chain(const Specification& s) { return s.layers > 1; }
bool has_layers(const Specification& s) { return !s.has_norms(); }  // only chains know them

// The number of SMs must not say how much memory a summary takes: an engine may meet another device
// of its kind.
int32_t most_slices(const Specification& s) { return std::max(2, s.outputs() / 256); }

hydra_linear_config varied(const hydra_linear_shape& shape, hydra_linear_config c,
                           int32_t variant) {
  if (variant == kMore && c.k_warps * tile_depth(shape.weight_type) < shape.inputs) {
    c.k_warps *= 2;
    c.row_warps = std::max(1, c.row_warps / 2);
  } else if (variant == kLess) {
    c.k_warps = std::max(1, c.k_warps / 2);
    if (16 * c.row_tiles * c.row_warps < shape.outputs) c.row_warps *= 2;
  } else if (variant == kOther) {
    c.row_tiles = 3 - c.row_tiles;
  } else if (variant == kFewerRows) {
    c.batch_tiles /= 2;
  }
  return c;
}

hydra_chain_config varied(hydra_chain_config c, int32_t variant) {
  if (variant == kMore) {
    c.slices *= 2;
  } else if (variant == kLess) {
    c.slices /= 2;
  } else if (variant == kOther) {
    c.warps = 12 - c.warps;  // 4 or 8
  } else if (variant == kFewerRows) {
    c.batch_tiles /= 2;
  }
  return c;
}

hydra_status choose_chain(const Specification& s, int32_t rows, const hydra_device& device,
                          int32_t variant, hydra_chain_config* config) {
  const hydra_chain_shape shape = chain_shape(s, rows);
  if (hydra_status status = hydra_choose_chain(&shape, &device, config)) return status;
  const hydra_chain_config other = varied(*config, variant);
  if (hydra_check_chain(&shape, &device, &other) == HYDRA_OK) *config = other;
  return HYDRA_OK;
}

hydra_status choose_layer(const Specification& s, int layer, int32_t rows,
                          const hydra_device& device, int32_t variant,
                          hydra_linear_config* config) {
  const hydra_linear_shape shape = layer_shape(s, layer, rows);
  if (hydra_status status = hydra_choose_linear(&shape, &device, config)) return status;
  const hydra_linear_config other = varied(shape, *config, variant);
  if (hydra_check_linear(&shape, &device, &other) == HYDRA_OK) *config = other;
  return HYDRA_OK;
}

size_t aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

}  // namespace

hydra_status check_tactic(const Specification& s, int32_t id) {
  if (id == 0) return HYDRA_OK;
  const Tactic tactic(id);
  const bool form = tactic.form == kChain ? has_chain(s) : tactic.form == kLayers && has_layers(s);
  const bool summary = s.summary == HYDRA_NO_SUMMARY
                           ? tactic.summary == kNone
                           : tactic.summary == kBehind || tactic.summary == kAlone;
  if (form && summary && tactic.variant >= 0 && tactic.variant < kVariants) return HYDRA_OK;
  return fail(HYDRA_UNSUPPORTED,
              "Tactic %d. These heads have none of that number: it may be of another version of "
              "the plugin. Build the engine again.", id);
}

hydra_status make_plan(const Specification& s, int32_t id, int32_t rows, const hydra_device& device,
                       Plan* plan) {
  const Tactic tactic(id);
  Launches l{};
  if (has_chain(s) && tactic.form != kLayers) {
    const hydra_status status = choose_chain(s, rows, device, tactic.variant, &l.chain_config);
    if (status && s.has_norms()) return status;
    const bool preferred = s.has_norms() || tactic.form == kChain || !l.chain_config.prefer_layers;
    l.chain = status == HYDRA_OK && preferred;
  }
  int32_t alone = l.chain_config.prefer_summary_alone;
  if (!l.chain) {
    l.chain_config = {};
    for (int i = 0; i < s.layers; ++i) {
      hydra_linear_config& config = l.layer_configs[i];
      if (hydra_status status = choose_layer(s, i, rows, device, tactic.variant, &config)) {
        return status;
      }
      alone = config.prefer_summary_alone;
    }
  }
  if (s.summary != HYDRA_NO_SUMMARY) {
    l.summary_alone = id == 0 ? alone : tactic.summary == kAlone;
  }
  if (l.summary_alone) {
    const hydra_summary_shape shape = summary_shape(s, rows);
    hydra_summary_config& config = l.summary_config;
    if (hydra_status status = hydra_choose_summary(&shape, &device, &config)) return status;
    config.slices = std::min(config.slices, most_slices(s));
  }
  *plan = {id, rows, l, workspace_of(s, rows)};
  return HYDRA_OK;
}

int list_tactics(const Specification& s, int32_t rows, const hydra_device& device,
                 int32_t (&tactics)[kMaxTactics]) {
  Launches seen[kMaxTactics];
  int count = 0;
  for (int32_t form : {kChain, kLayers}) {
    for (int32_t summary : {kNone, kBehind, kAlone}) {
      for (int32_t variant = kChosen; variant < kVariants; ++variant) {
        const int32_t id = id_of(form, summary, variant);
        Plan plan;
        if (check_tactic(s, id) || make_plan(s, id, rows, device, &plan)) continue;
        if (plan.launches.chain != (form == kChain)) continue;
        const bool again = std::any_of(seen, seen + count, [&](const Launches& other) {
          return std::memcmp(&other, &plan.launches, sizeof(Launches)) == 0;
        });
        if (again) continue;
        seen[count] = plan.launches;
        tactics[count++] = id;
      }
    }
  }
  return count;
}

size_t summary_bytes(const Specification& s, int32_t rows) {
  if (s.summary == HYDRA_NO_SUMMARY) return 0;
  hydra_summary_config config{};
  config.slices = s.summary == HYDRA_GAUSSIAN ? 1 : most_slices(s);
  const hydra_summary_shape shape = summary_shape(s, rows);
  return std::max(hydra_summary_workspace(&shape, &config), size_t(rows) * sizeof(uint32_t));
}

Workspace workspace_of(const Specification& s, int32_t rows) {
  size_t hidden[2] = {0, 0};
  if (has_layers(s)) {
    const size_t size = s.hidden_type() == HYDRA_INT8 ? 1 : 2;
    for (int i = 0; i + 1 < s.layers; ++i) {
      const size_t bytes = size * size_t(s.heads) * size_t(rows) * size_t(s.widths[i + 1]);
      hidden[i % 2] = std::max(hidden[i % 2], bytes);
    }
  }
  Workspace w;
  w.hidden[0] = 0;
  w.hidden[1] = aligned(hidden[0]);
  w.summary = w.hidden[1] + aligned(hidden[1]);
  w.bytes = w.summary + summary_bytes(s, rows);
  return w;
}

}  // namespace hydra::plugin
