"""Every setting as frozen dataclasses; JSON in and out.

A config file (`configs/*.py`) is plain Python that binds `config` to a `Recipe`; it holds only the differences
from the defaults here, which are the paper's (arXiv 2309.02591) where the paper states them. Settings marked
"ours" are stated nowhere.
"""

import dataclasses
import hashlib
import json
import math
import pathlib
import runpy
import types as pytypes
import typing
from typing import Any, Literal

from cm3jax.types import UserError
from cm3jax.vocab import EOD, EOSS, Vocab

SEEDS = 2**32
"""Seeds lie below this: what every generator of random numbers in use takes."""


def within(config, where: str, low: float | int, high: float | int, *names: str) -> None:
    """Raise ValueError for the first of these fields whose number is none, or not from `low` to `high`."""
    for name in names:
        value = getattr(config, name)
        if not (low <= value <= high and math.isfinite(value)):
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{where}.{name} = {value}: must be {limits}")


def later(default) -> Any:
    """Return a field that came after runs had been made with its dataclass.

    At its default it is in no JSON, and so in no digest: what was made before it existed is not stale, and continues.
    """
    return dataclasses.field(default=default, metadata={LATER: True})


LATER = "later"

# --------------------------------------------------------------------------------------------- shared by every training


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Shape of the device mesh; -1 means "all devices that are left". Sizes that need fewer take the first devices."""

    replica: int = 0
    """Data parallel: parameters are copied along this axis. 0: one copy per TPU slice."""
    fsdp: int = -1
    """Data parallel with parameters and optimizer state sharded."""
    tensor: int = 1
    """Tensor parallel: heads, feed-forward and vocabulary."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW as in arXiv 2309.02591 table 3 and OPT, or Muon for the matrices with Adam for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    """muon: matrices by Muon, all else by Adam."""
    peak_lr: float = 3e-4
    """Peak learning rate of Adam(W)."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices under Muon."""
    warmup: int = 1500
    """Steps of linear warm-up."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate goes from its peak to `final_fraction` of it."""
    final_fraction: float = 0.1
    """Learning rate at the last step as a fraction of the peak (ours: OPT's)."""
    b1: float = 0.9
    """Decay of Adam's mean of gradients."""
    b2: float = 0.95
    """Decay of Adam's mean of squared gradients."""
    eps: float = 1e-8
    """Added to Adam's denominator."""
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment (Adam's and Muon's); bfloat16 saves 2 bytes a parameter. The second is always float32."""
    weight_decay: float = 0.1
    """Decoupled weight decay, times the learning rate."""
    clip: float = 1.0
    """Clip the global gradient norm to this; 0 for never."""

    def __post_init__(self):
        within(self, "optimizer", 0, math.inf, "peak_lr", "muon_lr", "warmup", "weight_decay", "clip", "eps")
        within(self, "optimizer", 0, 1, "final_fraction", "b1", "b2")


@dataclasses.dataclass(frozen=True)
class Training:
    """What the one training loop needs to know, whatever it trains."""

    steps: int = 1000
    """Updates in all."""
    batch: int = 32
    """Rows per step, over all hosts and accumulation steps."""
    accumulate: int = 1
    """Compute the batch in this many parts, one after another, to save memory; the loss is the same."""
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    ema: float = 0.0
    """Decay of the exponential moving average of the weights; 0 for none."""
    log_every: int = 20
    """Steps between two lines of the log."""
    evaluate_every: int = 0
    """Steps between evaluations on the validation split; 0: only at the end."""
    evaluate_batches: int = 8
    """Batches of an evaluation, at most."""
    sample_every: int = 0
    """Steps between sample pictures; 0: never. With several hosts one chip draws them, and needs room for the whole
    model beside its share of the training."""
    save_every: int = 1000
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Checkpoints kept, the latest ones; 0: all."""
    workers: int = 0
    """Processes that read and prepare batches; 0: threads of this process."""
    profile: tuple[int, ...] = ()
    """Write an xprof trace of these steps, first and last, counted from 1, to profile/ in the stage's folder."""
    seed: int = 0
    """Of the first weights, the order of the data and the masks."""

    def __post_init__(self):
        within(self, "training", 1, math.inf, "steps", "batch", "accumulate", "log_every", "evaluate_batches")
        within(self, "training", 0, math.inf, "evaluate_every", "sample_every", "save_every", "keep", "workers")
        within(self, "training", 0, SEEDS - 1, "seed")
        if self.profile and not (len(self.profile) == 2 and 1 <= self.profile[0] <= self.profile[1]):
            raise ValueError(f"training.profile = {self.profile}: must be the first and the last step, from 1 on")
        if not 0 <= self.ema < 1:
            raise ValueError(f"training.ema = {self.ema}: must be at least 0 (none) and below 1")


@dataclasses.dataclass(frozen=True)
class Hosts:
    """How the processes of one run, one per host, find each other; TPU pods, GKE and SLURM tell by themselves."""

    coordinator: str = ""
    """HOST:PORT of the machine that runs process 0; "": as the cluster says."""
    processes: int = 0
    """Processes of the run; 0: as the cluster says, else one; 1: this one alone, whatever the cluster says."""
    process: int = -1
    """Number of this process, from 0; -1: as the cluster says."""


# ------------------------------------------------------------------------------------------------------------- stages


