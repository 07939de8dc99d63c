"""The GPU's side of `triton_kernels.py`, which loads it twice: compiled, and for Triton's interpreter on a CPU.

`int4.py`, `int8.py` and `mxfp4.py` describe the bytes; codes are multiplied as the integers they are, and each group's
sum is scaled. Used of Triton's library is only what its interpreter runs beside compiled code: no `tl.sum`, for one.

The experts' kernels compute y = activation(W_gate x + bias, W_up x + bias) for some assignments of many experts, or
plain W x + bias:

table  int64 [pieces, 3], pieces of work: the record's address, its first assignment, how many
first  the first piece of this launch; program (p, b) has piece first + p and the b-th part of the matrices' rows
chosen     int64 [k], experts; program (i, b) has the i-th
addresses  int64 [experts], of their records
x      float32 [tokens, P.cols]; which of its rows an assignment has is in `rows`, int32, if P.gather, else its own
y      float32 [assignments, P.rows]
P      `triton_kernels.Projection`

Those of the trunk compute y = W x + bias with one matrix:

weight uint8, the packed matrix
bias   [P.rows] in any dtype, or None
x, y   [tokens, P.cols] and [tokens, P.rows] in any dtype of at most 32 bits; sums are float32
P      `triton_kernels.PackedShape`
"""

# Triton's language has constants and pointers that Python's types do not describe.
# pyright: reportAttributeAccessIssue=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["first"])
def matvec(table, first, x, rows, y, P: tl.constexpr, CHUNKS: tl.constexpr):
    """One assignment and one block of 16 rows, in float32.

    A chunk is 16 rows x P.word columns of codes, 64 bytes; the program reads CHUNKS of them, which lie together, at
    once.
    """
    record, assignment, _ = _piece(table, first)
    source = tl.load(rows + assignment).to(tl.int64) if P.gather else assignment
    _one_assignment(record, assignment, source, x, y, P, CHUNKS)


@triton.jit
def matvec_resident(chosen, addresses, x, y, P: tl.constexpr, CHUNKS: tl.constexpr):
    """The same for a single token, whose assignment i is to expert chosen[i] with its record at addresses[chosen[i]];
    nothing where that is 0."""
    assignment = tl.program_id(0).to(tl.int64)
    address = tl.load(addresses + tl.load(chosen + assignment))
    if address != 0:
        record = tl.multiple_of(address.to(tl.pointer_type(tl.uint8)), 64)
        source = assignment * 0 if P.gather else assignment
        _one_assignment(record, assignment, source, x, y, P, CHUNKS)


