// Round to nearest, and one block of columns of GPTQ. For the inside of an anonymous namespace, after
// a register of 16 rows (vec_*.h) and common/grid.inl.
//
//   GPTQ, column j    e_j = (w_j - scale * (q_j - zero)) / hinv[j, j];   w_i -= e_j * hinv[j, i] for i > j
//   (Frantar et al., arXiv 2210.17323, algorithm 1; hinv is the upper Cholesky factor of the inverse Hessian)
//
// One fp32 operation at a time, as in common/grid.inl; the loops over 16 lanes are left to the compiler where they are
// not many.

// --- round to nearest ---

// Extremes of one group of a row, 0 included: 16 at a time, because the order of minima does not matter.
void find_range(const float* w, int64_t count, float* low, float* high) {
    float lows[16] = {}, highs[16] = {};
    int64_t i = 0;
    for (; i + 16 <= count; i += 16) {
        for (int lane = 0; lane < 16; ++lane) {
            lows[lane] = w[i + lane] < lows[lane] ? w[i + lane] : lows[lane];
            highs[lane] = w[i + lane] > highs[lane] ? w[i + lane] : highs[lane];
        }
    }
    for (; i < count; ++i) {
        lows[0] = std::min(lows[0], w[i]);
        highs[0] = std::max(highs[0], w[i]);
    }
    *low = *std::min_element(lows, lows + 16);
    *high = *std::max_element(highs, highs + 16);
}

void encode_row(const float* w, int64_t count, float scale, float zero, float max_code, uint8_t* codes) {
    for (int64_t i = 0; i < count; ++i)
        codes[i] = static_cast<uint8_t>(static_cast<int>(encode(w[i], scale, zero, max_code)));
}

void rtn(const RtnArgs& args) {
    const GridRule rule(args);
    const int64_t groups = ceil_div(args.k, args.group_size);
    // A row of half precision is widened once per thread's block of rows.
    const int64_t blocks = std::min<int64_t>(args.n, 4 * args.threads);
    const bool widen = args.dtype != Dtype::kFloat32;
    const AlignedFloats rows(widen ? blocks * args.k : 0);
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        for (int64_t n = args.n * block / blocks; n < args.n * (block + 1) / blocks; ++n) {
            const float* w = static_cast<const float*>(args.weight) + (widen ? 0 : n * args.k);
            if (widen) {
                load_row(args.weight, args.dtype, n * args.k, args.k, rows.data() + block * args.k);
                w = rows.data() + block * args.k;
            }
            for (int64_t g = 0; g < groups; ++g) {
                const int64_t begin = g * args.group_size, count = std::min(args.group_size, args.k - begin);
                float low, high, scale, zero;
                find_range(w + begin, count, &low, &high);
                rule.find(low, high, &scale, &zero);
                args.scale[n * groups + g] = scale;
                args.zero[n * groups + g] = static_cast<uint8_t>(zero);
                encode_row(w + begin, count, scale, zero, rule.max_code, args.codes + n * args.k + begin);
            }
        }
    });
}

// --- GPTQ ---

// 16 rows of the block, transposed: w[column][lane]; lanes past n repeat nothing and are never stored.
struct RowTile {
    float scale[kTileRows], zero[kTileRows];
    int64_t first, count;
    float* w;
};

void load_rows(const GptqArgs& args, const RowTile& tile) {
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
        if (lane >= tile.count) {
            for (int64_t j = 0; j < args.columns; ++j) tile.w[j * kTileRows + lane] = 0.0f;
            continue;
        }
        const float* row = args.weight + (tile.first + lane) * args.weight_stride;
        for (int64_t j = 0; j < args.columns; ++j) tile.w[j * kTileRows + lane] = row[j];
    }
}