@dataclasses.dataclass(frozen=True)
class Form:
    """How a document is written in ids; an import sets it, and what trains on its tokens keeps it."""

    kind: Literal["cm3leon", "chameleon"] = "cm3leon"
    """cm3leon: parts joined by <break>, masked spans behind them. chameleon (arXiv 2405.09818): text and pictures as
    they come, each picture between <break> and <eoss>; no masks."""
    begin: int = 0
    """chameleon: id of <s>, which opens every document."""
    turn: int = 0
    """chameleon: id of the end of turn, which closes a request and an answer."""
    pair: Literal["plain", "turn"] = "plain"
    """chameleon: what stands between a caption and its picture: nothing, or the end of turn, as where a model was tuned
    to draw on request."""
    request: str = "Describe the picture."
    """chameleon: what is asked of a picture, behind it, to have a caption (ours)."""
    grid: int = later(0)
    """chameleon: 0, or as in Lumina-mGPT (arXiv 2408.02657 §2.2): so many rows of so many codes, each row ended by
    `line`, all behind `side` twice."""
    side: int = later(0)
    """With `grid`: id that states height, and width."""
    line: int = later(0)
    """With `grid`: id that ends a row of codes."""
    drawing: str = later("{}")
    """chameleon: what a caption in place of {} is put into, where a picture follows it."""

    @property
    def plain(self) -> str:
        """The key of `PLAIN` and `PLAIN_TEXT`."""
        return "lumina" if self.grid else self.kind


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Decode and crop a source into records of one size."""

    source: str = ""
    """scenes:easy, :full, :rare, :tasks, tfds:NAME, set:NAME:FOLDER (a public set's files), a folder with
    metadata.jsonl/.csv, or WebDataset tars (braces allowed)."""
    resolution: int = 256
    """Side of the square picture: shorter side to this (Lanczos), then a centre crop."""
    count: int = 0
    """Records to generate (scenes) or to take at most (elsewhere); 0: the source's own count."""
    validation: float = 0.01
    """Share of the records whose split is not given that goes to validation, by hash of the pixels."""
    test: float = 0.01
    """The same, for the test split."""
    shards: int = 0
    """Output shards of the training split; 0: by size."""
    image_feature: str = "image"
    """tfds only: name of the picture feature."""
    text_feature: str = ""
    """Name of the caption: a tfds feature such as captions/text, a metadata column, a .json entry; "" looks for one."""
    tfds_dir: str = ""
    """tfds only: folder of the prepared sets; "": where tfds keeps them."""
    workers: int = 0
    """Processes; 0: one per core."""
    seed: int = 0
    """scenes only: which scenes are drawn."""
    feature: str = later("")
    """Make of every captioned picture a document that draws it from a feature image, made of it: "edges", "scribble",
    or "KIND=package.module:function", a function of yours: uint8 [h, w, 3] -> the same."""

    def __post_init__(self):
        within(self, "prepare", 0, SEEDS - 1, "seed")


@dataclasses.dataclass(frozen=True)
class Text:
    """Train a sentencepiece BPE on the captions of a data set."""

    sample: int = 1_000_000
    """Captions to train on, at most."""
    character_coverage: float = 0.9995
    """Share of the text whose characters get a piece of their own; rarer ones are written as bytes."""
    seed: int = 0
    """Of the choice of `sample` captions."""
    splits: tuple[str, ...] = later(("train",))
    """Whose texts it is trained on."""

    def __post_init__(self):
        within(self, "text", 1, math.inf, "sample")
        within(self, "text", 0, 1, "character_coverage")
        within(self, "text", 0, SEEDS - 1, "seed")
        if not self.splits or {"test", "validation"} & set(self.splits):
            raise ValueError(f"text.splits = {self.splits}: must be one or more, without validation and test")


@dataclasses.dataclass(frozen=True)
class VQGAN:
    """Network of the image tokenizer (Make-A-Scene's VQGAN, arXiv 2203.13131; VQGAN, arXiv 2012.09841)."""

    patch: int = 1
    """Fold patch x patch pixels into channels before the first layer (early patching; ours, for small machines)."""
    width: int = 128
    """Channels before `multipliers`."""
    multipliers: tuple[int, ...] = (1, 1, 2, 4)
    """Channels of each resolution over `width`; a halving between two neighbours."""
    encoder_blocks: int = 2
    """Residual blocks per resolution."""
    decoder_blocks: int = 3
    """The same, of the decoder."""
    encoder_kernel: int = 3
    """1 lets a code see its own patch only."""
    attention: tuple[int, ...] = (3,)
    """Indices into `multipliers` of the resolutions with self-attention; the encoder has none if encoder_kernel = 1."""
    middle: bool = True
    """Two more residual blocks at the lowest resolution, on both sides."""
    middle_attention: bool = True
    """Self-attention between those two blocks."""
    groups: int = 32
    """Groups of GroupNorm; lowered to a divisor of the channels where needed. 0: no norms, which a shallow network on
    plain pictures learns faster without (ours)."""
    z: int = 256
    """Dimension of a code vector."""
    l2_normalise: bool = False
    """Compare codes on the unit sphere (arXiv 2110.04627)."""
    codebook_ema: float = 0.0
    """Decay of codebook updates by moving averages; 0: by gradient."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute dtype; parameters are float32."""
    latents: int = later(0)
    """Channels that the encoder ends and the decoder begins with, before and behind the codes' own two convolutions;
    0: z. Published codes of few dimensions (LlamaGen's 8) lie between 256."""
    quantizer: Literal["nearest", "cosine", "argmax"] = later("nearest")
    """nearest: the code at the least distance. For imported weights only: cosine: the same, latents and codes scaled to
    length 1 at each use (LlamaGen); argmax: the code of the highest score by one more convolution (DALL-E's and
    taming's Gumbel softmax, without its noise)."""
    shortcut_kernel: int = later(1)
    """Of the convolution beside a residual block that changes the channels: 1 or 3."""
    decoder: bool = later(True)
    """False: pictures become codes, and codes no pictures, as in Chameleon's own files. For imported weights only."""

    def __post_init__(self):
        within(self, "image.model", 1, math.inf, "patch", "width", "z")
        within(self, "image.model", 0, math.inf, "encoder_blocks", "decoder_blocks", "groups", "latents")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"image.model.multipliers = {self.multipliers}: must be one or more numbers from 1 on")
        if self.encoder_kernel not in (1, 3):
            raise ValueError(f"image.model.encoder_kernel = {self.encoder_kernel}: must be 1 or 3")
        if self.shortcut_kernel not in (1, self.encoder_kernel):
            raise ValueError(
                f"image.model.shortcut_kernel = {self.shortcut_kernel}: must be 1, or 3 where encoder_kernel is 3"
            )
        if self.l2_normalise and self.quantizer != "nearest":
            raise ValueError(
                f"image.model.quantizer = {self.quantizer!r}: has its own scale; set l2_normalise to False, or take"
                " 'nearest'"
            )
        if any(not 0 <= i < len(self.multipliers) for i in self.attention):
            last = len(self.multipliers) - 1
            raise ValueError(f"image.model.attention = {self.attention}: must be indices of multipliers, 0 to {last}")
        if not 0 <= self.codebook_ema < 1:
            raise ValueError(f"image.model.codebook_ema = {self.codebook_ema}: must be at least 0 (none) and below 1")

    @property
    def factor(self) -> int:
        """Pixels of a side per code."""
        return self.patch * 2 ** (len(self.multipliers) - 1)


