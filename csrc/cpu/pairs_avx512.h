// Plane words -> registers of bf16 pairs: lane r holds two centred codes q - 2^(bits-1) of row r, as vdpbf16ps multiplies
// them. Integers up to 8 bits are exact in bf16: nothing is rounded. Included inside an anonymous namespace.
//
// Half h = 0, 1 of a step: columns 4s + h (low 16 bits of a lane) and 4s + h + 2 (high). A shift by 8h more than the
// step's brings both fields to the bottom of their 16 bits at once, and vpermw looks only at 5 bits of each: entries that
// repeat need no mask. How a register of 32 codes is made:
//
//   bits   2, 4      shift, look up; with 2, steps share shifts: a field may lie anywhere among the 5 bits, given a table
//                    for the place
//          3, 5, 6   beside a nibble of plane 0, the field of one step or two, the bits of plane 1 replace the other nibble:
//                    one selection for all columns of those steps. Then as above; 6 bits look at two registers of table,
//                    and with 3 bits, where there are registers for that, the two steps of a nibble share a shift
//          7, 8      two tables of 16: the low four bits, and the rest; two registers whose sum is the code. Or one, dearer
//                    to decode for half the products: 7 bits from two tables of 64, or as q + 2^7; 8 by conversion

// How the codes of a register are to be taken.
enum class Codes {
    kCentred,  // q - 2^(bits-1)
    kTerms,    // two registers whose sum is that: 7 and 8 bits
    kOffset,  // q + 2^7, of which q is the mantissa: 7 bits. What must be taken away again costs x in fp32 its last bits
};

// What a code is less than q.
template <int BITS, Codes CODES>
constexpr int kCentre = CODES == Codes::kOffset ? -128 : middle_code(BITS);

// Bits of an index that are looked at: as few as will do.
template <int BITS>
constexpr int kWindow = BITS == 6 ? 6 : 5;

// Where a register of both planes has the code of a step: shifted down by `shift`, plane 0 begins at bit `low` of each byte
// and plane 1 at bit `high`, and they are over at bit `end`.
struct Place {
    int shift, low, high, end;
};

// Steps that have their fields of plane 0 in one nibble, and the bits of plane 1 that belong to them.
template <int BITS>
constexpr int kNibbleSteps = 4 / planes_of(BITS).width[0];

template <int BITS>
constexpr int kNibbleHigh = kNibbleSteps<BITS> * planes_of(BITS).width[1];

// Nibble 0 stays where it is and has plane 1 above it; nibble 1 has it below.
template <int BITS>
constexpr int high_beside(bool upper) {
    return upper ? 4 - kNibbleHigh<BITS> : 4;
}

