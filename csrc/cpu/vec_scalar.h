// A register of 16 rows in portable C++. Included inside an anonymous namespace of a kernel file.

struct F16 {
    float lane[16];
};
struct I16 {
    int32_t lane[16];
};

constexpr int kTokens = 4;  // tokens of a register block

inline F16 set1(float value) {
    F16 out;
    for (float& lane : out.lane) lane = value;
    return out;
}
inline F16 load(const float* from) {
    F16 out;
    std::memcpy(out.lane, from, sizeof out.lane);
    return out;
}
inline void store(float* to, const F16& a) {
    std::memcpy(to, a.lane, sizeof a.lane);
}
inline F16 add(const F16& a, const F16& b) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] + b.lane[i];
    return out;
}
inline F16 sub(const F16& a, const F16& b) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] - b.lane[i];
    return out;
}
inline F16 mul(const F16& a, const F16& b) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] * b.lane[i];
    return out;
}
// a * b + c
inline F16 fma(const F16& a, const F16& b, const F16& c) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] * b.lane[i] + c.lane[i];
    return out;
}
// c - a * b
inline F16 fnma(const F16& a, const F16& b, const F16& c) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = c.lane[i] - a.lane[i] * b.lane[i];
    return out;
}

inline I16 load_words(const int32_t* from) {
    I16 out;
    std::memcpy(out.lane, from, sizeof out.lane);
    return out;
}
inline I16 shift_right(const I16& a, int count) {
    I16 out;
    for (int i = 0; i < 16; ++i)
        out.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) >> count);
    return out;
}
inline I16 shift_left(const I16& a, int count) {
    I16 out;
    for (int i = 0; i < 16; ++i)
        out.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) << count);
    return out;
}
inline I16 mask(const I16& a, int32_t bits) {
    I16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] & bits;
    return out;
}
inline I16 either(const I16& a, const I16& b) {
    I16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = a.lane[i] | b.lane[i];
    return out;
}
// Adds 128 to every byte, mod 256: codes of 8 bits become signed bytes centred on 0.
inline I16 centre_bytes(const I16& a) {
    I16 out;
    for (int i = 0; i < 16; ++i) {
        out.lane[i] = static_cast<int32_t>(static_cast<uint32_t>(a.lane[i]) ^ 0x80808080u);
    }
    return out;
}
inline I16 signed_byte(const I16& a, int byte) {
    I16 out;
    for (int i = 0; i < 16; ++i) {
        out.lane[i] = static_cast<int8_t>(static_cast<uint32_t>(a.lane[i]) >> (8 * byte));
    }
    return out;
}
inline F16 to_float(const I16& a) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = static_cast<float>(a.lane[i]);
    return out;
}

inline F16 load_fp16(const uint16_t* from) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = fp16_to_float(from[i]);
    return out;
}
inline F16 load_bf16(const uint16_t* from) {
    F16 out;
    for (int i = 0; i < 16; ++i) out.lane[i] = bf16_to_float(from[i]);
    return out;
}

// 16 codes of a dense stream that starts at a byte.
template <int BITS>
inline F16 load_stream(const uint8_t* from) {
    F16 out;
    for (int i = 0; i < 16; ++i) {
        const int byte = i * BITS / 8, shift = i * BITS % 8;
        uint32_t window = from[byte];
        if (shift + BITS > 8) window |= static_cast<uint32_t>(from[byte + 1]) << 8;
        out.lane[i] = static_cast<float>((window >> shift) & ((1u << BITS) - 1));
    }
    return out;
}