@dataclasses.dataclass(frozen=True)
class VQGANLoss:
    """Weights of the tokenizer's losses (arXiv 2012.09841 §3, arXiv 2203.13131 §3)."""

    l1: float = 1.0
    """Weight of the absolute error of pixels."""
    l2: float = 0.0
    """Weight of the squared error of pixels."""
    commitment: float = 0.25
    """Weight that draws the encoder's outputs to their codes."""
    perceptual: float = 1.0
    """Weight of the distance in a feature network; 0: none."""
    perceptual_weights: str = ""
    """File of LPIPS's VGG16 weights (safetensors); "": a stated substitute on multi-scale gradients."""
    adversarial: float = 0.75
    """Weight of the patch discriminator before the adaptive factor; 0: no discriminator."""
    adversarial_start: int = 30_000
    """First step of the discriminator."""
    discriminator_width: int = 64
    """Channels of the discriminator's first layer."""
    face: float = 0.0
    """Weight of feature matching on the boxes of regions of kind "face"."""
    face_weights: str = ""
    """File of a face network's weights (VGG16's layers, safetensors)."""
    object: float = 0.0
    """Weight of feature matching on the boxes of regions of kind "object", in the features of perceptual_weights."""
    boxes: int = 4
    """Boxes of a picture that these two look at, the largest first."""

    def __post_init__(self):
        weights = ("l1", "l2", "commitment", "perceptual", "adversarial", "face", "object")
        within(self, "image.loss", 0, math.inf, *weights, "adversarial_start")
        within(self, "image.loss", 1, math.inf, "discriminator_width", "boxes")


@dataclasses.dataclass(frozen=True)
class Image:
    """Train the image tokenizer."""

    model: VQGAN = VQGAN()
    loss: VQGANLoss = VQGANLoss()
    training: Training = Training(steps=800_000, batch=192, ema=0.999)
    seed_after: int = 0
    """Train this many steps without quantization, then seed the codebook with k-means; 0: seed from the first batch."""
    reset_dead_after: int = 500
    """Re-seed codes unused for this many steps from the data; 0: never."""

    def __post_init__(self):
        within(self, "image", 0, math.inf, "seed_after", "reset_dead_after")


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Turn records into token shards with the two tokenizers."""

    batch: int = 64
    """Pictures per step of the image tokenizer, over all chips of a host; rounded up to a multiple of them."""
    workers: int = 0
    """Processes that read and decode the pictures ahead; 0: threads of the main process."""

    def __post_init__(self):
        within(self, "tokens", 1, math.inf, "batch")
        within(self, "tokens", 0, math.inf, "workers")


@dataclasses.dataclass(frozen=True)
class CLIP:
    """Network of the retriever (CLIP, arXiv 2103.00020). Defaults: ViT-B/32, the paper's (arXiv 2309.02591 §2.1)."""

    resolution: int = 224
    """Side of the pictures that it sees; others are resized."""
    patch: int = 32
    """Side of a patch; a divisor of `resolution`."""
    vision_width: int = 768
    """Width of the picture tower."""
    vision_layers: int = 12
    """Blocks of the picture tower."""
    vision_heads: int = 12
    """Heads of the picture tower."""
    context: int = 77
    """Tokens of a text at most, begin and end included; the rest is cut."""
    text_width: int = 512
    """Width of the text tower."""
    text_layers: int = 12
    """Blocks of the text tower."""
    text_heads: int = 8
    """Heads of the text tower."""
    size: int = 512
    """Width of the vectors that the two towers share."""
    activation: Literal["quick_gelu", "gelu"] = "quick_gelu"
    """Of the feed-forward layers; OpenAI's weights need quick_gelu."""

    def __post_init__(self):
        sizes = ("resolution", "patch", "vision_width", "vision_layers", "vision_heads", "text_width", "text_layers")
        within(self, "retriever.model", 1, math.inf, *sizes, "text_heads", "size")
        within(self, "retriever.model", 3, math.inf, "context")
        if self.resolution % self.patch:
            raise ValueError(
                f"retriever.model.resolution = {self.resolution}: must be a multiple of patch = {self.patch}"
            )
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(
                    f"retriever.model.{tower}_width = {width}: must be a multiple of {tower}_heads = {heads}"
                )