template <int BITS, int WINDOW>
constexpr Place place_of(int step) {
    constexpr Planes kPlanes = planes_of(BITS);
    const int low = kPlanes.width[0] * step % 8, nibble = low / 4 * 4;
    if (kPlanes.count == 1) return {nibble, low - nibble, 0, low - nibble + BITS};
    const int beside = high_beside<BITS>(nibble > 0);
    const int high = beside + step % kNibbleSteps<BITS> * kPlanes.width[1];
    const int shift = WINDOW > 5 ? std::min(nibble, beside) : std::min(low, high);
    const int end = std::max(low + kPlanes.width[0], high + kPlanes.width[1]) - shift;
    return {shift, low - shift, high - shift, end};
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

// mask ? inside : outside, bit by bit
inline __m512i select_bits(__m512i mask, __m512i inside, __m512i outside) {
    return _mm512_ternarylogic_epi32(mask, inside, outside, 0xCA);
}

// In a register: GCC would load it again for each use.
inline void stay([[maybe_unused]] __m512i& word) {
#if !defined(MMQ_EMULATE_AVX512)
    asm("" : "+v"(word));
#endif
}

inline __m512i look_up_pairs(const uint16_t* table, __m512i index) {
    return _mm512_permutexvar_epi16(index, _mm512_load_si512(table));
}

inline __m512i look_up_pairs_of_64(const uint16_t* table, __m512i index) {
    return _mm512_permutex2var_epi16(_mm512_load_si512(table), index, _mm512_load_si512(table + 32));
}

// The codes of 32 columns of 16 rows, step after step.
template <int BITS, int WINDOW = kWindow<BITS>>
struct PairUnit {
    static constexpr Planes kPlanes = planes_of(BITS);
    const int32_t* words;
    __m512i word[kPlanes.count], both;

    // Goes to a step: what it has of the words stays in registers until the next, as loads are what there is least of. ALONE:
    // the step before was not entered.
    template <int STEP, bool ALONE = false>
    MMQ_INLINE void enter() {
        each_number<kPlanes.count>([&](auto p) MMQ_INLINE_LAMBDA {
            constexpr int kAlong = kPlanes.width[p] * STEP;
            if constexpr (ALONE || kAlong % 8 == 0) {
                word[p] = _mm512_loadu_si512(words + (kPlanes.low[p] + kAlong / 8) * kTileRows);
                stay(word[p]);
            }
        });
        if constexpr (kPlanes.count == 2 && (ALONE || STEP % kNibbleSteps<BITS> == 0)) {
            constexpr bool kUpper = kPlanes.width[0] * STEP % 8 >= 4;
            constexpr int kFirst = STEP / kNibbleSteps<BITS> * kNibbleSteps<BITS>;
            constexpr int kBy = kPlanes.width[1] * kFirst % 8 - high_beside<BITS>(kUpper);
            both = select_bits(_mm512_set1_epi8(static_cast<int8_t>(kUpper ? 0xf0 : 0x0f)), word[0],
                               shifted<kBy>(word[1]));
        }
    }

    // Term i of the pairs of a half step; terms add up to the code.
    template <int STEP, int HALF, int TERM>
    MMQ_INLINE __m512i term() const {
        constexpr int kHalf = 8 * HALF, kField = kPlanes.width[0] * STEP % 8;
        if constexpr (BITS < 7) {
            constexpr Place kPlace = place_of<BITS, WINDOW>(STEP);
            static_assert(kPlace.end <= WINDOW, "more than is looked at");
            const uint16_t* table = kCodeTable<BITS, kPlace.low, kPlace.high>.value;
            const __m512i index = shifted<kPlace.shift + kHalf>(kPlanes.count == 1 ? word[0] : both);
            return kPlace.end > 5 ? look_up_pairs_of_64(table, index) : look_up_pairs(table, index);
        } else if constexpr (TERM == 0) {
            return look_up_pairs(kTermTable<4, 0, 0>.value, shifted<kField + kHalf>(word[0]));
        } else if constexpr (BITS == 7) {
            const __m512i index = select_bits(_mm512_set1_epi16(3), shifted<2 * STEP % 8 + kHalf>(word[1]),
                                              shifted<STEP + kHalf - 2>(word[2]));
            return look_up_pairs(kTermTable<3, 4, middle_code(BITS)>.value, index);
        } else {
            return look_up_pairs(kTermTable<4, 4, middle_code(BITS)>.value, shifted<kHalf + 4>(word[0]));
        }
    }

    // The pairs of the step entered, pairs[half][term].
    template <int STEP, Codes CODES, int TERMS>
    MMQ_INLINE void decode(__m512i (&pairs)[2][TERMS]) const {
        if constexpr (BITS < 7 || CODES == Codes::kTerms) {
            each_number<TERMS>([&](auto t) MMQ_INLINE_LAMBDA {
                pairs[0][t] = term<STEP, 0, t>();
                pairs[1][t] = term<STEP, 1, t>();
            });
        } else if constexpr (CODES == Codes::kOffset) {
            const __m512i codes = seven_bits<STEP>();
            pairs[0][0] = with_exponent(codes);
            pairs[1][0] = with_exponent(_mm512_srli_epi32(codes, 8));
        } else if constexpr (BITS == 7) {
            const __m512i low = low_six<STEP>();
            pairs[0][0] = looked_up<STEP % 8>(low);
            pairs[1][0] = looked_up<STEP % 8 + 8>(_mm512_srli_epi32(low, 8));
        } else {
            const __m512i code = word[0], odd = _mm512_srli_epi32(code, 8);
            pairs[0][0] = joined(code, _mm512_srli_epi32(code, 16));
            pairs[1][0] = joined(odd, _mm512_srli_epi32(code, 24));
        }
    }

  private:
    // To the right, to the left if negative.
    template <int BY>
    static MMQ_INLINE __m512i shifted(__m512i word) {
        if constexpr (BY == 0) return word;
        if constexpr (BY > 0) return _mm512_srli_epi32(word, static_cast<unsigned>(BY));
        return _mm512_slli_epi32(word, static_cast<unsigned>(-BY));
    }

    // --- 7 bits: planes of 4, 2 and 1

    // The low six bits of the four codes of a step, at the bottom of the bytes of a lane.
    template <int STEP>
    MMQ_INLINE __m512i low_six() const {
        return select_bits(_mm512_set1_epi8(0x0f), shifted<4 * STEP % 8>(word[0]),
                           shifted<2 * STEP % 8 - 4>(word[1]));
    }

    // The codes whose low six bits an index has, and the top one bit TOP of each 16.
    template <int TOP>
    MMQ_INLINE __m512i looked_up(__m512i index) const {
        const __mmask32 upper =
            _mm512_test_epi16_mask(word[2], _mm512_set1_epi16(static_cast<int16_t>(1 << TOP)));
        return _mm512_mask_blend_epi16(upper, look_up_pairs_of_64(kRunTable<-64>.value, index),
                                       look_up_pairs_of_64(kRunTable<0>.value, index));
    }

    // The four codes of a step, at the bottom of the bytes of a lane; the top bits may be anything.
    template <int STEP>
    MMQ_INLINE __m512i seven_bits() const {
        return select_bits(_mm512_set1_epi8(0x3f), low_six<STEP>(), shifted<STEP - 6>(word[2]));
    }

    // 2^7 + the seven bits at the bottom of each 16.
    static __m512i with_exponent(__m512i codes) {
        constexpr int kAndOr = 0xEA;  // (codes & mask) | exponent
        return _mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(0x7f), _mm512_set1_epi16(0x4300), kAndOr);
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
