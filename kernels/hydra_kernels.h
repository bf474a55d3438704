/* The kernels behind the fused heads, as a C library.
 *
 * Every launch enqueues on `stream` and returns: no allocation, no synchronisation, and nothing that
 * CUDA graphs cannot capture. Pointers are device pointers. A call that fails has enqueued nothing;
 * `hydra_last_error` tells the calling thread why.
 */
#ifndef HYDRA_KERNELS_H
#define HYDRA_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
  HYDRA_OK = 0,
  HYDRA_INVALID = 1,     /* arguments that make no sense */
  HYDRA_UNSUPPORTED = 2, /* they do, but there is no kernel for them on this device */
  HYDRA_CUDA_ERROR = 3   /* CUDA refused the launch */
} hydra_status;

typedef enum {
  HYDRA_FLOAT32 = 0,
  HYDRA_FLOAT16 = 1,
  HYDRA_BFLOAT16 = 2,
  HYDRA_INT8 = 3,
  HYDRA_INT4 = 4
} hydra_type;

typedef enum {
  HYDRA_NONE = 0,
  HYDRA_RELU = 1,
  HYDRA_GELU = 2, /* with erf */
  HYDRA_SILU = 3,
  HYDRA_TANH = 4
} hydra_activation;

typedef enum {
  HYDRA_NO_SUMMARY = 0,
  HYDRA_SOFTMAX = 1,
  HYDRA_SIGMOID = 2,
  HYDRA_GAUSSIAN = 3
} hydra_summary_kind;

/* "What happened. Why. What to do." of this thread's last failure; "" before any. */
const char* hydra_last_error(void);

/* The layout of packed weights that these kernels read, such as "hydra-mma16-2". */
const char* hydra_weight_layout(void);

/* What the choice of a configuration depends on. */
typedef struct {
  int32_t compute_capability; /* 87 for 8.7 */
  int32_t sm_count;
  int32_t shared_bytes; /* that one block can opt in to */
} hydra_device;

/* The current device. */
hydra_status hydra_query_device(hydra_device* device);

/* ---- one linear layer of M heads: y = activation(x W * scales + bias) */

typedef struct {
  int32_t heads, batch, inputs, outputs; /* M, B, K, N */
  int32_t x_type;      /* FLOAT16, BFLOAT16 or INT8 */
  int32_t weight_type; /* FLOAT16, BFLOAT16, INT8 or INT4 */
  int32_t y_type;      /* FLOAT32, FLOAT16, BFLOAT16 or INT8 */
  int32_t x_per_head;  /* 0: x is [B, K]; 1: [M, B, K] */
  int32_t quantize_x;  /* INT8 weights, 16-bit x: 1 quantizes x and multiplies integers */
  int32_t group;       /* INT4: 32, 64 or 128 values of K share a scale */
  int32_t activation;
  int32_t summary; /* hydra_summary_kind of the logits y, which must then be FLOAT32 */
} hydra_linear_shape;

/* How the work is shared out. Read from `hydra_choose_linear`, or set by hand for tuning. */
typedef struct {
  int32_t batch_tiles;    /* rows of the batch per block, in 8: 1, 2, 4 or 8 */
  int32_t row_tiles;      /* outputs per warp, in 16: 1 or 2 */
  int32_t row_warps;      /* warps side by side */
  int32_t k_warps;        /* warps along K */
  int32_t overlap;        /* 1: programmatic dependent launch, from 9.0 on; else ignored.
                             Weights and their scales are then not what the previous kernel writes */
  int32_t prefer_library; /* 1: a library's GEMM is likely faster at this shape */
  int32_t prefer_summary_alone; /* 1: hydra_ensemble_summary in a launch of its own likely is */
} hydra_linear_config;

typedef struct {
  float* mean;                /* mean_prob [B, C], or mean [B, D] */
  float* predictive_entropy;  /* [B], or aleatoric_variance [B, D] */
  float* expected_entropy;    /* [B], or epistemic_variance [B, D] */
  float* mutual_information;  /* [B] */
  float* variation_ratio;     /* [B] */
} hydra_summary_outputs;

typedef struct {
  const void* x;
  const void* weight;       /* packed; 16-byte aligned */
  const float* weight_scale; /* [M, N]; of INT8 and INT4 */
  const void* group_scale;  /* INT4: packed, relative to weight_scale, in the type of x */
  const float* bias;        /* [M, N] or NULL */
  const float* x_scale;     /* of INT8 x: one, or [M] */
  int32_t x_scale_per_head;
  void* y; /* [M, B, N] */
  const float* y_scale; /* of INT8 y: one, or [M] */
  int32_t y_scale_per_head;
  hydra_summary_outputs summary;
  uint32_t* counters; /* with a summary: one per 8 rows of the batch, 0 before the first launch */
} hydra_linear_arguments;

