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


def text(plan: Plan, training: configs.Training, change: Change | None) -> str:
    """Return the table of one plan.

    Args:
      training: Steps, for the days of the whole run.
      change: The cheapest change to try if it does not fit.
    """
    rows = [("slice", plan.target.describe()), ("program", _program(plan)), ("HBM per chip", _memory(plan))]
    if plan.fits and plan.terms:
        rows += _speed(plan, training)
    if plan.rematerialized:
        rows.append(("WARNING", f"{len(plan.rematerialized)} x {plan.rematerialized[0].strip()}"))
    if plan.refusal:
        rows.append(("compiler", plan.refusal))
    if not plan.fits:
        hint = f"{change.flags}; or --search, which compiles such changes" if change else "a larger slice"
        rows.append(("to try", hint))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {line}" for name, value in rows for name, line in _lines(name, value))


def _lines(name: str, value: str):
    first, *rest = value.split("\n")
    yield name, first
    for line in rest:
        yield "", line


def _program(plan: Plan) -> str:
    model, training = plan.stage.model, plan.stage.training
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items())
    rows = training.batch // (plan.mesh["replica"] * plan.mesh["fsdp"] * training.accumulate)
    lines = [
        f"{plan.params:,} parameters; attention {model.attention}, remat {model.remat}; mesh {mesh}",
        f"{training.batch} rows of {plan.stage.packing.length} in {training.accumulate} parts, of which {rows} a chip",
    ]
    return "\n".join(lines) + (f"; compiled in {plan.compile_seconds:.0f} s" if plan.compile_seconds else "")


def _memory(plan: Plan) -> str:
    parts = f"state {plan.state / GIB:.2f} + activations {(plan.total - plan.state) / GIB:.2f}"
    total = f"{parts} = {plan.total / GIB:.2f} GiB of {plan.limit / GIB:.2f}"
    if plan.fits:
        return f"{total}: fits"
    return f"{total}: does not fit, by {(plan.total - plan.limit) / GIB:.2f} GiB"


def _speed(plan: Plan, training: configs.Training) -> list[tuple[str, str]]:
    flops, (fast, slow), (low, high) = plan.flops, plan.seconds, plan.mfu
    parts = {name: getattr(plan.terms, name) for name in TERMS}
    shares = "\n".join(f"{TERMS[name]:24} {s:8.3f} s" for name, s in parts.items() if s)
    exchanged = hlo.summary(list(plan.collectives))
    kinds = "\n".join(f"{kind:18} {v['count']:6} times {v['gib']:10.2f} GiB" for kind, v in exchanged.items())
    days = [s * training.steps / 86400 for s in (fast, slow)]
    budget = training.steps * plan.tokens
    return [
        ("exchanges, a step", kinds or "none"),
        (
            "FLOPs, a step",
            f"model {flops.model:.3e}, attention {flops.attention:.3e}, recomputed {flops.recompute:.3e}",
        ),
        ("seconds, a step", f"{fast:.3f} (all overlaps) to {slow:.3f} (nothing does), of\n{shares}"),
        ("MFU", f"{low:.3f} to {high:.3f}"),
        ("tokens/s", f"{plan.rate[0]:,.0f} to {plan.rate[1]:,.0f}"),
        (
            "the whole run",
            f"{budget:.3e} tokens: {days[0]:.1f} to {days[1]:.1f} days,"
            f" {days[0] * 24 * plan.target.chips:,.0f} to {days[1] * 24 * plan.target.chips:,.0f} chip-hours",
        ),
    ]