@triton.jit
def _one_assignment(record, assignment, source, x, y, P: tl.constexpr, CHUNKS: tl.constexpr):
    block = tl.program_id(1)
    block_at = block * (P.head + P.body)
    up = tl.full([CHUNKS, 16], 0.0, tl.float32)
    gate = tl.full([CHUNKS, 16], 0.0, tl.float32)
    for start in range(0, P.padded // P.word, CHUNKS):
        chunk = start + tl.arange(0, CHUNKS)
        up += _chunk_products(record + P.up + block_at, chunk, x + source * P.cols, P, CHUNKS)
        if P.gate is not None:
            gate += _chunk_products(record + P.gate + block_at, chunk, x + source * P.cols, P, CHUNKS)
    row = block * 16 + tl.arange(0, 16)
    up = tl.reduce(up, 0, tl.standard._sum_combine) + _bias(record, P.up_bias, row, P)
    gate = tl.reduce(gate, 0, tl.standard._sum_combine) + _bias(record, P.gate_bias, row, P)
    tl.store(y + assignment * P.rows + row, _activation(gate, up, P), mask=row < P.rows)


@triton.jit
def _chunk_products(block, chunk, x, P: tl.constexpr, CHUNKS: tl.constexpr):
    """For some chunks of one block each row's sum of weights times x, float32 [CHUNKS, 16]."""
    word: tl.constexpr = P.word
    inside = ((chunk * word < P.padded) | (P.padded % (word * CHUNKS) == 0))[:, None]
    lane = tl.arange(0, 16)[None, :]
    words = _read(block + P.head, chunk[:, None] * 16 + lane, inside, tl.int32)
    products = tl.full([CHUNKS, 16], 0.0, tl.float32)
    x_sum = tl.full([CHUNKS], 0.0, tl.float32)
    for j in tl.static_range(word):
        column = chunk * word + j
        x_j = tl.load(x + column, mask=(column < P.cols) | (P.cols % (word * CHUNKS) == 0), other=0.0).to(tl.float32)
        products += _codes(words >> (j % 4 * 8 + j // 4 * 4), P) * x_j[:, None]
        x_sum += x_j
    # Four at a time as the words are: eight float16 would make 16 bytes, and threads that skip every other 16 of words.
    at = tl.max_contiguous((chunk // (P.group // word))[:, None] * 16 + lane, [1, 4])
    products *= _scales(block, at, inside, P)
    if P.minimums is not None:
        products += x_sum[:, None] * _minimums(block, at, inside, P)
    return products


@triton.jit(do_not_specialize=["first"])
def matmul(
    table,
    first,
    x,
    rows,
    y,
    P: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Up to TOKENS assignments and TILE_ROWS rows.

    x is cut into two bfloat16 numbers, which leave out less than 2^-14 of it; bfloat16 holds all codes exactly. Sums
    are float32. OPERAND is bfloat16, or float32 for the interpreter, which cannot multiply bfloat16.
    """
    record, start, count = _piece(table, first)
    token = tl.arange(0, TOKENS)
    present = token < count
    assignment = start + token
    source = tl.load(rows + assignment, mask=present, other=0).to(tl.int64) if P.gather else assignment
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    there = row < (P.rows + 15) // 16 * 16
    up = tl.full([TILE_ROWS, TOKENS], 0.0, tl.float32)
    gate = tl.full([TILE_ROWS, TOKENS], 0.0, tl.float32)
    for k in range(0, P.padded, TILE_COLS):
        column = k + tl.arange(0, TILE_COLS)
        inside = present[None, :] & ((column < P.cols) | (P.cols % TILE_COLS == 0))[:, None]
        x_tile = tl.load(x + source[None, :] * P.cols + column[:, None], mask=inside, other=0.0)
        up += _tile_products(record + P.up, row, there, k, x_tile, P, TILE_ROWS, TILE_COLS, OPERAND)
        if P.gate is not None:
            gate += _tile_products(record + P.gate, row, there, k, x_tile, P, TILE_ROWS, TILE_COLS, OPERAND)
    up += _bias(record, P.up_bias, row, P)[:, None]
    gate += _bias(record, P.gate_bias, row, P)[:, None]
    y_at = assignment[None, :] * P.rows + row[:, None]
    tl.store(y + y_at, _activation(gate, up, P), mask=present[None, :] & (row < P.rows)[:, None])


@triton.jit
def _tile_products(
    matrix,
    row,
    there,
    k,
    x_tile,
    P: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """The sums of weights times x over TILE_COLS columns from k on, all of one group: float32 [TILE_ROWS, TOKENS]."""
    word: tl.constexpr = P.word
    block = row // 16 * (P.head + P.body)
    chunk = k // word + tl.arange(0, TILE_COLS // word)
    words = _read(matrix + P.head, (block // 4 + row % 16)[:, None] + (chunk * 16)[None, :], there[:, None], tl.int32)
    place = tl.arange(0, word)
    words = words[:, :, None] >> (place % 4 * 8 + place // 4 * 4)[None, None, :]
    codes = tl.reshape(_codes(words, P), [TILE_ROWS, TILE_COLS]).to(OPERAND)
    if x_tile.dtype == tl.float32:
        x_high = x_tile.to(tl.bfloat16)
        x_low = (x_tile - x_high.to(tl.float32)).to(tl.bfloat16)
        products = tl.dot(codes, x_low.to(OPERAND), input_precision="ieee")
        products = tl.dot(codes, x_high.to(OPERAND), products, input_precision="ieee")
    else:
        products = tl.dot(codes, x_tile.to(OPERAND), input_precision="ieee")
    at = block // (1 if P.codes == "mxfp4" else 2) + k // P.group * 16 + row % 16  # in bytes of MXFP4 or in float16
    products *= _scales(matrix, at, there, P)[:, None]
    if P.minimums is not None:
        x_sum = tl.reduce(x_tile.to(tl.float32), 0, tl.standard._sum_combine)
        products += _minimums(matrix, at, there, P)[:, None] * x_sum[None, :]
    return products


@triton.jit
def linear_matvec(weight, bias, x, y, P: tl.constexpr, CHUNKS: tl.constexpr):
    """One row of x and one block of 16 rows, in float32."""
    token, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    packed = weight + block.to(tl.int64) * (P.head + P.body)
    sums = tl.full([CHUNKS, 16], 0.0, tl.float32)
    for start in range(0, P.padded // P.word, CHUNKS):
        sums += _chunk_products(packed, start + tl.arange(0, CHUNKS), x + token * P.cols, P, CHUNKS)
    row = block * 16 + tl.arange(0, 16)
    out = tl.reduce(sums, 0, tl.standard._sum_combine)
    if bias is not None:
        out += tl.load(bias + row, mask=row < P.rows, other=0.0).to(tl.float32)
    tl.store(y + token * P.rows + row, out.to(y.dtype.element_ty), mask=row < P.rows)


@triton.jit(do_not_specialize=["tokens"])
def linear_matmul(
    weight,
    bias,
    x,
    y,
    tokens,
    P: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_COLS: tl.constexpr,
    OPERAND: tl.constexpr,
):
    """Up to TOKENS rows of x and TILE_ROWS rows, as in `matmul`; but x of 16 bits is multiplied as it is, and OPERAND
    is its type."""
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    present, tile = token < tokens, tl.program_id(1).to(tl.int64)
    inner_row = tl.arange(0, TILE_ROWS)
    row = tile * TILE_ROWS + inner_row
    packed = weight + tile * (TILE_ROWS // 16 * (P.head + P.body))
    sums = tl.full([TILE_ROWS, TOKENS], 0.0, tl.float32)
    for k in range(0, P.padded, TILE_COLS):
        column = k + tl.arange(0, TILE_COLS)
        inside = present[None, :] & ((column < P.cols) | (P.cols % TILE_COLS == 0))[:, None]
        x_tile = tl.load(x + token[None, :] * P.cols + column[:, None], mask=inside, other=0.0)
        there = row < (P.rows + 15) // 16 * 16
        sums += _tile_products(packed, inner_row, there, k, x_tile, P, TILE_ROWS, TILE_COLS, OPERAND)
    if bias is not None:
        sums += tl.load(bias + row, mask=row < P.rows, other=0.0).to(tl.float32)[:, None]
    y_at = token[None, :] * P.rows + row[:, None]
    tl.store(y + y_at, sums.to(y.dtype.element_ty), mask=present[None, :] & (row < P.rows)[:, None])


@triton.jit
def _piece(table, first):
    row = table + 3 * (first + tl.program_id(0))
    record = tl.load(row).to(tl.pointer_type(tl.uint8))
    return tl.multiple_of(record, 64), tl.load(row + 1), tl.load(row + 2)


@triton.jit
def _read(data, index, inside, dtype: tl.constexpr):
    """Values of that type from where `data`, a pointer to bytes, points to; zero where not `inside`."""
    return tl.load(data.to(tl.pointer_type(dtype)) + index, mask=inside, other=0)


@triton.jit
def _codes(words, P: tl.constexpr):
    """What the lowest bits stand for before scaling, float32. 2^23 + i has the bits of 2^23, plus i."""
    if P.codes == "mxfp4":
        doubled = (0xC8643210 >> ((words & 7) * 4).to(tl.uint32)) & 15  # nibble i is `mxfp4.DOUBLED[i]`
        magnitude = (doubled | 0x4B000000).to(tl.float32, bitcast=True) - 8388608.0
        codes = tl.where((words & 8) != 0, -magnitude, magnitude)
    elif P.codes == "int8":
        codes = ((words & 255) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + 128)
    else:
        zero: tl.constexpr = 8388608.0 + (8 if P.minimums is None else 0)
        codes = ((words & 15) | 0x4B000000).to(tl.float32, bitcast=True) - zero
    return codes


@triton.jit
def _scales(data, index, inside, P: tl.constexpr):
    if P.codes == "mxfp4":
        scales = (_read(data, index, inside, tl.uint8).to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif P.words:
        scales = _word_scales(_read(data, index, inside, tl.int16).to(tl.int32))
    else:
        scales = _read(data, index, inside, tl.float16).to(tl.float32)
    return scales


@triton.jit
def _minimums(data, index, inside, P: tl.constexpr):
    """What the code 0 stands for, float32."""
    if P.words:
        words = _read(data, index, inside, tl.int16).to(tl.int32)
        minimums = (words & 0x3F).to(tl.float32) * (_word_scales(words) * -0.25)
    else:
        minimums = _read(data + P.minimums, index, inside, tl.float16).to(tl.float32)
    return minimums


@triton.jit
def _word_scales(words):
    """The scales in words of scale and zero point (`int4.py`)."""
    return (((words & 0xFFC0) << 12) + 0x33800000).to(tl.float32, bitcast=True)


@triton.jit
def _bias(record, offset: tl.constexpr, row, P: tl.constexpr):
    if offset is None:
        bias = tl.full(row.shape, 0.0, tl.float32)
    else:
        bias = _read(record + offset, row, row < P.rows, tl.float32)
    return bias


@triton.jit
def _activation(gate, up, P: tl.constexpr):
    """`activations.apply`, if there is one."""
    if P.activation is None:
        y = up
    elif P.activation.kind == "silu":
        y = gate * _sigmoid(gate) * up
    elif P.activation.kind == "silu_clamp":
        gate = _at_most(gate, P.activation.limit)
        y = gate * _sigmoid(gate) * _at_least(_at_most(up, P.activation.limit), -P.activation.limit)
    elif P.activation.kind == "gpt_oss":
        gate = _at_most(gate, P.activation.limit)
        up = _at_least(_at_most(up, P.activation.limit), -P.activation.limit) + 1
        y = up * (gate * _sigmoid(P.activation.alpha * gate))
    elif P.activation.kind == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z)
        y = gate * _sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)) * up
    else:
        tl.static_assert(P.activation.kind == "relu2")
        y = _at_least(up, 0.0) * _at_least(up, 0.0)
    return y


@triton.jit
def _sigmoid(z):
    return 1 / (1 + tl.exp(-z))


@triton.jit
def _at_most(z, limit: tl.constexpr):
    return tl.minimum(z, limit, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _at_least(z, limit: tl.constexpr):
    return tl.maximum(z, limit, propagate_nan=tl.PropagateNan.ALL)
