"""Recipes: the stages in order, which of them are stale, and what each calls.

    prepare -> text, image -> tokens -> decoder -> evaluate

and, for a recipe that retrieves, `retriever -> bank -> neighbours` between tokens and decoder.

Every stage is `f(recipe, run folder)`. It leaves its files in its own folder, and continues from them when it was
interrupted. The calls import what they need when they run, so that preparing data never loads jax.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import time
from collections.abc import Callable
from typing import Any

from cm3jax import config, hosts, stages
from cm3jax.config import Recipe
from cm3jax.types import UserError
from cm3jax.vocab import EOD


@dataclasses.dataclass(frozen=True)
class Stage:
    """One step of a recipe.

    Attributes:
      output: Folder below the run folder that holds all it leaves, and its stage.json.
      inputs: Stages whose results it reads.
      settings: The part of the recipe that it depends on, as JSON types.
      call: Does the work.
      wanted: Whether a recipe has this stage.
    """

    name: str
    output: str
    inputs: tuple[str, ...]
    settings: Callable[[Recipe], dict[str, Any]]
    call: Callable[[Recipe, pathlib.Path], None]
    wanted: Callable[[Recipe], bool] = lambda recipe: True

    def folder(self, run: pathlib.Path) -> pathlib.Path:
        return run / self.output


def settings(section: str, *vocab: str) -> Callable[[Recipe], dict[str, Any]]:
    """Return the function that takes `section` and some sizes of the vocabulary out of a recipe."""

    def take(recipe: Recipe) -> dict[str, Any]:
        sizes = {name: getattr(recipe.vocab, name) for name in vocab}
        return {section: config.to_json(getattr(recipe, section))} | ({"vocab": sizes} if sizes else {})

    return take


def token_settings(recipe: Recipe) -> dict[str, Any]:
    """Return what token shards depend on: also the form of documents, if that is not CM3Leon's."""
    form = {} if recipe.form == config.Form() else {"form": config.to_json(recipe.form)}
    return settings("tokens", "text", "image")(recipe) | form


# ------------------------------------------------------------------------------------------------------------ the calls


def prepare(recipe: Recipe, run: pathlib.Path) -> None:
    """Source -> prepared/; several processes share the shards, the lead writes the summary."""
    from cm3jax.data import prepare

    if hosts.count() > 1:
        prepare.part(recipe.prepare, run / "prepared", hosts.index(), hosts.count(), progress=hosts.lead())
        hosts.barrier("prepared shards")
    if hosts.lead():
        prepare.prepare(recipe.prepare, run / "prepared")


def text(recipe: Recipe, run: pathlib.Path) -> None:
    """Texts of the splits that the recipe names -> text/tokenizer.model."""
    from cm3jax.data import index, shards
    from cm3jax.tokenizers import text

    index.check(run / "prepared", HOW["prepare"].format(run=run))
    reader = shards.Reader(run / "prepared", *recipe.text.splits)
    texts = (part for i in range(len(reader)) for part in shards.texts(reader.read_bytes(i)))
    tokenizer = text.train(texts, recipe.vocab.text, run / "text" / "tokenizer.model", recipe.text)
    say(f"text: {tokenizer.size} entries of at most {recipe.vocab.text}")


def image(recipe: Recipe, run: pathlib.Path) -> None:
    """Pictures of the training split -> image/."""
    from cm3jax import hooks, sharding
    from cm3jax.data import index, shards
    from cm3jax.tokenizers import image
    from cm3jax.train import loop, vqgan

    index.check(run / "prepared", HOW["prepare"].format(run=run))
    stage, host = recipe.image, sharding.host_share(sharding.mesh(recipe.image.training.mesh))
    prepared, resolution, codes = run / "prepared", recipe.prepare.resolution, recipe.vocab.image
    held_out = "validation" in shards.splits(prepared)
    state = loop.train(
        vqgan.task(stage, resolution, codes),
        lambda step: vqgan.batches(prepared, stage, step, *host),
        (lambda: vqgan.eval_batches(prepared, stage, *host)) if held_out else None,
        stage.training,
        run / "image",
        hooks=sampled(stage.training, vqgan.averaged, hooks.reconstructions, recipe, run),
        name="image",
        meta={"data": stages.read(prepared).result, "model": config.to_json(stage.model)},
    )
    weights = hosts.whole(vqgan.averaged(state))
    if hosts.lead():
        image.save(run / "image", stage.model, codes, resolution, weights)


def tokens(recipe: Recipe, run: pathlib.Path) -> None:
    """Records and the two tokenizers -> tokens/; several processes share the shards, the lead writes the index."""
    from cm3jax.data import encode

    encode_shards(recipe, run, hosts.index(), hosts.count())
    hosts.barrier("token shards")
    if hosts.lead() and not encode.finish(run / "prepared", run / "tokens"):
        raise UserError(f"{run / 'tokens'}: not all shards are there; do the hosts see one disk?")