@dataclasses.dataclass(frozen=True)
class Retriever:
    """The bi-encoder that finds documents: CLIP, from published weights or trained on the run's own pairs."""

    weights: str = ""
    """Folder of published weights (model.safetensors, its tokenizer; with config.json if Hugging Face's);
    "": train `model` on the pairs of `splits`, with the run's own text tokenizer."""
    model: CLIP = CLIP()
    splits: tuple[str, ...] = ("train",)
    """Splits whose pairs it is trained on; validation and test are refused."""
    training: Training = Training(steps=10_000, batch=1024)
    init_temperature: float = 0.07
    """First temperature of the contrastive loss (arXiv 2103.00020 §2.3); it is learned."""

    def __post_init__(self):
        within(self, "retriever", 1e-4, 100, "init_temperature")
        if not self.splits or {"test", "validation"} & set(self.splits):
            raise ValueError(f"retriever.splits = {self.splits}: must be one or more, without validation and test")


@dataclasses.dataclass(frozen=True)
class Bank:
    """The memory bank: a vector for each document that can be retrieved, and how it is searched."""

    splits: tuple[str, ...] = ("train",)
    """Splits whose documents can be retrieved; validation and test are refused."""
    held_out: tuple[str, ...] = later(())
    """Splits of whose documents no copy is ever retrieved; (): all that are not in `splits`."""
    search: Literal["flat", "ivf_pq", "hnsw", "mesh"] = "flat"
    """flat: every vector, on the host; ivf_pq, hnsw: faiss on the host (pip install 'cm3jax[retrieval]'); mesh: every
    vector, split over the accelerators."""
    batch: int = 256
    """Documents that go through the retriever at once, over all chips of a host."""
    shard: int = 65_536
    """Vectors of a file at most, in files that are still to be made. A shard is what hosts share and what is kept of an
    interrupted stage."""
    lists: int = 0
    """ivf_pq: cells of the coarse quantizer; 0: 4 x the root of the documents."""
    probes: int = 32
    """ivf_pq: cells that a query looks into."""
    code_bytes: int = 64
    """ivf_pq: bytes of a compressed vector; a divisor of its width."""
    links: int = 32
    """hnsw: links of a vector."""
    breadth: int = 128
    """hnsw: candidates kept while searching."""

    def __post_init__(self):
        within(self, "bank", 1, math.inf, "batch", "shard", "probes", "code_bytes", "links", "breadth")
        within(self, "bank", 0, math.inf, "lists")
        if not self.splits or {"test", "validation"} & set(self.splits):
            raise ValueError(f"bank.splits = {self.splits}: must be one or more splits, without validation and test")
        if set(self.held_out) & set(self.splits):
            raise ValueError(f"bank.held_out = {self.held_out}: must be without bank.splits {self.splits}")


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """Which documents are retrieved for one (arXiv 2309.02591 §2.1): relevance, modality, diversity, query dropout."""

    by_image: int = 2
    """Found by the picture's vector."""
    by_text: int = 2
    """Found by the text's vector."""
    candidates: int = 64
    """Nearest documents that the choice is made from."""
    most_score: float = 0.9
    """A document more similar to the query than this is passed over."""
    most_alike: float = 0.9
    """A document more similar than this to one already chosen is passed over (ours: the paper gives one number)."""
    dropout: float = 0.2
    """Share of the query's text tokens that are dropped."""
    both: bool = True
    """Only documents that hold text and a picture."""
    seed: int = 0
    """Of the dropout."""

    def __post_init__(self):
        within(self, "neighbours", 0, math.inf, "by_image", "by_text")
        within(self, "neighbours", 1, math.inf, "candidates")
        within(self, "neighbours", -1, 1, "most_score", "most_alike")
        within(self, "neighbours", 0, 1, "dropout")
        within(self, "neighbours", 0, SEEDS - 1, "seed")
        if not self.by_image + self.by_text:
            raise ValueError("neighbours.by_image = by_text = 0: nothing would be retrieved; set retrieve to False")


