// Codes of a weight a step at a time, and their dot products with integers: what every gemm by integers is made of.
// Included inside an anonymous namespace after unroll.h, decode.inl, outputs.inl and dot_*.h.
//
// A step is 4 consecutive columns of 16 rows, a column a byte of each row's lane. What it meets are streams: bytes of a
// token for its 4 columns, [step][stream][4]. A thread owns whole tiles of 16 rows:
//
//        streams of a block                        for each step of a segment:
//      +--------------------------+                  codes = words of the step: one shift and one mask a plane
//   W  | sums[kDotTiles][STREAMS] |                  sums[i][s] += sum of 4 products codes[i] * stream[step][s]
//      +--------------------------+
//
// Sums are exact: those of a segment, at most 256 columns of one group, are below 255 * 128 * 256 < 2^24.
//
// Where no instruction adds up in 32 bits (kPairSums), sums of pairs are added in 16 bits for as many steps as these hold
// (kPairSteps), and widened then; codes of 8 bits go as two of 4, parts, of which the second is worth 16 times as much.

constexpr int kGrains = kUnitColumns / kGrainColumns;
constexpr int kGrainSteps = kGrainColumns / kStepColumns;
constexpr int kUnitSteps = kGrains * kGrainSteps;

constexpr int kBlockSizes = sizeof kDotBlocks / sizeof kDotBlocks[0];

// The smallest block that has room for so many tokens; the most tokens a block has that so many streams go into.
constexpr int block_for(int64_t tokens) {
    int size = 0;
    for (int i = kBlockSizes - 1; i >= 0 && kDotBlocks[i] >= tokens; --i) size = kDotBlocks[i];
    return size;
}
constexpr int most_tokens(int streams) {
    int most = 0;
    for (int size : kDotBlocks) most = size <= streams ? size : most;
    return most;
}

template <int BITS>
constexpr int kParts = kPairSums && BITS == 8 ? 2 : 1;

template <int BITS>
struct StepCodes {
    I16 part[kParts<BITS>];

    MMQ_INLINE explicit StepCodes(I16 codes) : part{codes} {
        if constexpr (kParts<BITS> == 2) {
            part[0] = mask(codes, 0x0f0f0f0f);
            part[1] = mask(shift_right(codes, 4), 0x0f0f0f0f);
        }
    }
    // As `store` left them.
    MMQ_INLINE explicit StepCodes(const int32_t* from) {
        each_number<kParts<BITS>>([&](auto p)
                                      MMQ_INLINE_LAMBDA { part[p] = load_words(from + p * kTileRows); });
    }
    MMQ_INLINE void store(int32_t* to) const {
        each_number<kParts<BITS>>([&](auto p)
                                      MMQ_INLINE_LAMBDA { store_words(to + p * kTileRows, part[p]); });
    }
};

// The codes of a step of a unit, whose words are line(number, whether this step is the first that needs it).
template <int BITS, int STEP, class Line>
MMQ_INLINE I16 codes_of_step(const Line& line) {
    constexpr Planes kPlanes = planes_of(BITS);
    if constexpr (BITS == 8) {
        return line(STEP, true);
    } else {
        I16 codes = set1_word(0);
        each_number<kPlanes.count>([&](auto p) MMQ_INLINE_LAMBDA {
            constexpr int kWidth = kPlanes.width[p], kLow = kPlanes.low[p];
            constexpr int kAlong = kWidth * STEP, kRight = kAlong % 8 - kLow;
            constexpr int32_t kField = (((1 << kWidth) - 1) << kLow) * 0x01010101;
            const I16 word = line(kLow + kAlong / 8, kAlong % 8 == 0);
            const I16 bits =
                mask(kRight >= 0 ? shift_right(word, kRight) : shift_left(word, -kRight), kField);
            codes = p == 0 ? bits : either(codes, bits);
        });
        return codes;
    }
}