def encode_shards(recipe: Recipe, run: pathlib.Path, host: int, hosts: int) -> None:
    """Write the token shards of one host, with the image tokenizer on all its chips, and say how fast it was."""
    import jax
    import numpy as np

    from cm3jax.data import encode, index
    from cm3jax.tokenizers import image, text

    prepared, out, devices = run / "prepared", run / "tokens", tuple(jax.local_devices())
    index.check(prepared, HOW["prepare"].format(run=run))
    if not encode.missing(prepared, out, host, hosts):
        return
    batch = -(-recipe.tokens.batch // len(devices)) * len(devices)
    tokenizer, pictures = text.load(run / "text"), image.load(run / "image", batch, devices)
    count = 0

    def codes(found):
        nonlocal count
        count += len(found)
        return pictures.encode(found)

    pictures.encode(np.zeros((1, *(pictures.resolution,) * 2, 3), np.uint8))  # compiles, which no rate should count
    start = time.monotonic()
    arguments = prepared, out, codes, tokenizer, recipe.vocab, batch, host, hosts, recipe.tokens.workers, recipe.form
    encode.encode(*arguments)
    rate = count / (time.monotonic() - start)
    chips = f"{rate / len(devices):.1f} per chip ({len(devices)} x {devices[0].device_kind})"
    say(f"tokens: {count:,} pictures, {rate:.1f} a second, {chips}, reading included")


def retrieves(recipe: Recipe) -> bool:
    return recipe.retrieve


def retriever(recipe: Recipe, run: pathlib.Path) -> None:
    """Pairs of the training split, or published weights -> retriever/."""
    from cm3jax import sharding, trees
    from cm3jax.data import index, pair_batches, shards
    from cm3jax.retrieval import encoder
    from cm3jax.tokenizers import clip as tokenizers
    from cm3jax.train import clip, loop
    from cm3jax.train import state as states

    if recipe.retriever.weights:
        published = encoder.read_published(recipe.retriever.weights)
        say(f"retriever: {trees.size(published[1]):,} parameters from {recipe.retriever.weights}")
        return encoder.save(run / "retriever", *published) if hosts.lead() else None
    index.check(run / "prepared", HOW["prepare"].format(run=run))
    stage, prepared = recipe.retriever, run / "prepared"
    host = sharding.host_share(sharding.mesh(stage.training.mesh))
    tokenizer = tokenizers.load(run / "text")
    held_out = "validation" in shards.splits(prepared)
    state = loop.train(
        clip.task(stage, tokenizer.rows),
        lambda step: pair_batches.batches(prepared, stage, tokenizer, step, *host),
        (lambda: pair_batches.eval_batches(prepared, stage, tokenizer, *host)) if held_out else None,
        stage.training,
        run / "retriever",
        name="retriever",
        meta={"data": stages.read(prepared).result, "model": config.to_json(stage.model)},
    )
    weights = hosts.whole(states.averaged(state))
    if hosts.lead():
        encoder.save(run / "retriever", stage.model, weights, tokenizer)


def bank(recipe: Recipe, run: pathlib.Path) -> None:
    """Records and the retriever -> bank/: a vector for each document; the hosts share the shards."""
    from cm3jax.data import index, pipeline, shards
    from cm3jax.retrieval import bank, encoder, search

    prepared, out, settings = run / "prepared", run / "bank", recipe.bank
    index.check(prepared, HOW["prepare"].format(run=run))
    mine = bank.plan(prepared, out, settings)[hosts.index() :: hosts.count()]
    left = [shard for shard in bank.missing(prepared, out, settings) if shard in mine]
    found = encoder.load(run / "retriever", settings.batch)
    for shard in left:
        reader = shards.Reader(prepared, shard.split)
        records = pipeline.read(reader, shard.first, shard.stop)
        bank.write(out, shard, encoder.embed(found, records, lambda line: say(f"bank: {line}")))
    hosts.barrier("bank shards")
    if not hosts.lead():
        return
    if not bank.finish(prepared, out, settings, found.identity):
        raise UserError(f"{out}: not all shards are there; do the hosts see one disk?")
    made = bank.open(out, found.identity)
    say(f"bank: {len(made):,} documents of {made.size} numbers; {len(made.held_out):,} marks are held out")
    if settings.search in search.APPROXIMATE:
        search.build(made, settings, say)
        say(search.measured(made, settings, sampled_queries(prepared, made, found)))


def sampled_queries(prepared: pathlib.Path, made, encoder):
    """Return the vectors of the texts and of the pictures of some documents of the bank: queries as retrieval has."""
    import numpy as np

    from cm3jax.data import shards
    from cm3jax.retrieval import neighbours

    readers = {split: shards.Reader(prepared, split) for split in made.splits}
    places = [made.place(int(i)) for i in np.unique(np.linspace(0, len(made) - 1, RECALL).astype(np.int64))]
    records = [readers[place.split][place.index] for place in places]
    plain = config.Neighbours(dropout=0.0)
    queries = np.concatenate([by(records, encoder, plain) for by in (neighbours.by_image, neighbours.by_text)])
    return queries[queries.any(1)]


RECALL = 128
"""Documents whose texts and pictures an approximate index is measured with."""


def neighbours(recipe: Recipe, run: pathlib.Path) -> None:
    """Records of every split and the bank -> neighbours/; hosts share the shards, unless all search the one mesh."""
    from cm3jax.data import index
    from cm3jax.retrieval import bank, encoder, neighbours, search

    prepared, out, together = run / "prepared", run / "neighbours", recipe.bank.search == "mesh"
    index.check(prepared, HOW["prepare"].format(run=run))
    found = encoder.load(run / "retriever", recipe.bank.batch)
    made = bank.open(run / "bank", found.identity)
    left = hosts.leads([list(shard) for shard in neighbours.missing(prepared, out)])
    left = [tuple(shard) for shard in left][0 if together else hosts.index() :: 1 if together else hosts.count()]
    searcher, start = search.open(made, recipe.bank), time.monotonic()
    write = hosts.lead() or not together
    count = neighbours.make(prepared, out, made, searcher, found, recipe.neighbours, left, write)
    if count:
        say(f"neighbours: {count:,} documents, {count / (time.monotonic() - start):.1f} a second")
    hosts.barrier("neighbour shards")
    if not hosts.lead():
        return
    if neighbours.missing(prepared, out):
        raise UserError(f"{out}: not all shards are there; do the hosts see one disk?")
    index.write(out)
    for line in neighbours.describe(out):
        say(f"neighbours: {line}")


def decoder(recipe: Recipe, run: pathlib.Path) -> None:
    """Token shards -> decoder/."""
    import jax

    from cm3jax import hooks, sharding
    from cm3jax.data import index, mixing, paths, pipeline, retrieved
    from cm3jax.data import tokens as token_shards
    from cm3jax.train import lm, loop
    from cm3jax.train import state as states

    sets = tuple(paths.at_hand(name, run / ".sets") for name in recipe.decoder.mixture.sets)
    for folder in (run / "tokens", *sets):
        check_set(folder, run / "tokens")
        index.check(folder, HOW["tokens"].format(run=folder.parent))
    if recipe.decoder.start:
        check_start(pathlib.Path(recipe.decoder.start), run / "tokens")
    stage, vocab = recipe.decoder, recipe.vocab
    host = sharding.host_share(sharding.mesh(stage.training.mesh))
    held_out = "validation" in token_shards.splits(run / "tokens")
    mixture = dataclasses.replace(stage.mixture, sets=tuple(map(str, sets)))
    stage = dataclasses.replace(stage, mixture=mixture)
    source = retrieved.source(recipe, run)
    found = mixing.open(run / "tokens", "train", stage, source)
    facts = pipeline.describe(found, stage)
    say(
        "decoder: {documents:,} documents of {tokens:,} tokens in {rows:,} rows an epoch, {filled:.0%} filled,"
        " {too_long:,} left out as too long".format(**facts)
    )
    if pipeline.retrieving(found):
        say(
            "decoder: {retrieved:,} documents are retrieved for them in an epoch, {given_up:,} more had no room in"
            " a row".format(**facts)
        )
    for line in found.describe(stage.training.steps * stage.training.batch / facts["rows"]) if sets else ():
        say(f"decoder: {line}")
    model = stages.significant(config.to_json(stage.model), "decoder.model")
    meta = {"data": pipeline.fingerprint(found, stage, vocab), "model": model}
    resolved = lm.resolve(stage, device := jax.devices()[0])
    say(f"decoder: attention by {resolved.model.attention} on {device.device_kind}")
    if stage.start:
        say(f"decoder: begins with the weights in {pathlib.Path(stage.start) / STAGES['decoder'].output}")
    loop.train(
        lm.task(resolved, vocab),
        lambda step: pipeline.batches(run / "tokens", "train", stage, vocab, step, *host, source),
        (lambda: pipeline.eval_batches(run / "tokens", "validation", stage, vocab, True, *host, source))
        if held_out
        else None,
        stage.training,
        run / "decoder",
        hooks=sampled(stage.training, states.averaged, hooks.drawings, recipe, run),
        name="decoder",
        meta=meta,
        weights=(lambda target: begun(recipe, target)) if stage.start else None,
    )


def begun(recipe: Recipe, target):
    """Return the weights in `decoder.start`, in the shapes and places of a tree; with new rows if `decoder.unseen`."""
    from cm3jax import checkpoint, rng
    from cm3jax.data import tokens as token_shards
    from cm3jax.train import lm

    stage, vocab, start = recipe.decoder, recipe.vocab, pathlib.Path(recipe.decoder.start)
    found = checkpoint.load_params(start / STAGES["decoder"].output, target=target)
    if stage.unseen == "kept":
        return found
    seen = token_shards.Tokens(start / "tokens", "train").counts(vocab.size) > 0
    count = vocab.text - int(seen[vocab.text_start : vocab.image_start].sum())
    say(f"decoder: rows are drawn for {count} text pieces that these never saw")
    return lm.drawn(found, vocab, seen, rng.key(stage.training.seed, "unseen"))


def check_set(folder: pathlib.Path, own: pathlib.Path) -> None:
    """Raise UserError unless a token folder was made, to its end, with the tokenizers of the run's own."""
    mine, record = stages.read(own), stages.read(folder)
    if record is None or not record.complete:
        raise UserError(f"token set {str(folder)!r}: no finished tokens/ folder of a run; cm3jax encode RUN makes one")
    for name in TOKENIZERS:
        if record.inputs.get(name) != mine.inputs.get(name):
            raise UserError(
                f"token set {str(folder)!r}: made with another {name} tokenizer than {str(own)!r}; make it again with"
                f" cm3jax encode {folder.parent} --redo --tokenizers {own.parent}"
            )


def check_start(start: pathlib.Path, tokens: pathlib.Path) -> None:
    """Raise UserError unless the run whose decoder training begins with has the tokenizers of a token folder."""
    mine = stages.read(tokens)
    for name in TOKENIZERS:
        record = stages.read(STAGES[name].folder(start))
        if record is None or record.result != mine.inputs.get(name):
            odd = "has no" if record is None else "has another"
            raise UserError(
                f"decoder.start = {start}: {odd} {name} tokenizer than {str(tokens)!r} was made with; make that again"
                f" with cm3jax encode {tokens.parent} --redo --tokenizers {start}"
            )


def sampled(training: config.Training, weights, hook, recipe: Recipe, run: pathlib.Path) -> list:
    """Return the loop's hooks: the sheet of sample pictures by weights(state), if the settings ask for one."""
    if not training.sample_every:
        return []
    draw = hook(recipe, run)

    def sheet(state, step: int) -> None:
        """Let the lead draw; with several hosts on one of its devices, with weights that all bring together."""
        params = weights(state) if hosts.count() == 1 else hosts.whole(weights(state))
        if hosts.lead():
            draw(params, step)
        hosts.barrier("sample pictures")

    return [(training.sample_every, sheet)]


def evaluate(recipe: Recipe, run: pathlib.Path) -> None:
    """Everything before -> evaluate/."""
    from cm3jax.evaluate import protocol

    protocol.evaluate(recipe, run, say)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("prepare", "prepared", (), settings("prepare"), prepare),
        Stage("text", "text", ("prepare",), settings("text", "text"), text),
        Stage("image", "image", ("prepare",), settings("image", "image"), image),
        Stage("tokens", "tokens", ("prepare", "text", "image"), token_settings, tokens),
        Stage("retriever", "retriever", ("prepare", "text"), settings("retriever"), retriever, retrieves),
        Stage("bank", "bank", ("prepare", "retriever"), settings("bank"), bank, retrieves),
        Stage(
            "neighbours",
            "neighbours",
            ("prepare", "retriever", "bank"),
            settings("neighbours"),
            neighbours,
            retrieves,
        ),
        Stage(
            "decoder",
            "decoder",
            ("tokens", "neighbours"),
            settings("decoder", "text", "image", "sentinels", "multiple"),
            decoder,
        ),
        Stage(
            "evaluate",
            "evaluate",
            ("prepare", "text", "image", "tokens", "retriever", "bank", "neighbours", "decoder"),
            settings("evaluate"),
            evaluate,
        ),
    )
}

