/* The C interface of the compiled kernels: one launcher for each kernel, raw pointers, no PyTorch.

   Letters: T tokens, K in-features, N out-features, R total rank, r trainable rank, E experts; C columns of any
   token-sized matrix (K or N). Every launcher
     - enqueues on `stream` (a cudaStream_t) of the current device, and returns without waiting for it;
     - returns DK_OK, a DK_... status below, or a positive cudaError_t: `dk_error_string` has the words;
     - launches nothing where the result has no element;
     - takes any strides of a dk_matrix unless it says "rows": column stride 1, any row stride;
     - sums in float32 in a fixed order: results repeat bit for bit;
     - with `in_tf32`, multiplies float32 operands as tf32, from sm_80.
   A matrix or vector whose data is NULL is not there. Dtypes that may differ within a call are named with it.

   Dropout: `seed` points to an int64 on the device, NULL: nothing drops. The element (t, k) of a [T, K] matrix is kept
   where its 16 bits of the hash (device.cuh) are at least `threshold`, a signed 16-bit number; 1 / (1 - p) is part of
   the factor that the caller gives. A dropped element counts x * 0, so that NaN and Inf show. */

#ifndef DELORA_KERNELS_H
#define DELORA_KERNELS_H

#include <stdint.h>

#if defined(_WIN32)
#define DK_API __declspec(dllexport)
#else
#define DK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DK_ABI_VERSION 4 /* changes with any signature below */

enum dk_dtype { DK_FLOAT32 = 0, DK_FLOAT16 = 1, DK_BFLOAT16 = 2 };

enum dk_status { DK_OK = 0, DK_BAD_DTYPE = -1, DK_BAD_STRIDE = -2, DK_BAD_SIZE = -3, DK_MISSING = -4 };

typedef struct {
  void *data;
  int64_t row_stride, column_stride; /* in elements */
  int32_t dtype;
} dk_matrix;

typedef struct {
  void *data;
  int64_t stride; /* in elements; 0: one number stands for all */
  int32_t dtype;
} dk_vector;

/* DK_ABI_VERSION of the library. */
DK_API int dk_abi_version(void);

/* 1 if the library was compiled for the host (csrc/host_shim) and takes pointers to host memory, else 0. */
DK_API int dk_on_host(void);

/* What the library was compiled by and for, such as "CUDA 13.0 for sm_75 sm_80 compute_80" (compute_: PTX). */
DK_API const char *dk_build_info(void);

/* What a status says; CUDA's own words for a cudaError_t. */
DK_API const char *dk_error_string(int status);

/* Rows of A_hat [r, K] = A / max(a, eps) * weight_norm and columns of B_hat [N, r] = B * sign * lam / (r max(b, eps)),
   and their norms a, b [r]; without lam both are cast only. eps 0: no clamp, a norm of 0 gives 0. Any dtypes. */
DK_API int dk_fold(dk_matrix A, dk_matrix B, dk_vector lam, dk_vector weight_norm, dk_matrix A_hat, dk_matrix B_hat,
                   float *a, float *b, int64_t K, int64_t N, int64_t r, float sign, float eps, void *stream);

/* Gradients of dk_fold: dA [r, K] of dA_hat, dB [N, r] of dB_hat, both optional, and with dB_hat the r parts of dlam,
   `along` [r + r0]; frozen_B [N, r0], scaled by the same lam with the other sign, adds r0 parts. Its columns follow the
   r of dB_hat, and their norms those in b. Any dtypes. */
DK_API int dk_fold_backward(dk_matrix dA_hat, dk_matrix dB_hat, dk_matrix A, dk_matrix B, dk_vector lam,
                            dk_vector weight_norm, dk_matrix frozen_B, const float *a, const float *b, dk_matrix dA,
                            dk_matrix dB, float *along, int64_t K, int64_t N, int64_t r, int64_t r0, float eps,
                            void *stream);

/* norm [N] of the rows of W + scale * B_hat A_hat; with magnitude, c = magnitude / norm [N] (0 where the norm is 0);
   with `scaled`, c * W [N, K] in W's dtype, rows. W: one of its strides is 1; A_hat [R, K], rows, and B_hat [N, R]: W's
   dtype, or both float32; R > 0. */
