"""The one id space of a model: specials | text | image codes | sentinels (arXiv 2309.02591 §2.1).

    0 .. 3                      <pad> <eod> <break> <eoss>
    text_start  .. +text        sentencepiece ids
    image_start .. +image       codes of the image tokenizer
    sentinel_start .. +sentinels
    .. size                     never used: the table is padded to a multiple of `multiple`

Pure arithmetic on ints and numpy arrays; imports no jax.
"""

import dataclasses

PAD, EOD, BREAK, EOSS = 0, 1, 2, 3
SPECIALS = ("<pad>", "<eod>", "<break>", "<eoss>")
LIMIT = 65536  # token shards hold uint16


@dataclasses.dataclass(frozen=True)
class Vocab:
    """Sizes of the id space. The defaults are the paper's (arXiv 2309.02591 §2.1)."""

    text: int = 56320
    """Entries of the text tokenizer; a cap, since small corpora fill fewer."""
    image: int = 8192
    """Codes of the image tokenizer."""
    sentinels: int = 512
    """Span sentinels <sentinel:i>; at most sentinels - 1 spans are masked in a block."""
    multiple: int = 256
    """The embedding table is padded to a multiple of this, so that it shards evenly over up to 256 chips."""

    def __post_init__(self):
        for name in ("text", "image", "sentinels", "multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"vocab.{name} = {getattr(self, name)}: must be at least 1")
        if self.sentinels < 2:
            raise ValueError(f"vocab.sentinels = {self.sentinels}: must be at least 2, or no span is ever masked")
        if self.size > LIMIT:
            raise ValueError(
                f"vocab: {self.size} ids after padding, more than the {LIMIT} that uint16 shards hold;"
                " lower vocab.text, vocab.image or vocab.sentinels"
            )

    @property
    def text_start(self) -> int:
        return len(SPECIALS)

    @property
    def image_start(self) -> int:
        return self.text_start + self.text

    @property
    def sentinel_start(self) -> int:
        return self.image_start + self.image

    @property
    def used(self) -> int:
        """Ids that mean something; the rest up to `size` is padding."""
        return self.sentinel_start + self.sentinels

    @property
    def size(self) -> int:
        """Rows of the embedding table."""
        return -(-self.used // self.multiple) * self.multiple

    def sentinel(self, i: int) -> int:
        """Id of <sentinel:i>."""
        if not 0 <= i < self.sentinels:
            raise ValueError(f"<sentinel:{i}>: the vocabulary has sentinels 0 to {self.sentinels - 1}")
        return self.sentinel_start + i

    def is_text(self, ids):
        return (ids >= self.text_start) & (ids < self.image_start)

    def is_image(self, ids):
        return (ids >= self.image_start) & (ids < self.sentinel_start)

    def is_sentinel(self, ids):
        return (ids >= self.sentinel_start) & (ids < self.used)

    def name(self, i: int) -> str:
        """Readable name of one id: "<eod>", "text:17", "image:4093", "<sentinel:0>", "unused:65279"."""
        if i < self.text_start:
            return SPECIALS[i]
        if i < self.image_start:
            return f"text:{i - self.text_start}"
        if i < self.sentinel_start:
            return f"image:{i - self.image_start}"
        return f"<sentinel:{i - self.sentinel_start}>" if i < self.used else f"unused:{i}"
