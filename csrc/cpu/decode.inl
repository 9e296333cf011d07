// Reading a weight of the cpu layout, 16 rows x 8 columns at a time. Included inside an anonymous namespace,
// after unroll.h, a register of 16 rows (vec_*.h) and a way to make codes of its words (codes_by_*.h).

// The words of one tile of 16 rows.
template <int BITS>
struct Tile {
    const int32_t* words;

    Tile(const Weight& w, int64_t tile) : words(w.words + tile * row_words(w.k, BITS) * kTileRows) {}
};

constexpr int64_t kFetchAhead = 8 * 1024;  // bytes

// Asks for the bytes `ahead` of an address, before they are needed: the products between two loads fill the window in which
// a CPU looks ahead by itself, and its own prefetchers stop at every page. Harmless past the end.
template <int LINES>
MMQ_INLINE void fetch(const void* from, int64_t ahead) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(ahead);
    each_number<LINES>(
        [&](auto i) MMQ_INLINE_LAMBDA { __builtin_prefetch(reinterpret_cast<const void*>(at + 64 * i)); });
}

template <int BITS>
MMQ_INLINE void fetch_unit(const int32_t* unit) {
    fetch<BITS>(unit, kFetchAhead);
}

// The words of a grain, shifted so that the field of its first column is in the lowest bits of each plane's.
template <int BITS>
struct Grain {
    static constexpr Planes kPlanes = planes_of(BITS);
    I16 word[kMaxPlanes];

    // Grain 0 .. 3 of a unit.
    MMQ_INLINE Grain(const int32_t* unit, int grain) {
        const int step = grain * (kGrainColumns / kStepColumns);
        if constexpr (BITS == 8) {
            word[0] = centre_bytes(load_words(unit + step * kTileRows));
            word[1] = centre_bytes(load_words(unit + (step + 1) * kTileRows));
        } else {
#pragma GCC unroll 3
            for (int p = 0; p < kPlanes.count; ++p) {
                const int along = kPlanes.width[p] * step;
                word[p] = load_words(unit + (kPlanes.low[p] + along / 8) * kTileRows);
                if (kPlanes.width[p] < 4) word[p] = shift_right(word[p], along % 8);
            }
        }
    }

    // q - 2^(BITS-1) of column c
    MMQ_INLINE F16 centred(int c) const {
        if constexpr (BITS == 8) {
            return to_float(signed_byte(word[c / kStepColumns], c % kStepColumns));
        } else {
            return centred_code<BITS>(word, c);
        }
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

// Scale and zero - 2^(BITS-1) of 16 rows.
struct Grid {
    F16 scale, zero;
};

// Where a tile has its grids: group after group, read as the words are, front to back.
inline int64_t scale_at(const Weight& w, int64_t tile, int64_t group) {
    return (tile * w.groups + group) * kTileRows;
}

// 16 zero points of BITS bits are 2 * BITS whole bytes: a group's begin at a byte.
template <int BITS>
inline const uint8_t* zeros_at(const Weight& w, int64_t tile, int64_t group) {
    const int32_t* row = w.zero + tile * stream_words(w.groups * kTileRows, BITS);
    return reinterpret_cast<const uint8_t*>(row) + 2 * BITS * group;
}

template <int BITS>
inline F16 load_zeros(const Weight& w, int64_t tile, int64_t group) {
    return load_stream<BITS>(zeros_at<BITS>(w, tile, group));
}

// Asks for the grid that the next tile has for the group. Grids are a trickle beside the words, too thin for a CPU to see
// where it leads.
template <int BITS>
MMQ_INLINE void fetch_grid(const Weight& w, int64_t tile, int64_t group) {
    const int64_t itemsize = w.scale_dtype == Dtype::kFloat32 ? 4 : 2;
    fetch<1>(w.scale, scale_at(w, tile + 1, group) * itemsize);
    if (w.zero != nullptr) fetch<1>(zeros_at<BITS>(w, tile + 1, group), 0);
}

template <int BITS>
inline Grid load_grid(const Weight& w, int64_t tile, int64_t group) {
    fetch_grid<BITS>(w, tile, group);
    Grid grid;
    grid.scale = load_any(w.scale, w.scale_dtype, scale_at(w, tile, group));
    grid.zero = set1(0.0f);
    if (w.zero != nullptr) {
        grid.zero = sub(load_zeros<BITS>(w, tile, group), set1(static_cast<float>(middle_code(BITS))));
    }
    return grid;
}

// Columns [begin, end) of a tile -> panel [end - begin, 16], scale * (q - zero); begin is a multiple of 8.
// The panel has room for whole grains.
template <int BITS>
void decode_panel(const Weight& w, int64_t tile_index, int64_t begin, int64_t end, float* panel) {
    const Tile<BITS> tile(w, tile_index);
    for (int64_t column = begin; column < end;) {
        const int64_t group = column / w.group_size;
        const int64_t stop = std::min(end, (group + 1) * w.group_size);
        const Grid grid = load_grid<BITS>(w, tile_index, group);
        for (; column < stop; column += kGrainColumns) {
            const int32_t* unit = tile.words + column / kUnitColumns * (BITS * kTileRows);
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