// A line of a unit. Words are asked for ahead one line at a time, as they are loaded: a whole unit at once takes longer where
// little is done with each, as with 8 bits.
MMQ_INLINE I16 load_line(const int32_t* unit, int number, bool first) {
    const int32_t* words = unit + number * kTileRows;
    if (first) fetch<1>(words, kFetchAhead);
    return load_words(words);
}

// The same of a step that is not known at compile time: for the ends of segments that are no whole units.
template <int BITS>
MMQ_INLINE I16 codes_of_any_step(const int32_t* unit, int step) {
    constexpr Planes kPlanes = planes_of(BITS);
    I16 codes = set1_word(0);
    for (int p = 0; p < kPlanes.count; ++p) {
        const int along = kPlanes.width[p] * step;
        const I16 word = load_words(unit + (kPlanes.low[p] + along / 8) * kTileRows);
        const uint32_t low_bits = ((1u << kPlanes.width[p]) - 1) * 0x01010101u;
        const I16 field = mask(shift_right(word, along % 8), static_cast<int32_t>(low_bits));
        codes = either(codes, shift_left(field, kPlanes.low[p]));
    }
    return codes;
}

// Where codes come from: the words of a tile, or a panel to which units were decoded before.
template <int BITS>
struct FromWords {
    const int32_t* words;

    // The codes of one column.
    MMQ_INLINE I16 column(uint32_t column) const {
        constexpr Planes kPlanes = planes_of(BITS);
        const int32_t* unit = words + static_cast<int64_t>(column / kUnitColumns) * (BITS * kTileRows);
        const uint32_t step = column % kUnitColumns / kStepColumns, byte = 8 * (column % kStepColumns);
        I16 codes = set1_word(0);
        each_number<kPlanes.count>([&](auto p) MMQ_INLINE_LAMBDA {
            constexpr int kWidth = kPlanes.width[p], kLow = kPlanes.low[p];
            const uint32_t along = kWidth * step;
            const I16 word = load_words(unit + (kLow + along / 8) * kTileRows);
            const I16 field = mask(shift_right(word, static_cast<int>(byte + along % 8)), (1 << kWidth) - 1);
            codes = p == 0 ? field : either(codes, shift_left(field, kLow));
        });
        return codes;
    }

    template <int STEP>
    MMQ_INLINE StepCodes<BITS> codes(int64_t unit) const {
        const int32_t* lines = words + unit * (BITS * kTileRows);
        return StepCodes<BITS>(codes_of_step<BITS, STEP>(
            [&](int number, bool first) MMQ_INLINE_LAMBDA { return load_line(lines, number, first); }));
    }

    // A unit whose steps are asked for in their order. Of 2 bits, a line of which has four steps, it stays in registers.
    class Unit {
      public:
        MMQ_INLINE Unit(const FromWords& from, int64_t unit)
            : lines_(from.words + unit * (BITS * kTileRows)) {}

        template <int STEP>
        MMQ_INLINE StepCodes<BITS> codes() {
            return StepCodes<BITS>(codes_of_step<BITS, STEP>([&](int number, bool first) MMQ_INLINE_LAMBDA {
                if (BITS > 2) return load_line(lines_, number, first);
                if (first) line_[number] = kept(load_line(lines_, number, first));
                return line_[number];
            }));
        }

      private:
        const int32_t* lines_;
        I16 line_[BITS];
    };
};

template <int BITS>
struct FromPanel {
    static constexpr int kUnitWords = kUnitSteps * kParts<BITS> * kTileRows;
    const int32_t* words;  // of the tile
    const int32_t* panel;  // [units][steps][parts][16]
    int64_t first;         // its first unit

    MMQ_INLINE I16 column(uint32_t column) const {
        const uint32_t step = column / kStepColumns - static_cast<uint32_t>(first) * kUnitSteps;
        static_assert(kParts<BITS> == 1, "columns of 8 bits are not asked for");
        const I16 codes = load_words(panel + static_cast<int64_t>(step) * kTileRows);
        return mask(shift_right(codes, static_cast<int>(8 * (column % kStepColumns))), 0xff);
    }

