"""Plan drawing pictures: prefill and the decode loop of `sample.decode`, on a slice."""

import jax
import jax.numpy as jnp

from cm3jax import sharding, trees
from cm3jax.config import Recipe, Sampling
from cm3jax.nn import decoder, flops
from cm3jax.plan import compiler, costs, estimate, hlo, programs, slices
from cm3jax.plan.training import GIB, Plan
from cm3jax.sample import decode, grammar, layout
from cm3jax.sharding import fit
from cm3jax.train import lm
from cm3jax.types import UserError

PROMPT = 64
"""Tokens of the prompt; a caption of the paper's data has about 10 (arXiv 2309.02591 §3: 3B tokens, 340M pairs)."""

GUIDED = Sampling(guidance=3.0)
"""Two streams, as the paper's figures have them (arXiv 2309.02591 §3.1)."""


def plan(recipe: Recipe, target: slices.Slice, rows: int = 0, dtype: str = "float32") -> Plan:
    """Compile drawing a batch of pictures with guidance, and read off what it needs.

    Args:
      rows: Pictures drawn at one time; 0: one for each chip that rows are split over.
      dtype: That the weights are kept in.

    Raises:
      UserError: if the slice is not known, or the rows or the model do not divide over it.
    """
    if target.count > 1:
        raise UserError(f"--slices {target.count}: drawing takes the chips of one host; leave it out")
    devices, memory = compiler.devices(target), round(target.chip.hbm_gib * GIB)
    stage = lm.resolve(recipe.decoder, devices[0])
    asked = layout.mesh(recipe, len(devices), memory)
    mesh, model = sharding.mesh(asked, devices), lm.model(stage, recipe.vocab)
    params = jax.tree.map(lambda x: x.update(dtype=jnp.dtype(dtype)), layout.abstract(model, mesh))
    data = sharding.shares(mesh)
    rows = rows or data
    if rows % data:
        raise UserError(f"--rows {rows}: not a multiple of the {data} chips that share the rows; change it or the mesh")
    codes = (recipe.prepare.resolution // recipe.image.model.factor) ** 2 + recipe.form.grid  # and the ends of its rows
    cache = _cache_bytes(recipe, rows, PROMPT - 1 + codes) / (data * mesh.shape["tensor"])
    known = Plan(
        target=target,
        stage=stage,
        mesh=dict(mesh.shape),
        params=trees.size(params),
        state=programs.local_bytes(params),
        total=0,
        limit=memory,
        fits=False,
        refusal="",
        flops=_flops(recipe, rows, codes),
        tokens=rows * codes,
    )
    lower = lambda: _lower(recipe, model, params, rows, codes)  # noqa: E731
    return known.compiled(lower, mesh, lambda found: _terms(known, mesh, found, codes, cache))


def _lower(recipe: Recipe, model: decoder.Decoder, params, rows: int, codes: int) -> jax.stages.Lowered:
    vocab, mesh, streams = recipe.vocab, sharding.mesh_of(params), decode.streams(GUIDED)

    def array(dtype, *shape: int | str) -> jax.ShapeDtypeStruct:
        sizes = tuple(rows if side == "b" else side for side in shape)
        spec = fit(mesh, ["batch" if side == "b" else None for side in shape], sizes)
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))

    ints, floats = jnp.int32, jnp.float32
    prompts = decode.Prompts(
        ids=array(ints, streams, "b", PROMPT),
        lengths=array(ints, streams, "b"),
        positions=array(ints, streams, "b", PROMPT),
        following=array(ints, streams, "b", 2),
        first=array(ints),
    )
    settings = decode.Settings(
        temperature=array(floats, "b"),
        top_k=array(ints, "b"),
        top_p=array(floats, "b"),
        scales=array(floats, streams - 1, "b"),
        contrast=array(bool, "b"),
        cd_alpha=array(floats, "b"),
        uncond_temperature=array(floats, "b"),
        penalty=array(floats, "b"),
    )
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
    with jax.set_mesh(mesh):
        return decode.decode.lower(
            model,
            grammar.pictures(vocab, vocab.text, codes),
            decode.kind(GUIDED),
            codes,
            decoder.apart(params, _layer),  # as the sampler has them
            prompts,
            grammar.State(*(array(ints, "b") for _ in grammar.State._fields)),
            settings,
            array(ints, "b", codes),
            array(keys.dtype, "b"),
        )


def _layer(stack, i: int):
    """Return what stands for a layer of an abstract stack: its sharding, without that of the layers."""
    spec = jax.sharding.PartitionSpec(*stack.sharding.spec[1:])
    return stack.update(shape=stack.shape[1:], sharding=jax.sharding.NamedSharding(stack.sharding.mesh, spec))


def _cache_bytes(recipe: Recipe, rows: int, slots: int) -> costs.Number:
    model = recipe.decoder.model
    return decode.streams(GUIDED) * rows * slots * flops.cached(model) * jnp.dtype(model.dtype).itemsize


def _flops(recipe: Recipe, rows: int, codes: int) -> costs.Flops:
    """Return the FLOPs of all streams: every slot of the cache is looked at in every step."""
    model, streams = recipe.decoder.model, decode.streams(GUIDED)
    layers, head = model.layers * flops.matrices(model), recipe.vocab.size * model.width
    passes = streams * rows * (PROMPT - 1 + codes)
    attention = streams * rows * codes * model.layers * flops.scores(model, PROMPT - 1 + codes)
    return costs.Flops(2.0 * passes * layers + 2.0 * streams * rows * codes * head, float(attention), 0.0)


def _terms(plan: Plan, mesh, found: list[hlo.Collective], codes: int, cache: costs.Number) -> estimate.Terms:
    """Return the seconds of a batch: each token reads the weights and the whole cache."""
    chip, chips = plan.target.chip, mesh.size
    weights = plan.state * mesh.shape["fsdp"]  # a chip gathers what fsdp has split
    return estimate.Terms(
        matrices=plan.flops.model / chips / chip.flops,
        attention=plan.flops.attention / chips / chip.flops,
        hbm=codes * (weights + cache) / chip.hbm,
        host=0.0,
        **estimate.exchanges(plan.target, list(mesh.devices.flat), found),
    )
