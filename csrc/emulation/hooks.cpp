// What "-fsanitize=thread" makes the compiler call at each access of the kernels, without the sanitizer's runtime.
#include <cstddef>
#include <cstdint>

namespace mmq::emulation {
void on_access(const void* address, int bytes, bool write);
}

using mmq::emulation::on_access;

#define MMQ_HOOKS(bytes)                                     \
    extern "C" void __tsan_read##bytes(void* p) {            \
        on_access(p, bytes, false);                          \
    }                                                        \
    extern "C" void __tsan_write##bytes(void* p) {           \
        on_access(p, bytes, true);                           \
    }                                                        \
    extern "C" void __tsan_unaligned_read##bytes(void* p) {  \
        on_access(p, bytes, false);                          \
    }                                                        \
    extern "C" void __tsan_unaligned_write##bytes(void* p) { \
        on_access(p, bytes, true);                           \
    }                                                        \
    extern "C" void __tsan_volatile_read##bytes(void* p) {   \
        on_access(p, bytes, false);                          \
    }                                                        \
    extern "C" void __tsan_volatile_write##bytes(void* p) {  \
        on_access(p, bytes, true);                           \
    }

MMQ_HOOKS(1)
MMQ_HOOKS(2)
MMQ_HOOKS(4)
MMQ_HOOKS(8)
MMQ_HOOKS(16)

extern "C" {
void __tsan_read_range(void* p, size_t bytes) {
    on_access(p, static_cast<int>(bytes), false);
}
void __tsan_write_range(void* p, size_t bytes) {
    on_access(p, static_cast<int>(bytes), true);
}
void __tsan_vptr_update(void**, void*) {}
void __tsan_vptr_read(void**) {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_init() {}
}