@dataclasses.dataclass(frozen=True)
class Retrieved:
    """Retrieved documents in training rows; only where the recipe retrieves at all."""

    least: int = 0
    """Of a document at least, if its neighbours suffice (ours)."""
    most: int = 3
    """Of a document at most, drawn from its neighbours (arXiv 2309.02591 §2.1); 0: train without."""
    weight: float = 1.0
    """Weight of the loss on retrieved documents: 1 in CM3Leon (arXiv 2309.02591 §2.2), 0.1 in RA-CM3 (2211.12561)."""

    def __post_init__(self):
        within(self, "decoder.retrieved", 0, 16, "least", "most")
        within(self, "decoder.retrieved", 0, 1, "weight")
        if self.least > self.most:
            raise ValueError(
                f"decoder.retrieved.least = {self.least}: must be at most decoder.retrieved.most = {self.most}"
            )


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Network of the language model. Defaults: CM3Leon (arXiv 2309.02591 §2.3); switches: Chameleon (2405.09818)."""

    layers: int = 24
    """Blocks of attention and feed-forward."""
    width: int = 1024
    """Width of the residual stream; a multiple of `heads`."""
    heads: int = 16
    """Heads of the queries."""
    kv_heads: int = 0
    """Heads of keys and values (grouped-query attention); 0: as many as `heads`."""
    head_size: int = 0
    """Width of a head; 0: width / heads."""
    mlp_width: int = 0
    """Width of the feed-forward layer; 0: 4 x width."""
    activation: Literal["relu", "swiglu"] = "relu"
    """swiglu: gated, as in Chameleon."""
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    """CM3Leon's layernorm has no learned parameters; rmsnorm has a learned scale, as in Chameleon."""
    norm_order: Literal["pre", "post"] = "pre"
    """post: Chameleon 34B's, the norm after attention and feed-forward, inside the residual branch."""
    norm_eps: float = 1e-5
    """Added to the variance in norms."""
    position: Literal["learned", "rope", "both"] = "learned"
    """A learned table, rotations of queries and keys (Chameleon), or both."""
    rope_theta: float = 10_000.0
    """Base of the rotations' wavelengths."""
    qk_norm: bool = False
    """LayerNorm per head on queries and keys, as in Chameleon."""
    tied: bool = True
    """Use the embedding table as the output layer."""
    init_std: float = 0.006
    """Truncated normal, cut at 3 standard deviations; output projections start at 0."""
    position_std: float = 0.0002
    """As `init_std`, of the table of positions."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Compute dtype; parameters, norms, softmax and loss are float32."""
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"
    """How training computes attention, alike within rounding. auto: splash (Pallas kernel) on TPU; cudnn on NVIDIA of
    compute capability >= 8, in bfloat16 and without packing.isolate; else xla. Sampling with a cache is always xla."""
    remat: Literal["none", "dots", "full", "offload"] = "full"
    """What the backward pass recomputes: nothing; all but matrix products; all from each layer's input on; offload:
    as full, with these inputs in the host's memory."""

    def __post_init__(self):
        within(self, "decoder.model", 1, math.inf, "layers", "width", "heads")
        within(self, "decoder.model", 0, math.inf, "kv_heads", "mlp_width", "norm_eps", "init_std", "position_std")
        if not self.head_size and self.width % self.heads:
            raise ValueError(f"decoder.model.width = {self.width} is not a multiple of heads = {self.heads}")
        if self.kv_heads and self.heads % self.kv_heads:
            raise ValueError(f"decoder.model.heads = {self.heads} is not a multiple of kv_heads = {self.kv_heads}")

    @property
    def head_width(self) -> int:
        return self.head_size or self.width // self.heads


@dataclasses.dataclass(frozen=True)
class Packing:
    """How documents fill the rows that the decoder trains on."""

    kind: Literal["whole", "chop"] = "chop"
    """chop: concatenate and cut anywhere, the paper's. whole: never cut a document, pad the rest (ours)."""
    length: int = 4096
    """Tokens of a row."""
    isolate: bool = False
    """Hide documents in one row from each other by segment ids; positions then count from each document's start."""
    documents: int = 0
    """whole only: documents per row at most; 0: as many as fit."""
    most_spans: int = 8
    """whole only: spans of a row at most, for whose markers room is kept. Poisson(1) exceeds 8 about once in a million
    rows, 4 in 0.4 % of them."""
    picture: int = 0
    """0: positions count through the row, the paper's. Else the codes of a picture, which then have fixed positions,
    the last of the row (ours, whole only): small models learn sooner what lies where (see `objectives.places`)."""
    opening: int = later(EOD)
    """Id before each document; not [eod] only in another form than cm3leon, whose form.begin it then is."""

    def __post_init__(self):
        within(self, "packing", 2, math.inf, "length")
        within(self, "packing", 0, math.inf, "documents", "most_spans", "opening")
        if self.opening != EOD and self.kind == "chop" and not self.isolate:
            raise ValueError(
                f"packing.opening = {self.opening}: documents that open with another id than they close with need"
                " packing.kind whole, or packing.isolate"
            )
        if self.picture and self.kind != "whole":
            raise ValueError(f"packing.picture = {self.picture}: needs whole pictures; set packing.kind to whole, or 0")
        if not 0 <= self.picture < self.length:
            raise ValueError(f"packing.picture = {self.picture}: must be 0 to packing.length - 1 = {self.length - 1}")


@dataclasses.dataclass(frozen=True)
class Mask:
    """The CM3 objective's span law (arXiv 2309.02591 §2.2, arXiv 2201.07520)."""

    spans: float = 1.0
    """Mean of the Poisson law of the number of spans in a block."""
    rotate: float = 0.5
    """Of the blocks with spans, the share that masks whole stretches between breaks (ours: the paper's is unknown, and
    without any, whole captions are hardly ever masked, which captioning and guidance need)."""
    captions: float = 0.0
    """Of those, the share that masks exactly one whole text (ours): short trainings learn to caption sooner."""
    answers: float = later(0.0)
    """Of the documents that a task made, the share that masks exactly the fields that the task declares as its answer
    (ours: 0.5 in instruction tuning). A picture that ends its document is not moved: nothing is masked there."""
    span_weight: float = later(0.0)
    """Weight that a moved span has in the loss at least, all its tokens together (ours: an answer of two words is
    little beside a picture's codes). 0: all tokens weigh the same, as in CM3Leon (arXiv 2309.02591 §2.2)."""
    context_weight: float = later(1.0)
    """Weight in the loss of each token around the answer, of documents that mask exactly that (ours: to model
    instructions and pictures that are given takes from learning what is asked for)."""
    end_weight: float = later(0.0)
    """Weight that each of the last two tokens of an answer in words has in the loss at least, of documents that mask
    exactly that (ours: an answer that first says what is seen ends with its verdict, two tokens of twenty)."""

    def __post_init__(self):
        within(self, "mask", 0, math.inf, "spans", "span_weight", "end_weight", "context_weight")
        within(self, "mask", 0, 1, "rotate", "captions", "answers")


