// A product of activations with a quantised weight, cut in pieces that threads can share.
#pragma once

#include <cstdint>

namespace jaxinfer {

// out[row, n] = sum over k of rotated(x)[row, k] * codes[n, k] * scale[n]
struct Product {
  const float* x;       // [rows, inner]
  const int8_t* codes;  // [outer, inner]
  const float* scale;   // [outer]
  float* out;           // [rows, outer]
  int64_t rows, inner, outer;
  int digits;  // int8 digits of an activation: 1, or 2
  int block;   // channels that a rotation mixes; 1: none
};

// Activations in whole numbers, token_scale * (first digit + second digit / 256).
//
// Few rows lie one after the other, each digit as a row of its own ([rows, digits, width], zeros
// behind `inner`), and weights are streamed past them. Many lie as panels of 16 rows,
// [panels, digits, inner / 4, 16, 4] with 128 added: one vector holds four channels of 16 rows.
struct Tokens {
  uint8_t* digits;
  int32_t* sums;  // of each digit of few rows; the kernel's left operand has no sign
  float* scale;   // [rows]
  int64_t width;
  bool many;
};

constexpr int kPanel = 16;    // rows of a panel
constexpr int kMostFew = 8;   // rows, two digits counted twice, that are streamed past
constexpr int kOutputs = 12;  // outputs of a tile of many rows
constexpr int kChunk = 48;    // outputs that a thread takes, or several times: whole cache lines

bool is_many(const Product& product);
int64_t width(const Product& product);

// Rotates and rounds rows [first, last). The bits of a row depend on that row alone.
void round_rows(const Product& product, const Tokens& tokens, int64_t first, int64_t last);

// Writes outputs [first, last) of all rows. Sums are exact, so any cut gives the same bits.
void few_rows(const Product& product, const Tokens& tokens, int64_t first, int64_t last);
void many_rows(const Product& product, const Tokens& tokens, int64_t first, int64_t last);

}  // namespace jaxinfer
