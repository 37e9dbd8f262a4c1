"""Training of the image tokenizer, as a task for the one loop (arXiv 2012.09841 §3.1, arXiv 2203.13131 §3).

The state's params are {"generator", "discriminator"}, each with its own optimizer state; without an adversarial loss
there is no discriminator. `extra` holds the codebook's upkeep, the averaged weights and the frozen feature networks.
"""

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax

import cm3jax.config as cfg
import cm3jax.data.picture_batches as picture_batches
import cm3jax.nn.discriminator as discriminators
import cm3jax.nn.perceptual as perceptual
import cm3jax.nn.quantizer as quantizer
import cm3jax.nn.vqgan as vqgan
import cm3jax.objectives.vqgan as objective
import cm3jax.optim as optim
import cm3jax.tokenizers.image as tokenizer
import cm3jax.train.state as states
from cm3jax.types import UserError

log = logging.getLogger(__name__)

RECENT = 100
"""Steps within which a code must have been chosen to count as used in the training metrics."""
SEEDS = 2**16
"""Latents at most that k-means looks at: it holds the distance of each to every code."""
JUDGED = ("adversarial", "discriminator", "adaptive_weight")
QUANTISED = ("commitment", "codebook")
"""Names of terms that start later than the others."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the step is made of: the stage's settings, its networks and optimizers by name."""

    image: cfg.Image
    resolution: int
    generator: vqgan.VQGAN
    discriminator: discriminators.PatchDiscriminator | None
    optimizers: dict[str, optax.GradientTransformation]
    networks: dict[str, Any]


def task(image: cfg.Image, resolution: int, codes: int) -> states.Task:
    """Return the task of training a tokenizer for pictures of `resolution` pixels with `codes` codes.

    A batch is what `batches` yields: {"pictures": uint8 [b, h, w, 3]}, with region losses also "boxes" [b, r, 4] and
    "kinds" [b, r].

    Raises:
      UserError: if sizes do not fit each other, or a file of weights is missing or wrong.
    """
    check(image, resolution, codes)
    for note in notes(image):
        log.warning(note)
    parts = build(image, resolution, codes)
    return states.Task(
        lambda key: init(parts, key),
        lambda state, batch, key: step(parts, state, batch, key),
        lambda state, batch: evaluate(parts, state, batch),
    )


def batches(
    prepared, image: cfg.Image, start_step: int = 0, process_index: int = 0, process_count: int = 1
) -> Iterator[picture_batches.Batch]:
    """Yield this host's share of the training batches from `start_step` on, without end; with boxes if they count."""
    host = (process_index, process_count)
    return picture_batches.batches(prepared, image.training, start_step, *host, boxes=boxes(image.loss))


def eval_batches(
    prepared, image: cfg.Image, process_index: int = 0, process_count: int = 1
) -> Iterator[picture_batches.Batch]:
    """Yield the same validation batches at every call."""
    return picture_batches.eval_batches(prepared, image.training, process_index, process_count)


def boxes(loss: cfg.VQGANLoss) -> int:
    """Return how many boxes of a picture the losses look at."""
    return loss.boxes if loss.face or loss.object else 0


def averaged(state: states.TrainState):
    """Return the generator's averaged weights, or the weights themselves if none are kept."""
    return state.extra.get("ema", state.params["generator"])


# ------------------------------------------------------------------------------------------------------------- building


def check(image: cfg.Image, resolution: int, codes: int) -> None:
    """Raise a UserError unless the settings fit each other."""
    tokenizer.check(image.model, resolution, codes)
    for field, value in (("quantizer", "nearest"), ("decoder", True)):
        if (found := getattr(image.model, field)) != value:
            raise UserError(f"image.model.{field} = {found!r}: of imported weights only; to train, set it to {value!r}")
    loss, smallest = image.loss, discriminators.SMALLEST
    if loss.adversarial and resolution < smallest:
        raise UserError(
            f"resolution {resolution}: the discriminator needs at least {smallest} pixels; set image.loss.adversarial 0"
        )
    if loss.face and not loss.face_weights:
        raise UserError(
            f"image.loss.face = {loss.face}: needs a face network; name its file in image.loss.face_weights"
        )
    if loss.object and not loss.perceptual_weights:
        raise UserError(
            f"image.loss.object = {loss.object}: needs VGG16; name its file in image.loss.perceptual_weights"
        )


