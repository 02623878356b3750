#pragma once

// A part of LLVM's sanitizer/allocator_interface.h, which GCC has the functions of and leaves out.

#include <cstddef>

extern "C" {
    size_t __sanitizer_get_current_allocated_bytes(void);
    size_t __sanitizer_get_allocated_size(const volatile void * pointer);
    int    __sanitizer_install_malloc_and_free_hooks(
            void (*on_malloc)(const volatile void * pointer, size_t size),
            void (*on_free)(const volatile void * pointer));
}