# -------------------------------------------------------------------------------------------------------- what is stale


def run(recipe: Recipe, folder, redo: str = "", only: str = "") -> pathlib.Path:
    """Bring every stage of a recipe up to date; return the run folder.

    Args:
      redo: Stage to make again from nothing, with all that depend on it.
      only: The one stage to bring up to date; those before it must be.

    Raises:
      UserError: if settings do not fit each other or the source; if one changed since a stage was made, naming it; or
        if an input of `only` is not there.
    """
    from cm3jax.data import paths

    paths.local_only(folder, "run folder")
    paths.reach(folder)
    folder = pathlib.Path(folder)
    names = [only] if only else [stage.name for stage in STAGES.values() if stage.wanted(recipe)]
    refuse_misfits(recipe, names)
    with stages.locked(folder) if hosts.lead() else contextlib.nullcontext():
        hosts.barrier("the run folder is there")
        for name in names:
            if not redo or name not in dependents(redo):
                refuse_changes(STAGES[name], recipe, folder, again(name, only))
                if all(stages.read(STAGES[n].folder(folder)) for n in (name, *needs(name, recipe))):
                    fitting_inputs(STAGES[name], recipe, folder, again(name, only))
        if only:
            require(needs(only, recipe), folder)
        hosts.barrier("the run folder is looked at")
        if hosts.lead():
            if redo:  # only now: a command that is refused deletes nothing
                forget(folder, redo)
            stages.write_text(folder / "recipe.json", json.dumps(config.to_json(recipe), indent=1) + "\n")
            if recipe.decoder.start and not only:
                take_tokenizers(recipe.decoder.start, folder)
        hosts.barrier("the run folder is ready")
        for i, name in enumerate(names):
            bring(STAGES[name], recipe, folder, f"[{i + 1}/{len(names)}] {name}", again(name, only))
            if name == "prepare" and "evaluate" in names:
                require_test(folder / "prepared")
        if "evaluate" in names and hosts.lead():
            publish(folder)
    return folder


