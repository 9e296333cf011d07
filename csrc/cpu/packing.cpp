// Bit streams of codes, and their split into planes tiled by 16 rows.
//
//   stream   int32 [n, ceil(k*bits/32)]     pack / unpack      codes uint8 [n, k]
//   cpu      int32 [ceil(n/16), ceil(k/32), bits, 16]     prepack / unprepack     stream
//
// A thread owns whole rows (pack, unpack) or whole tiles of 16 rows (prepack, unprepack). Both directions go
// through the codes of one row, so that only two facts are coded: where a code lies in a stream, and where in
// the planes.
#include "packing.h"

#include <cstring>
#include <memory>

#include "../common/layout.h"
#include "parallel.h"

namespace mmq {
namespace {

constexpr int64_t kRowsAtOnce = 16;

void pack_row(const uint8_t* codes, int64_t k, int bits, int32_t* words) {
    uint64_t window = 0;
    int filled = 0;
    for (int64_t i = 0; i < k; ++i) {
        window |= static_cast<uint64_t>(codes[i]) << filled;
        filled += bits;
        if (filled >= 32) {
            *words++ = static_cast<int32_t>(window);
            window >>= 32;
            filled -= 32;
        }
    }
    if (filled > 0) *words = static_cast<int32_t>(window);
}

void unpack_row(const int32_t* words, int64_t k, int bits, uint8_t* codes) {
    const uint64_t mask = (1u << bits) - 1;
    uint64_t window = 0;
    int filled = 0;
    for (int64_t i = 0; i < k; ++i) {
        if (filled < bits) {
            window |= static_cast<uint64_t>(static_cast<uint32_t>(*words++)) << filled;
            filled += 32;
        }
        codes[i] = static_cast<uint8_t>(window & mask);
        window >>= bits;
        filled -= bits;
    }
}

// Codes of one row, padded with zeros to whole units -> column `lane` of a tile.
template <int BITS>
void write_units(const uint8_t* codes, int64_t units, int32_t* tile) {
    constexpr Planes kPlanes = planes_of(BITS);
    for (int64_t unit = 0; unit < units; ++unit, codes += kUnitColumns, tile += BITS * kTileRows) {
        uint32_t words[BITS] = {};
        for (int p = 0; p < kPlanes.count; ++p) {
            const int width = kPlanes.width[p], low = kPlanes.low[p];
            for (int column = 0; column < kUnitColumns; ++column) {
                const int along =
                    width * (column / kStepColumns);  // bits that the steps before take of each byte
                const uint32_t field = (codes[column] >> low) & ((1u << width) - 1);
                words[low + along / 8] |= field << (8 * (column % kStepColumns) + along % 8);
            }
        }
        for (int w = 0; w < BITS; ++w) tile[w * kTileRows] = static_cast<int32_t>(words[w]);
    }
}

template <int BITS>
void read_units(const int32_t* tile, int64_t units, uint8_t* codes) {
    constexpr Planes kPlanes = planes_of(BITS);
    for (int64_t unit = 0; unit < units; ++unit, codes += kUnitColumns, tile += BITS * kTileRows) {
        for (int column = 0; column < kUnitColumns; ++column) {
            uint32_t code = 0;
            for (int p = 0; p < kPlanes.count; ++p) {
                const int width = kPlanes.width[p], low = kPlanes.low[p];
                const int along = width * (column / kStepColumns);
                const uint32_t word = static_cast<uint32_t>(tile[(low + along / 8) * kTileRows]);
                code |= ((word >> (8 * (column % kStepColumns) + along % 8)) & ((1u << width) - 1)) << low;
            }
            codes[column] = static_cast<uint8_t>(code);
        }
    }
}

using WriteUnits = void (*)(const uint8_t*, int64_t, int32_t*);
using ReadUnits = void (*)(const int32_t*, int64_t, uint8_t*);
constexpr WriteUnits kWriteUnits[] = {write_units<2>, write_units<3>, write_units<4>, write_units<5>,
                                      write_units<6>, write_units<7>, write_units<8>};
constexpr ReadUnits kReadUnits[] = {read_units<2>, read_units<3>, read_units<4>, read_units<5>,
                                    read_units<6>, read_units<7>, read_units<8>};

// One row of codes per thread of the loop that follows, allocated here because a loop body must not throw.
class RowBuffers {
  public:
    RowBuffers(int64_t k, int64_t count)
        : stride_(units_of(k) * kUnitColumns),
          codes_(new uint8_t[static_cast<size_t>(stride_ * count) + 1]()) {}

    uint8_t* row(int64_t i) const { return codes_.get() + i * stride_; }
    int64_t bytes() const { return stride_; }

  private:
    int64_t stride_;
    std::unique_ptr<uint8_t[]> codes_;
};

}  // namespace

void pack(const PackArgs& args, const uint8_t* codes, int32_t* words) {
    const int64_t stream = stream_words(args.k, args.bits);
    parallel_for(args.threads, args.n, kRowsAtOnce, [&](int64_t row) {
        pack_row(codes + row * args.k, args.k, args.bits, words + row * stream);
    });
}

void unpack(const PackArgs& args, const int32_t* words, uint8_t* codes) {
    const int64_t stream = stream_words(args.k, args.bits);
    parallel_for(args.threads, args.n, kRowsAtOnce, [&](int64_t row) {
        unpack_row(words + row * stream, args.k, args.bits, codes + row * args.k);
    });
}

void prepack(const PackArgs& args, const int32_t* words, int32_t* tiles) {
    const int64_t stream = stream_words(args.k, args.bits);
    const int64_t tile_words = row_words(args.k, args.bits) * kTileRows, units = units_of(args.k);
    const int64_t blocks = args.threads, count = tiles_of(args.n);
    const RowBuffers buffers(args.k, blocks);
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        uint8_t* codes = buffers.row(block);
        for (int64_t tile = count * block / blocks; tile < count * (block + 1) / blocks; ++tile) {
            int32_t* out = tiles + tile * tile_words;
            for (int64_t lane = 0; lane < kTileRows; ++lane) {
                const int64_t row = tile * kTileRows + lane;
                if (row < args.n) {
                    unpack_row(words + row * stream, args.k, args.bits, codes);
                } else {
                    std::memset(codes, 0, static_cast<size_t>(buffers.bytes()));
                }
                kWriteUnits[args.bits - 2](codes, units, out + lane);
            }
        }
    });
}

void unprepack(const PackArgs& args, const int32_t* tiles, int32_t* words) {
    const int64_t stream = stream_words(args.k, args.bits);
    const int64_t tile_words = row_words(args.k, args.bits) * kTileRows, units = units_of(args.k);
    const int64_t blocks = args.threads;
    const RowBuffers buffers(args.k, blocks);
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        uint8_t* codes = buffers.row(block);
        for (int64_t row = args.n * block / blocks; row < args.n * (block + 1) / blocks; ++row) {
            kReadUnits[args.bits - 2](tiles + row / kTileRows * tile_words + row % kTileRows, units, codes);
            pack_row(codes, args.k, args.bits, words + row * stream);
        }
    });
}

}  // namespace mmq
