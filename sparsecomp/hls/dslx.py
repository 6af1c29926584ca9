"""The processes of a design in DSLX, the language of Google XLS: what multiplies, requantises, pools and looks up.

Processes are connected by streams; memories lie beside them (`memories.v`) and stream their rows to them, because XLS
would compile the weights of a layer, as an array of constants, into logic. Streams are plain bits, laid out here and
in `sparsecomp.hls.rtl`, which writes the memories.
"""

from __future__ import annotations

from math import ceil, log2

from sparsecomp.hls.kernel import Tile
from sparsecomp.hls.network import LOW, Lookup, Pool, Requantise

FIRST, SHIFT, FACTOR, BIAS = 0, 1, 7, 23
"""Where the fields of a row of a requantisation begin: whether new sums begin, s, m and the bias."""
RULE_BITS = 55


def select_bits(tile: Tile) -> int:
    """Bits of one choice of a multiplexer."""
    return ceil(log2(tile.m)) if tile.m > 1 else 0


def row_bits(tile: Tile) -> int:
    """Bits of a trip's row in memory: whether it ends a group of rows, weights, choices."""
    return 1 + 8 * tile.rows * tile.lanes + select_bits(tile) * (tile.rows // tile.shared) * tile.lanes


def multiply(tile: Tile) -> str:
    """The tile loop: reads `{row, word}` in every trip, gives sums `[rows]` of 32 bits after the last of a group."""
    base, bits = 8 * tile.word, select_bits(tile)
    weights = base + 1
    choices = weights + 8 * tile.rows * tile.lanes
    lines = [f"let last = x[{base} +: u1];"]
    if tile.m > 1:
        for group in range(tile.groups):
            values = ", ".join(f"x[{8 * (group * tile.m + at)} +: u8] as s8" for at in range(tile.m))
            lines.append(f"let group{group} = s8[{tile.m}]:[{values}];")
    for share in range(tile.rows // tile.shared if tile.m > 1 else 1):
        for lane in range(tile.lanes):
            if tile.m > 1:
                at = choices + bits * (share * tile.lanes + lane)
                value = f"group{lane // tile.n}[x[{at} +: uN[{bits}]]]"
            else:
                value = f"x[{8 * lane} +: u8] as s8"
            lines.append(f"let value{share}_{lane} = ({value}) as s16;")
    for row in range(tile.rows):
        share = row // tile.shared if tile.m > 1 else 0
        products = [
            f"((value{share}_{lane} * (x[{weights + 8 * (row * tile.lanes + lane)} +: u8] as s8 as s16)) as s32)"
            for lane in range(tile.lanes)
        ]
        lines.append(f"let sum{row} = state[u32:{row}] + ({_tree(products)});")
    sums = " ++ ".join(f"(sum{row} as u32)" for row in reversed(range(tile.rows)))
    kind = f"s32[{tile.rows}]"
    lines += [
        f"send_if(tok, give, last, {sums});",
        f"if last {{ zero!<{kind}>() }} else {{ {kind}:[{', '.join(f'sum{row}' for row in range(tile.rows))}] }}",
    ]
    streams = {"step": choices + bits * (tile.rows // tile.shared) * tile.lanes}
    return _proc(streams, 32 * tile.rows, kind, f"zero!<{kind}>()", "let (tok, x) = recv(join(), step);", lines)


def _tree(terms: list[str]) -> str:
    """A sum in pairs, so that its depth is the logarithm of its terms."""
    while len(terms) > 1:
        terms = [" + ".join(terms[at : at + 2]) for at in range(0, len(terms), 2)]
        terms = [f"({term})" for term in terms]
    return terms[0]


def requantise(rows: int, rule: Requantise) -> str:
    """Gives one value in a cycle; `rule` holds a row for every output, `sums` what `multiply` gives."""
    kind = f"s32[{rows}]"
    fresh = ", ".join(f"fresh[{32 * row} +: u32] as s32" for row in range(rows))
    rest = ", ".join(f"held[u32:{min(row + 1, rows - 1)}]" for row in range(rows))
    lines = [
        f"let first = r[{FIRST} +: u1];",
        f"let (tok, fresh) = recv_if(tok, sums, first, uN[{32 * rows}]:0);",
        f"let held = if first {{ {kind}:[{fresh}] }} else {{ state }};",
        f"let total = held[u32:0] + (r[{BIAS} +: u32] as s32);",
        f"let shift = r[{SHIFT} +: u6];",
        f"let factor = r[{FACTOR} +: u16];",
        *_requantised(rule),
        "send(tok, give, result);",
        f"{kind}:[{rest}]",
    ]
    streams = {"rule": RULE_BITS, "sums": 32 * rows}
    return _proc(streams, 8, kind, f"zero!<{kind}>()", "let (tok, r) = recv(join(), rule);", lines)


def _requantised(rule: Requantise) -> list[str]:
    """From `total`, `factor` and `shift` to `result`, of 8 bits. 50 bits hold the product and the half."""
    low, high = f"sN[50]:{rule.low}", f"sN[50]:{rule.high}"
    return [
        "let product = ((total as s48) * (factor as s48)) as sN[50];",
        "let half = sN[50]:1 << ((shift - u6:1) as uN[50]);",
        f"let scaled = ((product + half) >> (shift as uN[50])) + sN[50]:{rule.zero};",
        f"let kept = if scaled < {low} {{ {low} }} else if scaled > {high} {{ {high} }} else {{ scaled }};",
        "let result = (kept as uN[50])[0 +: u8];",
    ]


def pool(layer: Pool) -> str:
    """The largest of every `taps` values, or their requantised sum."""
    rule = layer.requantise
    if rule is None:
        lines = [
            "let most = if state.1 == u16:0 { s32:-128 } else { state.0 };",
            "let total = if value > most { value } else { most };",
            "let result = (total as u32)[0 +: u8];",
        ]
    else:
        lines = [
            f"let total = (if state.1 == u16:0 {{ s32:{layer.bias} }} else {{ state.0 }}) + value;",
            f"let shift = u6:{int(rule.shifts[0])};",
            f"let factor = u16:{int(rule.factors[0])};",
            *_requantised(rule),
        ]
    lines = [
        "let value = x as s8 as s32;",
        f"let last = state.1 == u16:{layer.patches.taps - 1};",
        *lines,
        "send_if(tok, give, last, result);",
        "(total, if last { u16:0 } else { state.1 + u16:1 })",
    ]
    return _proc({"step": 8}, 8, "(s32, u16)", "(s32:0, u16:0)", "let (tok, x) = recv(join(), step);", lines)


def look_up(layer: Lookup) -> str:
    """A table of 256 values."""
    # By the bits of a value: 0 to 127, then -128 to -1.
    table = ", ".join(str(int(layer.table[(at - LOW) % 256]) % 256) for at in range(256))
    lines = [f"let values = u8[256]:[{table}];", "send(tok, give, values[x]);", "()"]
    return _proc({"step": 8}, 8, "()", "()", "let (tok, x) = recv(join(), step);", lines)


def _proc(streams: dict[str, int], out: int, kind: str, start: str, read: str, lines: list[str]) -> str:
    """A process of named streams of bits."""
    fields = [f"{name}: chan<uN[{bits}]> in" for name, bits in streams.items()] + [f"give: chan<uN[{out}]> out"]
    body = "\n        ".join([read, *lines])
    names = ", ".join([*streams, "give"])
    return (
        "pub proc process {\n"
        + "".join(f"    {field};\n" for field in fields)
        + f"    config({', '.join(fields)}) {{ ({names}) }}\n"
        + f"    init {{ {start} }}\n"
        + f"    next(state: {kind}) {{\n        {body}\n    }}\n}}\n"
    )