def needs(name: str, recipe: Recipe) -> list[str]:
    """Return the stages whose results a stage reads, of those that the recipe has."""
    return [n for n in STAGES[name].inputs if STAGES[n].wanted(recipe)]


def dependents(name: str) -> list[str]:
    """Return a stage and all that need its result, in order."""
    found = {name: None}
    for stage in STAGES.values():  # in order, so one pass is enough
        if found.keys() & set(stage.inputs):
            found[stage.name] = None
    return list(found)


def forget(folder: pathlib.Path, name: str) -> None:
    """Delete the results of a stage and of all that depend on it.

    Raises:
      UserError: if there is no such stage.
    """
    if name not in STAGES:
        raise UserError(f"--redo {name}: no such stage; stages: {', '.join(STAGES)}")
    for stage in map(STAGES.get, dependents(name)):
        stages.remove(stage.folder(folder))
    for report in REPORT:  # it tells of the evaluation, which depends on every stage
        stages.remove(folder / report)


def refuse_misfits(recipe: Recipe, names: list[str]) -> None:
    """Raise UserError for what would stop one of these stages after others have worked for hours."""
    if "prepare" in names:
        from cm3jax.data import prepare, sources

        prepare.check(recipe.prepare)
        if not recipe.prepare.source.startswith("tfds:"):  # to ask it would load TensorFlow, and perhaps download
            sources.open(recipe.prepare)
    side, factor = recipe.prepare.resolution, recipe.image.model.factor
    if "image" in names and side % factor:
        near = max(factor, round(side / factor) * factor)
        raise UserError(
            f"prepare.resolution = {side}: not a multiple of image.model's {factor} pixels per code; take {near}, or"
            " change image.model.patch or .multipliers"
        )
    if "retriever" in names and recipe.retriever.weights:
        refuse_weights(recipe.retriever)
    if "decoder" in names and recipe.decoder.start:
        refuse_start(recipe)
    codes, packing = (side // factor) ** 2, recipe.decoder.packing
    codes += recipe.form.grid and recipe.form.grid + 2  # ends of rows, and both sides
    if "decoder" in names and packing.kind == "whole" and packing.length < codes + LEAST_AROUND:
        raise UserError(
            f"decoder.packing.length = {packing.length}: no row holds a picture of {codes} codes and a caption; set it"
            f" to {codes + LEAST_AROUND} and some room for text and markers"
        )


def refuse_start(recipe: Recipe) -> None:
    """Raise UserError unless the run whose decoder training begins with is there, and of the same network."""
    from cm3jax import checkpoint

    where, start = f"decoder.start = {recipe.decoder.start}", pathlib.Path(recipe.decoder.start)
    if not (start / "recipe.json").is_file() or not checkpoint.steps(start / STAGES["decoder"].output):
        raise UserError(f"{where}: no run folder with a decoder; give one that was trained or imported")
    require(TOKENIZERS, start)
    tokens = stages.read(start / "tokens")
    if recipe.decoder.unseen == "drawn" and not (tokens and tokens.complete):
        raise UserError(f"{where}: has no tokens/ to say which pieces its model saw; set decoder.unseen to kept")
    theirs, ours = (
        config.to_json(known.decoder.model)
        | config.to_json(known.vocab)
        | stages.flatten(config.to_json(known.image.model), "image.model")
        for known in (config.load(start / "recipe.json"), recipe)
    )
    kept = {"attention", "remat", "dtype"}  # how the same weights are computed with
    if odd := [name for name, value in theirs.items() if name not in kept and ours.get(name) != value]:
        raise UserError(
            f"{where}: its {odd[0]} is {theirs[odd[0]]!r}, this recipe's {ours.get(odd[0])!r}; train with"
            f" {start / 'recipe.json'} as the config"
        )


TOKENIZERS = ("text", "image")
"""Stages that say what a decoder's ids mean."""


def take_tokenizers(source, folder) -> None:
    """Copy both tokenizers of a run into another run's folder, as an import would: a model is good for their ids alone.

    Raises:
      UserError: if it has none, or the folder has others.
    """
    source, folder = pathlib.Path(source), pathlib.Path(folder)
    require(TOKENIZERS, source)
    for name in TOKENIZERS:
        wanted, own = (stages.read(STAGES[name].folder(run)) for run in (source, folder))
        if own and own.result != wanted.result:
            raise UserError(f"{folder / name}: not that of {source}; remove it, or take another run folder")
        if own:
            continue
        for file in wanted.files:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source / file, folder / file)
        taken(folder, name, decided(config.load(source / "recipe.json"), name), str(source))