def notes(image: cfg.Image) -> list[str]:
    """Return what a reader of the log must know about the losses."""
    if image.loss.perceptual and not image.loss.perceptual_weights:
        return [
            "image.loss.perceptual_weights is not set: the perceptual loss is replaced by the L1 distance of"
            " multi-scale gradients, which is no LPIPS; expect blurrier texture"
        ]
    return []


def build(image: cfg.Image, resolution: int, codes: int) -> Parts:
    """Return networks, optimizers and the weights that the losses need."""
    model = vqgan.VQGAN(image.model, codes)
    judge = None
    if image.loss.adversarial:
        judge = discriminators.PatchDiscriminator(image.loss.discriminator_width, dtype=jnp.dtype(image.model.dtype))
    training, key = image.training, jax.random.key(0)
    shapes = jax.eval_shape(lambda key: _params(model, judge, resolution, key), key)
    made = {name: optim.make(training.optimizer, training.steps, tree) for name, tree in shapes.items()}
    return Parts(image, resolution, model, judge, made, _networks(image.loss))


def _params(model, judge, resolution: int, key):
    pictures = jnp.zeros((1, resolution, resolution, 3))
    # On a CPU, compiling the default generator takes over a second per array, this one a quarter of that.
    key = jax.random.wrap_key_data(jnp.tile(jax.random.key_data(key), 2), impl="rbg")
    keys = jax.random.split(key)
    found = {"generator": model.init(keys[0], pictures)["params"]}
    return found | ({"discriminator": judge.init(keys[1], pictures)["params"]} if judge else {})


def _networks(loss: cfg.VQGANLoss) -> dict[str, Any]:
    """Return the weights of the feature networks that the losses use."""
    found = {}
    if loss.perceptual_weights and (loss.perceptual or loss.object):
        found["perceptual"] = perceptual.load(loss.perceptual_weights, heads=bool(loss.perceptual))
    if loss.face:
        found["face"] = perceptual.load(loss.face_weights, heads=False)
    return found


def init(parts: Parts, key) -> states.TrainState:
    """Return the state of step 0, boxed."""
    params = _params(parts.generator, parts.discriminator, parts.resolution, key)
    codebook = params["generator"]["codebook"]
    upkeep = quantizer.init_state(codebook.value)
    extra = {
        "codebook": upkeep.replace(sums=codebook.replace_boxed(upkeep.sums)),
        # in the state, since a compiled step would carry 59 MB of constants
        "networks": {name: perceptual.boxed(weights) for name, weights in parts.networks.items()},
    }
    if parts.image.training.ema:
        extra["ema"] = params["generator"]
    opt_state = {name: optimizer.init(params[name]) for name, optimizer in parts.optimizers.items()}
    return states.TrainState(jnp.zeros((), jnp.int32), params, opt_state, extra)


# ------------------------------------------------------------------------------------------------------------- one step


def step(parts: Parts, state: states.TrainState, batch, key) -> tuple[states.TrainState, states.Metrics]:
    """Return the state one step on: seed the codebook if it is time, update both networks, look after the codebook."""
    image, codes = parts.image, parts.generator.codes
    seed_key, revive_key = jax.random.split(key)
    state = seed(parts, state, batch["pictures"], seed_key)
    quantised, judged = state.step >= image.seed_after, state.step >= image.loss.adversarial_start
    (found, metrics), (latents, indices) = states.over_parts(
        lambda rows, i: gradients(parts, state, quantised, judged, rows), batch, image.training.accumulate
    )
    found = jax.tree.map(lambda g: g / image.training.accumulate, found)
    latents, indices = latents.reshape(-1, image.model.z), indices.reshape(-1)
    old = state.params["generator"]["codebook"]
    state = update(parts, state, found, judged)
    state = look_after(image, state, old, latents, indices, quantised, revive_key)
    young = jnp.sum(state.extra["codebook"].unused < RECENT)
    effective = quantizer.perplexity(quantizer.histogram(indices, codes))
    on = quantised.astype(jnp.float32)
    return state, metrics | {"usage": (on * young, on * codes), "perplexity": (on * effective, on)}


