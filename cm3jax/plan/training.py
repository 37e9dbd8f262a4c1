"""Plan a training run: does it fit the slice, and how long would it take."""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cm3jax import config as configs
from cm3jax import trees
from cm3jax.config import Recipe
from cm3jax.plan import compiler, costs, estimate, hlo, programs, slices

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is known of a training step on a slice.

    Attributes:
      target: The slice.
      stage: With attention resolved.
      mesh: {axis: size}.
      params: Parameters.
      state: Bytes of the state per chip.
      total: Bytes that the program needs per chip, as the compiler states them.
      limit: Bytes that it may use.
      fits: Whether it does.
      refusal: The compiler's line if not.
      flops: Of a step.
      tokens: Of a step.
      collectives: Of the compiled program; () if there is none.
      terms: Seconds; None if there is no program.
      rematerialized: Lines of the compiler's log.
      compile_seconds: What compiling took.
    """

    target: slices.Slice
    stage: configs.DecoderStage
    mesh: dict[str, int]
    params: int
    state: int
    total: costs.Number
    limit: costs.Number
    fits: bool
    refusal: str
    flops: costs.Flops
    tokens: int
    collectives: tuple[hlo.Collective, ...] = ()
    terms: estimate.Terms | None = None
    rematerialized: tuple[str, ...] = ()
    compile_seconds: float = 0.0

    def compiled(self, lower: Callable, mesh: jax.sharding.Mesh, terms: Callable) -> "Plan":
        """Return the plan with what compiling the program shows.

        Args:
          lower: () -> what is to be compiled.
          terms: Its collectives -> `estimate.Terms`.
        """
        try:
            program = compiler.program(lower)
        except compiler.TooLarge as e:
            return dataclasses.replace(self, total=e.needed, limit=e.limit, refusal=e.message)
        found = hlo.collectives(program.text, mesh.size)
        return dataclasses.replace(
            self,
            total=program.total,
            fits=program.total <= self.limit,
            collectives=tuple(found),
            terms=terms(found),
            rematerialized=program.rematerialized,
            compile_seconds=program.seconds,
        )

    @property
    def seconds(self) -> tuple[costs.Number, costs.Number]:
        """A step if everything overlaps, and if nothing does."""
        return (self.terms.low, self.terms.high)

    @property
    def mfu(self) -> tuple[costs.Number, costs.Number]:
        """Model FLOPs (attention causal) over what the chips could do meanwhile: low, high."""
        best = self.flops.useful / (self.target.chips * self.target.chip.flops)
        return best / self.seconds[1], best / self.seconds[0]

    @property
    def rate(self) -> tuple[costs.Number, costs.Number]:
        """Tokens/s: low, high."""
        return self.tokens / self.seconds[1], self.tokens / self.seconds[0]

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        gib = {"state": self.state, "activations": self.total - self.state, "total": self.total, "limit": self.limit}
        span = lambda pair: dict(zip(("low", "high"), pair, strict=True)) if self.terms else None  # noqa: E731
        flops = {**self.flops._asdict(), "total": sum(self.flops)}
        return {
            "fits": self.fits,
            "chips": self.target.chips,
            "params": self.params,
            "hbm": {f"{name}_gib": round(value / GIB, 3) for name, value in gib.items()},
            "collectives": hlo.summary(list(self.collectives)) if self.terms else None,
            "flops": flops,
            "seconds": span(self.seconds if self.terms else ()),
            "mfu": span(self.mfu if self.terms else ()),
            "tokens_per_second": span(self.rate if self.terms else ()),
        }


def plan(recipe: Recipe, target: slices.Slice, devices: list[jax.Device] | None = None, **known_costs: Any) -> Plan:
    """Compile the train step of a recipe's decoder for a slice, and read off what it needs.

    Args:
      devices: From `compiler.devices`; None: those of the target.
      known_costs: `again` and `host_values` of `costs.Shape`, where a run differs from ours.

    Raises:
      UserError: if the slice is not known, or the recipe does not divide over it.
    """
    devices = compiler.devices(target) if devices is None else devices
    step = programs.step(recipe.decoder, recipe.vocab, devices)
    mesh, abstract = dict(step.mesh.shape), step.compiled.abstract
    shape = costs.Shape(
        stage=step.stage,
        vocab=recipe.vocab.size,
        params=trees.size(abstract.params),
        data=mesh["replica"] * mesh["fsdp"],
        tensor=mesh["tensor"],
        shards=mesh["fsdp"] * mesh["tensor"],
        **known_costs,
    )
    known = Plan(
        target=target,
        stage=step.stage,
        mesh=mesh,
        params=shape.params,
        state=programs.local_bytes(abstract),
        total=0,
        limit=target.chip.hbm_gib * GIB,
        fits=False,
        refusal="",
        flops=costs.flops(shape),
        tokens=shape.tokens,
    )
    order = list(step.mesh.devices.flat)
    return known.compiled(step.lower, step.mesh, lambda found: estimate.terms(target, order, shape, found))


# -------------------------------------------------------------------------------------------------------------- search


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of settings, as flags."""

    flags: str
    recipe: Recipe