def decided(recipe: Recipe, name: str) -> dict[str, Any]:
    """Return the settings of a stage that its files decide, by whatever they were trained."""
    if name == "text":
        return {"vocab": {"text": recipe.vocab.text}}
    fields = ("model", "packing", "mask") if name == "decoder" else ("model",)
    section = getattr(recipe, name)
    found: dict[str, Any] = {name: {field: config.to_json(getattr(section, field)) for field in fields}}
    return found | ({"vocab": {"image": recipe.vocab.image}} if name == "image" else {})


def taken(folder: pathlib.Path, name: str, settings: dict[str, Any], origin: str) -> None:
    """Write the stage.json of a stage whose files come from elsewhere."""
    files = stages.files(folder, STAGES[name].output)
    result, digest = stages.fingerprint(folder, files), config.digest(stages.significant(settings))
    made = stages.Record(settings, digest, {}, True, result, files, imported=origin)
    stages.write(STAGES[name].folder(folder), made)


def refuse_weights(stage: config.Retriever) -> None:
    """Raise UserError unless the published weights that a stage names are there, whole and of its network."""
    from cm3jax.retrieval import weights
    from cm3jax.tokenizers import clip

    clip.load(stage.weights)
    found, wanted = (stages.flatten(config.to_json(x)) for x in (weights.look(stage.weights), stage.model))
    if flags := [f"--retriever.model.{name} {value}" for name, value in found.items() if value != wanted[name]]:
        raise UserError(
            f"retriever.weights = {stage.weights}: of another network than retriever.model; add {' '.join(flags)}"
        )


