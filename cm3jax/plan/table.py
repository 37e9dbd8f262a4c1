"""A plan as text for people."""

from cm3jax import config as configs
from cm3jax.plan import hlo
from cm3jax.plan.training import GIB, Change, Plan

TERMS = {
    "matrices": "matrix products",
    "attention": "attention",
    "hbm": "HBM traffic",
    "ici": "exchanges in the slice",
    "dcn": "exchanges between slices",
    "host": "host memory",
}


def text(plan: Plan, training: configs.Training | None = None, change: Change | None = None) -> str:
    """Return the table of one plan.

    Args:
      training: Steps, for the days of the whole run; None: this is a plan of drawing pictures.
      change: The cheapest change to try if it does not fit.
    """
    rows = [
        ("slice", plan.target.describe()),
        ("program", _program(plan, drawing=not training)),
        ("HBM per chip", _memory(plan)),
    ]
    if plan.fits and plan.terms:
        rows += _speed(plan, training)
    if plan.rematerialized:
        rows.append(("WARNING", f"{len(plan.rematerialized)} x {plan.rematerialized[0].strip()}"))
    if plan.refusal:
        rows.append(("compiler", plan.refusal))
    if not plan.fits:
        smaller = "a larger slice, or fewer --rows" if not training else "a larger slice"
        hint = f"{change.flags}, by estimate; --search compiles such changes" if change else smaller
        rows.append(("to try", hint))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {line}" for name, value in rows for name, line in _lines(name, value))


def _lines(name: str, value: str):
    first, *rest = value.split("\n")
    yield name, first
    for line in rest:
        yield "", line


def _program(plan: Plan, drawing: bool) -> str:
    model, training = plan.stage.model, plan.stage.training
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = training.batch // (plan.mesh["replica"] * plan.mesh["fsdp"] * training.accumulate)
    batch = (
        f"{training.batch} rows of {plan.stage.packing.length} in {training.accumulate} parts, of which {rows} a chip"
    )
    lines = [
        f"{plan.params:,} parameters; mesh {mesh}",
        f"{plan.tokens:,} ids drawn" if drawing else f"{batch}; attention {model.attention}, remat {model.remat}",
    ]
    return "\n".join(lines) + (f"; compiled in {plan.compile_seconds:.0f} s" if plan.compile_seconds else "")


def _memory(plan: Plan) -> str:
    parts = f"state {plan.state / GIB:.2f} + activations {(plan.total - plan.state) / GIB:.2f}"
    total = f"{parts} = {plan.total / GIB:.2f} GiB of {plan.limit / GIB:.2f}"
    if plan.fits:
        return f"{total}: fits"
    return f"{total}: does not fit, by {(plan.total - plan.limit) / GIB:.2f} GiB"


def _speed(plan: Plan, training: configs.Training | None) -> list[tuple[str, str]]:
    flops, (fast, slow), (low, high) = plan.flops, plan.seconds, plan.mfu
    parts = {name: getattr(plan.terms, name) for name in TERMS}
    shares = "\n".join(f"{TERMS[name]:24} {s:8.3f} s" for name, s in parts.items() if s)
    exchanged = hlo.summary(list(plan.collectives))
    kinds = "\n".join(f"{kind:18} {v['count']:6} times {v['gib']:10.2f} GiB" for kind, v in exchanged.items())
    counted = f"model {flops.model:.3e}, attention {flops.attention:.3e}, recomputed {flops.recompute:.3e}"
    rows = [
        ("exchanges", kinds or "none"),
        ("FLOPs", counted),
        ("seconds", f"{fast:.3f} (all overlaps) to {slow:.3f} (nothing does), of\n{shares}"),
        ("MFU", f"{low:.3f} to {high:.3f}"),
        ("tokens/s", f"{plan.rate[0]:,.0f} to {plan.rate[1]:,.0f}"),
    ]
    return rows + ([("the whole run", _budget(plan, training))] if training else [])


def _budget(plan: Plan, training: configs.Training) -> str:
    """Return the days and chip-hours of all steps."""
    days = [s * training.steps / 86400 for s in plan.seconds]
    hours = [d * 24 * plan.target.chips for d in days]
    tokens = training.steps * plan.tokens
    return f"{tokens:.3e} tokens: {days[0]:.1f} to {days[1]:.1f} days, {hours[0]:,.0f} to {hours[1]:,.0f} chip-hours"