DK_API int dk_row_norm(dk_matrix W, dk_matrix A_hat, dk_matrix B_hat, dk_vector magnitude, float *norm, float *c,
                       dk_matrix scaled, int64_t N, int64_t K, int64_t R, float scale, int32_t in_tf32, void *stream);

/* out [T, R] = factor * drop(x) small, small [C, R]: h = drop(x) A_hat^T, or dv = dy (c * B_hat). With parts > 1 the sum
   over C is split and out is float32 [parts, T, R]. x: rows; small: x's dtype or float32; out: rows, any dtype. */
DK_API int dk_times_small(dk_matrix x, dk_matrix small, dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t parts,
                          const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32, void *stream);

/* What one read of x [T, C] sums up over tokens, in `parts` parts, float32, each optional:
   product [parts, C, ranks] (transposed: [parts, ranks, C]) = factor * drop(x)^T h of the first `ranks` columns of
   h [T, R], sums [parts, C] = sum_t x, dots [parts, C] = sum_t x * y. Beside the product, at ranks R up to 64 and
   without the others: out [T, C] = factor * drop(h small) with x's mask. x, h, y, out: rows; h: x's dtype or float32;
   y, out: x's dtype; small [R, C]: h's dtype. */
DK_API int dk_token_sums(dk_matrix x, dk_matrix h, dk_matrix y, dk_matrix small, dk_matrix out, float *product,
                         float *sums, float *dots, int64_t T, int64_t C, int64_t R, int64_t ranks, int64_t parts,
                         int32_t transposed, const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32,
                         void *stream);

/* out [size] = sum over parts of in [parts, size], in their order; out in any dtype, contiguous. */
DK_API int dk_add_parts(const float *in, int64_t parts, int64_t size, void *out, int32_t dtype, void *stream);

/* Columns that one block of dk_dy_sums takes: its dv comes in ceil(N / columns) parts. */
DK_API int64_t dk_dy_sums_columns(void);

/* What one read of dy [T, N] gives at ranks R up to 32: dv [ceil(N / columns), T, R], the parts of dy (c * small), and
   in `parts` parts product [parts, N, R] = factor * dy^T h, sums [parts, N] = sum_t dy, dots [parts, N] = sum_t dy * y,
   the last two optional; all float32. dy, y: rows, one dtype; h [T, R]: dy's dtype or float32; small [N, R]: h's; c [N]
   or NULL: 1; c * small is not rounded to a dtype. */
DK_API int dk_dy_sums(dk_matrix dy, dk_matrix small, const float *c, dk_matrix h, dk_matrix y, float *dv,
                      float *product, float *sums, float *dots, int64_t T, int64_t N, int64_t R, int64_t parts,
                      float factor, int32_t in_tf32, void *stream);

/* What expand_backward makes of the parts of dk_dy_sums or dk_token_sums: dB [N, R] = c * product, dm [N] = (dots +
   sum_r product * B_hat) / divisor (0 where the divisor is 0; without B_hat the dots alone), dy_sum [N], float32, and
   dv [dv_size] = the sum of dv_in [dv_parts, dv_size], in any dtype, contiguous. Each is optional. */
DK_API int dk_finish_dy(const float *dv_in, int64_t dv_parts, int64_t dv_size, void *dv, int32_t dv_dtype,
                        const float *product, const float *sums, const float *dots, int64_t parts, dk_matrix B_hat,
                        const float *c, dk_vector divisor, float *dB, float *dm, float *dy_sum, int64_t N, int64_t R,
                        void *stream);

/* out [T, C] = c * (drop(base) + scale * drop(h small)) + extra + bias, rounded once; every term but h small [R, C] is
   optional. The mask, if there is one, falls on the term, and with mask_base on base too. out may be base. base, h,
   extra: rows; h, small: out's dtype, or both float32; extra: out's dtype; c [C]; out: rows. */