LEAST_AROUND = 4
"""Tokens of the shortest pair beside the picture's codes: <eod>, one of text, <break>, <eod>."""


def require_test(prepared: pathlib.Path) -> None:
    """Raise UserError if there are records and none to evaluate on: now, and not when all is trained."""
    from cm3jax.data import shards

    found = shards.splits(prepared)
    if found and "test" not in found:
        raise UserError(
            f"{prepared}: no record in the test split, which the evaluation needs; give it a larger share with"
            " --prepare.test 0.1 --prepare.validation 0.1 --redo prepare, or mark some rows of the source as test"
        )


def again(name: str, only: str) -> str:
    """Return how to make a stage again, or keep it, in words that fit the verb: `run`, or the one of a single stage."""
    if not only:
        return f"--redo {name}, or keep both with another --out"
    own = {"evaluate": "cm3jax evaluate, without --suite"} | {memory: f"--redo {memory}" for memory in MEMORY}
    return f"{own.get(name, '--redo')}, or keep both in another run folder"


def refuse_changes(stage: Stage, recipe: Recipe, folder: pathlib.Path, how: str) -> None:
    """Raise UserError if the recipe differs from what the stage on disk was made with."""
    record = stages.read(stage.folder(folder))
    now = stage.settings(recipe)
    if record and record.imported:  # knows of nothing but what the import decided
        now = stages.common(record.config, now)
    changed = stages.differences(record.config, now) if record else []
    if changed:
        raise UserError(
            f"{stage.folder(folder)}: {stages.describe(changed)}; set it back, make the stage and what follows"
            f" again with {how}"
        )


def fitting_inputs(stage: Stage, recipe: Recipe, folder: pathlib.Path, how: str) -> dict[str, str]:
    """Return the fingerprints of what a stage reads.

    Raises:
      UserError: if they are not those that it was begun with.
    """
    record = stages.read(stage.folder(folder))
    now = {} if record and record.imported else inputs(stage, recipe, folder)
    if record and record.inputs != now:
        changed = ", ".join(sorted(k for k in {**now, **record.inputs} if now.get(k) != record.inputs.get(k)))
        whole = (stage.name, changed) == ("decoder", "neighbours") and record.complete
        keep = f"; as it is it draws with the memory there now, and cm3jax evaluate {folder} scores it" if whole else ""
        raise UserError(
            f"{stage.folder(folder)}: made from another {changed} than the one there now; make it and what"
            f" follows again with {how}{keep}"
        )
    return now


def require(names, folder: pathlib.Path) -> None:
    """Raise UserError unless the stages are finished and whole."""
    for name in names:
        record = stages.read(STAGES[name].folder(folder))
        if record is None or not record.complete:
            state = "not finished" if record else "not there"
            raise UserError(f"{STAGES[name].folder(folder)}: {state}, and needed here; {HOW[name].format(run=folder)}")
        if fault := stages.missing(folder, record):
            raise UserError(f"{folder}: {fault}; {HOW[name].format(run=folder)}")


