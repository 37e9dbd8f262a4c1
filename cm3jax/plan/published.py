"""The method on runs whose speed others have published: does the true figure lie between our two?

Their models are built with our switches and compiled for their slices. Where they keep other things for the backward
pass than our `remat` can say, the costs say so; what is exchanged is then that of the nearest program of ours.

Each run is as it was when its figure was published, by MaxText's history: sizes are multiples of its base.yml's of that
day, and its count of FLOPs changed too. MFU here is by that day's count: of attention it had nothing (April 2023), the
whole square (October 2023; the 4.546 s and 417.397 TFLOP/s of the run on v6e fit it to four digits), or the half that a
query sees (March 2024).
"""

import dataclasses

from cm3jax.config import Decoder, DecoderStage, Mesh, Optimizer, Packing, Recipe, Training
from cm3jax.nn import flops
from cm3jax.plan import costs, slices, training
from cm3jax.vocab import Vocab

MAXTEXT = "github.com/AI-Hypercomputer/maxtext"
RECIPES = "github.com/AI-Hypercomputer/tpu-recipes, training/trillium"


@dataclasses.dataclass(frozen=True)
class Text(Vocab):
    """Ids of a text model: no token shard of ours has to hold them."""

    def __post_init__(self):
        pass


@dataclasses.dataclass(frozen=True)
class Run:
    """A published run.

    Attributes:
      mfu: As published.
      source: Where, and the commit that published it.
      squares: Attention that the published count of FLOPs has: 0 none, 1/2 what a query sees, 1 the whole square.
      known: `again` and `host_values` of `costs.Shape`, if our remat policies cannot say what theirs does.
    """

    name: str
    topology: str
    recipe: Recipe
    mfu: float
    source: str
    squares: float
    known: dict = dataclasses.field(default_factory=dict)


LLAMA = Decoder(activation="swiglu", norm="rmsnorm", position="rope", tied=False)


def recipe(model: Decoder, vocab: int, length: int, batch: int, mesh: Mesh = Mesh()) -> Recipe:
    """Return a recipe that trains a text model of this vocabulary, a multiple of 256."""
    stage = DecoderStage(
        model=model,
        packing=Packing(length=length),
        training=Training(batch=batch, mesh=mesh, optimizer=Optimizer()),
    )
    return Recipe(name="published", vocab=Text(text=vocab - 4 - 2 - 2, image=2, sentinels=2), decoder=stage)


def llama8b() -> Run:
    """Llama 3.1 8B; every layer's input, queries, keys, values and attention output wait in the host's memory."""
    model = dataclasses.replace(LLAMA, layers=32, width=4096, heads=32, kv_heads=8, mlp_width=14336)
    again = costs.Again(2 * model.width * model.mlp_width / flops.matrices(model), 1)  # gate and up, and attention
    return Run(
        name="Llama 3.1 8B, MaxText",
        topology="v6e-256",
        recipe=recipe(model, 128_256, 8192, 4 * 256),
        mfu=0.4546,
        source=f"{RECIPES}/Llama3.1-8B-MaxText/v6e-256",
        squares=1.0,
        known={"again": again, "host_values": 3 * model.width + 2 * 8 * 128},
    )


RELU = dataclasses.replace(LLAMA, activation="relu", tied=True)
"""MaxText's base.yml of 2023: one product before the activation and one after it, heads of 256, a tied table."""

RUNS = (
    Run(
        name="16B, MaxText",
        topology="v5e-256",
        # global_parameter_scale=16: twice the width of 2560, four times 8 heads and 8192, twice 16 layers
        recipe=recipe(
            dataclasses.replace(RELU, layers=32, width=5120, heads=32, head_size=256, mlp_width=32768),
            32_768,
            2048,
            6 * 256,
        ),
        mfu=0.6110,
        source=f"{MAXTEXT} 9bc243c95, README.md and MaxText/configs/largest_job/16b.sh",
        squares=1.0,
    ),
    Run(
        name="32B, MaxText",
        topology="v5p-128",
        recipe=recipe(
            dataclasses.replace(LLAMA, layers=32, width=8192, heads=64, mlp_width=28672),
            32_000,
            2048,
            6 * 64,
            Mesh(1, -1, 4),
        ),
        mfu=0.7147,
        source=f"{MAXTEXT} 04262f3cf, README.md and MaxText/configs/v5p/32b.sh",
        squares=0.5,
        # remat_policy=minimal keeps the products with weights; ours would need 141 GiB, as it splits fewer of them
        known={"again": costs.Again(0, 1)},
    ),
    llama8b(),
    Run(
        name="22B, MaxText",
        topology="v4-128",
        # scale=3; no flash attention yet, so scores of 1024 x 1024 in HBM (bfloat16; in our count float32)
        recipe=recipe(
            dataclasses.replace(RELU, layers=48, width=6144, heads=24, mlp_width=24576, qk_norm=True, attention="xla"),
            32_768,
            1024,
            16 * 64,
        ),
        mfu=0.567,
        source=f"{MAXTEXT} 281e04bf3, README.md and MaxText/configs/1xv4-128.sh",
        squares=0.0,
    ),
)


@dataclasses.dataclass(frozen=True)
class Line:
    """A run, and what we say of it: MFU low and high by the published count."""

    run: Run
    plan: training.Plan
    low: float
    high: float

    @property
    def inside(self) -> bool:
        return self.low <= self.run.mfu <= self.high

    @property
    def seconds(self) -> float:
        return self.plan.compile_seconds


def compare(run: Run) -> Line:
    """Compile a run and return the comparison."""
    target = slices.parse(run.topology)
    found = training.plan(run.recipe, target, **run.known)
    if not found.terms:
        return Line(run, found, float("nan"), float("nan"))
    counted = found.flops.model + 2 * run.squares * found.flops.attention
    best = counted / (target.chips * target.chip.flops)
    return Line(run, found, best / found.seconds[1], best / found.seconds[0])


def text(lines: list[Line]) -> str:
    """Return the table of error, in Markdown."""
    rows = ["| run | slice | parameters | published MFU | ours, low to high | inside | source |", "|" + "---|" * 7]
    for line in lines:
        inside = "yes" if line.inside else f"no, by {_distance(line):+.3f}" if line.plan.terms else "does not fit"
        ours = f"{line.low:.3f} to {line.high:.3f}" if line.plan.terms else line.plan.refusal
        run, size = line.run, f"{line.plan.params / 1e9:.1f}B"
        cells = (run.name, run.topology, size, f"{run.mfu:.3f}", ours, inside, run.source)
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _distance(line: Line) -> float:
    """Return how far the published figure is above our high, or (negative) below our low."""
    return line.run.mfu - line.high if line.run.mfu > line.high else line.run.mfu - line.low
