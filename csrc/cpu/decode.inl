// Reading a weight of the cpu layout, 16 rows x 8 columns at a time. Included inside an anonymous namespace,
// after unroll.h, a register of 16 rows (vec_*.h) and a way to make codes of its words (codes_by_*.h).

// The words of one tile of 16 rows.
template <int BITS>
struct Tile {
    const int32_t* words;

    Tile(const Weight& w, int64_t tile) : words(w.words + tile * row_words(w.k, BITS) * kTileRows) {}
};

constexpr int64_t kFetchAhead = 8 * 1024;  // bytes

// How long what is asked for is to stay, in the words of __builtin_prefetch. kOnce: it need not take the place in level 2 of
// what the next call reads before its kernel runs. kLater: other things are worked on before.
enum Stay { kOnce = 0, kLater = 2 };

// Asks for the bytes `ahead` of an address, before they are needed: the products between two loads fill the window in which
// a CPU looks ahead by itself, and its own prefetchers stop at every page. Harmless past the end.
template <int LINES, Stay STAY = kOnce>
MMQ_INLINE void fetch(const void* from, int64_t ahead) {
    constexpr int kToRead = 0;
    const uintptr_t at = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead);
    each_number<LINES>([&](auto i) MMQ_INLINE_LAMBDA {
        __builtin_prefetch(reinterpret_cast<const void*>(at + 64 * i), kToRead, STAY);
    });
}

template <int BITS>
MMQ_INLINE void fetch_unit(const int32_t* unit) {
    fetch<BITS>(unit, kFetchAhead);
}

// The codes of a grain. Of one plane below 8 bits: its word, shifted so that the field of the first column is lowest. Else the
// planes put together, a word for each step: a column's byte has the code in its highest bits, less the middle one.
template <int BITS>
struct Grain {
    static constexpr Planes kPlanes = planes_of(BITS);
    static constexpr bool kBytes = kPlanes.count > 1 || BITS == 8;
    I16 word[kBytes ? 2 : 1];

    // Grain 0 .. 3 of a unit.
    MMQ_INLINE Grain(const int32_t* unit, int grain) {
        const int step = grain * (kGrainColumns / kStepColumns);
        if constexpr (kBytes) {
            word[0] = bytes(unit, step);
            word[1] = bytes(unit, step + 1);
        } else {
            const int along = BITS * step;
            word[0] = load_words(unit + along / 8 * kTileRows);
            if (BITS < 4) word[0] = shift_right(word[0], along % 8);
        }
    }

    // q - 2^(BITS-1) of column c
    MMQ_INLINE F16 centred(int c) const {
        if constexpr (kBytes) {
            return to_float(top_of_byte<BITS>(word[c / kStepColumns], c % kStepColumns));
        } else {
            return centred_code<BITS>(word[0], c);
        }
    }

  private:
    static MMQ_INLINE I16 bytes(const int32_t* unit, int step) {
        I16 all;
        each_number<kPlanes.count>([&](auto p) MMQ_INLINE_LAMBDA {
            constexpr int kWidth = kPlanes.width[p], kTo = 8 - BITS + kPlanes.low[p];
            const int along = kWidth * step;
            I16 field = load_words(unit + (kPlanes.low[p] + along / 8) * kTileRows);
            if (BITS < 8) {
                const int left = kTo - along % 8;
                field = left < 0 ? shift_right(field, -left) : shift_left(field, left);
                field = mask(field, static_cast<int32_t>(0x01010101u * ((1u << kWidth) - 1) << kTo));
            }
            all = p == 0 ? field : either(all, field);
        });
        return centre_bytes(all);
    }
};

inline F16 load_any(const void* from, Dtype dtype, int64_t offset) {
    switch (dtype) {
        case Dtype::kFloat16:
            return load_fp16(static_cast<const uint16_t*>(from) + offset);
        case Dtype::kBFloat16:
            return load_bf16(static_cast<const uint16_t*>(from) + offset);
        default:
            return load(static_cast<const float*>(from) + offset);
    }
}

