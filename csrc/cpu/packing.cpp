// Bit streams of codes, and their split into planes tiled by 16 rows.
//
//   stream   int32 [n, ceil(k*bits/32)]     pack / unpack      codes uint8 [n, k]
//   cpu      int32 [ceil(n/16), ceil(k/32), bits, 16]     prepack / unprepack     stream
//
// A thread owns whole rows (pack, unpack) or whole tiles of 16 rows (prepack, unprepack). Both directions go
// through the codes of one row, so that only two facts are coded: where a code lies in a stream, and where in
// the planes.
#include "packing.h"

#include <algorithm>
#include <cstring>
#include <memory>

#include "../common/layout.h"
#include "parallel.h"

namespace mmq {
namespace {

constexpr int64_t kRowsAtOnce = 16;

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read and written as bytes");

constexpr int kEight = 8;  // codes that take as many bytes of a stream as a code has bits

// Eight codes, a byte each -> side by side in the lowest 8 * bits: pairs, pairs of pairs, halves.
uint64_t join(uint64_t codes, int bits) {
    codes = (codes & 0x00ff00ff00ff00ff) | (codes & 0xff00ff00ff00ff00) >> (8 - bits);
    codes = (codes & 0x0000ffff0000ffff) | (codes & 0xffff0000ffff0000) >> (16 - 2 * bits);
    return (codes & 0x00000000ffffffff) | (codes & 0xffffffff00000000) >> (32 - 4 * bits);
}

// The inverse; what lies above the codes is left out.
uint64_t part(uint64_t bytes, int bits) {
    const uint64_t four = (uint64_t{1} << (4 * bits)) - 1, two = (uint64_t{1} << (2 * bits)) - 1;
    const uint64_t one = (uint64_t{1} << bits) - 1;
    bytes = (bytes & four) | (bytes >> (4 * bits) & four) << 32;
    bytes = (bytes & two * 0x0000000100000001) | (bytes >> (2 * bits) & two * 0x0000000100000001) << 16;
    return (bytes & one * 0x0001000100010001) | (bytes >> bits & one * 0x0001000100010001) << 8;
}

void pack_row(const uint8_t* codes, int64_t k, int bits, int32_t* words) {
    auto* to = reinterpret_cast<uint8_t*>(words);
    const uint8_t* const end = to + stream_words(k, bits) * 4;
    for (int64_t i = 0; i < k; i += kEight) {
        uint64_t eight = 0;
        std::memcpy(&eight, codes + i, static_cast<size_t>(std::min<int64_t>(kEight, k - i)));
        eight = join(eight, bits);
        // Zeros above the codes are written over by the next ones.
        const int64_t bytes = std::min<int64_t>(kEight, end - to);
        std::memcpy(to, &eight, static_cast<size_t>(bytes));
        to += std::min<int64_t>(bits, bytes);
    }
    std::fill_n(to, end - to, uint8_t{0});  // of no codes there may be no words
}

void unpack_row(const int32_t* words, int64_t k, int bits, uint8_t* codes) {
    const auto* from = reinterpret_cast<const uint8_t*>(words);
    const uint8_t* const end = from + stream_words(k, bits) * 4;
    for (int64_t i = 0; i < k; i += kEight) {
        uint64_t eight = 0;
        std::memcpy(&eight, from, static_cast<size_t>(std::min<int64_t>(kEight, end - from)));
        eight = part(eight, bits);
        std::memcpy(codes + i, &eight, static_cast<size_t>(std::min<int64_t>(kEight, k - i)));
        from += bits;
    }
}

// The four codes of a step, a byte each.
uint32_t load_step(const uint8_t* codes) {
    uint32_t four;
    std::memcpy(&four, codes, sizeof four);
    return four;
}

void store_step(uint32_t four, uint8_t* codes) {
    std::memcpy(codes, &four, sizeof four);
}

// The lowest `width` bits of each byte.
constexpr uint32_t low_bits(int width) {
    return 0x01010101u * ((1u << width) - 1);
}

// body(plane, word, along) for each plane: bits `along` and up of each byte of the word are what the step has of the plane.
template <int BITS, typename Body>
void each_place(int step, Body body) {
    constexpr Planes kPlanes = planes_of(BITS);
    for (int p = 0; p < kPlanes.count; ++p) {
        const int along = kPlanes.width[p] * step;
        body(p, kPlanes.low[p] + along / 8, along % 8);
    }
}

// Codes of one row, padded with zeros to whole units -> column `lane` of a tile.
template <int BITS>
void write_units(const uint8_t* codes, int64_t units, int32_t* tile) {
    constexpr Planes kPlanes = planes_of(BITS);
    for (int64_t unit = 0; unit < units; ++unit, codes += kUnitColumns, tile += BITS * kTileRows) {
        uint32_t words[BITS] = {};
        for (int step = 0; step < kUnitColumns / kStepColumns; ++step) {
            const uint32_t four = load_step(codes + step * kStepColumns);
            each_place<BITS>(step, [&](int p, int word, int along) {
                words[word] |= (four >> kPlanes.low[p] & low_bits(kPlanes.width[p])) << along;
            });
        }
        for (int w = 0; w < BITS; ++w) tile[w * kTileRows] = static_cast<int32_t>(words[w]);
    }
}

template <int BITS>
void read_units(const int32_t* tile, int64_t units, uint8_t* codes) {
    constexpr Planes kPlanes = planes_of(BITS);
    for (int64_t unit = 0; unit < units; ++unit, codes += kUnitColumns, tile += BITS * kTileRows) {
        for (int step = 0; step < kUnitColumns / kStepColumns; ++step) {
            uint32_t four = 0;
            each_place<BITS>(step, [&](int p, int word, int along) {
                const uint32_t bits = static_cast<uint32_t>(tile[word * kTileRows]) >> along;
                four |= (bits & low_bits(kPlanes.width[p])) << kPlanes.low[p];
            });
            store_step(four, codes + step * kStepColumns);
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
