/* cuBLAS and cuBLASLt: GEMMs that check where their matrices are. */

#include "fake_cuda.h"
#include <stdio.h>

struct cublasContext {
  cudaStream_t stream;
  cublasMath_t math;
  cublasPointerMode_t pointers;
};
static cublasStatus_t gemm(cudaStream_t stream, const char *name, const void *a, const void *b, const void *c) {
  if (issue(stream, name)) return CUBLAS_STATUS_EXECUTION_FAILED;
  if (checks_pointers && (device_of(a) != current || device_of(b) != current || device_of(c) != current)) {
    refuse(cudaErrorIllegalAddress, "%s: a matrix that is not in the memory of device %d", name, current);
    return CUBLAS_STATUS_EXECUTION_FAILED;
  }
  Event event = {GEMM, .stream = (uint64_t)stream, .count = 3, .size = {sizeof a, sizeof b, sizeof c}};
  note_event(event, name, (void *[]){&a, &b, &c});
  return CUBLAS_STATUS_SUCCESS;
}
/* "cublasGemmEx tn 768x2304x197 bfloat16": transposes, sizes and the element type's number in library_types.h. */
static const char *describe(const char *name, cublasOperation_t ta, cublasOperation_t tb, long m, long n, long k, int type) {
  static __thread char text[160];
  if (!recording) return name;
  snprintf(text, sizeof text, "%s %c%c %ldx%ldx%ld type %d", name, "ntc"[ta], "ntc"[tb], m, n, k, type);
  return text;
}