DK_API int dk_rank_update(dk_matrix base, dk_matrix h, dk_matrix small, const float *c, dk_matrix extra, dk_vector bias,
                          dk_matrix out, int64_t T, int64_t C, int64_t R, float scale, const int64_t *seed,
                          int32_t threshold, int32_t mask_base, int32_t in_tf32, void *stream);

/* The three that follow work on rows sorted by expert: those of expert e < E end before row offsets[e] (int32, or
   in_64_bits int64), rows behind the last are nobody's, are not read, and become 0. A matrix of each expert is given as
   that of expert 0 and the elements from one to the next.

   out [T, R] = factor * drop(x_e) small_e, small_e [C, R]: h, or dv. x, out: rows; small: x's dtype or float32. */
DK_API int dk_grouped_times_small(dk_matrix x, dk_matrix small, int64_t by_expert, const void *offsets,
                                  int32_t in_64_bits, dk_matrix out, int64_t T, int64_t C, int64_t R, int64_t E,
                                  const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32, void *stream);

/* out_e [T, C] += scale * drop(h_e small_e) + bias_e, small_e [R, C], bias [E, C] or not there. out, h, bias: rows; h,
   small: out's dtype, or both float32. */
DK_API int dk_grouped_update(dk_matrix out, dk_matrix h, dk_matrix small, int64_t by_expert, dk_matrix bias,
                             const void *offsets, int32_t in_64_bits, int64_t T, int64_t C, int64_t R, int64_t E,
                             float scale, const int64_t *seed, int32_t threshold, int32_t in_tf32, void *stream);

/* product [E, R, C] = factor * h_e^T drop(x_e) and sums [E, C] = sum_t x_e, float32, each optional; 0 for an expert
   without rows. Of an expert with more than `part` rows they are left in parts [2 T / part, R C + C], which
   dk_grouped_total adds; where `part` is T or more none is needed. x, h: rows; h: x's dtype or float32. */
DK_API int dk_grouped_sums(dk_matrix x, dk_matrix h, const void *offsets, int32_t in_64_bits, float *product,
                           float *sums, float *parts, int64_t T, int64_t C, int64_t R, int64_t E, int64_t part,
                           const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32, void *stream);

/* product and sums of the experts that dk_grouped_sums left in parts, which it was given for the same arguments. */
DK_API int dk_grouped_total(const void *offsets, int32_t in_64_bits, const float *parts, float *product, float *sums,
                            int64_t T, int64_t C, int64_t R, int64_t E, int64_t part, void *stream);

/* out [M, C] = x * factor, a vector of rows [M] or of columns [C], rounded once. x, out: rows, one dtype. */
DK_API int dk_scaled(dk_matrix x, const float *factor, dk_matrix out, int64_t M, int64_t C, int32_t by_row,
                     void *stream);

/* The kept elements of a [T, K] matrix, one byte each: 1 or 0. */
DK_API int dk_dropout_mask(const int64_t *seed, int32_t threshold, uint8_t *mask, int64_t T, int64_t K, void *stream);

/* dropped = factor * drop(x) and rest = x - dropped, [T, K] each, one dtype, rows. */
DK_API int dk_drop(dk_matrix x, const int64_t *seed, int32_t threshold, float factor, dk_matrix dropped, dk_matrix rest,
                   int64_t T, int64_t K, void *stream);

/* A mixture's factors side by side: rows [of_A + of_router + of_start, K] = A, the router and frozen_A one below the
   other, each optional, and columns [N, E r + starts r0]: those of B [E N, r], an expert's N rows after the other's, and
   of frozen_B [starts N, r0] times -residual [starts]. Any dtypes and strides. */
DK_API int dk_stack_factors(dk_matrix A, dk_matrix router, dk_matrix frozen_A, dk_matrix B, dk_matrix frozen_B,
                            const float *residual, dk_matrix rows, dk_matrix columns, int64_t K, int64_t N,
                            int64_t of_A, int64_t of_router, int64_t of_start, int64_t E, int64_t r, int64_t starts,
                            int64_t r0, void *stream);