def gradients(parts: Parts, state: states.TrainState, quantised, judged, rows):
    """Return ((gradients, metrics), (latents, codes)) of some rows; losses are means over these.

    The decoder's output is where the losses part: each gives its gradient there, the adversarial one is scaled by the
    ratio of what the two do to the last layer, and one backward pass takes their sum through the generator. Under
    accumulation that ratio is each part's own.
    """
    loss, params, b = parts.image.loss, state.params, rows["pictures"].shape[0]
    target = objective.to_unit(rows["pictures"])
    forward = lambda generator: generate(parts, generator, target, quantised)  # noqa: E731
    (output, side), pull, aux = jax.vjp(forward, params["generator"], has_aux=True)
    compare = lambda y: objective.reconstruction(target, y, loss, state.extra["networks"], rows)  # noqa: E731
    (value, terms), direction = jax.value_and_grad(compare, has_aux=True)(output)
    terms |= aux["terms"] | {"loss": value + side}
    found = {}
    if parts.discriminator:
        extra = jax.lax.cond(judged, *_adversarial(parts, params, target, output, direction, aux["features"]))
        direction, found["discriminator"] = direction + extra["direction"], extra["gradients"]
        terms |= extra["terms"]
    (found["generator"],) = pull((direction, jnp.ones_like(side)))
    terms["psnr"] = jnp.mean(objective.psnr(rows["pictures"], objective.to_bytes(output)))
    metrics = weighted(terms, b, judged, quantised) | {"items": (jnp.float32(b), jnp.float32(1))}
    return (found, metrics), (aux["latents"], aux["indices"])


def weighted(terms, b: int, judged, quantised) -> states.Metrics:
    """Return metrics of means over b rows; what has not started yet has weight 0."""
    starts = dict.fromkeys(JUDGED, judged) | dict.fromkeys(QUANTISED, quantised)

    def one(name, term):
        on = jnp.asarray(starts.get(name, True))
        return jnp.where(on, term * b, 0.0), jnp.where(on, jnp.float32(b), 0.0)

    return {name: one(name, term) for name, term in terms.items()}


def generate(parts: Parts, generator, target, quantised):
    """Return ((reconstruction, codebook and commitment loss), what else the step needs).

    Before `quantised`, latents pass as they are.
    """
    model, config, weights = parts.generator, parts.image.model, parts.image.loss
    apply = lambda method, x: model.apply({"params": generator}, x, method=method)  # noqa: E731
    latents = apply("encode", target)
    indices = quantizer.nearest(jax.lax.stop_gradient(latents), generator["codebook"])
    vectors = quantizer.lookup(indices, generator["codebook"])
    terms = {"commitment": quantizer.commitment(latents, vectors)}
    side = weights.commitment * terms["commitment"]
    if not config.codebook_ema:
        terms["codebook"] = quantizer.codebook_loss(latents, vectors)
        side += terms["codebook"]
    features = apply("features", jnp.where(quantised, quantizer.straight_through(latents, vectors), latents))
    aux = {"latents": latents, "indices": indices, "features": features, "terms": terms}
    return (apply("pixels", features), jnp.where(quantised, side, 0.0)), aux


def _adversarial(parts: Parts, params, target, output, direction, features):
    """Return two functions for `lax.cond`: the discriminator's part of a step, and nothing of the same shape."""
    weight, judge = parts.image.loss.adversarial, parts.discriminator
    score = lambda p, x: judge.apply({"params": p}, x)  # noqa: E731

    def last_layer(cotangent):
        """Gradient of the last layer's kernel when its output has this one."""
        paint = lambda kernel: parts.generator.apply(  # noqa: E731
            {"params": params["generator"] | {"last": params["generator"]["last"] | {"kernel": kernel}}},
            features,
            method="pixels",
        )
        return jax.vjp(paint, params["generator"]["last"]["kernel"])[1](cotangent)[0]

    def on():
        fool = lambda y: objective.hinge_generator(score(params["discriminator"], y))  # noqa: E731
        fooled, towards = jax.value_and_grad(fool)(output)
        ratio = objective.adaptive_weight(last_layer(direction), last_layer(towards))
        detect = lambda p: objective.hinge_discriminator(score(p, target), score(p, output))  # noqa: E731
        detected, found = jax.value_and_grad(detect)(params["discriminator"])
        terms = {"adversarial": fooled, "discriminator": detected, "adaptive_weight": ratio}
        return {"direction": weight * ratio * towards, "gradients": found, "terms": terms}

    def off():
        return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(on))

    return on, off


