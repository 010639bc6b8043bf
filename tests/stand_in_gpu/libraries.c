/* cuBLAS, cuSPARSELt and NCCL (one rank) for the stand-in: handles, sizes and counts. Their headers are not needed for
   that, so that handles are void pointers and enumerations int. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

void stand_in_launch(void);
int cudaMemcpyAsync(void *to, const void *from, size_t size, int kind, void *stream);

static void *fresh(void) { return calloc(1, 64); }
static int launched(void) { stand_in_launch(); return 0; }

int cublasCreate_v2(void **handle) { *handle = fresh(); return 0; }
int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGetPointerMode_v2(void *handle, int *mode) { *mode = 0; return 0; }
int cublasGemmEx(void) { return launched(); }
int cublasGemmStridedBatchedEx(void) { return launched(); }
int cublasSgemm_v2(void) { return launched(); }
int cublasLtMatmul(void) { return launched(); }
int cublasLtMatmulDescCreate(void **made, int compute, int scale) { *made = fresh(); return 0; }
int cublasLtMatrixLayoutCreate(void **made, int type, uint64_t rows, uint64_t columns, int64_t stride) {
  *made = fresh();
  return 0;
}
int cublasLtMatmulPreferenceCreate(void **made) { *made = fresh(); return 0; }
int cublasLtMatmulAlgoGetHeuristic(void *handle, void *matmul, void *a, void *b, void *c, void *d, void *preference,
                                   int wanted, void *results, int *found) {
  memset(results, 0, 96);  /* cublasLtMatmulHeuristicResult_t */
  *found = 1;
  return 0;
}

int cusparseLtSpMMACompressedSize2(void *handle, void *matrix, size_t *size, size_t *buffer) {
  *size = *buffer = (size_t)1 << 20;
  return 0;
}
int cusparseLtMatmulGetWorkspace(void *handle, void *plan, size_t *size) { *size = 0; return 0; }
int cusparseLtMatmul(void) { return launched(); }

typedef struct { char bytes[128]; } Id;
int ncclGetVersion(int *version) { *version = 22800; return 0; }
const char *ncclGetErrorString(int error) { return "error of the stand-in"; }
const char *ncclGetLastError(void *comm) { return "error of the stand-in"; }
int ncclGetUniqueId(Id *id) { memset(id, 0, sizeof *id); return 0; }
/* 5: an invalid argument; there is one rank. */
int ncclCommInitRank(void **comm, int ranks, Id id, int rank) { *comm = fresh(); return ranks == 1 ? 0 : 5; }
int ncclCommInitRankConfig(void **comm, int ranks, Id id, int rank, void *config) {
  return ncclCommInitRank(comm, ranks, id, rank);
}
int ncclCommSplit(void *parent, int color, int key, void **comm, void *config) { *comm = fresh(); return 0; }
int ncclCommCount(void *comm, int *count) { *count = 1; return 0; }
int ncclCommUserRank(void *comm, int *rank) { *rank = 0; return 0; }
int ncclCommGetAsyncError(void *comm, int *error) { *error = 0; return 0; }

static int passed_on(const void *from, void *to, size_t count, int type) {
  static const size_t sizes[] = {1, 1, 4, 4, 8, 8, 2, 4, 8, 2};  /* of ncclInt8 ... ncclBfloat16 */
  launched();
  return from == to ? 0 : cudaMemcpyAsync(to, from, count * sizes[type], 3, 0);
}
int ncclAllReduce(const void *from, void *to, size_t n, int type, int op, void *comm, void *stream) {
  return passed_on(from, to, n, type);
}
int ncclReduce(const void *from, void *to, size_t n, int type, int op, int root, void *comm, void *stream) {
  return passed_on(from, to, n, type);
}
int ncclReduceScatter(const void *from, void *to, size_t n, int type, int op, void *comm, void *stream) {
  return passed_on(from, to, n, type);
}
int ncclAllGather(const void *from, void *to, size_t n, int type, void *comm, void *stream) {
  return passed_on(from, to, n, type);
}
int ncclBroadcast(const void *from, void *to, size_t n, int type, int root, void *comm, void *stream) {
  return passed_on(from, to, n, type);
}
