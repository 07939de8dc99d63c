// The kernels that are the same for every instruction set, written on the vector operations of the including isa_*.cpp.
// Everything is in an anonymous namespace: each isa_*.cpp is compiled with its own flags, and a function shared by the
// linker would carry one file's instructions into the others.
//
// Before the include, an isa_*.cpp declares
//     Vec, WIDTH (floats in one), vload, vstore, vset, vadd, vsub, vmul, vdiv, vfma, vmin, vmax, vround, vscale2,
//     vsum (of all lanes)
//     max_magnitude_bits, round_codes                                          32 floats to int8
//     load_half (WIDTH of them), load_halves, load_exponents, unpack_nibbles, prefetch_later
//     dot_tile       few rows of activations (DIRECT_TILE at most, 0 = there is none) by one block, from packed bytes
//     panel_tile     some rows (PANEL_TILE at most) by PANEL_BLOCKS blocks or one, from unpacked codes
//     PANEL_GROUPS, PANEL_ROWS: the size of a panel; PANEL_FROM: fewer rows than this go to dot_tile
#ifndef POCKETMOE_KERNELS_H
#define POCKETMOE_KERNELS_H

#include "attend.h"
#include "dot.h"
#include "elementwise.h"

// The entries of an `Isa` table after its name and `usable`.
#define PM_KERNELS quantize, dot, activate, combine, read, add, rms_norm, matvec, rotate, attend, store, gate

#endif
