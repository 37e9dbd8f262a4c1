"""From work and rates to seconds: two figures between which a run should fall, not a prediction.

`seconds.low`: everything overlaps, and the step takes as long as its largest term. `seconds.high`: nothing overlaps,
and it takes the sum. Both at the rates of `slices.CHIPS`; a run that is slower than the sum has a fault worth finding.
"""

import dataclasses

from cm3jax.plan import costs, hlo, slices


@dataclasses.dataclass(frozen=True)
class Terms:
    """Seconds of one step, by what they are spent on."""

    matrices: costs.Number
    attention: costs.Number
    hbm: costs.Number
    ici: costs.Number
    dcn: costs.Number
    host: costs.Number

    @property
    def low(self) -> costs.Number:
        """The largest term; products with parameters and attention share the matrix units."""
        return max(self.matrices + self.attention, self.hbm, self.ici, self.dcn, self.host)

    @property
    def high(self) -> costs.Number:
        return sum(dataclasses.astuple(self))


def terms(
    target: slices.Slice,
    order: list,
    shape: costs.Shape,
    collectives: list[hlo.Collective],
) -> Terms:
    """Return what the parts of a step take.

    Args:
      order: Devices in the order of the mesh, to which the groups of the collectives refer.
    """
    chip, work = target.chip, costs.work(shape)
    # A head narrower than the matrix unit leaves a part of it idle, in both products of attention.
    width = min(1.0, shape.stage.model.head_width / chip.mxu)
    return Terms(
        matrices=work.matrices / chip.flops,
        attention=work.attention / chip.flops / width,
        hbm=work.hbm / chip.hbm,
        host=work.host / chip.host,
        **exchanges(target, order, collectives),
    )


def exchanges(target: slices.Slice, order: list, collectives: list[hlo.Collective]) -> dict[str, costs.Number]:
    """Return the seconds of all collectives: {"ici": within slices, "dcn": between them}."""
    abroad = [c for c in collectives if crosses(order, c.group)]
    within = [c for c in collectives if not crosses(order, c.group)]
    return {
        "ici": hlo.seconds(within, lambda group: ici(target, order, group)),
        "dcn": hlo.seconds(abroad, lambda _: target.chip.dcn),
    }


def crosses(order: list, group: tuple[int, ...]) -> bool:
    """Tell whether a group has members in several slices."""
    return len({getattr(order[i], "slice_index", 0) for i in group}) > 1


def ici(target: slices.Slice, order: list, group: tuple[int, ...]) -> costs.Number:
    """Return the bytes/s that leave a chip towards the rest of its group.

    Along each axis of the torus on which the group has several places: both directions if the group fills an axis that
    closes to a ring, one if not ("How to Scale Your Model", chapter 2).
    """
    rate = 0.0
    for axis, side in enumerate(target.shape):
        places = len({order[i].coords[axis] for i in group})
        ring = places == side and side % target.chip.ring == 0
        rate += target.chip.link * ((2 if ring else 1) if places > 1 else 0)
    return rate or target.chip.link
