// Scratch memory: vectors on a cache line's boundary, not initialised, large ones in pages of their own that go
// back to the system at once. (malloc keeps freed blocks of tens of megabytes, in an arena per thread.)
#pragma once
#include <cstddef>
#include <new>
#include <utility>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace alds {

template <typename T>
struct PageAllocator {
  using value_type = T;
  PageAllocator() = default;
  template <typename U>
  PageAllocator(const PageAllocator<U>&) {}

  static constexpr std::align_val_t LINE{64};
  static bool paged(size_t bytes) {
#if defined(__linux__)
    return bytes >= (1 << 20);
#else
    return false;
#endif
  }

  T* allocate(size_t count) {
    const size_t bytes = count * sizeof(T);
    if (!paged(bytes)) return static_cast<T*>(::operator new(bytes, LINE));
#if defined(__linux__)
    void* pages = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED) throw std::bad_alloc();
    madvise(pages, bytes, MADV_HUGEPAGE);  // a wish: fewer page faults
    return static_cast<T*>(pages);
#else
    throw std::bad_alloc();
#endif
  }
  void deallocate(T* pointer, size_t count) {
    const size_t bytes = count * sizeof(T);
    if (!paged(bytes)) return ::operator delete(pointer, LINE);
#if defined(__linux__)
    munmap(pointer, bytes);
#endif
  }
  template <typename U>
  void construct(U* p) {
    ::new (static_cast<void*>(p)) U;  // no zeros
  }
  template <typename U, typename... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
  bool operator==(const PageAllocator&) const { return true; }
  bool operator!=(const PageAllocator&) const { return false; }
};

template <typename T>
using BufferOf = std::vector<T, PageAllocator<T>>;
using Buffer = BufferOf<double>;

// At least `size` values of a buffer; what it held is lost.
template <typename T>
T* grow(BufferOf<T>& buffer, size_t size) {
  if (buffer.size() < size) {
    buffer.clear();
    buffer.shrink_to_fit();
    buffer.resize(size);
  }
  return buffer.data();
}

}  // namespace alds