cublasStatus_t cublasCreate_v2(cublasHandle_t *handle) {
  attach();
  if (prohibits_unsafe_calls())
    return invalidate(cudaErrorStreamCaptureUnsupported, "cublasCreate"), CUBLAS_STATUS_NOT_INITIALIZED;
  return *handle = calloc(1, sizeof(struct cublasContext)), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasDestroy_v2(cublasHandle_t handle) { return free(handle), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasSetStream_v2(cublasHandle_t handle, cudaStream_t stream) {
  return handle->stream = stream, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetWorkspace_v2(cublasHandle_t handle, void *workspace, size_t size) { return CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasGetMathMode(cublasHandle_t handle, cublasMath_t *mode) {
  return *mode = handle->math, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetMathMode(cublasHandle_t handle, cublasMath_t mode) {
  return handle->math = mode, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasGetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t *mode) {
  return *mode = handle->pointers, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasSetPointerMode_v2(cublasHandle_t handle, cublasPointerMode_t mode) {
  return handle->pointers = mode, CUBLAS_STATUS_SUCCESS;
}

#define GEMM_OF(name, T, type)                                                                                           \
  cublasStatus_t name(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const T *alpha, \
                      const T *a, int lda, const T *b, int ldb, const T *beta, T *c, int ldc) {                          \
    return gemm(h->stream, describe(#name, ta, tb, m, n, k, type), a, b, c);                                             \
  }
#define BATCHED_GEMM_OF(name, T, type)                                                                                       \
  cublasStatus_t name(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k, const T *alpha,     \
                      const T *a, int lda, long long stride_a, const T *b, int ldb, long long stride_b, const T *beta, T *c, \
                      int ldc, long long stride_c, int count) {                                                              \
    return gemm(h->stream, describe(#name, ta, tb, m, n, k, type), a, b, c);                                                 \
  }
#define GEMV_OF(name, T, type)                                                                                              \
  cublasStatus_t name(cublasHandle_t h, cublasOperation_t t, int m, int n, const T *alpha, const T *a, int lda, const T *x, \
                      int incx, const T *beta, T *y, int incy) {                                                            \
    return gemm(h->stream, describe(#name, t, t, m, 1, n, type), a, x, y);                                                  \
  }
#define DOT_OF(name, T, type)                                                                           \
  cublasStatus_t name(cublasHandle_t h, int n, const T *x, int incx, const T *y, int incy, T *result) { \
    return gemm(h->stream, describe(#name, CUBLAS_OP_T, CUBLAS_OP_N, 1, 1, n, type), x, y, result);     \
  }
GEMM_OF(cublasSgemm_v2, float, CUDA_R_32F)
GEMM_OF(cublasDgemm_v2, double, CUDA_R_64F)
BATCHED_GEMM_OF(cublasSgemmStridedBatched, float, CUDA_R_32F)
BATCHED_GEMM_OF(cublasDgemmStridedBatched, double, CUDA_R_64F)
GEMV_OF(cublasSgemv_v2, float, CUDA_R_32F)
GEMV_OF(cublasDgemv_v2, double, CUDA_R_64F)
DOT_OF(cublasSdot_v2, float, CUDA_R_32F)
DOT_OF(cublasDdot_v2, double, CUDA_R_64F)

cublasStatus_t cublasGemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                            const void *alpha, const void *a, cudaDataType a_type, int lda, const void *b, cudaDataType b_type,
                            int ldb, const void *beta, void *c, cudaDataType c_type, int ldc, cublasComputeType_t compute,
                            cublasGemmAlgo_t algorithm) {
  return gemm(h->stream, describe("cublasGemmEx", ta, tb, m, n, k, a_type), a, b, c);
}
cublasStatus_t cublasSgemmEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                             const float *alpha, const void *a, cudaDataType a_type, int lda, const void *b,
                             cudaDataType b_type, int ldb, const float *beta, void *c, cudaDataType c_type, int ldc) {
  return gemm(h->stream, describe("cublasSgemmEx", ta, tb, m, n, k, a_type), a, b, c);
}
cublasStatus_t cublasGemmStridedBatchedEx(cublasHandle_t h, cublasOperation_t ta, cublasOperation_t tb, int m, int n, int k,
                                          const void *alpha, const void *a, cudaDataType a_type, int lda, long long stride_a,
                                          const void *b, cudaDataType b_type, int ldb, long long stride_b, const void *beta,
                                          void *c, cudaDataType c_type, int ldc, long long stride_c, int count,
                                          cublasComputeType_t compute, cublasGemmAlgo_t algorithm) {
  return gemm(h->stream, describe("cublasGemmStridedBatchedEx", ta, tb, m, n, k, a_type), a, b, c);
}
cublasStatus_t cublasDotEx(cublasHandle_t h, int n, const void *x, cudaDataType x_type, int incx, const void *y,
                           cudaDataType y_type, int incy, void *result, cudaDataType result_type, cudaDataType execution_type) {
  return gemm(h->stream, describe("cublasDotEx", CUBLAS_OP_T, CUBLAS_OP_N, 1, 1, n, x_type), x, y, result);
}

/* A layout keeps what `cublasLtMatmul` is recorded with. PyTorch passes its cuBLAS handle for the handle of cuBLASLt. */
size_t cublasLtGetVersion(void) { return 130000; }
cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t *layout, cudaDataType type, uint64_t rows, uint64_t columns,
                                          int64_t ld) {
  *layout = malloc(sizeof **layout);
  **layout = (cublasLtMatrixLayoutOpaque_t){{rows, columns, type}};
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) { return free(layout), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatrixLayoutSetAttribute(cublasLtMatrixLayout_t layout, cublasLtMatrixLayoutAttribute_t attribute,
                                                const void *value, size_t size) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t *description, cublasComputeType_t compute, cudaDataType_t scale) {
  return *description = calloc(1, sizeof **description), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t description) { return free(description), CUBLAS_STATUS_SUCCESS; }
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t description, cublasLtMatmulDescAttributes_t attribute,
                                              const void *value, size_t size) {
  if (attribute == CUBLASLT_MATMUL_DESC_TRANSA) description->data[0] = *(const int32_t *)value;
  if (attribute == CUBLASLT_MATMUL_DESC_TRANSB) description->data[1] = *(const int32_t *)value;
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t *preference) {
  return *preference = calloc(1, sizeof **preference), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  return free(preference), CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute, const void *value,
                                                    size_t size) {
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t description,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c,
                                              cublasLtMatrixLayout_t d, cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[], int *count) {
  results[0] = (cublasLtMatmulHeuristicResult_t){.state = CUBLAS_STATUS_SUCCESS};
  return *count = 1, CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t description, const void *alpha, const void *a,
                              cublasLtMatrixLayout_t a_layout, const void *b, cublasLtMatrixLayout_t b_layout, const void *beta,
                              const void *c, cublasLtMatrixLayout_t c_layout, void *d, cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t *algorithm, void *workspace, size_t workspace_size,
                              cudaStream_t stream) {
  uint64_t ta = description->data[0], tb = description->data[1], k = a_layout->data[ta ? 0 : 1];
  return gemm(stream, describe("cublasLtMatmul", ta, tb, d_layout->data[0], d_layout->data[1], k, a_layout->data[2]), a, b, d);
}

/* cuDNN's graphs cannot be stood in for: at::Context::userEnabledCuDNN() and userEnabledCuDNNSDP() say that it is disabled,
   whatever was set. */
EXPORTED int cudnn_is_enabled(const void *context) __asm__("_ZNK2at7Context16userEnabledCuDNNEv");
EXPORTED int cudnn_attention_is_enabled(const void *context) __asm__("_ZNK2at7Context19userEnabledCuDNNSDPEv");
int cudnn_is_enabled(const void *context) { return 0; }
int cudnn_attention_is_enabled(const void *context) { return 0; }
