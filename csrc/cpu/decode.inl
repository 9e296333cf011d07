// Reading a weight of the cpu layout, 16 rows x 8 columns at a time. Included inside an anonymous namespace,
// after a register of 16 rows (vec_*.h) and a way to make codes of its words (codes_by_*.h).

// Where the planes of one tile of 16 rows begin.
template <int BITS>
struct Tile {
    static constexpr Planes kPlanes = planes_of(BITS);
    const int32_t* plane[kMaxPlanes] = {};
    int64_t last_word;  // of the first plane

    Tile(const Weight& w, int64_t tile) : last_word(plane_words(w.k, kPlanes.width[0]) - 1) {
        const int32_t* words = w.words + tile * word_rows(w.k, BITS) * kTileRows;
        for (int p = 0; p < kPlanes.count; ++p) {
            plane[p] = words;
            words += plane_words(w.k, kPlanes.width[p]) * kTileRows;
        }
    }
};

// The words of 8 columns, shifted so that each plane's first field is in its lowest bits.
template <int BITS>
struct Unit {
    I16 word[kMaxPlanes];

    Unit(const Tile<BITS>& tile, int64_t unit) {
        if constexpr (BITS == 8) {
            // The second word of the last unit may lie beyond the row: any word will do, it goes unused.
            const int64_t second = std::min(2 * unit + 1, tile.last_word);
            word[0] = centre_bytes(load_words(tile.plane[0] + 2 * unit * kTileRows));
            word[1] = centre_bytes(load_words(tile.plane[0] + second * kTileRows));
        } else {
#pragma GCC unroll 3
            for (int p = 0; p < Tile<BITS>::kPlanes.count; ++p) {
                const int64_t bit = unit * kUnitColumns * Tile<BITS>::kPlanes.width[p];
                word[p] = load_words(tile.plane[p] + bit / 32 * kTileRows);
                if (Tile<BITS>::kPlanes.width[p] < 4)
                    word[p] = shift_right(word[p], static_cast<int>(bit % 32));
            }
        }
    }

    // q - 2^(BITS-1) of column c
    F16 centred(int c) const {
        if constexpr (BITS == 8) {
            return to_float(signed_byte(word[c / 4], c % 4));
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

template <int BITS>
inline Grid load_grid(const Weight& w, int64_t tile, int64_t group) {
    const int64_t rows = tiles_of(w.n) * kTileRows;
    Grid grid;
    grid.scale = load_any(w.scale, w.scale_dtype, group * rows + tile * kTileRows);
    grid.zero = set1(0.0f);
    if (w.zero != nullptr) {
        // 16 zero points of BITS bits are 2 * BITS whole bytes: a tile's begin at a byte.
        const int32_t* row = w.zero + group * stream_words(rows, BITS);
        const F16 zero = load_stream<BITS>(reinterpret_cast<const uint8_t*>(row) + 2 * BITS * tile);
        grid.zero = sub(zero, set1(static_cast<float>(middle_code(BITS))));
    }
    return grid;
}

// Columns [begin, end) of a tile -> panel [end - begin, 16], scale * (q - zero); begin is a multiple of 8.
// The panel has room for whole units.
template <int BITS>
void decode_panel(const Weight& w, int64_t tile_index, int64_t begin, int64_t end, float* panel) {
    const Tile<BITS> tile(w, tile_index);
    for (int64_t column = begin; column < end;) {
        const int64_t group = column / w.group_size;
        const int64_t stop = std::min(end, (group + 1) * w.group_size);
        const Grid grid = load_grid<BITS>(w, tile_index, group);
        for (; column < stop; column += kUnitColumns) {
            const Unit<BITS> unit(tile, column / kUnitColumns);
#pragma GCC unroll 8
            for (int c = 0; c < kUnitColumns; ++c) {
                store(panel, mul(grid.scale, sub(unit.centred(c), grid.zero)));
                panel += kTileRows;
            }
        }
        column = stop;
    }
}
