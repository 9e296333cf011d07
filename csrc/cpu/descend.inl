// Searching for a group's grid, and descent on its scale, zero point and codes. For the inside of an anonymous namespace,
// after quantize.inl. Rows do not depend on each other: 16 of them side by side, as in gptq_block.
//
//   search    scale, zero = argmin over shares p of  sum_j importance_j * (w_j - scale_p * (q_j - zero_p))^2
//             on the min-max grid of [p * low, p * high]
//   descend   of the error d H d^T, d = w^ - w, given its gradient g = d H on the group's columns; v = q - zero
//             scale    s' = round_to(s - (g . v) / (v H v))                              where that helps
//             zero     one up, then one down, codes kept                                 where that helps
//             code j   nearest to w^_j - g_j / H_jj, then g_i += moved_j * H_ji for i > j
//
// Steps and the order of sums are those of common/descent.inl: all instruction sets and GPUs agree bit for bit. Lanes are
// vectorized by order: left to itself, GCC unrolls them into scalars first, which takes seven times as long.

// A sum over columns, of 16 rows: see common/descent.inl.
struct ColumnSum {
    float part[kSumParts][kTileRows] = {};

    float* of(int64_t column) { return part[column % kSumParts]; }
    void total(float* out) const {
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane)
            out[lane] = (part[0][lane] + part[1][lane]) + (part[2][lane] + part[3][lane]);
    }
};

// --- search ---

struct Grids {
    float share[kTileRows], scale[kTileRows], zero[kTileRows], lost[kTileRows];
};

// What the shares in `tried` of the range cost.
void try_shares(const SearchArgs& args, const GridRule& rule, const float* w, const float* low,
                const float* high, Grids& tried) {
#pragma omp simd
    for (int lane = 0; lane < kTileRows; ++lane) {
        const float share = tried.share[lane];
        rule.find(low[lane] * share, high[lane] * share, &tried.scale[lane], &tried.zero[lane]);
    }
    ColumnSum lost;
    for (int64_t j = 0; j < args.columns; ++j, w += kTileRows) {
        const float importance = args.importance[j];
        float* sum = lost.of(j);
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane)
            sum[lane] += grid_error(w[lane], importance, tried.scale[lane], tried.zero[lane], rule.max_code);
    }
    lost.total(tried.lost);
}

void keep_better(const Grids& tried, Grids& best) {
#pragma omp simd
    for (int lane = 0; lane < kTileRows; ++lane) {
        if (!(tried.lost[lane] < best.lost[lane])) continue;
        best.share[lane] = tried.share[lane];
        best.scale[lane] = tried.scale[lane];
        best.zero[lane] = tried.zero[lane];
        best.lost[lane] = tried.lost[lane];
    }
}

// `count` rows of a matrix, transposed: to[column][lane]; lanes past `count` are zero.
void load_tile(const float* from, int64_t stride, int64_t count, int64_t columns, float* to) {
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const float* row = from + lane * stride;
        for (int64_t j = 0; j < columns; ++j) to[j * kTileRows + lane] = lane < count ? row[j] : 0.0f;
    }
}

void search_tile(const SearchArgs& args, const GridRule& rule, int64_t first, float* w) {
    const int64_t count = std::min<int64_t>(kTileRows, args.n - first);
    load_tile(args.weight + first * args.weight_stride, args.weight_stride, count, args.columns, w);
    float low[kTileRows] = {}, high[kTileRows] = {};
    for (int64_t j = 0; j < args.columns; ++j) {
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane) {
            const float value = w[j * kTileRows + lane];
            low[lane] = value < low[lane] ? value : low[lane];
            high[lane] = value > high[lane] ? value : high[lane];
        }
    }
    Grids best, tried;
    std::fill_n(best.share, kTileRows, coarse_share(0));
    try_shares(args, rule, w, low, high, best);
    for (int i = 1; i < kCoarseShares; ++i) {
        std::fill_n(tried.share, kTileRows, coarse_share(i));
        try_shares(args, rule, w, low, high, tried);
        keep_better(tried, best);
    }
    for (int i = 0; i < kFineSteps; ++i) {
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane) tried.share[lane] = fine_share(i, best.share[lane]);
        try_shares(args, rule, w, low, high, tried);
        keep_better(tried, best);
    }
    for (int64_t lane = 0; lane < count; ++lane) {
        args.scale[first + lane] = best.scale[lane];
        args.zero[first + lane] = static_cast<uint8_t>(best.zero[lane]);
    }
}