// Of 16 rows the scale, and the zero less what codes are less: by default 2^(BITS-1).
struct Grid {
    F16 scale, zero;
};

// The grids of one tile: group after group, read as the words are, front to back.
template <int BITS>
class TileGrids {
  public:
    MMQ_INLINE TileGrids(const Weight& w, int64_t tile)
        : dtype_(w.scale_dtype), scales_(bytes(w.scale)), zeros_(bytes(w.zero)) {
        row_scales_ = w.groups * scale_bytes();
        row_zeros_ = stream_words(w.groups * kTileRows, BITS) * static_cast<int64_t>(sizeof(int32_t));
        scales_ += tile * row_scales_;
        if (zeros_ != nullptr) zeros_ += tile * row_zeros_;
    }

    MMQ_INLINE bool symmetric() const { return zeros_ == nullptr; }

    MMQ_INLINE F16 scale(int64_t group) const { return load_any(scales_ + group * scale_bytes(), dtype_, 0); }

    MMQ_INLINE F16 zero_codes(int64_t group) const { return load_stream<BITS>(zeros_ + group * kGroupZeros); }

    // Asks for the grid that the next tile has for the group. Grids are a trickle beside the words, too thin for a CPU to
    // see where it leads.
    MMQ_INLINE void fetch_next(int64_t group) const {
        fetch<1>(scales_, row_scales_ + group * scale_bytes());
        if (!symmetric()) fetch<1>(zeros_, row_zeros_ + group * kGroupZeros);
    }

    // For codes q - centre: without zeros, centre is the middle.
    MMQ_INLINE Grid load(int64_t group, int centre = middle_code(BITS)) const {
        fetch_next(group);
        const F16 less = set1(static_cast<float>(centre));
        return {scale(group), symmetric() ? set1(0.0f) : sub(zero_codes(group), less)};
    }

  private:
    static constexpr int64_t kGroupZeros = 2 * BITS;  // bytes of 16 codes: a group's begin at a byte

    static const uint8_t* bytes(const void* from) { return static_cast<const uint8_t*>(from); }
    MMQ_INLINE int64_t scale_bytes() const { return kTileRows * (dtype_ == Dtype::kFloat32 ? 4 : 2); }

    Dtype dtype_;
    const uint8_t *scales_, *zeros_;
    int64_t row_scales_, row_zeros_;  // bytes from a tile's to the next one's
};

// Columns [begin, end) of a tile -> panel [end - begin, 16], scale * (q - zero); begin is a multiple of 8.
// The panel has room for whole grains. Asks for the words of as many columns behind them.
template <int BITS>
void decode_panel(const Weight& w, int64_t tile_index, int64_t begin, int64_t end, float* panel) {
    const Tile<BITS> tile(w, tile_index);
    const TileGrids<BITS> grids(w, tile_index);
    const int64_t ahead = units_of(end - begin) * BITS * kTileRows * static_cast<int64_t>(sizeof(int32_t));
    for (int64_t column = begin; column < end;) {
        const int64_t group = column / w.group_size;
        const int64_t stop = std::min(end, (group + 1) * w.group_size);
        const Grid grid = grids.load(group);
        for (; column < stop; column += kGrainColumns) {
            const int32_t* unit = tile.words + column / kUnitColumns * (BITS * kTileRows);
            if (column % kUnitColumns == 0) fetch<BITS, kLater>(unit, ahead);
            const Grain<BITS> grain(unit, static_cast<int>(column % kUnitColumns) / kGrainColumns);
#pragma GCC unroll 8
            for (int c = 0; c < kGrainColumns; ++c) {
                store(panel, mul(grid.scale, sub(grain.centred(c), grid.zero)));
                panel += kTileRows;
            }
        }
        column = stop;
    }
}
