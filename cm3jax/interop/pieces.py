"""The text tokenizer of a run as Hugging Face's tokenizer.json, with the entries that Chameleon's has beside text.

sentencepiece's BPE joins the pair of neighbours whose whole has the least id; the library `tokenizers` the pair that
stands first in a list. The list of all pairs whose whole is a piece, by the id of that whole, says the same. Only a
text that holds sentencepiece's sign for a blank, U+2581, is encoded otherwise there: as if it were a blank.
"""

from typing import Any

from cm3jax.interop import chameleon_vocab
from cm3jax.tokenizers import text
from cm3jax.types import UserError
from cm3jax.vocab import Vocab

UNKNOWN = "<unk>"


def document(tokenizer: text.Tokenizer, vocab: Vocab) -> dict[str, Any]:
    """Return the content of a tokenizer.json whose ids are those of `vocab`."""
    pieces = [tokenizer.piece(i) for i in range(tokenizer.size)]
    names = chameleon_vocab.own_names(vocab)
    for i, piece in enumerate(pieces):
        del names[vocab.name(vocab.text_start + i)]
        if piece in names:
            raise UserError(f"text piece {piece!r}: is the name of a marker too; export as plain safetensors instead")
        names[piece] = vocab.text_start + i
    markers = [name for name, i in names.items() if not vocab.is_text(i)]
    replace = {"type": "Replace", "pattern": {"String": text.SPACE}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(name, names[name]) for name in sorted(markers, key=names.get)],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": text.SPACE},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [replace, {"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "vocab": dict(sorted(names.items(), key=lambda item: item[1])),
            "merges": merges(pieces),
            "unk_token": UNKNOWN,
            "byte_fallback": True,
            "fuse_unk": False,
            "ignore_merges": False,
        },
    }


def _added(name: str, i: int) -> dict[str, Any]:
    plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": i, "content": name, **plain, "special": True}


def merges(pieces: list[str]) -> list[list[str]]:
    """Return all pairs of pieces whose whole is a piece, by the place of that whole."""
    known = {piece for piece in pieces if not (piece.startswith("<") and piece.endswith(">") and len(piece) > 2)}
    found = []
    for piece in pieces:
        if piece in known:
            pairs = ([piece[:cut], piece[cut:]] for cut in range(1, len(piece)))
            found += [pair for pair in pairs if known.issuperset(pair)]
    return found
