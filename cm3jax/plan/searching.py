"""Plan the search of a memory bank whose vectors lie over the chips of a slice: `retrieval.search_mesh`'s program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from cm3jax.plan import compiler, costs, estimate, hlo, slices
from cm3jax.plan.training import GIB
from cm3jax.retrieval import search, search_mesh
from cm3jax.types import UserError

PASSES = 6
"""Of the matrix units for one product in float32, which they make of bfloat16 ones (`precision="highest"`)."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of searching a bank on a slice.

    Attributes:
      target: The slice.
      documents, size, k: Vectors of the bank, their numbers (fp16), and how many are found for each query.
      total, limit: Bytes of HBM that the program needs per chip, and may use.
      refusal: The compiler's line if it does not fit.
      terms: Seconds of `search.QUERIES` queries; None if there is no program.
    """

    target: slices.Slice
    documents: int
    size: int
    k: int
    total: costs.Number
    limit: costs.Number
    refusal: str = ""
    terms: estimate.Terms | None = None

    @property
    def fits(self) -> bool:
        return not self.refusal and self.total <= self.limit

    @property
    def rate(self) -> tuple[costs.Number, costs.Number]:
        """Queries/s if nothing overlaps, and if everything does."""
        return search.QUERIES / self.terms.high, search.QUERIES / self.terms.low

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        found = {
            "fits": self.fits,
            "chips": self.target.chips,
            "documents": self.documents,
            "hbm": {"total_gib": round(self.total / GIB, 3), "limit_gib": round(self.limit / GIB, 3)},
        }
        if self.terms:
            found["queries_per_second"] = dict(zip(("low", "high"), self.rate, strict=True))
        return found

    def text(self) -> str:
        """Return the plan for people."""
        vectors = 2 * self.documents * self.size
        state = f"{self.total / GIB:.2f} GiB of {self.limit / GIB:.2f}"
        over = (self.total - self.limit) / GIB
        lines = [
            f"slice         {self.target.describe()}",
            f"bank          {self.documents:,} vectors of {self.size} fp16 numbers, {vectors / GIB:,.1f} GiB in all",
            f"HBM per chip  {state}: {'fits' if self.fits else f'does not fit, by {over:.2f} GiB'}",
        ]
        if self.refusal:
            lines.append(f"compiler      {self.refusal}")
        if self.fits and self.terms:
            (low, high), at = self.rate, self.terms
            hours = [2 * self.documents / rate / 3600 for rate in (high, low)]
            lines += [
                f"{search.QUERIES} queries   {at.low:.3f} (all overlaps) to {at.high:.3f} s (nothing does), of products"
                f" {at.matrices:.3f}, HBM {at.hbm:.3f}, exchanges {at.ici + at.dcn:.3f}",
                f"queries/s     {low:,.0f} to {high:,.0f}; the neighbours of all documents, by picture and by text:"
                f" {hours[0]:,.1f} to {hours[1]:,.1f} h",
            ]
        return "\n".join(lines)


def plan(target: slices.Slice, documents: int, size: int, k: int) -> Plan:
    """Compile the search of a bank for a slice, and read off what it needs.

    Args:
      documents: Of the bank.
      size: Numbers of a vector.
      k: Documents to be found for each query.

    Raises:
      UserError: if the slice is not known, or there are no documents.
    """
    if documents < 1:
        raise UserError(f"--documents {documents}: must be at least 1")
    devices = compiler.devices(target)
    mesh, block, share = search_mesh.cut(documents, devices)

    def lower() -> jax.stages.Lowered:
        def array(shape, dtype, *axes):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*axes)))

        queries = array((search.QUERIES, size), jnp.float32)
        vectors = array((share * len(devices), size), jnp.float16, search_mesh.AXIS)
        return search_mesh.program(mesh, documents, block, k, True).lower(queries, vectors)

    known = Plan(target, documents, size, k, 0, round(target.chip.hbm_gib * GIB))
    try:
        found = compiler.program(lower)
    except compiler.TooLarge as e:
        return dataclasses.replace(known, total=e.needed, limit=e.limit, refusal=e.message)
    moved = 2 * share * size + 2 * 4 * share * search.QUERIES  # vectors are read, scores written and read
    terms = estimate.Terms(
        matrices=PASSES * 2 * search.QUERIES * share * size / target.chip.flops,
        attention=0.0,
        hbm=moved / target.chip.hbm,
        host=0.0,
        **estimate.exchanges(target, devices, hlo.collectives(found.text, len(devices))),
    )
    return dataclasses.replace(known, total=found.total, terms=terms)
