// A register of 16 rows in portable C++. Included inside an anonymous namespace of a kernel file.

using F4 = float __attribute__((vector_size(16)));
using I4 = int32_t __attribute__((vector_size(16)));
using U4 = uint32_t __attribute__((vector_size(16)));

// Quarters, because every target has vectors of 4 and compiles them fast.
struct F16 {
    F4 part[4];
};
struct I16 {
    U4 part[4];
};

constexpr int kRegisters = 1;  // as many as are worth chains of sums
constexpr int kTokens = 4;     // tokens of a register block

template <class Function>
inline F16 each_part(const Function& function) {
    return {{function(0), function(1), function(2), function(3)}};
}
template <class Function>
inline I16 each_word(const Function& function) {
    return {{function(0), function(1), function(2), function(3)}};
}

inline F16 set1(float value) {
    return each_part([&](int) { return F4{value, value, value, value}; });
}
inline F16 load(const float* from) {
    F16 out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline void store(float* to, const F16& a) {
    std::memcpy(to, &a, sizeof a);
}
inline F16 add(const F16& a, const F16& b) {
    return each_part([&](int i) { return a.part[i] + b.part[i]; });
}
inline F16 sub(const F16& a, const F16& b) {
    return each_part([&](int i) { return a.part[i] - b.part[i]; });
}
inline F16 mul(const F16& a, const F16& b) {
    return each_part([&](int i) { return a.part[i] * b.part[i]; });
}
// a * b + c
inline F16 fma(const F16& a, const F16& b, const F16& c) {
    return each_part([&](int i) { return a.part[i] * b.part[i] + c.part[i]; });
}
// c - a * b
inline F16 fnma(const F16& a, const F16& b, const F16& c) {
    return each_part([&](int i) { return c.part[i] - a.part[i] * b.part[i]; });
}

inline I16 load_words(const int32_t* from) {
    I16 out;
    std::memcpy(&out, from, sizeof out);
    return out;
}
inline I16 shift_right(const I16& a, int count) {
    return each_word([&](int i) { return a.part[i] >> count; });
}
inline I16 shift_left(const I16& a, int count) {
    return each_word([&](int i) { return a.part[i] << count; });
}
inline I16 mask(const I16& a, uint32_t bits) {
    return each_word([&](int i) { return a.part[i] & bits; });
}
inline I16 either(const I16& a, const I16& b) {
    return each_word([&](int i) { return a.part[i] | b.part[i]; });
}
// Adds 128 to every byte, mod 256: codes in the highest bits of bytes become signed, centred on 0.
inline I16 centre_bytes(const I16& a) {
    return each_word([&](int i) { return a.part[i] ^ 0x80808080u; });
}
// The highest BITS bits of byte i of each lane, as a signed number.
template <int BITS>
inline I16 top_of_byte(const I16& a, int byte) {
    return each_word([&](int i) { return (U4)((I4)(a.part[i] << (24 - 8 * byte)) >> (32 - BITS)); });
}
inline F16 to_float(const I16& a) {
    return each_part([&](int i) { return __builtin_convertvector((I4)a.part[i], F4); });
}

inline F16 load_fp16(const uint16_t* from) {
    float out[16];
    for (int i = 0; i < 16; ++i) out[i] = fp16_to_float(from[i]);
    return load(out);
}
inline F16 load_bf16(const uint16_t* from) {
    float out[16];
    for (int i = 0; i < 16; ++i) out[i] = bf16_to_float(from[i]);
    return load(out);
}

// 16 codes of a dense stream that starts at a byte.
template <int BITS>
inline F16 load_stream(const uint8_t* from) {
    float out[16];
    for (int i = 0; i < 16; ++i) {
        const int byte = i * BITS / 8, shift = i * BITS % 8;
        uint32_t window = from[byte];
        if (shift + BITS > 8) window |= static_cast<uint32_t>(from[byte + 1]) << 8;
        out[i] = static_cast<float>((window >> shift) & ((1u << BITS) - 1));
    }
    return load(out);
}