REPORT = ("report.json", "report.html", "samples.png", "tasks.png")
HOW = {
    "prepare": "make it with: cm3jax prepare SOURCE {run}",
    "text": "make it with: cm3jax train CONFIG --inputs {run} --stage text",
    "image": "make it with: cm3jax train CONFIG --inputs {run} --stage image",
    "tokens": "make it with: cm3jax encode {run}",
    "retriever": "make it with: cm3jax retrieve build {run}",
    "bank": "make it with: cm3jax retrieve build {run}",
    "neighbours": "make it with: cm3jax retrieve build {run}",
    "decoder": "make it with: cm3jax train CONFIG --inputs {run}",
    "evaluate": "make it with: cm3jax evaluate {run}",
}


def inputs(stage: Stage, recipe: Recipe, folder: pathlib.Path) -> dict[str, str]:
    """Return the fingerprints of what a stage reads: earlier results, or the data source."""
    if stage.name == "prepare":
        return source(recipe.prepare)
    return {name: stages.read(STAGES[name].folder(folder)).result for name in needs(stage.name, recipe)}


def source(prepare: config.Prepare) -> dict[str, str]:
    """Return the fingerprint of the data source; tfds has its versions, and asking it would load TensorFlow.

    Raises:
      UserError: if there is no such source.
    """
    from cm3jax.data import sources

    return {} if prepare.source.startswith("tfds:") else {"source": config.digest(sources.open(prepare).fingerprint())}


def bring(stage: Stage, recipe: Recipe, folder: pathlib.Path, title: str, how: str) -> None:
    """Make a stage's result unless the one on disk is whole and made from the same things.

    Raises:
      UserError: if its inputs are not those that it was begun with.
    """
    now, record = fitting_inputs(stage, recipe, folder, how), stages.read(stage.folder(folder))
    if record and record.complete and not (fault := stages.missing(folder, record)):
        return say(f"{title}: {f'imported from {record.imported}' if record.imported else 'up to date'}")
    if record and record.imported:
        raise UserError(f"{folder}: {fault}; import it again from {record.imported}")
    if record:
        say(f"{title}: {fault if record.complete else 'was interrupted'}; continues after {record.seconds:.0f} s")
    else:
        say(title)
    make(stage, recipe, folder, record or stages.Record(), now)
    say(f"{title}: {stages.read(stage.folder(folder)).seconds:.1f} s in all")


TOGETHER = {"prepare", "image", "tokens", "retriever", "bank", "neighbours", "decoder"}
"""Stages that all hosts work on; during the others they wait for the lead."""


def make(stage: Stage, recipe: Recipe, folder: pathlib.Path, record: stages.Record, now: dict[str, str]) -> None:
    """Run one stage and write its record, which the lead does alone."""
    hosts.barrier(f"{stage.name} begins")  # else the lead's first write may come before another host's look
    if hosts.lead():
        _make(stage, recipe, folder, record, now)
    elif stage.name in TOGETHER:
        stage.call(recipe, folder)
    hosts.barrier(f"{stage.name} ends")


ON_DEVICES = {"image", "tokens", "retriever", "bank", "neighbours", "decoder", "evaluate"}
"""Stages that compute with jax; the others never ask for its devices."""


def devices() -> dict[str, int]:
    """Return {kind: number} of all devices of this run."""
    import jax

    return dict(collections.Counter(device.device_kind for device in jax.devices()))


def _make(stage: Stage, recipe: Recipe, folder: pathlib.Path, record: stages.Record, now: dict[str, str]) -> None:
    record.config = stage.settings(recipe)
    record.hash = config.digest(stages.significant(record.config))
    record.inputs, record.complete = now, False
    held = devices() if stage.name in ON_DEVICES else None
    with stages.measured(stage.folder(folder), record, devices=held):
        stage.call(recipe, folder)
        record.files = stages.files(folder, stage.output)
        record.result = stages.fingerprint(folder, record.files)
        record.complete = True


def publish(folder: pathlib.Path) -> None:
    """Write report.json (the scores, seconds of each stage, peak memory), report.html and its sheets of pictures."""
    from cm3jax import report

    scores = json.loads((folder / "evaluate" / "scores.json").read_text())
    measured = stages.summary(folder, {stage.name: stage.output for stage in STAGES.values()})
    stages.write_text(folder / "report.json", json.dumps({**scores, **measured}, indent=1) + "\n")
    report.write(folder)


def say(line: str) -> None:
    if hosts.lead():
        print(line, flush=True)


# -------------------------------------------------------------------------------------------------- one stage by itself


MEMORY = ("retriever", "bank", "neighbours")


