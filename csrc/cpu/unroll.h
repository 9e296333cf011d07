// Loops whose counters are constants: arrays that are indexed by them stay in registers, where GCC's own unrolling comes
// too late for that. Included inside an anonymous namespace.

#define MMQ_INLINE __attribute__((always_inline)) inline
#define MMQ_INLINE_LAMBDA __attribute__((always_inline))

template <class Body, int... NUMBERS>
MMQ_INLINE void each_of(const Body& body, std::integer_sequence<int, NUMBERS...>) {
    (body(std::integral_constant<int, NUMBERS>()), ...);
}

// body(0) .. body(COUNT - 1), each number a std::integral_constant.
template <int COUNT, class Body>
MMQ_INLINE void each_number(const Body& body) {
    each_of(body, std::make_integer_sequence<int, COUNT>());
}
