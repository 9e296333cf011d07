#include "fiber.h"

#include <link.h>

namespace mmq::emulation {

#if defined(__x86_64__)

extern "C" void mmq_switch(void** save, void* next);

// The callee-saved registers of the System V ABI go onto the stack that is left, and come from the one entered.
asm(R"(
.text
.type mmq_switch, @function
mmq_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mmq_switch, .-mmq_switch
)");

void prepare_fiber(Fiber& fiber, FiberStack& stack, void (*entry)()) {
    fiber.stack = &stack;
    void** top = reinterpret_cast<void**>(stack.top());
    *--top = nullptr;  // where `entry` would return to; leaves the stack aligned as a call does
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber.context.stack_pointer = top;
}

void switch_fiber(FiberContext& from, FiberContext& to) {
    mmq_switch(&from.stack_pointer, to.stack_pointer);
}

#else

void prepare_fiber(Fiber& fiber, FiberStack& stack, void (*entry)()) {
    fiber.stack = &stack;
    getcontext(&fiber.context.context);
    fiber.context.context.uc_stack.ss_sp = stack.bottom();
    fiber.context.context.uc_stack.ss_size = FiberStack::kBytes;
    fiber.context.context.uc_link = nullptr;
    makecontext(&fiber.context.context, entry, 0);
}

void switch_fiber(FiberContext& from, FiberContext& to) {
    swapcontext(&from.context, &to.context);
}

#endif

bool is_constant(const char* address) {
    const auto visit = [](dl_phdr_info* info, size_t, void* data) -> int {
        const auto wanted = *static_cast<const uintptr_t*>(data);
        for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            const uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
            if (segment.p_type == PT_LOAD && !(segment.p_flags & PF_W) && wanted >= begin &&
                wanted < begin + segment.p_memsz)
                return 1;
        }
        return 0;
    };
    uintptr_t wanted = reinterpret_cast<uintptr_t>(address);
    return dl_iterate_phdr(visit, &wanted) != 0;
}

}  // namespace mmq::emulation