void search(const SearchArgs& args) {
    const GridRule rule(args);
    const int64_t tiles = tiles_of(args.n), blocks = std::min<int64_t>(tiles, 4 * args.threads);
    const AlignedFloats buffers(blocks * args.columns * kTileRows);
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        float* w = buffers.data() + block * args.columns * kTileRows;
        for (int64_t i = tiles * block / blocks; i < tiles * (block + 1) / blocks; ++i)
            search_tile(args, rule, i * kTileRows, w);
    });
}

// --- descent ---

// 16 rows of a group on their way: gradient, centred codes v = q - zero, and room for v H, [column][lane] each.
struct DescentTile {
    float *gradient, *centred, *along;
    float scale[kTileRows], zero[kTileRows], gained[kTileRows];
};

// along = v H. Four columns at a time, so that their sums stay in registers; H is symmetric, so its rows are read.
[[gnu::noinline]] void multiply_by_hessian(const DescendArgs& args, DescentTile& tile) {
    for (int64_t c = 0; c < args.columns; c += 4) {
        const int64_t last = args.columns - 1;
        const float* h0 = args.hessian + c * args.hessian_stride;
        const float* h1 = args.hessian + std::min(c + 1, last) * args.hessian_stride;
        const float* h2 = args.hessian + std::min(c + 2, last) * args.hessian_stride;
        const float* h3 = args.hessian + std::min(c + 3, last) * args.hessian_stride;
        float s0[kTileRows] = {}, s1[kTileRows] = {}, s2[kTileRows] = {}, s3[kTileRows] = {};
        for (int64_t i = 0; i < args.columns; ++i) {
            const float* v = tile.centred + i * kTileRows;
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) s0[lane] += v[lane] * h0[i];
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) s1[lane] += v[lane] * h1[i];
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) s2[lane] += v[lane] * h2[i];
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) s3[lane] += v[lane] * h3[i];
        }
        const float* sums[] = {s0, s1, s2, s3};
        for (int64_t at = c; at < std::min(c + 4, args.columns); ++at)
            std::memcpy(tile.along + at * kTileRows, sums[at - c], sizeof s0);
    }
}

[[gnu::noinline]] void move_scale(const DescendArgs& args, DescentTile& tile) {
    multiply_by_hessian(args, tile);
    ColumnSum slopes, curvatures;
    for (int64_t j = 0, at = 0; j < args.columns; ++j, at += kTileRows) {
        float *slope = slopes.of(j), *curvature = curvatures.of(j);
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane) {
            slope[lane] += tile.gradient[at + lane] * tile.centred[at + lane];
            curvature[lane] += tile.along[at + lane] * tile.centred[at + lane];
        }
    }
    float slope[kTileRows], curvature[kTileRows], step[kTileRows];
    slopes.total(slope);
    curvatures.total(curvature);
#pragma omp simd
    for (int lane = 0; lane < kTileRows; ++lane) {
        const float scale =
            moved_scale(tile.scale[lane], slope[lane], curvature[lane], args.scale_dtype, &tile.gained[lane]);
        step[lane] = scale - tile.scale[lane];
        tile.scale[lane] = scale;
    }
    for (int64_t at = 0; at < args.columns * kTileRows; at += kTileRows)
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane)
            tile.gradient[at + lane] += step[lane] * tile.along[at + lane];
}

// sums[c] = sum_i H_ic, total = sum of them.
[[gnu::noinline]] void move_zero(const DescendArgs& args, const GridRule& rule, const float* sums,
                                 float total, DescentTile& tile) {
    for (const float step : {1.0f, -1.0f}) {
        ColumnSum slopes;
        for (int64_t j = 0; j < args.columns; ++j) {
            float* sum = slopes.of(j);
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) sum[lane] += tile.gradient[j * kTileRows + lane];
        }
        float slope[kTileRows], taken[kTileRows], shift[kTileRows];
        slopes.total(slope);
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane) {
            const float zero = moved_zero(tile.zero[lane], step, tile.scale[lane], slope[lane], total,
                                          rule.max_code, &tile.gained[lane]);
            taken[lane] = zero - tile.zero[lane];
            shift[lane] = -tile.scale[lane] * taken[lane];
            tile.zero[lane] = zero;
        }
        for (int64_t j = 0; j < args.columns; ++j) {
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) {
                tile.gradient[j * kTileRows + lane] += shift[lane] * sums[j];
                tile.centred[j * kTileRows + lane] -= taken[lane];
            }
        }
    }
}

