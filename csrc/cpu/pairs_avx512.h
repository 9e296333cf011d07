// Plane words -> registers of bf16 pairs: lane r holds two centred codes q - 2^(bits-1) of row r, as vdpbf16ps multiplies
// them. Integers up to 8 bits are exact in bf16: nothing is rounded. Included inside an anonymous namespace.
//
// Half h = 0, 1 of a step: columns 4s + h (low 16 bits of a lane) and 4s + h + 2 (high). A shift by 8h more than the
// step's brings both fields to the bottom of their 16 bits at once, and vpermw looks only at 5 bits of each: entries that
// repeat need no mask. Operations a register of 32 codes, one look-up each:
//
//   bits   2      shift, shared by two steps: a field may lie anywhere among the 5 bits, given a table for the place
//          4      shift
//          3      shift both planes, select the low bits of one and the rest of the other; shifts are shared likewise
//          5      the same, nothing shared
//          6      likewise, over a table of two registers (6 bits of index)
//          7, 8   two tables of 16: the low four bits, and the rest; two registers whose sum is the code. Or one, dearer
//                 to decode for half the products: 7 bits from two tables of 64, 8 by conversion

// Where an index has the bits of the planes of a code.
struct Places {
    int low, high;
};

// Step s has plane p at bit p.width * s % 8 of a byte: places are chosen such that few shifts lead there.
template <int BITS>
constexpr Places places_of(int step) {
    if (BITS == 2) return {2 * step % 4, 0};
    constexpr int kTopBit[] = {2, 1, 2, 0, 4, 1, 2, 4};  // of 3 bits: shifts by -2, 0, 3 and 4
    if (BITS == 3) return {2 * step % 4, kTopBit[step]};
    return {0, planes_of(BITS).width[0]};
}

// Entry i is worth the code whose planes it has at LOW and HIGH, less the middle one.
template <int BITS, int LOW, int HIGH>
struct CodeTable {
    alignas(64) uint16_t value[64] = {};

    constexpr CodeTable() {
        constexpr Planes kPlanes = planes_of(BITS);
        for (int i = 0; i < 64; ++i) {
            int code = i >> LOW & ((1 << kPlanes.width[0]) - 1);
            if (kPlanes.count > 1) code |= (i >> HIGH & ((1 << kPlanes.width[1]) - 1)) << kPlanes.low[1];
            value[i] = exact_bf16(code - middle_code(BITS));
        }
    }
};

template <int BITS, int LOW, int HIGH>
inline constexpr CodeTable<BITS, LOW, HIGH> kCodeTable{};

// Entry i is worth (i mod 2^WIDTH) * 2^LOW - CENTRE: one term of two.
template <int WIDTH, int LOW, int CENTRE>
struct TermTable {
    alignas(64) uint16_t value[32] = {};

    constexpr TermTable() {
        for (int i = 0; i < 32; ++i) value[i] = exact_bf16(((i & ((1 << WIDTH) - 1)) << LOW) - CENTRE);
    }
};

template <int WIDTH, int LOW, int CENTRE>
inline constexpr TermTable<WIDTH, LOW, CENTRE> kTermTable{};

// Entry i of 64 is worth i + FIRST.
template <int FIRST>
struct RunTable {
    alignas(64) uint16_t value[64] = {};

    constexpr RunTable() {
        for (int i = 0; i < 64; ++i) value[i] = exact_bf16(i + FIRST);
    }
};

template <int FIRST>
inline constexpr RunTable<FIRST> kRunTable{};

// Bits [from, from + count) of each 16 of `inside`, the others of `outside`.
inline __m512i bits_of(int from, int count, __m512i inside, __m512i outside) {
    const __m512i mask = _mm512_set1_epi16(static_cast<int16_t>(((1 << count) - 1) << from));
    return _mm512_ternarylogic_epi32(mask, inside, outside, 0xCA);  // mask ? inside : outside
}

inline __m512i look_up_pairs(const uint16_t* table, __m512i index) {
    return _mm512_permutexvar_epi16(index, _mm512_load_si512(table));
}

inline __m512i look_up_pairs_of_64(const uint16_t* table, __m512i index) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
}

// The codes of 32 columns of 16 rows, step after step.
template <int BITS>
struct PairUnit {
    static constexpr Planes kPlanes = planes_of(BITS);
    const int32_t* words;
    __m512i word[kPlanes.count];

    // Goes to a step: what it has of the words stays in registers until the next, as loads are what there is least of.
    template <int STEP>
    MMQ_INLINE void enter() {
        each_number<kPlanes.count>([&](auto p) MMQ_INLINE_LAMBDA {
            constexpr int kAlong = kPlanes.width[p] * STEP;
            if constexpr (kAlong % 8 == 0) {
                word[p] = _mm512_loadu_si512(words + (kPlanes.low[p] + kAlong / 8) * kTileRows);
                asm("" : "+v"(word[p]));  // else GCC loads it again for each shift
            }
        });
    }

