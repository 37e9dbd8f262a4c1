"""What a compiled program sends between chips, read from its text.

XLA's own cost analysis counts the body of a loop once, and layers are a loop. Here every computation is weighed by how
often it runs: that of its caller, times the trip count if it is a loop's body.
"""

import dataclasses
import math
import re
from collections.abc import Callable

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
SIZES = {"pred": 8, "bf16": 16, "token": 0, "opaque": 0}
"""Bits of the types whose name does not end with them."""

HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
CALLED = re.compile(r"(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)")
BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between chips.

    Attributes:
      kind: One of KINDS; "reduce-scatter" also where TPUs fuse it out of an all-reduce and a slice.
      bytes: Of the whole array as a chip sees it before it is scattered or after it is gathered.
      times: How often the program runs it.
      group: Numbers of the devices of its first group, in the order of the mesh.
      operation: Where it comes from, as jax names it.
    """

    kind: str
    bytes: int
    times: int
    group: tuple[int, ...]
    operation: str = ""


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    types: str
    opcode: str
    rest: str


def collectives(text: str, devices: int) -> list[Collective]:
    """Return the collectives of a compiled module's text, for `devices` devices.

    A TPU program splits an asynchronous collective over several fusions that compute meanwhile; they share its channel
    and are counted once.
    """
    computations, entry = parse(text)
    times = runs(computations, entry)
    found: dict[object, Collective] = {}
    for name, instructions in computations.items():
        for one in instructions:
            kind = one.opcode.removesuffix("-start")
            if kind not in KINDS or not times.get(name):
                continue
            channel = re.search(r"channel_id=(\d+)", one.rest)
            key = (kind, channel[1]) if channel else (name, one.name)
            operation = re.search(r'op_name="([^"]*)"', one.rest)
            scattered = kind == "all-reduce" and name.startswith("all-reduce-scatter")
            found[key] = Collective(
                kind="reduce-scatter" if scattered else kind,
                bytes=_payload(kind, one, devices),
                times=times[name],
                group=_group(one.rest, devices),
                operation=operation[1] if operation else "",
            )
    return [c for c in found.values() if len(c.group) > 1]


def parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Return {computation: its instructions}, and the name of the entry."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        if match := HEADER.match(line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (match := INSTRUCTION.match(line)):
            types, rest = _split_type(match[2])
            opcode, _, rest = rest.partition("(")
            current.append(_Instruction(match[1], types, opcode.strip(), rest))
    return computations, entry


def runs(computations: dict[str, list[_Instruction]], entry: str) -> dict[str, int]:
    """Return how often the program runs each computation that it reaches.

    Raises:
      ValueError: if a loop's trip count cannot be read from its condition.
    """
    found: dict[str, int] = {}

    def visit(name: str, times: int) -> None:
        found[name] = found.get(name, 0) + times
        for one in computations[name]:
            trips = trip_count(computations, one) if one.opcode == "while" else 1
            branches = [b.strip().lstrip("%") for m in BRANCHES.findall(one.rest) for b in m.split(",")]
            for called in {*CALLED.findall(one.rest), *branches} & computations.keys():
                visit(called, times * trips)

    visit(entry, 1)
    return found


def trip_count(computations: dict[str, list[_Instruction]], loop: _Instruction) -> int:
    """Return how often a loop that counts from 0 runs: the largest integer that its condition compares with."""
    seen, todo, constants = set(), re.findall(r"condition=%?([\w.\-]+)", loop.rest), []
    while todo:
        seen.add(name := todo.pop())
        for one in computations[name]:
            if one.opcode == "constant" and one.types.startswith(("s32[]", "u32[]", "s64[]")):
                constants.append(int(one.rest.partition(")")[0]))
            todo += [c for c in CALLED.findall(one.rest) if c in computations and c not in seen]
    if not constants:
        raise ValueError(f"loop {loop.name}: its condition holds no constant to read the trip count from")
    return max(constants)


def _split_type(text: str) -> tuple[str, str]:
    """Return the type and the rest of what stands behind an instruction's "="."""
    if not text.startswith("("):
        head, _, rest = text.partition(" ")
        return head, rest
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return text[: i + 1], text[i + 1 :].lstrip()
    raise ValueError(f"unbalanced type: {text[:80]}")


def sizes(types: str) -> list[int]:
    """Return the bytes of each array of a type such as "(f32[2,3], bf16[4])"."""
    found = []
    for kind, sides in ARRAY.findall(types):
        bits = SIZES.get(kind) if kind in SIZES else int(re.search(r"\d+", kind)[0]) if re.search(r"\d", kind) else 0
        found.append(math.prod(int(s) for s in sides.split(",") if s) * bits // 8)
    return found


def _payload(kind: str, one: _Instruction, devices: int) -> int:
    """Return the bytes of the whole array of a collective."""
    arrays = sizes(one.types)
    if one.opcode.endswith("-start") and kind != "all-reduce":
        arrays = [max(arrays[:2])] if len(arrays) > 1 else arrays  # (operand, result, ...)
        return arrays[0]
    whole = sum(arrays)
    return whole * len(_group(one.rest, devices)) if kind == "reduce-scatter" else whole


def _group(rest: str, devices: int) -> tuple[int, ...]:
    """Return the first group of a collective's replica_groups, or the devices of one hop of its pairs."""
    if pairs := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest):
        return tuple(map(int, pairs.groups()))
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}(?:, ?device_ids=\(?\[?([\d,]+))?", rest):
        axes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        own = re.findall(r"'(\w+)'", mesh[2])
        grid = np.arange(devices).reshape(tuple(axes.values()))
        return _first(np.moveaxis(grid, [list(axes).index(a) for a in own], range(len(own))), len(own))
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        grid = np.arange(devices).reshape([int(s) for s in iota[3].split(",")])
        grid = grid.transpose([int(s) for s in iota[4].split(",")]) if iota[4] else grid
        return tuple(grid.reshape(int(iota[1]), int(iota[2]))[0].tolist())
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
        return tuple(int(d) for d in listed[1].split(","))
    return tuple(range(devices))


def _first(grid, own: int) -> tuple[int, ...]:
    return tuple(grid.reshape(math.prod(grid.shape[:own]), -1)[:, 0].tolist())


# ---------------------------------------------------------------------------------------------------------------- time


def summary(found: list[Collective]) -> dict[str, dict[str, int | float]]:
    """Return {kind: {count, gib}} of one run of the program, per chip."""
    out: dict[str, dict[str, int | float]] = {}
    for one in found:
        kind = out.setdefault(one.kind, {"count": 0, "gib": 0.0})
        kind["count"] += one.times
        kind["gib"] += one.times * one.bytes / 2**30
    return {kind: {"count": v["count"], "gib": round(v["gib"], 6)} for kind, v in sorted(out.items())}


def seconds(found: list[Collective], rate: Callable[[tuple[int, ...]], int | float]) -> int | float:
    """Return the time of collectives one after another.

    Args:
      rate: Group of devices -> bytes/s that leave a chip towards the others of its group.
    """
    return sum(one.times * traffic(one) / rate(one.group) for one in found)


def traffic(one: Collective) -> int | float:
    """Return the bytes that leave each chip ("How to Scale Your Model", chapter 3; all-to-all: on a ring)."""
    n = len(one.group)
    share = {"all-reduce": 2.0, "all-to-all": 0.25}.get(one.kind, 1.0)
    return one.bytes * share * (1 if one.kind == "collective-permute" else (n - 1) / n)