    class Unit {
      public:
        MMQ_INLINE Unit(const FromPanel& from, int64_t unit)
            : codes_(from.panel + (unit - from.first) * kUnitWords) {}

        template <int STEP>
        MMQ_INLINE StepCodes<BITS> codes() const {
            return StepCodes<BITS>(codes_ + STEP * kParts<BITS> * kTileRows);
        }

      private:
        const int32_t* codes_;
    };
};

// Units [begin, end) of a tile's words -> panel. Asks for the words of as many behind them.
template <int BITS>
void decode_codes(const int32_t* words, int64_t begin, int64_t end, int32_t* panel) {
    constexpr int kLines = BITS * kTileRows;
    const int64_t ahead = (end - begin) * kLines * static_cast<int64_t>(sizeof(int32_t));
    for (const int32_t* unit = words + begin * kLines; unit < words + end * kLines; unit += kLines) {
        fetch<BITS, kLater>(unit, ahead);
        each_number<kUnitSteps>([&](auto step) MMQ_INLINE_LAMBDA {
            const StepCodes<BITS> codes(codes_of_step<BITS, step>(
                [&](int number, bool) MMQ_INLINE_LAMBDA { return load_words(unit + number * kTileRows); }));
            codes.store(panel + step * kParts<BITS> * kTileRows);
        });
        panel += FromPanel<BITS>::kUnitWords;
    }
}

// The sums of a block. Few streams take one tile at a time, in memory's order, and their steps take turns between chains:
// a dot product takes 4 cycles.
template <int STREAMS>
struct Sums {
    static constexpr int kTiles = STREAMS < 4 ? 1 : kDotTiles;
    static constexpr int kChains = STREAMS < 4 && !kPairSums ? 4 / STREAMS : 1;
    I16 of[kTiles][STREAMS][kChains];
};

// sums += codes(tile) of one step * the streams at x.
template <int BITS, int STEP, int STREAMS, class Codes>
MMQ_INLINE void multiply_step(const Codes& codes_of, const int8_t* x, Sums<STREAMS>& sums) {
    constexpr int kTiles = Sums<STREAMS>::kTiles, kChain = STEP % Sums<STREAMS>::kChains;
    I16 codes[kTiles];
    each_number<kTiles>([&](auto i) MMQ_INLINE_LAMBDA { codes[i] = codes_of(i); });
    each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
        const I16 four = four_codes(x + s * kStepColumns);
        each_number<kTiles>([&](auto i) MMQ_INLINE_LAMBDA {
            sums.of[i][s][kChain] = dot<BITS>(sums.of[i][s][kChain], codes[i], four);
        });
    });
}

// Sums of a few steps in 16 bits.
template <int BITS, int STREAMS>
struct PairSums {
    I16 of[STREAMS][kParts<BITS>];

    template <class Body>
    static MMQ_INLINE void each(const Body& body) {
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            each_number<kParts<BITS>>([&](auto p) MMQ_INLINE_LAMBDA { body(s, p); });
        });
    }

    MMQ_INLINE void clear() {
        each([&](auto s, auto p) MMQ_INLINE_LAMBDA { of[s][p] = set1_word(0); });
    }
    // += a step of a unit * the streams at x; the FIRST of them all needs no cleared sums.
    template <int STEP, bool FIRST, class Unit>
    MMQ_INLINE void add_step(Unit& unit, const int8_t* x) {
        const StepCodes<BITS> codes = unit.template codes<STEP>();
        each_number<STREAMS>([&](auto s) MMQ_INLINE_LAMBDA {
            const I16 four = four_codes(x + s * kStepColumns);
            each_number<kParts<BITS>>([&](auto p) MMQ_INLINE_LAMBDA {
                const I16 products = pair_products(codes.part[p], four);
                of[s][p] = FIRST ? products : add_pairs(of[s][p], products);
            });
        });
    }
    MMQ_INLINE void add_to(Sums<STREAMS>& sums) const {
        each([&](auto s, auto p) MMQ_INLINE_LAMBDA {
            sums.of[0][s][0] = add_widened(sums.of[0][s][0], of[s][p], p == 0 ? 1 : 16);
        });
    }
};