hydra_status hydra_choose_linear(const hydra_linear_shape* shape, const hydra_device* device,
                                 hydra_linear_config* config);

/* Bytes of shared memory of a block. */
size_t hydra_linear_shared_bytes(const hydra_linear_shape* shape, const hydra_linear_config* config);

/* `config` may be NULL: then it is chosen for the current device. */
hydra_status hydra_group_linear(const hydra_linear_shape* shape, const hydra_linear_config* config,
                                const hydra_linear_arguments* arguments, void* stream);

/* ---- the whole MLP head in one launch */

enum { HYDRA_MAX_LAYERS = 4 };

typedef struct {
  int32_t heads, batch, layers; /* layers: 2 to 4, the output layer included */
  int32_t widths[HYDRA_MAX_LAYERS + 1]; /* K, hidden widths, C */
  int32_t x_type, weight_type, x_per_head, quantize_x, group; /* as above, of every layer */
  int32_t activations[HYDRA_MAX_LAYERS];
  int32_t norms[HYDRA_MAX_LAYERS]; /* 1: LayerNorm before the activation; not in the output layer */
  int32_t summary;
} hydra_chain_shape;

typedef struct {
  int32_t batch_tiles; /* 1, 2 or 4 */
  int32_t warps;       /* 4 or 8 */
  int32_t slices;      /* blocks that share the outputs of a head */
  int32_t overlap;
  int32_t prefer_layers; /* 1: one `hydra_group_linear` per layer is likely faster */
  int32_t prefer_summary_alone;
} hydra_chain_config;

typedef struct {
  const void* weight;
  const float* weight_scale;
  const void* group_scale;
  const float* bias;
  const float* x_scale; /* of the layer's int8 input */
  int32_t x_scale_per_head;
  const float* gamma; /* [M, N] */
  const float* beta;  /* [M, N] */
  float epsilon;
} hydra_chain_layer;

typedef struct {
  const void* x;
  hydra_chain_layer layers[HYDRA_MAX_LAYERS];
  float* y; /* [M, B, C] */
  hydra_summary_outputs summary;
  uint32_t* counters;
} hydra_chain_arguments;

hydra_status hydra_choose_chain(const hydra_chain_shape* shape, const hydra_device* device,
                                hydra_chain_config* config);
size_t hydra_chain_shared_bytes(const hydra_chain_shape* shape, const hydra_chain_config* config);
hydra_status hydra_head_chain(const hydra_chain_shape* shape, const hydra_chain_config* config,
                              const hydra_chain_arguments* arguments, void* stream);

/* ---- mean and uncertainty of logits [M, B, C] */

typedef struct {
  int32_t kind; /* hydra_summary_kind */
  int32_t heads, batch, outputs; /* outputs: C, or 2 D */
  int32_t logits_type; /* FLOAT32, FLOAT16 or BFLOAT16 */
} hydra_summary_shape;

typedef struct {
  int32_t rows;          /* of the batch that a block takes at once */
  int32_t head_threads;  /* per (row, head): 1, 32 or 256 */
  int32_t class_threads; /* per row: a power of 2, at most 256 */
  int32_t slices;        /* above 1: as many blocks share the classes of a row, in a second kernel */
} hydra_summary_config;

hydra_status hydra_choose_summary(const hydra_summary_shape* shape, const hydra_device* device,
                                  hydra_summary_config* config);

/* Bytes of device memory that a launch needs; 0 for one slice. It begins with a counter of 4 bytes per
   row of the batch: 0 before the first launch, and 0 again after each. The rest may hold anything. */
size_t hydra_summary_workspace(const hydra_summary_shape* shape, const hydra_summary_config* config);

hydra_status hydra_ensemble_summary(const hydra_summary_shape* shape,
                                    const hydra_summary_config* config, const void* logits,
                                    const hydra_summary_outputs* outputs, void* workspace,
                                    void* stream);

/* ---- for libraries on top of this one that link to no CUDA runtime, such as the TensorRT plugin */

/* Whether `device` would run this configuration. */
hydra_status hydra_check_linear(const hydra_linear_shape* shape, const hydra_device* device,
                                const hydra_linear_config* config);
hydra_status hydra_check_chain(const hydra_chain_shape* shape, const hydra_device* device,
                               const hydra_chain_config* config);

/* Device memory that holds zeros. Not a launch: allocates, and waits for the zeros. */
hydra_status hydra_allocate_zeros(size_t bytes, void** memory);
hydra_status hydra_free(void* memory); /* may be NULL */

/* Enqueues zeros. */
hydra_status hydra_zero(void* memory, size_t bytes, void* stream);

/* Makes `message` what `hydra_last_error` says to this thread, and returns `status`. */
hydra_status hydra_fail(hydra_status status, const char* message);

#ifdef __cplusplus
}
#endif
#endif
