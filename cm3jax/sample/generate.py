"""Prompts in, pictures and text out: what the command line, the evaluation and notebooks call.

    generator = generate.load("runs/quickstart")
    pictures = generator.text_to_image(["a red circle"], seed=1)

Row i of a call draws from the stream (seed, i): the same seed and place give the same answer whatever else is in the
batch and however large it is (up to the rounding of matrix products of other shapes).

Every prompt may have documents that were retrieved for it (arXiv 2309.02591 §2.1): `retrieved`, of each prompt a list
of documents' ids, such as `retrieval.memory` gives. They stand before the prompt, and guidance keeps them.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cm3jax import checkpoint, rng, sharding, stages
from cm3jax import config as configs
from cm3jax.data import pictures as files
from cm3jax.nn import decoder
from cm3jax.sample import decode, grammar, layout
from cm3jax.tokenizers import document
from cm3jax.tokenizers import image as images
from cm3jax.tokenizers import text as texts
from cm3jax.types import Part, UserError
from cm3jax.vocab import EOSS, Vocab

GREEDY = configs.Sampling(temperature=0.0)
MASK = "<mask>"
Retrieved = Sequence[document.Documents]
"""Of each prompt, the ids of the documents before it."""
CAPTIONING = 6
"""Tokens around a picture to caption and its caption: [eod] <sentinel> <break> ... [eod] <sentinel> ... <eoss>."""
Box = Sequence[int | float]
"""(x0, y0, x1, y1), upper left and lower right: floats are fractions of the square picture, ints its pixels."""


def load(run, batch: int = 16, step: int | None = None, mesh: configs.Mesh | None = None) -> "Generator":
    """Return the generator of a run's folder: needs recipe.json, text/, image/ and decoder/.

    Args:
      batch: Rows drawn at one time, at most.
      step: Checkpoint of the decoder; None: the latest.
      mesh: As for `weights`.

    Raises:
      UserError: if something of it is missing, or does not fit the mesh.
    """
    run = pathlib.Path(run)
    if not (run / "recipe.json").is_file():
        raise UserError(f"run {str(run)!r}: no recipe.json there; give the folder that `cm3jax run` wrote")
    recipe = configs.load(run / "recipe.json")
    text, image = texts.load(run / "text"), images.load(run / "image")
    params = decoder.apart(weights(run, recipe, step, mesh), delete=True)
    return of(recipe, layout.model(recipe), params, text, image, batch)


def weights(run, recipe: configs.Recipe, step: int | None = None, mesh: configs.Mesh | None = None):
    """Return a run's decoder on this host's devices, each array in the type of its file.

    Args:
      step: Checkpoint of the decoder; None: the latest.
      mesh: How the devices are laid out; None: as `sample.layout` says.

    Raises:
      UserError: if the mesh does not fit the devices, the model the mesh, or the checkpoint the model.
    """
    devices = jax.local_devices()
    if mesh is None:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit")
        mesh = layout.mesh(recipe, len(devices), memory)
    target = layout.abstract(layout.model(recipe), sharding.mesh(mesh, devices))
    return checkpoint.load_params(pathlib.Path(run) / "decoder", step=step, target=target, stored=True)


def identity(run, step: int | None = None) -> tuple[int, str]:
    """Return the step of a decoder's checkpoint (None: the latest), and 16 hex digits that identify what draws with it.

    They are a digest of that checkpoint and of the two tokenizers' files: another result has others.
    """
    run = pathlib.Path(run)
    step = checkpoint.steps(run / "decoder")[-1] if step is None else step
    paths = (path for part in ("text", "image") for path in (run / part).iterdir() if path.is_file())
    names = [str(p.relative_to(run)) for p in paths if stages.counts(p.relative_to(run))]
    return step, configs.digest(checkpoint.identity(run / "decoder", step), stages.fingerprint(run, names))


def of(recipe: configs.Recipe, model: decoder.Decoder, params, text, image, batch: int = 16) -> "Generator":
    """Return the generator of a recipe's form; for the arguments see `Generator`."""
    from cm3jax.sample import turns  # which stands on this file

    kind = {"cm3leon": Generator, "chameleon": turns.Generator}[recipe.form.kind]
    return kind(model, params, recipe.vocab, text, image, batch, recipe.decoder.packing.picture, recipe.form)


