#include "tables.h"

namespace hydra {
namespace {

template <Variant>
struct Types;
template <>
struct Types<Variant::kHalf> {
  using Format = Float16Format<Half>;
  using Read = DirectRead<Format>;
};
template <>
struct Types<Variant::kBfloat> {
  using Format = Float16Format<Bfloat>;
  using Read = DirectRead<Format>;
};
template <>
struct Types<Variant::kInt8> {
  using Format = Int8Format;
  using Read = DirectRead<Format>;
};
template <>
struct Types<Variant::kQuantizing> {
  using Format = Int8Format;
  using Read = QuantizingRead;
};
template <>
struct Types<Variant::kInt8Half> {
  using Format = Int8WeightFormat<Half>;
  using Read = DirectRead<Format>;
};
template <>
struct Types<Variant::kInt8Bfloat> {
  using Format = Int8WeightFormat<Bfloat>;
  using Read = DirectRead<Format>;
};
template <>
struct Types<Variant::kInt4Half> {
  using Format = Int4WeightFormat<Half>;
  using Read = DirectRead<Format>;
};
template <>
struct Types<Variant::kInt4Bfloat> {
  using Format = Int4WeightFormat<Bfloat>;
  using Read = DirectRead<Format>;
};

template <Variant V, int NT, int RT>
constexpr LinearKernel linear_if_compiled() {
  if constexpr (linear_exists(V, NT)) {
    return group_linear<typename Types<V>::Format, typename Types<V>::Read, NT, RT>;
  } else {
    return nullptr;
  }
}

template <Variant V>
LinearKernel linear_of(int batch_tiles, int row_tiles) {
  const bool two = row_tiles == 2;
  switch (batch_tiles) {
    case 1: return two ? linear_if_compiled<V, 1, 2>() : linear_if_compiled<V, 1, 1>();
    case 2: return two ? linear_if_compiled<V, 2, 2>() : linear_if_compiled<V, 2, 1>();
    case 4: return two ? linear_if_compiled<V, 4, 2>() : linear_if_compiled<V, 4, 1>();
    case 8: return two ? linear_if_compiled<V, 8, 2>() : linear_if_compiled<V, 8, 1>();
  }
  return nullptr;
}

template <Variant V>
ChainKernel chain_of(int batch_tiles) {
  using Format = typename Types<V>::Format;
  switch (batch_tiles) {
    case 1: return head_chain<Format, 1>;
    case 2: return head_chain<Format, 2>;
    case 4: return head_chain<Format, 4>;
  }
  return nullptr;
}

}  // namespace

LinearKernel linear_kernel(Variant variant, int batch_tiles, int row_tiles) {
  switch (variant) {
    case Variant::kHalf: return linear_of<Variant::kHalf>(batch_tiles, row_tiles);
    case Variant::kBfloat: return linear_of<Variant::kBfloat>(batch_tiles, row_tiles);
    case Variant::kInt8: return linear_of<Variant::kInt8>(batch_tiles, row_tiles);
    case Variant::kQuantizing: return linear_of<Variant::kQuantizing>(batch_tiles, row_tiles);
    case Variant::kInt8Half: return linear_of<Variant::kInt8Half>(batch_tiles, row_tiles);
    case Variant::kInt8Bfloat: return linear_of<Variant::kInt8Bfloat>(batch_tiles, row_tiles);
    case Variant::kInt4Half: return linear_of<Variant::kInt4Half>(batch_tiles, row_tiles);
    case Variant::kInt4Bfloat: return linear_of<Variant::kInt4Bfloat>(batch_tiles, row_tiles);
    case Variant::kNone: break;
  }
  return nullptr;
}

ChainKernel chain_kernel(Variant variant, int batch_tiles) {
  switch (variant) {
    case Variant::kHalf: return chain_of<Variant::kHalf>(batch_tiles);
    case Variant::kBfloat: return chain_of<Variant::kBfloat>(batch_tiles);
    case Variant::kInt8:
    case Variant::kQuantizing: return chain_of<Variant::kInt8>(batch_tiles);
    case Variant::kInt8Half: return chain_of<Variant::kInt8Half>(batch_tiles);
    case Variant::kInt8Bfloat: return chain_of<Variant::kInt8Bfloat>(batch_tiles);
    case Variant::kInt4Half: return chain_of<Variant::kInt4Half>(batch_tiles);
    case Variant::kInt4Bfloat: return chain_of<Variant::kInt4Bfloat>(batch_tiles);
    case Variant::kNone: break;
  }
  return nullptr;
}

}  // namespace hydra