def changes(recipe: Recipe, chips: int) -> Iterator[Change]:
    """Yield changes that make a step need less memory, the cheapest first.

    More accumulation leaves the result as it is and costs exchanges; more recomputation costs up to a third of the
    FLOPs; splitting rows over `tensor` costs exchanges in every layer.
    """
    stage = recipe.decoder
    model, training, tensor = stage.model, stage.training, max(stage.training.mesh.tensor, 1)
    while training.batch % (2 * training.accumulate * chips // tensor) == 0:
        training = dataclasses.replace(training, accumulate=2 * training.accumulate)
        yield _change(recipe, model, training)
    kinds = typing.get_args(typing.get_type_hints(configs.Decoder)["remat"])
    for remat in kinds[kinds.index(model.remat) + 1 :]:
        model = dataclasses.replace(model, remat=remat)
        yield _change(recipe, model, training)
    mesh = training.mesh if training.mesh.replica == -1 else dataclasses.replace(training.mesh, fsdp=-1)
    for ways in (2, 4, 8):
        fixed = ways * (mesh.fsdp if mesh.replica == -1 else max(mesh.replica, 1))
        if ways > tensor and chips % fixed == 0 and (model.kv_heads or model.heads) % ways == 0:
            yield _change(recipe, model, dataclasses.replace(training, mesh=dataclasses.replace(mesh, tensor=ways)))


def _change(recipe: Recipe, model: configs.Decoder, training: configs.Training) -> Change:
    stage, old = dataclasses.replace(recipe.decoder, model=model, training=training), recipe.decoder
    named = {
        "--decoder.accumulate": (training.accumulate, old.training.accumulate),
        "--decoder.remat": (model.remat, old.model.remat),
        "--decoder.fsdp": (training.mesh.fsdp, old.training.mesh.fsdp),
        "--decoder.tensor": (training.mesh.tensor, old.training.mesh.tensor),
    }
    flags = " ".join(f"{name} {new}" for name, (new, before) in named.items() if new != before)
    return Change(flags, dataclasses.replace(recipe, decoder=stage))


def likely(plan: Plan, recipe: Recipe, chips: int) -> Change | None:
    """Return the first of `changes` with which a step should fit: activations by the values kept and rows at a time.

    An estimate: only compiling tells (`search`).
    """

    def kept(stage: configs.DecoderStage) -> costs.Number:
        return costs.kept(stage.model) / stage.training.accumulate

    activations = (plan.total - plan.state) / kept(recipe.decoder)
    found = changes(recipe, chips)
    return next((c for c in found if plan.state + activations * kept(c.recipe.decoder) <= plan.limit), None)


def search(recipe: Recipe, target: slices.Slice, say: Callable[[str], None]) -> tuple[Change, Plan] | None:
    """Return the cheapest of `changes` with which a step fits, and its plan; None if none does."""
    devices = compiler.devices(target)
    for change in changes(recipe, target.chips):
        found = plan(change.recipe, target, devices)
        say(f"{change.flags}: {found.total / GIB:.2f} GiB, {'fits' if found.fits else 'does not fit'}")
        if found.fits:
            return change, found
    return None
