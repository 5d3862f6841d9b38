// What the binding files share: addresses arrive as integers, already checked by robust_moe_kernels, and the
// interpreter lock is released while a kernel runs.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>

namespace rmk {

using Address = std::uintptr_t;
using NoGil = pybind11::call_guard<pybind11::gil_scoped_release>;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Python calls kernel(arguments..., threads) on the CPU and kernel(arguments..., stream) on the GPU; `make` turns the
// arguments into the kernel's structure.
template <typename Args, typename... P>
auto on_cpu(void (*kernel)(const Args&), Args (*make)(P...)) {
  return [kernel, make](P... arguments, int threads) {
    Args args = make(arguments...);
    args.threads = threads;
    kernel(args);
  };
}

template <typename Args, typename... P>
auto on_cuda(void (*kernel)(const Args&, Address), Args (*make)(P...)) {
  return [kernel, make](P... arguments, Address stream) { kernel(make(arguments...), stream); };
}

void bind_expert_block(pybind11::module_& m);
void bind_expert_mlp(pybind11::module_& m);

}  // namespace rmk