def build_memory(recipe: Recipe, folder, redo: str = "", extend: bool = False) -> None:
    """Bring retriever, bank and neighbours up to date.

    Args:
      redo: The one of them to make again from nothing, with all that depend on it.
      extend: Keep the bank's vectors though its splits have grown, or it is searched another way.

    Raises:
      UserError: as `run`, or if the recipe does not retrieve.
    """
    folder = pathlib.Path(folder)
    if not recipe.retrieve:
        raise UserError(f"{folder}: its recipe does not retrieve; add --retrieve to make a memory for it")
    if extend and hosts.lead():
        with stages.locked(folder):
            extend_bank(recipe, folder)
    hosts.barrier("the bank may grow")
    for name in MEMORY:
        run(recipe, folder, redo=name if name == redo else "", only=name)


def extend_bank(recipe: Recipe, folder: pathlib.Path) -> None:
    """Let a finished bank continue under settings that add splits or change the search; neighbours are made again.

    Raises:
      UserError: if there is no finished bank, or the settings would change vectors that are in it.
    """
    from cm3jax.retrieval import bank

    stage = STAGES["bank"]
    record = stages.read(stage.folder(folder))
    if record and not stages.differences(record.config, stage.settings(recipe)):
        return  # nothing to add, or an extension that was interrupted
    require(["bank"], folder)
    old, new = config.from_json(config.Bank, record.config["bank"], "bank"), recipe.bank
    if new.splits[: len(old.splits)] != old.splits:
        raise UserError(
            f"--extend: bank.splits {old.splits} can only grow at their end, here {new.splits}; else make the bank"
            " again with --redo bank"
        )
    bank.plan(folder / "prepared", stage.folder(folder), new)  # a split that is not there is refused before a change
    bank.held_out_splits(folder / "prepared", new)
    record.config, record.complete = stage.settings(recipe), False
    stages.write(stage.folder(folder), record)
    stages.remove(STAGES["neighbours"].folder(folder))


def fetch(stage: str, url: str, folder: pathlib.Path, recipe: Recipe) -> None:
    """Copy what a stage needs of a run in a bucket into a run folder.

    Of prepared/, a stage that does not train on it gets the validation split, whose captions sample pictures are of.
    """
    from cm3jax.data import paths, shards

    def sample(file: str) -> bool:
        return file.startswith("validation-") or not shards.NAME.fullmatch(file)

    for name in [s for s in STAGES if stage in dependents(s) and s != stage and STAGES[s].wanted(recipe)]:
        whole = name != "prepare" or "prepare" in STAGES[stage].inputs
        wanted = (lambda file: True) if whole else sample
        paths.copy(f"{url.rstrip('/')}/{STAGES[name].output}", STAGES[name].folder(folder), wanted)


def adopt(recipe: Recipe, folder, stage: str) -> Recipe:
    """Return the recipe with the settings of all earlier stages as they are on disk in `folder`.

    Raises:
      UserError: if the recipe's vocabulary is not the one that those stages were made with, or its settings do not go
        with the form of their documents.
    """
    for name in STAGES[stage].inputs:
        recipe = adopt(recipe, folder, name)
        record = stages.read(STAGES[name].folder(pathlib.Path(folder)))
        if record is None:
            continue
        for size, value in record.config.get("vocab", {}).items():
            if getattr(recipe.vocab, size) != value:
                raise UserError(
                    f"vocab.{size} = {getattr(recipe.vocab, size)}, but {folder} was made with {value};"
                    f" add --vocab.{size} {value}"
                )
        taken = {}
        if name in record.config:  # an imported text tokenizer has no settings
            taken[name] = config.from_json(type(getattr(recipe, name)), record.config[name], name)
        if name == "tokens":
            taken |= form_of(record.config, recipe)
        try:
            recipe = dataclasses.replace(recipe, **taken)
        except ValueError as e:
            raise UserError(f"{folder}: {e}") from None
    return recipe


def form_of(settings: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return the form of documents that token shards with these settings have, and the decoder's with its opening."""
    form = config.from_json(config.Form, settings.get("form", {}), "form")
    packing = dataclasses.replace(recipe.decoder.packing, opening=form.begin if form.kind == "chameleon" else EOD)
    return {"form": form, "decoder": dataclasses.replace(recipe.decoder, packing=packing)}


def borrow(recipe: Recipe, folder, source) -> Recipe:
    """Take over the tokenizers of another run (`take_tokenizers`); return the recipe with its vocabulary and form."""
    take_tokenizers(source, folder)
    known = config.load(pathlib.Path(source) / "recipe.json")
    return dataclasses.replace(recipe, vocab=known.vocab, form=known.form)


def link(stage: str, source: pathlib.Path, folder: pathlib.Path) -> None:
    """Make the results that a stage needs visible in another run folder, by links."""
    if not hosts.lead():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in [s for s in STAGES if stage in dependents(s) and s != stage]:
        target, here = STAGES[name].folder(source), STAGES[name].folder(folder)
        if target.is_dir() and not here.exists():
            here.symlink_to(os.path.relpath(target, here.parent), target_is_directory=True)
