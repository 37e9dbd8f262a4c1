"""Small Chameleons: a vocabulary whose codes lie in another order than their ids, sizes, random tensors."""

import numpy as np

from cm3jax.interop import chameleon, chameleon_vocab

ROWS, CODES = 131, 37
ROWS_WITH_BYTES = 352
"""Room for an entry of every byte."""
MARKERS = ("<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<image>")
CONFIGS = {
    "as many groups as heads": {},
    "grouped queries": {"num_key_value_heads": 2},
    "swin": {"swin_norm": True},
    "swin, grouped queries": {"num_attention_heads": 6, "num_key_value_heads": 2, "hidden_size": 36, "swin_norm": True},
    "one group, odd sizes, long waves": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "hidden_size": 30,
        "intermediate_size": 41,
        "num_hidden_layers": 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
    "tied": {"tie_word_embeddings": True, "num_hidden_layers": 2},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1, "hidden_size": 14, "swin_norm": True},
    "rows that divide": {"vocab_size": 160, "num_key_value_heads": 1},
}
"""Settings of config.json that differ from `about`'s."""


def vocabulary(rows=ROWS, codes=CODES, seed=0):
    """Return names of entries: codes and text thrown together, markers where the released files have them or not."""
    ids = np.random.default_rng(seed).permutation(np.arange(4, rows)).tolist()
    names = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
    names |= {chameleon_vocab.spelt(code): ids.pop() for code in range(codes)}
    names |= {name: ids.pop() for name in ("<eoss>", "<racm3:break>", "<image>", "<reserved08706>")}
    names |= {f"<reserved{i:05}>": ids.pop() for i in range(8194, 8201)}
    return names | {f"word{i}": i for i in ids[:-3]}  # three ids have no name


def about(**changes):
    """Return a small config.json."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 97,
        "vocab_size": ROWS,
        "dtype": "float32",
    }
    settings = sizes | changes
    return settings | {"vocabulary_map": vocabulary(settings["vocab_size"])}


def opened(settings):
    """Return the network and the order of a config.json."""
    network = chameleon.network(settings)
    return network, chameleon_vocab.order(settings["vocabulary_map"], network.rows, "config.json")


def random_tensors(settings, dtype=np.float32, seed=0):
    """Return tensors under Chameleon's names; norms about 1, all else about 0."""
    draw, network = np.random.default_rng(seed), chameleon.network(settings)
    shapes = {n: leaf for leaf in chameleon.leaves(network.model, network.rows).values() for n in leaf.names}
    return {
        name: (0.3 * draw.standard_normal(leaf.theirs) + ("norm.weight" in name)).astype(dtype)
        for name, leaf in shapes.items()
    }


# ---------------------------------------------------------------------------------------------------------- checkpoints


def words(rows=ROWS_WITH_BYTES, codes=CODES, seed=0):
    """Return the content of a tokenizer.json as the released ones are: BPE with bytes, markers among its entries.

    Ids are thrown together and three have no entry.
    """
    names = vocabulary(rows, codes, seed)
    free = [name for name in names if name.startswith("word")]
    letters = [f"<0x{i:02X}>" for i in range(256)] + [*"\u2581abcdefghijklmnopqrstuvwxyz", "ca", "cat", "\u2581cat"]
    for name, new in zip(free, letters, strict=False):
        names[new] = names.pop(name)
    assert "\u2581cat" in names, "more rows are needed"
    names = {name: i for name, i in names.items() if not name.startswith("word")}
    added = [name for name in names if name.startswith(("IMGIMG", "<reserved")) or name in MARKERS]
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [
            {"id": names[name], "content": name, "special": True}
            | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            for name in sorted(added, key=names.get)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "vocab": names,
            "merges": [["c", "a"], ["ca", "t"], ["\u2581", "cat"]],
            "byte_fallback": True,
            "fuse_unk": False,
            "unk_token": "<unk>",
        },
    }