// sums += units [unit, end) * the streams at x, kPairSteps at a time: parts of a unit, or several.
template <int BITS, int STREAMS, class Source>
MMQ_INLINE void multiply_units_by_pairs(const Source& source, int64_t unit, int64_t end, const int8_t* x,
                                        Sums<STREAMS>& sums) {
    constexpr int kStreamed = STREAMS * kStepColumns, kSteps = kPairSteps<BITS>;
    while (unit < end) {
        if constexpr (kSteps > kUnitSteps) {
            PairSums<BITS, STREAMS> pairs;
            pairs.clear();
            for (const int64_t stop = std::min<int64_t>(end, unit + kSteps / kUnitSteps); unit < stop;
                 ++unit, x += kUnitSteps * kStreamed) {
                typename Source::Unit steps(source, unit);
                each_number<kUnitSteps>([&](auto step) MMQ_INLINE_LAMBDA {
                    pairs.template add_step<step, false>(steps, x + step * kStreamed);
                });
            }
            pairs.add_to(sums);
        } else {
            typename Source::Unit steps(source, unit);
            each_number<kUnitSteps / kSteps>([&](auto run) MMQ_INLINE_LAMBDA {
                PairSums<BITS, STREAMS> pairs;
                each_number<kSteps>([&](auto i) MMQ_INLINE_LAMBDA {
                    constexpr int kStep = run * kSteps + i;
                    pairs.template add_step<kStep, i == 0>(steps, x + kStep * kStreamed);
                });
                pairs.add_to(sums);
            });
            ++unit, x += kUnitSteps * kStreamed;
        }
    }
}

// sums += codes of grains [begin, end) of the tiles * the streams at x, which begin at grain 0.
template <int BITS, int STREAMS, class Source>
MMQ_INLINE void multiply_segment(const Source* sources, const int8_t* x, int64_t begin, int64_t end,
                                 Sums<STREAMS>& sums) {
    static_assert(kGrains == 4 && kGrainSteps == 2, "a unit is four grains of two steps");
    static_assert(!kPairSums || Sums<STREAMS>::kTiles == 1, "pairs are added up for one tile");
    constexpr int64_t kGrainCodes = kGrainSteps * STREAMS * kStepColumns;
    for (int64_t grain = begin; grain < end;) {
        const int64_t unit = grain / kGrains;
        const int8_t* codes = x + grain * kGrainCodes;
        if (grain % kGrains == 0 && end - grain >= kGrains) {
            if constexpr (kPairSums) {
                const int64_t stop = end / kGrains;
                multiply_units_by_pairs<BITS>(sources[0], unit, stop, codes, sums);
                grain = stop * kGrains;
            } else {
                each_number<kUnitSteps>([&](auto step) MMQ_INLINE_LAMBDA {
                    multiply_step<BITS, step>(
                        [&](auto i)
                            MMQ_INLINE_LAMBDA { return sources[i].template codes<step>(unit).part[0]; },
                        codes + step * STREAMS * kStepColumns, sums);
                });
                grain += kGrains;
            }
        } else {
            const int first = static_cast<int>(grain++ % kGrains) * kGrainSteps;
            each_number<kGrainSteps>([&](auto s) MMQ_INLINE_LAMBDA {
                multiply_step<BITS, s>(
                    [&](auto i) MMQ_INLINE_LAMBDA {
                        return codes_of_any_step<BITS>(sources[i].words + unit * (BITS * kTileRows),
                                                       first + s);
                    },
                    codes + s * STREAMS * kStepColumns, sums);
            });
        }
    }
}