def update(parts: Parts, state: states.TrainState, found, judged) -> states.TrainState:
    """Return the state after the optimizers' steps; the discriminator stands still until its start."""
    params, opt_state = {}, {}
    for name, optimizer in parts.optimizers.items():

        def move(weights, memory, optimizer=optimizer, name=name):
            updates, memory = optimizer.update(found[name], memory, weights)
            return optax.apply_updates(weights, updates), memory

        before = (state.params[name], state.opt_state[name])
        on = judged if name == "discriminator" else True
        params[name], opt_state[name] = jax.lax.cond(on, move, lambda *x: x, *before)
    return state.replace(step=state.step + 1, params=params, opt_state=opt_state)


# --------------------------------------------------------------------------------------------------------- the codebook


def seed(parts: Parts, state: states.TrainState, pictures, key) -> states.TrainState:
    """Put the codebook on the k-means centres of the batch's latents, if this is the step for it."""
    image = parts.image

    def encode(rows, i):
        target = objective.to_unit(rows)
        return (), parts.generator.apply({"params": state.params["generator"]}, target, method="encode")

    def fresh(codebook, upkeep):
        latents = states.over_parts(encode, pictures, image.training.accumulate)[1].reshape(-1, image.model.z)
        latents = latents[:: max(1, len(latents) // SEEDS)]
        codebook = quantizer.kmeans(key, latents, parts.generator.codes, image.model.l2_normalise)
        return codebook, quantizer.init_state(codebook)

    before = (state.params["generator"]["codebook"], state.extra["codebook"])
    codebook, upkeep = jax.lax.cond(state.step == image.seed_after, fresh, lambda *x: x, *before)
    return _with_codebook(state, codebook, upkeep)


def look_after(image: cfg.Image, state, old, latents, indices, quantised, key) -> states.TrainState:
    """Return the state after the optimizer's step with codebook, its usage and the averaged weights brought up to date.

    Args:
      old: The codebook that the step used. Where moving averages or nothing at all are to move it, what the optimizer
        did to it (weight decay) is undone.
    """
    decay, l2 = image.model.codebook_ema, image.model.l2_normalise
    before = state.extra["codebook"]
    codebook = state.params["generator"]["codebook"]
    upkeep = quantizer.count(before, quantizer.histogram(indices, codebook.shape[0]))
    if decay:
        upkeep, codebook = quantizer.move(upkeep, old, latents, indices, decay, l2)
    elif l2:
        codebook = quantizer.normalise(codebook)
    moved = jnp.zeros(codebook.shape[0], bool)
    if image.reset_dead_after:
        upkeep, codebook, moved = quantizer.revive(key, upkeep, codebook, latents, indices, image.reset_dead_after)
    upkeep = jax.tree.map(lambda a, b: jnp.where(quantised, a, b), upkeep, before)
    state = _with_codebook(state, jnp.where(quantised, codebook, old), upkeep)
    return _average(image, state, moved)


def _with_codebook(state, codebook, upkeep) -> states.TrainState:
    generator = state.params["generator"] | {"codebook": codebook}
    return state.replace(params=state.params | {"generator": generator}, extra=state.extra | {"codebook": upkeep})


def _average(image: cfg.Image, state, moved) -> states.TrainState:
    """Return the state with averaged weights; a code that jumped, or is an average already, is copied."""
    if not image.training.ema:
        return state
    generator = state.params["generator"]
    ema = states.average(state.extra["ema"], generator, image.training.ema, state.step)
    copied = moved | bool(image.model.codebook_ema) | (state.step <= image.seed_after + 1)
    ema["codebook"] = jnp.where(copied[:, None], generator["codebook"], ema["codebook"])
    return state.replace(extra=state.extra | {"ema": ema})


# ----------------------------------------------------------------------------------------------------------- evaluation


def evaluate(parts: Parts, state: states.TrainState, batch) -> states.Metrics:
    """Return the metrics of a validation batch with the averaged weights; usage and perplexity are a batch's own."""
    target, b = objective.to_unit(batch["pictures"]), jnp.float32(batch["pictures"].shape[0])
    output, indices = parts.generator.apply({"params": averaged(state)}, target)
    counts = quantizer.histogram(indices, parts.generator.codes)
    psnr = objective.psnr(batch["pictures"], objective.to_bytes(output))
    error = target - output
    return {
        "psnr": (jnp.sum(psnr), b),
        "l1": (jnp.mean(jnp.abs(error)) * b, b),
        "l2": (jnp.mean(jnp.square(error)) * b, b),
        "batch_usage": (quantizer.usage(counts), jnp.float32(1)),
        "batch_perplexity": (quantizer.perplexity(counts), jnp.float32(1)),
    }