/* Tokens that one block of dk_route and dk_route_backward takes: their sums come in ceil(T / tokens) parts. */
DK_API int64_t dk_route_tokens(void);

/* A mixture's gating (in the op `project_route`): h [T, (E r or r) + E + passed] -> v [T, E r + passed] and w [T, E], and
   for each block of tokens its sums [2 E + 1] of f, P and z. With `parts`, float32 [count, T, ...], h is their sum, and
   is written. gates [T, E] in the place of logits: no w. share [T] or NULL: all count 1. h, v: rows, one dtype. */
DK_API int dk_route(const float *parts, int64_t count, dk_matrix h, const float *gates, const float *scale,
                    const float *share, dk_matrix v, float *w, float *sums, int64_t T, int64_t E, int64_t r,
                    int64_t passed, int64_t top_k, int32_t renormalize, int32_t shared, void *stream);

/* dk_times_small of a mixture and dk_route at once, for h of up to 64 columns and up to 32 experts; 64 tokens a block.
   x: rows; small: x's dtype or float32; h, v: rows, small's dtype. */
DK_API int dk_project_route(dk_matrix x, dk_matrix small, int64_t C, dk_matrix h, const float *gates,
                            const float *scale, const float *share, dk_matrix v, float *w, float *sums, int64_t T,
                            int64_t E, int64_t r, int64_t passed, int64_t top_k, int32_t renormalize, int32_t shared,
                            const int64_t *seed, int32_t threshold, float factor, int32_t in_tf32, void *stream);

/* f, P [E] and z [1]: the sums over the first dimension of sums [blocks, 2 E + 1], divided by `over`. Without P and z
   f alone, of sums [blocks, E]. */
DK_API int dk_route_totals(const float *sums, int64_t blocks, int64_t E, float over, float *f, float *P, float *z,
                           void *stream);

/* The op `expand_route_backward` after its reads of dy: of the parts of dv [dv_parts, T, E r + passed] (float32; one part
   in any dtype), whose sum is rounded to h's dtype, dh as h, dgates [T, E] if given, and for each block of tokens its
   part of dscale [E], optional. A token counts `share`, or 1 / T. h, dh: rows, one dtype. Beside that dB [N, E r +
   passed] and dy_sum [N] = the sums of product and sums over their `parts` parts, each optional. */
DK_API int dk_route_backward(const void *dv, int64_t dv_parts, int32_t dv_dtype, dk_matrix h, const float *w,
                             const float *scale, const float *share, const float *dP, const float *dz, dk_matrix dh,
                             float *dgates, float *dscale, int64_t T, int64_t E, int64_t r, int64_t passed,
                             int32_t given, int32_t renormalize, int32_t shared, const float *product,
                             const float *sums, int64_t parts, float *dB, float *dy_sum, int64_t N, void *stream);

/* out [T, n D] = every block of D columns of x reflected, x - 2 (x . u) / (u . u) u, or with v the two terms of ETHER+,
   + bias [n D]; v and bias are optional, a vector of length 0 does nothing. x, out: rows, one dtype; u, v [n, D]: rows,
   x's dtype or float32. */
DK_API int dk_reflect(dk_matrix x, dk_matrix u, dk_matrix v, dk_vector bias, dk_matrix out, int64_t T, int64_t n,
                      int64_t D, void *stream);

/* dx [T, n D], optional, and g [parts, 1 (with v: 2), n D], float32: what dk_reflect_across makes du and dv of, as sums
   over `parts` parts of the tokens. dy, x, dx: rows, one dtype; u, v as above. */
DK_API int dk_reflect_backward(dk_matrix dy, dk_matrix x, dk_matrix u, dk_matrix v, dk_matrix dx, float *g, int64_t T,
                               int64_t n, int64_t D, int64_t parts, void *stream);

/* du [n, D], and with v dv, of g [1 (with v: 2), n D]: the part across u (v), signed and scaled. u, v: rows, one dtype. */
DK_API int dk_reflect_across(const float *g, dk_matrix u, dk_matrix v, float *du, float *dv, int64_t n, int64_t D,
                             void *stream);

#ifdef __cplusplus
}
#endif

#endif
