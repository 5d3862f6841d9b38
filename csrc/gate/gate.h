// Top-k gate. The specification is robust_moe_kernels/ops/gate/reference_impl.py.
#pragma once

#include <cstdint>

namespace rmk {

struct GateArgs {
  const void* logits;  // [rows, experts]
  int64_t rows;
  int64_t experts;
  int64_t top_k;
  int mode;  // 0: kept scores as they are, 1: divided by their sum, 2: straight-through (forward weight 1)
  int dtype;
  int threads;  // of the CPU
  // Outputs, float (double for double logits).
  void* scores;           // [rows, experts]
  int64_t* indices;       // [rows, top_k]
  void* weights;          // [rows, top_k]
  void* mean_scores;      // [experts]
  void* argmax_fraction;  // [experts]
  void* mean_entropy;     // []
  void* mean_square_lse;  // []
  int32_t* nonfinite;     // [], rows with a NaN or an infinity
  // Scratch of the CUDA kernels.
  double* partial;  // [blocks, 2 * experts + 3], or null with one block
  int64_t blocks;   // gate_blocks(rows, experts)
};

struct GateBackwardArgs {
  const void* logits;  // [rows, experts]
  const void* scores;  // [rows, experts]
  const int64_t* indices;
  const void* d_scores;           // [rows, experts] or null
  const void* d_weights;          // [rows, top_k] or null
  const void* d_mean_scores;      // [experts] or null
  const void* d_mean_entropy;     // [] or null
  const void* d_mean_square_lse;  // [] or null
  void* d_logits;                 // [rows, experts], as logits
  int64_t rows;
  int64_t experts;
  int64_t top_k;
  int mode;
  int dtype;
  int threads;
};

void gate_forward_cpu(const GateArgs& args);
void gate_backward_cpu(const GateBackwardArgs& args);
#ifdef RMK_CUDA
// Blocks of the forward kernel. One block needs no scratch and no second launch.
int64_t gate_blocks(int64_t rows, int64_t experts);
void gate_forward_cuda(const GateArgs& args, std::uintptr_t stream);
void gate_backward_cuda(const GateBackwardArgs& args, std::uintptr_t stream);
#endif

}  // namespace rmk
