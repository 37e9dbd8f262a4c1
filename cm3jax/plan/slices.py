"""TPU slices: what they are called, their chips, and what one chip can do.

Users (and Google's price list) say v5p-128, the compiler says v5p:4x4x4. The numbers do not mean the same: v4-N and
v5p-N count TensorCores, two a chip, v5e-N and v6e-N count chips.
"""

import dataclasses
import difflib
import math
import re

from cm3jax.types import UserError

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip of a family.

    Rates are those of the table "TPU specs" of "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus, as of
    commit 54e2c43), which agree with docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e} but for v6e's FLOP/s, of which the
    documentation's 918e12 is taken.
    """

    family: str
    cores: int
    """TensorCores, which the users' names of some families count."""
    hbm_gib: float
    """What the compiler lets a program use (libtpu 0.0.42's own error message); the rest is the system's."""
    flops: float
    """bf16 FLOP/s."""
    hbm: float
    """Bytes/s between a chip and its HBM."""
    link: float
    """Bytes/s of one inter-chip link in one direction; each torus axis has two links."""
    dcn: float
    """Bytes/s to other slices, per chip."""
    host: float
    """Bytes/s to the host's memory (PCIe), per chip."""
    mxu: int
    """Side of the matrix unit: a product over fewer than this many terms leaves a part of it idle. 256 on v6e, else 128
    (docs.cloud.google.com/tpu/docs/v6e)."""
    ring: int
    """An axis of the torus closes to a ring if its side is a multiple of this (scaling book, same page)."""
    shapes: tuple[tuple[int, ...], ...]
    """Slices that are sold (docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e})."""
    options: tuple[tuple[str, object], ...] = ()
    """What the compiler must be told besides the name. A v4 chip without megacore is two devices of half the memory."""


FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
CUBES = (
    (2, 2, 1),
    (2, 2, 2),
    (2, 2, 4),
    (2, 4, 4),
    (4, 4, 4),
    (4, 4, 8),
    (4, 8, 8),
    (8, 8, 8),
    (8, 8, 16),
    (8, 16, 16),
)
CUBES += ((16, 16, 16),)

CHIPS = {
    chip.family: chip
    for chip in (
        Chip(
            family="v4",
            cores=2,
            hbm_gib=30.75,
            flops=275e12,
            hbm=1.2e12,
            link=4.5e10,
            dcn=6.25e9,
            host=1.6e10,
            mxu=128,
            ring=4,
            shapes=CUBES,
            options=(("chip_config_name", "megacore"),),
        ),
        Chip(
            family="v5e",
            cores=1,
            hbm_gib=15.75,
            flops=197e12,
            hbm=8.2e11,
            link=4.5e10,
            dcn=3.125e9,
            host=1.6e10,
            mxu=128,
            ring=16,
            shapes=FLAT,
        ),
        Chip(
            family="v5p",
            cores=2,
            hbm_gib=95.74,
            flops=459e12,
            hbm=2.8e12,
            link=9e10,
            dcn=6.25e9,
            host=1.6e10,
            mxu=128,
            ring=4,
            shapes=(*CUBES, (16, 16, 24)),
        ),
        Chip(
            family="v6e",
            cores=1,
            hbm_gib=31.25,
            flops=918e12,
            hbm=1.6e12,
            link=9e10,
            dcn=12.5e9,
            host=3.2e10,
            mxu=256,
            ring=16,
            shapes=FLAT,
        ),
    )
}
ALIASES = {"v5litepod": "v5e", "v5lite": "v5e", "trillium": "v6e"}
FORMS = "v5e-256, v5e:16x16, or both as v5e-256=v5e:16x16"


HOST = 8
"""Chips of a host at most, of all families (v5e and v6e; the others have 4)."""


@dataclasses.dataclass(frozen=True)
class Slice:
    """`count` equal slices, joined by the data-center network."""

    chip: Chip
    shape: tuple[int, ...]
    count: int = 1

    @property
    def name(self) -> str:
        """The users' name: "v5p-128"."""
        return f"{self.chip.family}-{math.prod(self.shape) * self.chip.cores}"

    @property
    def topology(self) -> str:
        """The compiler's name: "v5p:4x4x4"."""
        return f"{self.chip.family}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape) * self.count

    @property
    def options(self) -> dict[str, object]:
        """Keywords of `get_topology_desc`."""
        single = {"chips_per_host_bounds": (1, 1, 1)} if self.shape == (1, 1) else {}
        several = {"num_slices": self.count} if self.count > 1 else {}
        return {**dict(self.chip.options), **single, **several}

    def describe(self) -> str:
        """Return both names, chips and devices, on one line."""
        times = f"{self.count} x " if self.count > 1 else ""
        extra = "".join(f" with {value}" for _, value in self.chip.options)
        return f"{times}{self.name} = {self.topology}{extra}: {self.chips} chips, {self.chips} devices"


def parse(text: str, count: int = 1) -> Slice:
    """Return the slice that a name means: the users', the compiler's, or both joined by "=", which must agree.

    Raises:
      UserError: for a name that means nothing, or two that mean different slices.
    """
    if count < 1:
        raise UserError(f"--slices = {count}: must be at least 1")
    found = [_one(part.strip().lower()) for part in text.split("=")]
    if len(found) > 2 or found[0] != found[-1]:
        names = "; ".join(Slice(chip, shape).describe() for chip, shape in found)
        raise UserError(f"--topology {text!r}: the names disagree: {names}; give one of them")
    return Slice(*found[0], count)


def _one(text: str) -> tuple[Chip, tuple[int, ...]]:
    match = re.fullmatch(r"([a-z0-9]+?)(?:-(\d+)|:(\d+(?:x\d+)*))", text)
    family = ALIASES.get(match[1], match[1]) if match else ""
    if family not in CHIPS:
        near = difflib.get_close_matches(text, [Slice(c, s).name for c in CHIPS.values() for s in c.shapes], 1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(f"--topology {text!r}: no such slice; {hint}write {FORMS}; families: {', '.join(CHIPS)}")
    chip = CHIPS[family]
    sides = tuple(map(int, match[3].split("x"))) if match[3] else ()
    for shape in chip.shapes:
        if sides == shape or (match[2] and int(match[2]) == math.prod(shape) * chip.cores):
            return chip, shape
    unit = "TensorCores, two a chip" if chip.cores == 2 else "chips"
    known = ", ".join(f"{Slice(chip, s).name} = {Slice(chip, s).topology}" for s in chip.shapes)
    raise UserError(f"--topology {text!r}: no such slice; {chip.family}-N counts {unit}; there are {known}")