@dataclasses.dataclass(frozen=True)
class Mixture:
    """Train on the tokens of several runs, mixed by weight (`data.mixing`)."""

    sets: tuple[str, ...] = ()
    """Token folders of other runs (RUN/tokens), made with the same two tokenizers; (): the run's own tokens alone."""
    weights: tuple[float, ...] = ()
    """Shares of the tokens, the run's own first, then those of `sets`; they need not add up to 1. (): equal shares."""
    least: float = later(0.0)
    """An epoch passes over each set at least so often, whatever the weights: instruction tuning down-samples to 0.3
    (arXiv 2309.02591 table 4; that the threshold is one of passes is our reading)."""
    most: float = later(0.0)
    """And at most so often: instruction tuning up-samples to 3 (the same); 0: no limit."""

    def __post_init__(self):
        wanted = len(self.sets) + 1 if self.sets else 0
        if self.weights and len(self.weights) != wanted:
            raise ValueError(
                f"decoder.mixture.weights = {self.weights}: must be {wanted} numbers, for the run's own tokens and the"
                f" {len(self.sets)} sets, or none for equal shares"
            )
        if any(not 0 < w < math.inf for w in self.weights):
            raise ValueError(
                f"decoder.mixture.weights = {self.weights}: must be above 0; leave out a set without weight"
            )
        within(self, "decoder.mixture", 0, 1, "least")
        if self.most:
            within(self, "decoder.mixture", 1, math.inf, "most")


@dataclasses.dataclass(frozen=True)
class DecoderStage:
    """Train the decoder."""

    model: Decoder = Decoder()
    packing: Packing = Packing()
    mask: Mask = Mask()
    retrieved: Retrieved = Retrieved()
    training: Training = Training(steps=167_000, batch=2048, optimizer=Optimizer(peak_lr=6e-4))
    z_loss: float = 0.0
    """Weight of the squared log-partition (Chameleon: 1e-5)."""
    loss_chunk: int = 512
    """Positions of a row whose logits exist at one time."""
    eval_mask_seed: int = 0
    """Of order and masks in evaluations, which are the same at every step."""
    mixture: Mixture = Mixture()
    start: str = later("")
    """Run folder whose decoder's weights training begins with, one that was imported perhaps; "": random ones."""
    unseen: Literal["kept", "drawn"] = later("kept")
    """Of the model that training begins with, the table's rows of text pieces that none of its own training documents
    holds. drawn: at random, as long as the others. kept: as they are; where the table is tied, training has pushed them
    all the same way at every step, until they are long and alike (arXiv 1907.12009), and new words start as one."""
    trainable: Literal["all", "image_head"] = later("all")
    """image_head: the output layer's rows of image codes alone, as Anole did (arXiv 2407.06135); all else stays as it
    was, bit for bit. Needs model.tied False."""

    def __post_init__(self):
        within(self, "decoder", 0, math.inf, "z_loss")
        within(self, "decoder", 1, math.inf, "loss_chunk")
        within(self, "decoder", 0, SEEDS - 1, "eval_mask_seed")
        if self.unseen == "drawn" and not self.start:
            raise ValueError("decoder.unseen = drawn: rows of which model? set decoder.start, or unseen to kept")
        if self.trainable == "image_head" and self.model.tied:
            raise ValueError(
                "decoder.trainable = image_head: with decoder.model.tied the output layer's rows are the table's; set"
                " tied to False"
            )


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn (arXiv 2309.02591 §3.1)."""

    method: Literal["top_p", "cd_k", "mixture"] = "top_p"
    """top_p: temperature, top-k, top-p with guidance; cd_k: contrastive decoding; mixture: every other row by each."""
    temperature: float = 1.0
    """0 is greedy. Under cd_k: of the conditional stream."""
    top_k: int = 0
    """Keep the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Of these, keep the fewest that hold this probability; 1: all."""
    guidance: float = 1.0
    """Classifier-free guidance: logits = uncond + guidance * (cond - uncond); 1 is off."""
    image_guidance: float = later(-1.0)
    """Of the pictures in a prompt, beside its text: logits = uncond + image_guidance * (pictures - uncond) + guidance *
    (all - pictures), a third stream (arXiv 2211.09800 §3.2.1); -1: as guidance, which takes two. Needs method top_p."""
    cd_alpha: float = 0.5
    """CD-K keeps tokens with p >= cd_alpha * (cd_k-th largest p). The paper states no value; 0.5 is public code's."""
    cd_k: int = 4
    """1 is plain contrastive decoding. The paper states no value."""
    uncond_temperature: float = 1.0
    """CD-K: temperature of the unconditional stream (public code: 0.5, beside a temperature of 0.8)."""
    repetition_penalty: float = later(1.0)
    """Ids that the row has already, its prompt included, have their logits divided by this where they are above 0,
    else multiplied (arXiv 1909.05858 §4.1); 1 is off. Codes of pictures are free to repeat. Needs method top_p."""

    def __post_init__(self):
        for name, good, limit in (
            ("temperature", self.temperature >= 0, "must be 0 (greedy) or more"),
            ("top_k", self.top_k >= 0, "must be 0 (all) or more"),
            ("top_p", 0 < self.top_p <= 1, "must be above 0 and at most 1 (all)"),
            ("guidance", self.guidance >= 0, "must be 0 or more (1 is off)"),
            ("image_guidance", self.image_guidance >= 0 or self.image_guidance == -1, "must be 0 or more, or -1"),
            ("cd_alpha", 0 < self.cd_alpha <= 1, "must be above 0 and at most 1"),
            ("cd_k", self.cd_k >= 1, "must be 1 or more"),
            ("uncond_temperature", self.uncond_temperature > 0, "must be above 0"),
            ("repetition_penalty", self.repetition_penalty > 0, "must be above 0 (1 is off)"),
        ):
            if not (good and math.isfinite(getattr(self, name))):
                raise ValueError(f"sampling.{name} = {getattr(self, name)}: {limit}")
        for name, off in (("image_guidance", -1), ("repetition_penalty", 1)):
            if getattr(self, name) != off and self.method != "top_p":
                raise ValueError(
                    f"sampling.{name} = {getattr(self, name)}: needs method top_p, and it is {self.method}; set it to"
                    f" {off}"
                )


