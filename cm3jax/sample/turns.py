"""Prompts in, pictures and text out, for a model of Chameleon's form (arXiv 2405.09818).

As `sample.generate`, whose calls these are, with the prompts of `tokenizers.turns`. A document with text and pictures
is written in stretches, each drawn by one compiled loop: text without guidance up to <break>, then the picture's codes
with up to three streams, then text again.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from cm3jax import config as configs
from cm3jax.sample import decode, generate, grammar
from cm3jax.tokenizers import document, turns
from cm3jax.types import Part, UserError
from cm3jax.vocab import BREAK


@dataclasses.dataclass(frozen=True)
class Generator(generate.Generator):
    """A decoder of Chameleon's form and its two tokenizers."""

    # ------------------------------------------------------------------------------------------------------- pictures

    def text_to_image(self, prompts, seed=0, sampling=configs.Sampling(), retrieved=None, numbers=None) -> np.ndarray:
        """Return a picture for each prompt, uint8 [n, h, w, 3]; see `generate.Generator`."""
        refuse_documents(retrieved)
        found = [turns.text_to_image(prompt, self.text, self.vocab, self.form) for prompt in prompts]
        drawn = self._codes(found, [self.written] * len(found), seed, sampling, numbers)
        return self.image.decode(np.array(drawn, np.uint16).reshape(-1, self.codes))

    def infill_image(self, pictures, captions, boxes, seed=0, sampling=configs.Sampling(), retrieved=None):
        """Return the pictures with what lies in the boxes drawn anew; see `generate.Generator`.

        What is drawn does not see the codes behind it: Chameleon's form has no masks.
        """
        refuse_documents(retrieved)
        return super().infill_image(pictures, captions, boxes, seed, sampling)

    def _infilled(self, caption, codes, region, retrieved) -> document.Prompt:
        return turns.infill_image(caption, codes, region, self.text, self.vocab, self.form)

    # ----------------------------------------------------------------------------------------------------------- text

    def image_to_text(self, pictures, seed=0, sampling=generate.GREEDY, max_text=96, retrieved=None) -> list[str]:
        """Return what is answered to `form.request` for each picture; see `generate.Generator`."""
        refuse_documents(retrieved)
        found = [turns.image_to_text(codes, self.text, self.vocab, self.form) for codes in self.encode(pictures)]
        return [
            document.decode_text(ids[:-1], self.text, self.vocab) for ids in self._talk(found, seed, sampling, max_text)
        ]

    def infill_text(self, pictures, captions, seed=0, sampling=generate.GREEDY, max_text=96, retrieved=None):
        """Raise a UserError.

        Raises:
          UserError: always: a text with a gap is no beginning of a document.
        """
        raise UserError(
            "infill: a model of form chameleon was trained without masks and fills no gap in a text; draw a region of a"
            " picture with --box, or ask with: cm3jax generate RUN ... --interleaved"
        )

    def likelihood(self, prompts, texts):
        """Raise a UserError.

        Raises:
          UserError: always: there are no masked spans.
        """
        raise UserError("likelihood: a model of form chameleon was trained without masks, so no span has one")

    # ------------------------------------------------------------------------------------------------------ documents

    def continue_document(
        self, parts=(), max_parts=2, seed=0, sampling=configs.Sampling(), max_text=96, closed=False
    ) -> list[Part]:
        """Return a document that begins with `parts`: text, and pictures uint8 [h, w, 3].

        Args:
          parts: May be empty.
          max_parts: New pictures at most.
          max_text: Tokens of each new stretch of text at most.
          closed: The parts are a request, and what follows is the answer.
        """
        return self.interleave([parts], max_parts, seed, sampling, max_text, closed)[0]

    def interleave(
        self,
        prompts: Sequence[Sequence[Part]],
        pictures: int = 2,
        seed: int = 0,
        sampling: configs.Sampling = configs.Sampling(),
        max_text: int = 96,
        closed: bool = False,
    ) -> list[list[Part]]:
        """Return for each prompt the document that begins with it; the arguments are `continue_document`'s.

        Raises:
          UserError: if the parts leave no room in the model's row.
        """
        if pictures < 0 or max_text < 1:
            raise UserError(f"pictures = {pictures}, max_text = {max_text}: must be at least 0 and 1")
        codes = iter(self.encode([part for parts in prompts for part in parts if not isinstance(part, str)]))
        known = [[part if isinstance(part, str) else next(codes) for part in parts] for parts in prompts]
        rows = [turns.continuation(parts, self.text, self.vocab, self.form, closed).ids for parts in known]
        sizes = [len(ids) for ids in rows]
        rows = self._stretches(rows, pictures, seed, sampling, max_text)
        return [self._document(parts, ids[n:], closed) for parts, ids, n in zip(prompts, rows, sizes, strict=True)]

    def _document(self, given: Sequence[Part], ids: np.ndarray, closed: bool) -> list[Part]:
        """Return the parts that were given, and text and pictures of the ids that were drawn behind them."""
        parts = [part if isinstance(part, str) else self._square(part) for part in given]
        found = turns.decode(ids, self.text, self.vocab, self.form)
        if not closed and parts and found and isinstance(parts[-1], str) and isinstance(found[0], str):
            parts[-1] += found.pop(0)
        return parts + [part if isinstance(part, str) else self.image.decode(part[None])[0] for part in found]

    def _stretches(self, rows: list[np.ndarray], pictures: int, seed: int, sampling, max_text: int):
        """Return the rows, each continued to its end: text, and then as long as it asks for them a picture and text.

        Stretch i of all rows is drawn at one time, from streams of random numbers of its own.
        """
        words = dataclasses.replace(sampling, method="top_p", guidance=1.0, image_guidance=-1.0)
        left, going = [pictures] * len(rows), list(range(len(rows)))
        for i in range(pictures + 1):
            if not going:
                break
            prompts = [document.Prompt("continuation", rows[j], rows[j], "document", self.form.turn) for j in going]
            parts = [left[j] for j in going]
            found = self._talk(prompts, seed, words, max_text, parts, going, f"sample/text/{i}")
            for j, ids in zip(going, found, strict=True):
                rows[j] = document.join(rows[j], ids)
            going = [j for j in going if rows[j][-1] == BREAK]
            prompts = [turns.picture(rows[j], self.vocab, self.form) for j in going]
            found = self._codes(prompts, [self.written] * len(going), seed, sampling, going, f"sample/image/{i}")
            for j, codes in zip(going, found, strict=True):
                picture = turns.part_ids(codes, self.text, self.vocab, self.form)
                rows[j] = document.join(rows[j][:-1], picture)  # which begins with <break>
                left[j] -= 1
        return rows

    # --------------------------------------------------------------------------------------------------------- inside

    def _talk(self, prompts, seed: int, sampling, max_text: int, pictures=0, numbers=None, name="sample"):
        """Return the ids of a stretch of text for each prompt, with the one that ends it.

        Args:
          pictures: How many may still be begun, of all rows or int [n].
        """
        if max_text < 1:
            raise UserError(f"max_text = {max_text}: must be at least 1 token")
        room = self._room(prompts, "the document", 1)
        left = np.minimum(max_text, room - 1)
        state = grammar.start([grammar.TALK] * len(prompts), left=left, room=room, parts=np.asarray(pictures, int))
        picture = self.written + len(turns.opening(self.form)) - 1
        rules = grammar.talk(self.vocab, self.text.size, picture, self.text.unsaid, self.form.turn)
        steps = decode.bucket(int(left.max(initial=1)) + 1)
        return self._draw(rules, prompts, state, steps, seed, sampling, numbers, name)


def refuse_documents(retrieved) -> None:
    """Raise a UserError if documents are to be shown before a prompt."""
    if any(len(documents) for documents in retrieved or ()):
        raise UserError("documents: a model of form chameleon is shown no retrieved ones; leave out --documents")
