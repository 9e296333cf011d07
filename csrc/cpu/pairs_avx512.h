// Plane words -> registers of bf16 pairs: lane r holds two centred codes q - 2^(bits-1) of row r, as vdpbf16ps multiplies
// them. Integers up to 8 bits are exact in bf16: nothing is rounded. Included inside an anonymous namespace.
//
// Half h = 0, 1 of a step: columns 4s + h (low 16 bits of a lane) and 4s + h + 2 (high). A shift by 8h more than the
// step's brings both fields to the bottom of their 16 bits at once, and vpermw looks only at 5 bits of each: 16 table
// entries that repeat need no mask. Operations a register of 32 codes, one look-up each:
//
//   bits   2, 4   shift
//          3, 5   shift both planes, select the low bits of one and the rest of the other
//          6      likewise, over a table of two registers (6 bits of index)
//          7, 8   two tables of 16: the low four bits, and the rest; two registers whose sum is the code (`kTerms`),
//                 or one, made by conversion (`single`): dearer to decode, half the products

// Entry i is worth (i mod 2^WIDTH) * 2^LOW - CENTRE in bf16.
template <int WIDTH, int LOW, int CENTRE>
struct PairTable {
    alignas(64) uint16_t value[64] = {};

    constexpr PairTable() {
        for (int i = 0; i < 64; ++i) value[i] = exact_bf16(((i & ((1 << WIDTH) - 1)) << LOW) - CENTRE);
    }
};

template <int WIDTH, int LOW, int CENTRE>
inline constexpr PairTable<WIDTH, LOW, CENTRE> kPairTable{};

template <int BITS>
inline constexpr int kTerms = BITS >= 7 ? 2 : 1;

inline __m512i low_bits_of(int count, __m512i low, __m512i high) {
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>((1 << count) - 1));
    return _mm512_ternarylogic_epi32(mask, low, high, 0xCA);  // mask ? low : high
}

template <int WIDTH, int LOW, int CENTRE>
inline __m512i pairs_by_table(__m512i index) {
    const uint16_t* table = kPairTable<WIDTH, LOW, CENTRE>.value;
    if constexpr (WIDTH <= 5) return _mm512_permutexvar_epi16(index, _mm512_load_si512(table));
    return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
}

// The codes of 32 columns of 16 rows, step after step.
template <int BITS>
struct PairUnit {
    static constexpr Planes kPlanes = planes_of(BITS);
    const int32_t* words;
    __m512i word[kPlanes.count] = {};

    // Goes to a step: what it has of the words stays in registers until the next, as loads are what there is least of.
    void enter(int step) {
#pragma GCC unroll 3
        for (int p = 0; p < kPlanes.count; ++p) {
            const int along = kPlanes.width[p] * step;
            if (along % 8 != 0) continue;
            word[p] = _mm512_loadu_si512(words + (kPlanes.low[p] + along / 8) * kTileRows);
            asm("" : "+v"(word[p]));  // else GCC loads it again for each shift
        }
    }

    // The field of plane P of a half of the step entered, its lowest bit moved to bit AT of each 16 bits.
    template <int P, int AT>
    __m512i field(int step, int half) const {
        const int shift = kPlanes.width[P] * step % 8 + 8 * half - AT;
        if (shift == 0) return word[P];
        return shift > 0 ? _mm512_srli_epi32(word[P], static_cast<unsigned>(shift))
                         : _mm512_slli_epi32(word[P], static_cast<unsigned>(-shift));
    }

    // Term i of the pairs of a half step; terms add up to the code.
    template <int TERM = 0>
    __m512i term(int step, int half) const {
        constexpr int kCentre = middle_code(BITS);
        if constexpr (BITS == 2 || BITS == 4) {
            return pairs_by_table<BITS, 0, kCentre>(field<0, 0>(step, half));
        } else if constexpr (BITS == 3 || BITS == 5 || BITS == 6) {
            constexpr int kLow = planes_of(BITS).width[0];
            return pairs_by_table<BITS, 0, kCentre>(
                low_bits_of(kLow, field<0, 0>(step, half), field<1, kLow>(step, half)));
        } else if constexpr (TERM == 0) {
            return pairs_by_table<4, 0, 0>(field<0, 0>(step, half));
        } else if constexpr (BITS == 7) {
            return pairs_by_table<3, 4, kCentre>(
                low_bits_of(2, field<1, 0>(step, half), field<2, 2>(step, half)));
        } else {
            return pairs_by_table<4, 4, kCentre>(field<0, -4>(step, half));
        }
    }

    // The four codes of a step in the four bytes of a lane, for 7 and 8 bits.
    __m512i bytes(int step) const {
        if constexpr (BITS == 8) {
            return field<0, 0>(step, 0);
        } else {
            const __m512i high = mask_bytes(2, 4, field<1, 4>(step, 0), field<2, 6>(step, 0));
            return mask_bytes(4, 0, field<0, 0>(step, 0), high);
        }
    }

    // All pairs of a step, each in one register: pairs[half].
    void single(int step, __m512i (&pairs)[2]) const {
        if constexpr (kTerms<BITS> == 1) {
            pairs[0] = term(step, 0);
            pairs[1] = term(step, 1);
        } else {
            const __m512i code = bytes(step);
            const __m512i odd = _mm512_srli_epi32(code, 8);
            pairs[0] = joined(code, _mm512_srli_epi32(code, 16));
            pairs[1] = joined(odd, _mm512_srli_epi32(code, 24));
        }
    }

  private:
    // Bits [FROM, FROM + COUNT) of each byte from low, the others from high.
    static __m512i mask_bytes(int count, int from, __m512i low, __m512i high) {
        const __m512i mask = _mm512_set1_epi8(static_cast<int8_t>(((1 << count) - 1) << from));
        return _mm512_ternarylogic_epi32(mask, low, high, 0xCA);
    }

    // The code in the lowest byte of each lane in fp32, centred: q | 2^23 as a float is 2^23 + q.
    static __m512 centred(__m512i code) {
        const __m512i mask = _mm512_set1_epi32((1 << BITS) - 1), magic = _mm512_set1_epi32(0x4B000000);
        const __m512i biased = _mm512_ternarylogic_epi32(code, mask, magic, 0xEA);  // (code & mask) | magic
        return _mm512_sub_ps(_mm512_castsi512_ps(biased),
                             _mm512_set1_ps(8388608.0f + static_cast<float>(middle_code(BITS))));
    }

    // Low and high codes as bf16: their fp32 form ends in 16 zeros.
    static __m512i joined(__m512i low, __m512i high) {
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(centred(low)), 16),
                               _mm512_castps_si512(centred(high)));
    }
};
