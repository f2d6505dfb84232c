// cp.async by its CUDA names: a copy is made when its thread waits for it and not before, so that a missing wait shows.

#pragma once

#include "cuda_runtime.h"

inline void __pipeline_memcpy_async(void *to, const void *from, size_t size) {
  if (reinterpret_cast<uintptr_t>(to) % size || reinterpret_cast<uintptr_t>(from) % size)
    dk_shim::fail("an asynchronous copy of %zu bytes that are not aligned", size);
  dk_shim::current->open.push_back({to, from, size});
}

inline void __pipeline_commit() {
  auto *thread = dk_shim::current;
  thread->committed.push_back(std::move(thread->open));
  thread->open.clear();
}

inline void __pipeline_wait_prior(size_t left) {
  auto &committed = dk_shim::current->committed;
  while (committed.size() > left) {
    for (const dk_shim::Copy &copy : committed.front()) std::memcpy(copy.to, copy.from, copy.size);
    committed.erase(committed.begin());
  }
}
