// Bit streams of codes, and their split into planes tiled by 16 rows.
//
//   stream   int32 [n, ceil(k*bits/32)]     pack / unpack      codes uint8 [n, k]
//   cpu      int32 [ceil(n/16), R, 16]      prepack / unprepack     stream
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

// Codes of one row, padded with zeros to a multiple of 32 columns -> column `lane` of a tile.
template <int WIDTH>
void write_plane(const uint8_t* codes, int64_t words, int low, int32_t* tile) {
    constexpr int kPerWord = 32 / WIDTH;
    for (int64_t w = 0; w < words; ++w) {
        uint32_t word = 0;
        for (int i = 0; i < kPerWord; ++i) {
            const uint32_t field = (codes[w * kPerWord + i] >> low) & ((1u << WIDTH) - 1);
            word |= field << (i * WIDTH);
        }
        tile[w * kTileRows] = static_cast<int32_t>(word);
    }
}

template <int WIDTH>
void read_plane(const int32_t* tile, int64_t words, int low, uint8_t* codes) {
    constexpr int kPerWord = 32 / WIDTH;
    for (int64_t w = 0; w < words; ++w) {
        const uint32_t word = static_cast<uint32_t>(tile[w * kTileRows]);
        for (int i = 0; i < kPerWord; ++i) {
            const uint32_t field = (word >> (i * WIDTH)) & ((1u << WIDTH) - 1);
            codes[w * kPerWord + i] |= static_cast<uint8_t>(field << low);
        }
    }
}

void write_planes(const uint8_t* codes, int64_t k, int bits, int32_t* tile) {
    const Planes planes = planes_of(bits);
    for (int p = 0; p < planes.count; ++p) {
        const int64_t words = plane_words(k, planes.width[p]);
        switch (planes.width[p]) {
            case 1:
                write_plane<1>(codes, words, planes.low[p], tile);
                break;
            case 2:
                write_plane<2>(codes, words, planes.low[p], tile);
                break;
            case 4:
                write_plane<4>(codes, words, planes.low[p], tile);
                break;
            default:
                write_plane<8>(codes, words, planes.low[p], tile);
                break;
        }
        tile += words * kTileRows;
    }
}

void read_planes(const int32_t* tile, int64_t k, int bits, uint8_t* codes) {
    const Planes planes = planes_of(bits);
    for (int p = 0; p < planes.count; ++p) {
        const int64_t words = plane_words(k, planes.width[p]);
        switch (planes.width[p]) {
            case 1:
                read_plane<1>(tile, words, planes.low[p], codes);
                break;
            case 2:
                read_plane<2>(tile, words, planes.low[p], codes);
                break;
            case 4:
                read_plane<4>(tile, words, planes.low[p], codes);
                break;
            default:
                read_plane<8>(tile, words, planes.low[p], codes);
                break;
        }
        tile += words * kTileRows;
    }
}

// One row of codes per thread of the loop that follows, allocated here because a loop body must not throw.
class RowBuffers {
  public:
    RowBuffers(int64_t k, int64_t count)
        : stride_(32 * ceil_div(k, 32)), codes_(new uint8_t[static_cast<size_t>(stride_ * count) + 1]()) {}

    uint8_t* row(int64_t i) const { return codes_.get() + i * stride_; }
    int64_t bytes() const { return stride_; }

  private:
    int64_t stride_;
    std::unique_ptr<uint8_t[]> codes_;
};

}  // namespace

void pack(const PackArgs& args, const uint8_t* codes, int32_t* words) {
    const int64_t row_words = stream_words(args.k, args.bits);
    parallel_for(args.threads, args.n, kRowsAtOnce, [&](int64_t row) {
        pack_row(codes + row * args.k, args.k, args.bits, words + row * row_words);
    });
}

void unpack(const PackArgs& args, const int32_t* words, uint8_t* codes) {
    const int64_t row_words = stream_words(args.k, args.bits);
    parallel_for(args.threads, args.n, kRowsAtOnce, [&](int64_t row) {
        unpack_row(words + row * row_words, args.k, args.bits, codes + row * args.k);
    });
}

void prepack(const PackArgs& args, const int32_t* words, int32_t* tiles) {
    const int64_t row_words = stream_words(args.k, args.bits);
    const int64_t tile_words = word_rows(args.k, args.bits) * kTileRows;
    const int64_t blocks = args.threads, count = tiles_of(args.n);
    const RowBuffers buffers(args.k, blocks);
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        uint8_t* codes = buffers.row(block);
        for (int64_t tile = count * block / blocks; tile < count * (block + 1) / blocks; ++tile) {
            int32_t* out = tiles + tile * tile_words;
            for (int64_t lane = 0; lane < kTileRows; ++lane) {
                const int64_t row = tile * kTileRows + lane;
                if (row < args.n) {
                    unpack_row(words + row * row_words, args.k, args.bits, codes);
                } else {
                    std::memset(codes, 0, static_cast<size_t>(buffers.bytes()));
                }
                write_planes(codes, args.k, args.bits, out + lane);
            }
        }
    });
}

void unprepack(const PackArgs& args, const int32_t* tiles, int32_t* words) {
    const int64_t row_words = stream_words(args.k, args.bits);
    const int64_t tile_words = word_rows(args.k, args.bits) * kTileRows;
    const int64_t blocks = args.threads;
    const RowBuffers buffers(args.k, blocks);
    parallel_for(args.threads, blocks, 1, [&](int64_t block) {
        uint8_t* codes = buffers.row(block);
        for (int64_t row = args.n * block / blocks; row < args.n * (block + 1) / blocks; ++row) {
            std::memset(codes, 0, static_cast<size_t>(buffers.bytes()));
            read_planes(tiles + row / kTileRows * tile_words + row % kTileRows, args.k, args.bits, codes);
            pack_row(codes, args.k, args.bits, words + row * row_words);
        }
    });
}

}  // namespace mmq