    // The field of plane P of a half of the step entered, its lowest bit moved to bit AT of each 16 bits.
    template <int STEP, int HALF, int P, int AT>
    MMQ_INLINE __m512i field() const {
        constexpr int kShift = kPlanes.width[P] * STEP % 8 + 8 * HALF - AT;
        if constexpr (kShift == 0) return word[P];
        if constexpr (kShift > 0) return _mm512_srli_epi32(word[P], static_cast<unsigned>(kShift));
        return _mm512_slli_epi32(word[P], static_cast<unsigned>(-kShift));
    }

    // Term i of the pairs of a half step; terms add up to the code.
    template <int STEP, int HALF, int TERM>
    MMQ_INLINE __m512i term() const {
        if constexpr (BITS < 7) {
            constexpr Places kAt = places_of<BITS>(STEP);
            const uint16_t* table = kCodeTable<BITS, kAt.low, kAt.high>.value;
            __m512i index = field<STEP, HALF, 0, kAt.low>();
            if constexpr (kPlanes.count > 1)
                index = bits_of(kAt.low, kPlanes.width[0], index, field<STEP, HALF, 1, kAt.high>());
            return BITS == 6 ? look_up_pairs_of_64(table, index) : look_up_pairs(table, index);
        } else if constexpr (TERM == 0) {
            return look_up_pairs(kTermTable<4, 0, 0>.value, field<STEP, HALF, 0, 0>());
        } else if constexpr (BITS == 7) {
            const __m512i index = bits_of(0, 2, field<STEP, HALF, 1, 0>(), field<STEP, HALF, 2, 2>());
            return look_up_pairs(kTermTable<3, 4, middle_code(BITS)>.value, index);
        } else {
            return look_up_pairs(kTermTable<4, 4, middle_code(BITS)>.value, field<STEP, HALF, 0, -4>());
        }
    }

    // The pairs of the step entered, pairs[half][term].
    template <int STEP, int TERMS>
    MMQ_INLINE void decode(__m512i (&pairs)[2][TERMS]) const {
        if constexpr (BITS < 7 || TERMS == 2) {
            each_number<TERMS>([&](auto t) MMQ_INLINE_LAMBDA {
                pairs[0][t] = term<STEP, 0, t>();
                pairs[1][t] = term<STEP, 1, t>();
            });
        } else if constexpr (BITS == 7) {
            const __m512i low = low_six<STEP>();
            pairs[0][0] = seven_bits<STEP % 8>(low);
            pairs[1][0] = seven_bits<STEP % 8 + 8>(_mm512_srli_epi32(low, 8));
        } else {
            const __m512i code = word[0], odd = _mm512_srli_epi32(code, 8);
            pairs[0][0] = joined(code, _mm512_srli_epi32(code, 16));
            pairs[1][0] = joined(odd, _mm512_srli_epi32(code, 24));
        }
    }

  private:
    // --- 7 bits: planes of 4, 2 and 1

    // The low six bits of the four codes of a step, at the bottom of the bytes of a lane.
    template <int STEP>
    MMQ_INLINE __m512i low_six() const {
        const __m512i mask = _mm512_set1_epi8(0x0f);
        return _mm512_ternarylogic_epi32(mask, field<STEP, 0, 0, 0>(), field<STEP, 0, 1, 4>(), 0xCA);
    }

    // The codes whose low six bits an index has, and the top one bit TOP of each 16.
    template <int TOP>
    MMQ_INLINE __m512i seven_bits(__m512i index) const {
        const __mmask32 upper =
            _mm512_test_epi16_mask(word[2], _mm512_set1_epi16(static_cast<int16_t>(1 << TOP)));
        return _mm512_mask_blend_epi16(upper, look_up_pairs_of_64(kRunTable<-64>.value, index),
                                       look_up_pairs_of_64(kRunTable<0>.value, index));
    }

    // --- 8 bits

    // The lowest byte of each lane in fp32, centred: q | 2^23 as a float is 2^23 + q.
    static __m512 centred(__m512i code) {
        const __m512i mask = _mm512_set1_epi32(0xff), magic = _mm512_set1_epi32(0x4B000000);
        const __m512i biased = _mm512_ternarylogic_epi32(code, mask, magic, 0xEA);  // (code & mask) | magic
        return _mm512_sub_ps(_mm512_castsi512_ps(biased), _mm512_set1_ps(8388608.0f + 128.0f));
    }

    // Low and high codes as bf16: their fp32 form ends in 16 zeros.
    static __m512i joined(__m512i low, __m512i high) {
        return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(centred(low)), 16),
                               _mm512_castps_si512(centred(high)));
    }
};