@dataclasses.dataclass(frozen=True)
class Generator:
    """A decoder and its two tokenizers.

    Attributes:
      params: Of `model`, unboxed, as `decoder.apart` gives them; if they lie on a mesh, it is drawn there.
      image: A `tokenizers.image.Tokenizer`, or what has its encode, decode, grid and resolution.
      batch: Rows drawn at one time, at most; on a mesh the next multiple of the devices that share them.
      picture: `Packing.picture` of the model's training.
      form: How documents are written; the prompts here are CM3Leon's, those of `sample.turns` Chameleon's.
    """

    model: decoder.Decoder
    params: Any
    vocab: Vocab
    text: texts.Tokenizer
    image: Any
    batch: int = 16
    picture: int = 0
    form: configs.Form = configs.Form()

    @property
    def codes(self) -> int:
        """Codes of one picture."""
        h, w = self.image.grid
        return h * w

    @property
    def written(self) -> int:
        """Ids of one picture's codes and of what ends their rows."""
        return self.codes + self.form.grid

    @property
    def mesh(self) -> jax.sharding.Mesh | None:
        """The devices that the parameters are laid out on; None: one, or wherever they are."""
        return sharding.mesh_of(self.params)

    # ------------------------------------------------------------------------------------------------------- pictures

    def text_to_image(
        self,
        prompts: Sequence[str],
        seed: int = 0,
        sampling: configs.Sampling = configs.Sampling(),
        retrieved: Retrieved | None = None,
        numbers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Return a picture for each prompt, uint8 [n, h, w, 3].

        Args:
          numbers: i of the stream (seed, i) that each row draws from; None: its place in the call.

        Raises:
          UserError: if a prompt is too long.
        """
        before = _before(prompts, retrieved)
        found = [
            document.text_to_image(prompt, self.text, self.vocab, ids)
            for prompt, ids in zip(prompts, before, strict=True)
        ]
        drawn = self._codes(found, [self.codes] * len(found), seed, sampling, numbers)
        return self.image.decode(np.array(drawn, np.uint16).reshape(-1, self.codes))

    def infill_image(
        self,
        pictures: Sequence[np.ndarray] | np.ndarray,
        captions: Sequence[str],
        boxes: Sequence[Box],
        seed: int = 0,
        sampling: configs.Sampling = configs.Sampling(),
        retrieved: Retrieved | None = None,
    ) -> np.ndarray:
        """Return the pictures with what lies in the boxes drawn anew, uint8 [n, h, w, 3].

        Only codes whose patch of pixels overlaps the box change; the others are held (arXiv 2309.02591 §2.2).

        Args:
          pictures: uint8 [h, w, 3] each, cropped to the model's square if need be, or codes uint16 [n].
          captions: Of the whole picture.
          boxes: One per picture.

        Raises:
          UserError: if a box is empty or outside, or a caption too long.
        """
        _same_length(pictures=pictures, captions=captions, boxes=boxes)
        codes, regions = self.encode(pictures), [self.region(box) for box in boxes]
        before = _before(captions, retrieved)
        found = [self._infilled(*row) for row in zip(captions, codes, regions, before, strict=True)]
        drawn = self._codes(found, [len(prompt.known) for prompt in found], seed, sampling)
        for row, region, new in zip(codes, regions, drawn, strict=True):
            first = np.argmax(region)
            row[first : first + len(new)] = new
        return self.image.decode(codes)

    def _infilled(self, caption: str, codes: np.ndarray, region: np.ndarray, retrieved) -> document.Prompt:
        return document.infill_image(caption, codes, region, self.text, self.vocab, retrieved)

    def region(self, box: Box) -> np.ndarray:
        """Return which codes a box touches, bool [n] in reading order.

        Raises:
          UserError: if the box is empty or reaches outside the picture.
        """
        side, (h, w) = self.image.resolution, self.image.grid
        pixels = all(isinstance(x, (int, np.integer)) for x in box)
        x0, y0, x1, y1 = np.array(box, float) / (side if pixels else 1)
        if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
            limit = f"pixels 0 to {side}" if pixels else "fractions 0 to 1"
            raise UserError(f"box {tuple(box)}: must be x0, y0, x1, y1 in {limit}, with x0 < x1 and y0 < y1")
        inside = lambda a, b, n: (np.arange(n) < b * n) & (np.arange(1, n + 1) > a * n)  # noqa: E731
        return (inside(y0, y1, h)[:, None] & inside(x0, x1, w)).reshape(-1)

    # ----------------------------------------------------------------------------------------------------------- text

    def asking(self, request: str) -> "Generator":
        """Return the generator that asks this of a picture, in place of `form.request`.

        Raises:
          UserError: if the form has no requests.
        """
        if self.form.kind != "chameleon":
            raise UserError(f"request {request!r}: a model of form {self.form.kind} is asked nothing; leave it out")
        return dataclasses.replace(self, form=dataclasses.replace(self.form, request=request))

    def image_to_text(
        self,
        pictures: Sequence[np.ndarray] | np.ndarray,
        seed: int = 0,
        sampling: configs.Sampling = GREEDY,
        max_text: int = 96,
        retrieved: Retrieved | None = None,
    ) -> list[str]:
        """Return a caption for each picture.

        Args:
          pictures: uint8 [h, w, 3] each, cropped to the model's square if need be, or codes uint16 [n].
          max_text: Tokens at most; fewer where the model's row ends before.
        """
        rows = zip(self.encode(pictures), _before(pictures, retrieved), strict=True)
        found = [document.image_to_text(codes, self.vocab, ids) for codes, ids in rows]
        return self._spans(found, seed, sampling, max_text)

    def infill_text(
        self,
        pictures: Sequence[np.ndarray] | np.ndarray,
        captions: Sequence[str],
        seed: int = 0,
        sampling: configs.Sampling = GREEDY,
        max_text: int = 96,
        retrieved: Retrieved | None = None,
    ) -> list[str]:
        """Return each caption with words in the place of its one "<mask>", such as "a <mask> circle".

        Args:
          pictures, max_text: As for `image_to_text`.

        Raises:
          UserError: if a caption has no mask, or several, or is too long.
        """
        _same_length(pictures=pictures, captions=captions)
        for caption in captions:
            if caption.count(MASK) != 1:
                raise UserError(f"caption {caption!r}: has {caption.count(MASK)} {MASK}; must have exactly one")
        # A blank belongs to the word that follows it, as in the text tokenizer's pieces.
        halves = [tuple(caption.replace(" " + MASK, MASK).split(MASK)) for caption in captions]
        rows = zip(halves, self.encode(pictures), _before(captions, retrieved), strict=True)
        found = [document.infill_text(*half, codes, self.text, self.vocab, ids) for half, codes, ids in rows]
        spans = self._spans(found, seed, sampling, max_text)
        return [before + span + after for (before, after), span in zip(halves, spans, strict=True)]

    # ------------------------------------------------------------------------------------------------------ documents

    def continue_document(
        self,
        parts: Sequence[Part] = (),
        max_parts: int = 2,
        seed: int = 0,
        sampling: configs.Sampling = configs.Sampling(),
        max_text: int = 96,
        closed: bool = False,
    ) -> list[Part]:
        """Return a document that begins with `parts`: text, and pictures uint8 [h, w, 3].

        Args:
          parts: May be empty.
          max_parts: New parts at most, beside the end of an unfinished text.
          max_text: Tokens of a new text, or of the end of an unfinished one, at most.
          closed: The last text is finished; else it may be continued.

        Raises:
          UserError: if the parts leave no room in the model's row.
        """
        fresh = closed or not len(parts)
        if max_parts < fresh or max_text < 1:
            raise UserError(f"max_parts = {max_parts}, max_text = {max_text}: must be at least 1")
        codes = iter(self.encode([part for part in parts if not isinstance(part, str)]))
        known = [part if isinstance(part, str) else next(codes) for part in parts]
        prompt = document.continuation(known, self.text, self.vocab, closed)
        mode = grammar.PART_START if fresh else grammar.TEXT_PART if isinstance(known[-1], str) else grammar.IMAGE_END
        room = self._room([prompt], "the document", 2)
        state = grammar.start([mode], left=max_text, room=room, parts=max_parts - fresh)
        rules = grammar.documents(self.vocab, self.text.size, self.codes, max_text)
        drawn = self._draw(rules, [prompt], state, decode.bucket(int(room[0])), seed, sampling)[0]
        found = document.decode(np.concatenate([prompt.ids, drawn]), self.text, self.vocab)
        return [
            part if isinstance(part, str) else self._picture(part, parts[i : i + 1]) for i, part in enumerate(found)
        ]

    # --------------------------------------------------------------------------------------------- retrieved documents

    def fitting(self, retrieved: Retrieved, prompts: Sequence[str] | None = None, max_text: int = 96) -> list:
        """Return of each prompt's documents those that its row has room for: the first ones, as in training.

        Args:
          prompts: Captions that pictures are to be drawn from; None: captions are to be written for pictures.
          max_text: Tokens for which a caption is to have room.
        """
        if prompts is None:
            left = [self.model.length - self.codes - CAPTIONING - max_text] * len(retrieved)
        else:
            left = [self.model.length - self.codes - 2 - len(self.text.encode(prompt)) for prompt in prompts]
        sizes = [np.cumsum([len(ids) + 1 for ids in documents]) for documents in retrieved]
        counts = [int(np.searchsorted(size, room, "right")) for size, room in zip(sizes, left, strict=True)]
        return [list(documents[:count]) for documents, count in zip(retrieved, counts, strict=True)]

    # --------------------------------------------------------------------------------------------------------- inside

    def encode(self, pictures: Sequence[np.ndarray] | np.ndarray) -> np.ndarray:
        """Return codes, uint16 [n, codes], of pictures uint8 [h, w, 3] of any size, or of codes themselves."""
        if not len(pictures):
            return np.zeros((0, self.codes), np.uint16)
        if np.ndim(pictures[0]) == 1:
            return np.array(pictures, np.uint16).reshape(len(pictures), self.codes)
        return np.asarray(self.image.encode(np.stack([self._square(p) for p in pictures])))

    def _picture(self, codes: np.ndarray, given: Sequence[Part]) -> np.ndarray:
        """Return the picture of new codes, or the one that was given in this place."""
        return self._square(given[0]) if given and np.ndim(given[0]) == 3 else self.image.decode(codes[None])[0]

    def _square(self, picture: np.ndarray) -> np.ndarray:
        side = self.image.resolution
        if picture.ndim != 3 or picture.shape[-1] != 3 or picture.dtype != np.uint8:
            raise UserError(f"picture of shape {picture.shape}, {picture.dtype}: must be uint8 [height, width, 3]")
        return files.crop(picture, side)

    def _codes(
        self, prompts, counts: Sequence[int], seed: int, sampling, numbers=None, name: str = "sample"
    ) -> list[np.ndarray]:
        """Return the codes among `counts[row]` ids for each prompt, of which those that it knows are held.

        Args:
          counts: Codes, and what stands between them.
          numbers, name: As for `_draw`.
        """
        self._room(prompts, "the text", max(counts, default=0))
        quarter = -(-self.written // 4)
        steps = -(-max(counts, default=1) // quarter) * quarter  # at most four programs, whatever the regions
        state = grammar.start([grammar.CODES] * len(prompts), left=np.array(counts))
        rules = grammar.pictures(self.vocab, self.text.size, self.codes)
        sampling = dataclasses.replace(sampling, repetition_penalty=1.0)  # which is of words
        drawn = self._draw(rules, prompts, state, steps, seed, sampling, numbers, name)
        return [(ids[self.vocab.is_image(ids)] - self.vocab.image_start).astype(np.uint16) for ids in drawn]

    def likelihood(self, prompts: Sequence[document.Prompt], texts: Sequence[str]) -> np.ndarray:
        """Return the log-probability of each text as what a prompt for a masked span asks for, in nats, float32 [n].

        It is that of all its tokens and of its end, without guidance; -inf for an empty one. The blank before a word
        belongs to the text: in a document's middle it is " red", not "red".

        Raises:
          UserError: if a prompt and its text do not fit the model's row.
        """
        _same_length(prompts=prompts, texts=texts)
        spoken = [document.join(document.text_ids(text, self.text, self.vocab), EOSS) for text in texts]
        sizes = np.array([len(ids) for ids in spoken], int)
        self._room(prompts, "the text", count := int(sizes.max(initial=1)))
        rows = [document.join(prompt.ids, ids) for prompt, ids in zip(prompts, spoken, strict=True)]
        length, found = decode.bucket(max(map(len, rows), default=1)), []
        count = min(decode.bucket(count), length - 1)
        size = sharding.filled(self.batch, self.mesh)
        first = self.model.length - self.picture if self.picture else None
        for at in range(0, len(rows), size):
            here = np.minimum(np.arange(at, at + size), len(rows) - 1)  # one size, so one program
            hidden, before = ([getattr(prompts[i], name) for i in here] for name in ("hidden", "retrieved"))
            padded = decode.pad([[rows[i] for i in here]], length, [hidden], self.vocab, first, before, self.picture)
            with sharding.within(self.mesh):
                logprobs = _logprobs(self.model, count, self.params, padded)
            found += list(np.asarray(logprobs)[: len(rows) - at])
        sums = [row[len(row) - n :].sum() for row, n in zip(found, sizes, strict=True)]
        return np.where(sizes > 1, sums, -np.inf).astype(np.float32)

    def _spans(self, prompts, seed: int, sampling, max_text: int) -> list[str]:
        """Return the text of one masked span for each prompt."""
        drawn = self._span_ids(prompts, seed, sampling, max_text)
        return [document.decode_text(ids[:-1], self.text, self.vocab) for ids in drawn]

    def _span_ids(self, prompts, seed: int, sampling, max_text: int, name: str = "sample") -> list[np.ndarray]:
        """Return the ids of one masked span for each prompt, <eoss> included."""
        if max_text < 1:
            raise UserError(f"max_text = {max_text}: must be at least 1 token")
        left = np.minimum(max_text, self._room(prompts, "the caption", 2) - 1)
        state = grammar.start([grammar.SPAN_START] * len(prompts), left=left)
        rules = grammar.captions(self.vocab, self.text.size, self.codes)
        steps = decode.bucket(int(left.max(initial=1)) + 1)  # what the row has room for, however large max_text is
        return self._draw(rules, prompts, state, steps, seed, sampling, name=name)

    def _room(self, prompts, what: str, needed: int) -> np.ndarray:
        """Return how many tokens fit behind each prompt, int [n]."""
        sizes = np.array([len(prompt.ids) for prompt in prompts], int)
        limit = self.model.length - needed
        for row in np.flatnonzero(sizes > limit):
            over, shown = sizes[row] - limit, prompts[row].retrieved
            of_them, or_fewer = (
                (", of which {} of documents before it", " or show fewer of these") if shown else ("", "")
            )
            raise UserError(
                f"prompt {row}: {sizes[row]} tokens{of_them.format(shown)}, but the model's row of {self.model.length}"
                f" leaves {limit} before an answer of {needed}; shorten {what} by {over} tokens{or_fewer}"
            )
        return self.model.length - sizes

    def _draw(
        self, rules, prompts, state: grammar.State, steps: int, seed: int, sampling, numbers=None, name: str = "sample"
    ) -> list[np.ndarray]:
        """Return the drawn ids of each prompt, in batches of one fixed size; the last is filled with rows long done.

        Args:
          numbers: int [n], whose streams of random numbers the rows draw from; None: 0, 1, ...
          name: Of these streams.
        """
        if not prompts:
            return []
        numbers = np.arange(len(prompts)) if numbers is None else np.asarray(numbers)
        size = sharding.filled(min(self.batch, 1 << (len(prompts) - 1).bit_length()), self.mesh)
        length = decode.bucket(max(len(ids) for p in prompts for ids, _ in p.streams(3)))
        drawn = []
        for first in range(0, len(prompts), size):
            rows = np.arange(first, first + size)
            drawn += self._batch(rules, prompts, state, rows, length, steps, seed, sampling, numbers, name)
        return drawn

    def _batch(self, rules, prompts, state, rows, length: int, steps: int, seed: int, sampling, numbers, name: str):
        """Return the drawn ids of these rows; those beyond the last prompt are done before they begin."""
        here = np.minimum(rows, len(prompts) - 1)
        numbers = numbers[here]
        state = jax.tree.map(lambda x: x[here], state)
        state = state._replace(mode=jnp.where(rows < len(prompts), state.mode, grammar.DONE))
        chosen = [prompts[i] for i in here]
        pictured = any(p.pictured is not None for p in prompts)  # of the whole call: all batches are one program
        first = self.model.length - self.picture if self.picture else None
        by_stream = list(zip(*(p.streams(decode.streams(sampling, pictured)) for p in chosen), strict=True))
        streams = [[ids for ids, _ in stream] for stream in by_stream]
        hidden = [[codes for _, codes in stream] for stream in by_stream]
        padded = decode.pad(streams, length, hidden, self.vocab, first, [p.retrieved for p in chosen], self.picture)
        with sharding.within(self.mesh):
            out = decode.decode(
                self.model,
                rules,
                decode.kind(sampling),
                steps,
                self.params,
                padded,
                state,
                decode.settings(sampling, numbers, pictured),
                _forced(chosen, steps),
                rng.rows(rng.key(seed, name), jnp.asarray(numbers)),
            )
        ids, lengths = np.asarray(out.ids), np.asarray(out.lengths)
        return [ids[i, : lengths[i]] for i in np.flatnonzero(rows < len(prompts))]


@functools.partial(jax.jit, static_argnames=("model", "count"))
def _logprobs(model: decoder.Decoder, count: int, params, prompts: decode.Prompts):
    """Return the log-probability of each of the last `count` ids of rows, [b, count]."""
    ids, t = prompts.ids[0], prompts.ids.shape[-1]
    segments = (jnp.arange(t) >= t - prompts.lengths[0][:, None]).astype(jnp.int32)
    hidden, _ = model.apply({"params": params}, ids, prompts.positions[0], segments)
    logits = decoder.logits(params, model.config, hidden[:, t - count - 1 : t - 1])
    return jnp.take_along_axis(jax.nn.log_softmax(logits), ids[:, t - count :, None], axis=-1)[..., 0]


def _forced(prompts, steps: int) -> np.ndarray:
    """Return the ids that prompts hold, int32 [b, steps], -1 where they are free."""
    forced = np.full((len(prompts), steps), -1, np.int32)
    for row, prompt in zip(forced, prompts, strict=True):
        row[: len(prompt.known)] = prompt.known
    return forced


def _before(prompts, retrieved: Retrieved | None) -> Retrieved:
    """Return the documents before each prompt."""
    if retrieved is None:
        return [[]] * len(prompts)
    _same_length(prompts=prompts, lists_of_retrieved_documents=retrieved)
    return retrieved


def _same_length(**lists) -> None:
    sizes = {name: len(value) for name, value in lists.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(", ".join(f"{n} {name}" for name, n in sizes.items()) + ": must be as many of each")