[[gnu::noinline]] void move_codes(const DescendArgs& args, const GridRule& rule, DescentTile& tile) {
    for (int64_t j = 0; j < args.columns; ++j) {
        const float* row = args.hessian + j * args.hessian_stride;
        const float* gradient = tile.gradient + j * kTileRows;
        float* centred = tile.centred + j * kTileRows;
        float moved[kTileRows], most = 0.0f;
#pragma omp simd
        for (int lane = 0; lane < kTileRows; ++lane)
            centred[lane] = moved_code(centred[lane], gradient[lane], row[j], tile.scale[lane],
                                       tile.zero[lane], rule.max_code, &moved[lane], &tile.gained[lane]);
#pragma omp simd reduction(max : most)
        for (int lane = 0; lane < kTileRows; ++lane) most = std::max(most, std::fabs(moved[lane]));
        if (most == 0.0f) continue;
        for (int64_t i = j + 1; i < args.columns; ++i) {
            float* right = tile.gradient + i * kTileRows;
            const float factor = row[i];
#pragma omp simd
            for (int lane = 0; lane < kTileRows; ++lane) right[lane] += moved[lane] * factor;
        }
    }
}

void load_group(const DescendArgs& args, int64_t first, int64_t count, DescentTile& tile) {
    load_tile(args.gradient + first * args.gradient_stride, args.gradient_stride, count, args.columns,
              tile.gradient);
    for (int64_t lane = 0; lane < kTileRows; ++lane) {
        const int64_t row = first + std::min(lane, count - 1);
        tile.scale[lane] = args.scale[row];
        tile.zero[lane] = static_cast<float>(args.zero[row]);
        tile.gained[lane] = 0.0f;
        for (int64_t j = 0; j < args.columns; ++j)
            tile.centred[j * kTileRows + lane] =
                static_cast<float>(args.codes[row * args.columns + j]) - tile.zero[lane];
    }
}

void store_group(const DescendArgs& args, int64_t first, int64_t count, const DescentTile& tile) {
    for (int64_t lane = 0; lane < count; ++lane) {
        const int64_t row = first + lane;
        uint8_t* codes = args.codes + row * args.columns;
        float* moved = args.moved + row * args.columns;
        const float scale = args.scale[row], zero = static_cast<float>(args.zero[row]);
        for (int64_t j = 0; j < args.columns; ++j) {
            const float centred = tile.centred[j * kTileRows + lane];
            const float before = scale * (static_cast<float>(codes[j]) - zero);
            moved[j] = tile.scale[lane] * centred - before;
            codes[j] = static_cast<uint8_t>(static_cast<int>(centred + tile.zero[lane]));
        }
        args.scale[row] = tile.scale[lane];
        args.zero[row] = static_cast<uint8_t>(tile.zero[lane]);
        args.gained[row] = tile.gained[lane];
    }
}

void descend_group(const DescendArgs& args) {
    const GridRule rule(args);
    const int64_t tiles = tiles_of(args.n), blocks = std::min<int64_t>(tiles, 4 * args.threads);
    const int64_t size = args.columns * kTileRows;
    const AlignedFloats buffers(3 * blocks * size);
    std::vector<float> sums(static_cast<size_t>(args.columns), 0.0f);
    float total = 0.0f;
    for (int64_t i = 0; i < args.columns; ++i)
        for (int64_t j = 0; j < args.columns; ++j)
            sums[static_cast<size_t>(j)] += args.hessian[i * args.hessian_stride + j];
    for (const float sum : sums) total += sum;
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        float* own = buffers.data() + 3 * block * size;
        DescentTile tile;
        tile.gradient = own;
        tile.centred = own + size;
        tile.along = own + 2 * size;
        for (int64_t i = tiles * block / blocks; i < tiles * (block + 1) / blocks; ++i) {
            const int64_t first = i * kTileRows, count = std::min<int64_t>(kTileRows, args.n - first);
            load_group(args, first, count, tile);
            move_scale(args, tile);
            if (!args.symmetric) move_zero(args, rule, sums.data(), total, tile);
            move_codes(args, rule, tile);
            store_group(args, first, count, tile);
        }
    });
}