// The grid of a group from its columns as they stand now, or the one given.
void enter_group(const GptqArgs& args, const GridRule& rule, int64_t group, RowTile& tile) {
    const int64_t groups = ceil_div(args.columns, args.group_size);
    const int64_t begin = group * args.group_size, end = std::min(args.columns, begin + args.group_size);
    if (!args.search) {
        for (int64_t lane = 0; lane < kTileRows; ++lane) {
            const int64_t at = (tile.first + std::min(lane, tile.count - 1)) * groups + group;
            tile.scale[lane] = args.scale[at];
            tile.zero[lane] = static_cast<float>(args.zero[at]);
        }
        return;
    }
    float low[kTileRows] = {}, high[kTileRows] = {};
    for (int64_t j = begin; j < end; ++j) {
        const float* w = tile.w + j * kTileRows;
        for (int lane = 0; lane < kTileRows; ++lane) {
            low[lane] = w[lane] < low[lane] ? w[lane] : low[lane];
            high[lane] = w[lane] > high[lane] ? w[lane] : high[lane];
        }
    }
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
        rule.find(low[lane], high[lane], &tile.scale[lane], &tile.zero[lane]);
        if (lane >= tile.count) continue;
        args.scale[(tile.first + lane) * groups + group] = tile.scale[lane];
        args.zero[(tile.first + lane) * groups + group] = static_cast<uint8_t>(tile.zero[lane]);
    }
}

// Columns that are quantized before their errors are carried on, all in one pass over the columns to the right.
constexpr int64_t kColumnsAtOnce = 4;
static_assert(kUnitColumns % kColumnsAtOnce == 0,
              "a group begins where the errors of all columns are carried on");

// Columns [begin, end) to the right of columns first, first + 1, .. get their COUNT errors, one after another.
template <int COUNT>
void spread_errors(const GptqArgs& args, const RowTile& tile, int64_t first, int64_t begin, int64_t end) {
    F16 error[COUNT];
    const float* hinv[COUNT];
    for (int c = 0; c < COUNT; ++c) {
        error[c] = load(tile.w + (first + c) * kTileRows);
        hinv[c] = args.hinv + (first + c) * args.hinv_stride;
    }
    for (int64_t i = begin; i < end; ++i) {
        F16 right = load(tile.w + i * kTileRows);
#pragma GCC unroll 4
        for (int c = 0; c < COUNT; ++c) right = sub(right, mul(error[c], set1(hinv[c][i])));
        store(tile.w + i * kTileRows, right);
    }
}

// Quantizes column j and leaves its error in its place.
void quantize_column(const GptqArgs& args, const GridRule& rule, const RowTile& tile, int64_t j,
                     uint8_t* codes) {
    const float diagonal = args.hinv[j * args.hinv_stride + j];
    float* w = tile.w + j * kTileRows;
    for (int lane = 0; lane < kTileRows; ++lane) {
        const float code = encode(w[lane], tile.scale[lane], tile.zero[lane], rule.max_code);
        codes[lane] = static_cast<uint8_t>(static_cast<int>(code));
        const float product = tile.scale[lane] * (code - tile.zero[lane]);
        w[lane] = (w[lane] - product) / diagonal;
    }
}

void quantize_tile(const GptqArgs& args, const GridRule& rule, RowTile& tile, uint8_t* codes) {
    for (int64_t first = 0; first < args.columns; first += kColumnsAtOnce) {
        if (first % args.group_size == 0) enter_group(args, rule, first / args.group_size, tile);
        const int64_t next = std::min(args.columns, first + kColumnsAtOnce);
        for (int64_t j = first; j < next; ++j) {
            quantize_column(args, rule, tile, j, codes + j * kTileRows);
            spread_errors<1>(args, tile, j, j + 1, next);
        }
        if (next < args.columns) spread_errors<kColumnsAtOnce>(args, tile, first, next, args.columns);
    }
}

void gptq(const GptqArgs& args) {
    const GridRule rule(args);
    const int64_t tiles = tiles_of(args.n), blocks = std::min<int64_t>(tiles, 4 * args.threads);
    const AlignedFloats buffers(blocks * args.columns * kTileRows);
    std::vector<uint8_t> code_buffers(static_cast<size_t>(blocks * args.columns * kTileRows));
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        RowTile tile;
        tile.w = buffers.data() + block * args.columns * kTileRows;
        uint8_t* codes = code_buffers.data() + block * args.columns * kTileRows;
        for (int64_t i = tiles * block / blocks; i < tiles * (block + 1) / blocks; ++i) {
            tile.first = i * kTileRows;
            tile.count = std::min<int64_t>(kTileRows, args.n - tile.first);
            load_rows(args, tile);
            quantize_tile(args, rule, tile, codes);
            for (int64_t lane = 0; lane < tile.count; ++lane) {
                const int64_t row = (tile.first + lane) * args.columns;
                for (int64_t j = 0; j < args.columns; ++j) {
                    args.codes[row + j] = codes[j * kTileRows + lane];
                    args.error[row + j] = tile.w[j * kTileRows + lane];
                }
            }
        }
    });
}
