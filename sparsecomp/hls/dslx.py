"""The processes of a design in DSLX, the language of Google XLS: what multiplies, requantises, pools and looks up.

Processes are connected by streams; memories lie beside them (`memories.v`) and stream their rows to them, because XLS
would compile the weights of a layer, as an array of constants, into logic. Streams are plain bits, laid out here and
in `sparsecomp.hls.rtl`, which writes the memories.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, log2

from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import FACTOR_BITS, LOW, Lookup, Pool, Requantise

FIRST, SHIFT, FACTOR, BIAS = 0, 1, 7, 23
"""Where the fields of a row of a requantisation begin: whether new sums begin, s, m and the bias."""
RULE_BITS = 55


def select_bits(tile: Tile) -> int:
    """Bits of one choice of a multiplexer."""
    return ceil(log2(tile.m)) if tile.m > 1 else 0


def row_bits(tile: Tile) -> int:
    """Bits of a trip's row in memory: whether it ends a group of rows, weights, choices."""
    return 1 + 8 * tile.rows * tile.lanes + select_bits(tile) * (tile.rows // tile.shared) * tile.lanes


def multiply(tile: Tile, sums: int = 32, values: int = 8) -> str:
    """The tile loop: reads `{row, word}` in every trip, gives sums `[rows]` after the last of a group.

    Args:
        tile: of the loop.
        sums: bits of a sum.
        values: bits of an input: 8, or 9 where a queue took the zero point off.
    """
    base, bits, wide = values * tile.word, select_bits(tile), f"sN[{values + 8}]"
    weights = base + 1
    choices = weights + 8 * tile.rows * tile.lanes
    lines = [f"let last = x[{base} +: u1];"]
    if tile.m > 1:
        for group in range(tile.groups):
            given = ", ".join(_input(values, group * tile.m + at) for at in range(tile.m))
            lines.append(f"let group{group} = sN[{values}][{tile.m}]:[{given}];")
    for share in range(tile.rows // tile.shared if tile.m > 1 else 1):
        for lane in range(tile.lanes):
            if tile.m > 1:
                at = choices + bits * (share * tile.lanes + lane)
                value = f"group{lane // tile.n}[x[{at} +: uN[{bits}]]]"
            else:
                value = _input(values, lane)
            lines.append(f"let value{share}_{lane} = ({value}) as {wide};")
    for row in range(tile.rows):
        share = row // tile.shared if tile.m > 1 else 0
        products = []
        for lane in range(tile.lanes):
            weight = f"(x[{weights + 8 * (row * tile.lanes + lane)} +: u8] as s8 as {wide})"
            products.append(f"((value{share}_{lane} * {weight}) as sN[{sums}])")
        lines.append(f"let sum{row} = state[u32:{row}] + ({_tree(products)});")
    together = " ++ ".join(f"(sum{row} as uN[{sums}])" for row in reversed(range(tile.rows)))
    kind = f"sN[{sums}][{tile.rows}]"
    lines += [
        f"send_if(tok, give, last, {together});",
        f"if last {{ zero!<{kind}>() }} else {{ {kind}:[{', '.join(f'sum{row}' for row in range(tile.rows))}] }}",
    ]
    streams = {"step": choices + bits * (tile.rows // tile.shared) * tile.lanes}
    return _proc(streams, sums * tile.rows, kind, f"zero!<{kind}>()", "let (tok, x) = recv(join(), step);", lines)


def _input(bits: int, at: int) -> str:
    return f"x[{bits * at} +: uN[{bits}]] as sN[{bits}]"


def _tree(terms: list[str]) -> str:
    """A sum in pairs, so that its depth is the logarithm of its terms."""
    while len(terms) > 1:
        terms = [" + ".join(terms[at : at + 2]) for at in range(0, len(terms), 2)]
        terms = [f"({term})" for term in terms]
    return terms[0]


def requantise(rows: int, rule: Requantise, sums: int = 32, serial: bool = False) -> str:
    """Requantises; `rule` holds a row for every output, `sums` what `multiply` gives.

    Args:
        rows: sums that come at once.
        rule: its range and zero point are constants.
        sums: bits of a sum.
        serial: whether the product is made bit by bit without a multiplier, a value in `FACTOR_BITS` cycles; else
            a value is given in every cycle.
    """
    kind, wide = f"sN[{sums}][{rows}]", _width(sums, rule)
    fresh = ", ".join(f"fresh[{sums * row} +: uN[{sums}]] as sN[{sums}]" for row in range(rows))
    rest = ", ".join(f"held[u32:{min(row + 1, rows - 1)}]" for row in range(rows))
    lines = [
        f"let first = {'start && ' if serial else ''}r[{FIRST} +: u1];",
        f"let (tok, fresh) = recv_if(tok, sums, first, uN[{sums * rows}]:0);",
        f"let held = if first {{ {kind}:[{fresh}] }} else {{ held }};",
        f"let total = held[u32:0] + (r[{BIAS} +: u32] as sN[{sums}]);",
    ]
    streams = {"rule": RULE_BITS, "sums": sums * rows}
    if not serial:
        lines += [
            f"let shift = r[{SHIFT} +: u6];",
            f"let product = ((total as sN[{sums + 17}]) * (r[{FACTOR} +: u16] as sN[{sums + 17}])) as {wide};",
            *_requantised(rule, wide),
            "send(tok, give, result);",
            f"{kind}:[{rest}]",
        ]
        read = "let (tok, r) = recv(join(), rule);"
        return _proc(streams, 8, kind, f"zero!<{kind}>()", read, lines, ["let held = state;"])
    # Bit after bit of the factor, lowest first; the total moves to the left.
    lines = [
        *lines,
        f"let total = if start {{ total as {wide} }} else {{ moved }};",
        f"let factor = if start {{ r[{FACTOR} +: u16] }} else {{ factor }};",
        f"let shift = if start {{ r[{SHIFT} +: u6] }} else {{ shift }};",
        f"let term = if factor[0 +: u1] {{ total }} else {{ {wide}:0 }};",
        f"let product = if start {{ {wide}:0 }} else {{ sum }} + term;",
        *_requantised(rule, wide),
        f"let last = count == u4:{FACTOR_BITS - 1};",
        "send_if(tok, give, last, result);",
        f"let held = if last {{ {kind}:[{rest}] }} else {{ held }};",
        "(held, count + u4:1, total << u32:1, factor >> u32:1, shift, product)",
    ]
    state = f"({kind}, u4, {wide}, u16, u6, {wide})"
    before = ["let (held, count, moved, factor, shift, sum) = state;", "let start = count == u4:0;"]
    read = f"let (tok, r) = recv_if(join(), rule, start, uN[{RULE_BITS}]:0);"
    return _proc(streams, 8, state, f"zero!<{state}>()", read, lines, before)


def _width(sums: int, rule: Requantise) -> str:
    """Of a product with what rounds it."""
    return f"sN[{max(sums + FACTOR_BITS, int(rule.shifts.max())) + 2}]"


def _requantised(rule: Requantise, wide: str) -> list[str]:
    """From `product` and `shift` to `result`, of 8 bits."""
    low, high, bits = f"{wide}:{rule.low}", f"{wide}:{rule.high}", wide.replace("sN", "uN")
    return [
        f"let half = {wide}:1 << ((shift - u6:1) as {bits});",
        f"let scaled = ((product + half) >> (shift as {bits})) + {wide}:{rule.zero};",
        f"let kept = if scaled < {low} {{ {low} }} else if scaled > {high} {{ {high} }} else {{ scaled }};",
        f"let result = (kept as {bits})[0 +: u8];",
    ]


def pool(layer: Pool) -> str:
    """The largest value of every window, or its requantised sum: a window in every cycle."""
    rule, taps = layer.requantise, layer.patches.taps
    if rule is None:
        values = [f"value{at}" for at in range(taps)]
        lines = [f"let value{at} = x[{8 * at} +: u8] as s8;" for at in range(taps)]
        while len(values) > 1:  # in pairs, as sums are
            pairs = list(zip(values[::2], values[1::2], strict=False))
            lines += [f"let {a}_ = if {a} > {b} {{ {a} }} else {{ {b} }};" for a, b in pairs]
            values = [f"{a}_" for a, _ in pairs] + ([values[-1]] if len(values) % 2 else [])
        lines.append(f"let result = {values[0]} as u8;")
    else:
        sums = layer.sum_bits
        wide = _width(sums, rule)
        terms = [f"(x[{8 * at} +: u8] as s8 as sN[{sums}])" for at in range(taps)]
        lines = [
            f"let total = {_tree(terms)} + sN[{sums}]:{layer.bias};",
            f"let shift = u6:{int(rule.shifts[0])};",
            f"let product = ((total as sN[{sums + 17}]) * sN[{sums + 17}]:{int(rule.factors[0])}) as {wide};",
            *_requantised(rule, wide),
        ]
    lines += ["send(tok, give, result);", "()"]
    return _proc({"step": 8 * taps}, 8, "()", "()", "let (tok, x) = recv(join(), step);", lines)


def look_up(layer: Lookup) -> str:
    """A table of 256 values."""
    # By the bits of a value: 0 to 127, then -128 to -1.
    table = ", ".join(str(int(layer.table[(at - LOW) % 256]) % 256) for at in range(256))
    lines = [f"let values = u8[256]:[{table}];", "send(tok, give, values[x]);", "()"]
    return _proc({"step": 8}, 8, "()", "()", "let (tok, x) = recv(join(), step);", lines)


def _proc(
    streams: dict[str, int], out: int, kind: str, start: str, read: str, lines: list[str], before: Sequence[str] = ()
) -> str:
    """A process of named streams of bits."""
    fields = [f"{name}: chan<uN[{bits}]> in" for name, bits in streams.items()] + [f"give: chan<uN[{out}]> out"]
    body = "\n        ".join([*before, read, *lines])
    names = ", ".join([*streams, "give"])
    return (
        "pub proc process {\n"
        + "".join(f"    {field};\n" for field in fields)
        + f"    config({', '.join(fields)}) {{ ({names}) }}\n"
        + f"    init {{ {start} }}\n"
        + f"    next(state: {kind}) {{\n        {body}\n    }}\n}}\n"
    )
