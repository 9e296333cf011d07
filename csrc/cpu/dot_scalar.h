// Dot products of 4 codes of 16 rows with 4 of a token in portable C++. Included inside an anonymous namespace after
// vec_scalar.h.

constexpr int kDotTiles = 1;
// Blocks of tokens that there are kernels for; of missing tokens all codes are 0.
constexpr int kDotBlocks[] = {1, 4};
template <int BITS>
constexpr int kMostStreams = 4;

// Products are added up in 32 bits.
constexpr bool kPairSums = false;
template <int BITS>
constexpr int kPairSteps = 0;

// As dot_avx2.h needs it.
inline I16 kept(const I16& a) {
    return a;
}
inline I16 set1_word(int32_t value) {
    const uint32_t v = static_cast<uint32_t>(value);
    return each_word([&](int) { return U4{v, v, v, v}; });
}
inline I16 add_words(const I16& a, const I16& b) {
    return each_word([&](int i) { return a.part[i] + b.part[i]; });
}
inline I16 mul_words(const I16& a, const I16& b) {
    return each_word([&](int i) { return a.part[i] * b.part[i]; });
}
inline I16 to_words(const F16& a) {
    return each_word([&](int i) { return (U4) __builtin_convertvector(a.part[i], I4); });
}
// 4 codes of a token for every row.
inline I16 four_codes(const int8_t* from) {
    int32_t four;
    std::memcpy(&four, from, sizeof four);
    return set1_word(four);
}

// acc + the 4 products of each row: codes of a weight unsigned, those of a token signed.
template <int BITS>
inline I16 dot(const I16& acc, const I16& codes, const I16& x) {
    return each_word([&](int i) {
        I4 sum = (I4)acc.part[i];
        for (int b = 0; b < kStepColumns; ++b) {
            const I4 code = (I4)((codes.part[i] >> (8 * b)) & 0xffu);
            sum += code * ((I4)(x.part[i] << (24 - 8 * b)) >> 24);
        }
        return (U4)sum;
    });
}