PLAIN = {
    "cm3leon": Sampling(),
    "chameleon": Sampling(temperature=0.7, top_p=0.9, guidance=3.0, image_guidance=1.2, repetition_penalty=1.2),
    "lumina": Sampling(top_k=2000, guidance=4.0),
}
"""Form of documents -> how pictures, and pages of text and pictures, are drawn where no evaluation has chosen.
Chameleon's are the defaults of its released code (facebookresearch/chameleon, inference/chameleon.py: Options),
Lumina-mGPT's what its own README draws with (Alpha-VLLM/Lumina-mGPT)."""

PLAIN_TEXT = {
    "cm3leon": Sampling(temperature=0.0),
    "chameleon": Sampling(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
    "lumina": Sampling(top_k=10),
}
"""The same, of captions and answers."""


@dataclasses.dataclass(frozen=True)
class Evaluate:
    """Score a run; settings are chosen on the validation split, test and composition are run once."""

    samples: int = 512
    """Held-out examples behind every figure."""
    batch: int = 128
    """Rows drawn or written at one time."""
    draw: tuple[Sampling, ...] = (
        Sampling(temperature=1.0),
        Sampling(temperature=0.5),
        Sampling(temperature=0.5, guidance=1.5),
    )
    """Candidate settings for pictures."""
    write: Sampling = Sampling(temperature=0.0)
    """Setting for captions."""
    validation_samples: int = 128
    """Validation examples per candidate setting."""
    max_text: int = 96
    """Longest caption, in tokens."""
    documents: tuple[int, ...] = (0, 1, 2)
    """Numbers of retrieved documents to draw and caption with (arXiv 2309.02591 table 1), a row of the report each;
    only where the recipe retrieves."""
    candidates: int = 1
    """Pictures drawn for each caption, of which the retriever picks one (the paper: 8); above 1 the recipe must
    retrieve."""
    sheet: int = 16
    """Examples shown in the report."""
    seed: int = 0
    """Of what is drawn, and of the objects that are infilled."""

    def __post_init__(self):
        within(self, "evaluate", 1, math.inf, "samples", "batch", "validation_samples", "max_text", "candidates")
        within(self, "evaluate", 0, math.inf, "sheet")
        within(self, "evaluate", 0, SEEDS - 1, "seed")
        if not self.draw:
            raise ValueError("evaluate.draw: empty; needs at least one setting for pictures")
        if not self.documents or min(self.documents) < 0:
            raise ValueError(f"evaluate.documents = {self.documents}: must be one or more numbers from 0 on")


# ------------------------------------------------------------------------------------------------- scores of pictures

PictureMetric = Literal[
    "fid", "rfid", "kid", "precision", "recall", "clip_fid", "clip_score", "r_precision", "psnr", "ssim", "lpips"
]
"""What `cm3jax score` can tell; rfid is the FID of pictures and their originals, which have the same names."""


@dataclasses.dataclass(frozen=True)
class Weights:
    """Networks that pictures are scored with; none is part of this project."""

    inception: str = ""
    """pt_inception-2015-12-05 of pytorch-fid (.pth or safetensors): fid, rfid, kid, precision, recall."""
    clip: str = ""
    """A run's retriever/, or a folder of published CLIP weights with tokenizer: clip_fid, clip_score, r_precision."""
    vgg: str = ""
    """VGG16 with LPIPS's heads, as cm3jax/nn/perceptual.py says: lpips."""


@dataclasses.dataclass(frozen=True)
class Score:
    """Score a set of pictures."""

    metrics: tuple[PictureMetric, ...] = ("fid",)
    """Figures to compute."""
    weights: Weights = Weights()
    resize: Literal["pytorch-fid", "clean-fid"] = "pytorch-fid"
    """How pictures become Inception's 299 x 299: linear without a filter, or Pillow's bicubic in float32; figures of
    the two cannot be compared."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of Inception's convolutions."""
    subsets: int = 100
    """Of kid."""
    subset_size: int = 1000
    """Of kid, pictures of each set."""
    neighbours: int = 3
    """Of precision and recall: whose distance is the radius of a ball."""
    candidates: int = 100
    """Of r_precision: captions that a picture is compared with, its own among them."""
    seed: int = 0
    """Of kid's subsets and r_precision's captions."""
    batch: int = 0
    """Pictures in a network at one time; 0: 64, and 16 on a CPU, where what they take in it is host memory."""
    threads: int = 4
    """Threads that read and resize."""

    def __post_init__(self):
        within(self, "score", 0, math.inf, "batch")
        within(self, "score", 1, math.inf, "subsets", "neighbours", "threads")
        within(self, "score", 2, math.inf, "subset_size", "candidates")
        within(self, "score", 0, SEEDS - 1, "seed")


# ------------------------------------------------------------------------------------------------------------- a recipe


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One experiment: its stages in order."""

    name: str = "unnamed"
    """Of the run; its folder is runs/NAME unless --out says otherwise."""
    vocab: Vocab = Vocab()
    form: Form = later(Form())
    prepare: Prepare = Prepare()
    text: Text = Text()
    image: Image = Image()
    tokens: Tokens = Tokens()
    retrieve: bool = False
    """Find documents in a memory bank for the decoder to train and draw with; see retriever, bank, neighbours."""
    retriever: Retriever = Retriever()
    bank: Bank = Bank()
    neighbours: Neighbours = Neighbours()
    decoder: DecoderStage = DecoderStage()
    evaluate: Evaluate = Evaluate()

    def __post_init__(self):
        codes, picture = (self.prepare.resolution // self.image.model.factor) ** 2, self.decoder.packing.picture
        if picture not in (0, codes):
            raise ValueError(
                f"decoder.packing.picture = {picture}: a picture of {self.prepare.resolution} px has {codes} codes;"
                f" set it to {codes}, or to 0 for positions that count through the row"
            )
        if self.evaluate.candidates > 1 and not self.retrieve:
            raise ValueError(
                f"evaluate.candidates = {self.evaluate.candidates}: the retriever picks among them; set retrieve to"
                " True, or candidates to 1"
            )
        if self.form.kind == "chameleon":
            self._check_chameleon()
        elif self.decoder.packing.opening != EOD:
            raise ValueError(
                f"decoder.packing.opening = {self.decoder.packing.opening}: a document of form cm3leon opens with"
                f" [eod], {EOD}"
            )

    def _check_chameleon(self):
        """Raise ValueError for what a document of Chameleon's form has not."""
        for name in ("begin", "turn"):
            if not self.vocab.is_text(value := getattr(self.form, name)):
                raise ValueError(
                    f"form.{name} = {value}: must be an id of the vocabulary's text, {self.vocab.text_start} to"
                    f" {self.vocab.image_start - 1}"
                )
        if "{}" not in self.form.drawing:
            raise ValueError(f"form.drawing = {self.form.drawing!r}: must have {{}}, where the caption goes")
        codes, form = (self.prepare.resolution // self.image.model.factor) ** 2, self.form
        if form.grid and form.grid**2 != codes:
            raise ValueError(f"form.grid = {form.grid}: a picture of {self.prepare.resolution} px has {codes} codes")
        marks = [i for i in (form.side, form.line) if EOSS < i < self.vocab.size and not self.vocab.is_image(i)]
        if form.grid and len(marks) < 2:
            raise ValueError(
                f"form.side = {form.side}, form.line = {form.line}: with form.grid, ids of {EOSS + 1} to"
                f" {self.vocab.size - 1} that are no image codes"
            )
        for name, found, wanted in (
            ("decoder.packing.opening", self.decoder.packing.opening, self.form.begin),
            ("decoder.packing.picture", self.decoder.packing.picture, 0),
            ("decoder.mask.spans", self.decoder.mask.spans, 0),
            ("decoder.mask.answers", self.decoder.mask.answers, 0),
            ("retrieve", self.retrieve, False),
        ):
            if found != wanted:
                raise ValueError(f"{name} = {found}: must be {wanted} where documents are of form chameleon")


# -------------------------------------------------------------------------------------------------------- JSON, hashes


def to_json(config) -> Any:
    """Return a dataclass as plain JSON types; fields from `later` are left out at their default."""
    if dataclasses.is_dataclass(config):
        fields = {f: getattr(config, f.name) for f in dataclasses.fields(config)}
        return {f.name: to_json(x) for f, x in fields.items() if not (LATER in f.metadata and x == f.default)}
    if isinstance(config, (tuple, list)):
        return [to_json(x) for x in config]
    return config


def from_json(cls, data, where: str = ""):
    """Build dataclass `cls` from JSON types; missing fields take their defaults.

    Raises:
      UserError: naming the unknown field, or the value whose type is wrong.
    """
    if dataclasses.is_dataclass(cls):
        if not isinstance(data, dict):
            raise UserError(f"{where or cls.__name__}: expected an object, found {json.dumps(data)}")
        hints = typing.get_type_hints(cls)
        unknown = sorted(set(data) - set(hints))
        if unknown:
            raise UserError(f"{where or cls.__name__}: unknown field {unknown[0]!r}; known: {', '.join(hints)}")
        try:
            return cls(**{k: from_json(hints[k], v, f"{where}.{k}" if where else k) for k, v in data.items()})
        except (TypeError, ValueError) as e:
            raise UserError(str(e)) from None
    if typing.get_origin(cls) is tuple:
        item = typing.get_args(cls)[0]
        if not isinstance(data, (list, tuple)):
            raise UserError(f"{where}: expected a list, found {json.dumps(data)}")
        return tuple(from_json(item, x, f"{where}[{i}]") for i, x in enumerate(data))
    if typing.get_origin(cls) is Literal:
        if data not in typing.get_args(cls):
            raise UserError(f"{where} = {data!r}: must be one of {', '.join(map(repr, typing.get_args(cls)))}")
        return data
    if cls is Any or isinstance(cls, pytypes.UnionType):
        return data
    if cls is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if not isinstance(data, cls) or (cls is not bool and isinstance(data, bool)):
        raise UserError(f"{where} = {json.dumps(data)}: expected {cls.__name__}")
    return data


def digest(*things) -> str:
    """Return 16 hex digits that identify dataclasses or JSON values."""
    text = json.dumps([to_json(t) for t in things], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def load(path) -> Recipe:
    """Return the `Recipe` that a config file (.py binding `config`, or .json) holds.

    Raises:
      UserError: if there is no such file, or it holds no `Recipe`.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"config {str(path)!r}: no such file; see the folder configs/ of the repository")
    if path.suffix == ".json":
        try:
            return from_json(Recipe, json.loads(path.read_text()))
        except ValueError as e:
            raise UserError(f"config {str(path)!r}: not JSON: {e}") from None
    try:
        config = runpy.run_path(str(path)).get("config")
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"config {str(path)!r}: {type(e).__name__}: {e}") from None
    if not isinstance(config, Recipe):
        found = type(config).__name__
        raise UserError(f"config {str(path)!r}: must bind `config` to a cm3jax.config.Recipe, found {found}")
    return config
