"""Plain PyTorch image tokenizers under the published names: a second way to compute what nn/vqgan does.

Built from arXiv 2012.09841 (appendix A, and its public checkpoints' names) and arXiv 2406.06525 §2.1. A network is a
tree of torch's own layers; the functions below walk it.
"""

import dataclasses

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What a network is; the defaults are small, with every kind of part."""

    form: str = "taming"
    width: int = 32
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 1
    attention: tuple[int, ...] = (2,)
    z: int = 5
    latents: int = 7
    codes: int = 23
    gumbel: bool = False
    decoder: bool = True
    shortcut: str = "nin_shortcut"
    middle_attention: bool = True
    eps: float = 1e-6
    padding: tuple[int, int, int, int] = (0, 1, 0, 1)
    """Left, right, above, below, before a 3 x 3 kernel of stride 2."""


SMALL = {
    "taming": Sizes(),
    "Gumbel": Sizes(multipliers=(1, 2), attention=(1,), z=7, gumbel=True),
    "LlamaGen": Sizes("llamagen", z=3),
    "encoder alone": Sizes(multipliers=(1, 2), attention=(), blocks=2, decoder=False),
    "wide shortcut": Sizes(multipliers=(2, 1, 3), attention=(0, 2), shortcut="conv_shortcut", middle_attention=False),
}
F16 = Sizes(width=128, multipliers=(1, 1, 2, 2, 4), blocks=2, attention=(4,), z=256, latents=256, codes=16384)
FULL = {
    "taming f16/1024": (dataclasses.replace(F16, codes=1024), 72_141_699),
    "taming f16/16384": (F16, 76_073_859),
    "taming Gumbel f8/8192": (
        dataclasses.replace(F16, multipliers=(1, 1, 2, 4), attention=(3,), codes=8192, gumbel=True), 68_995_971,
    ),
    "Chameleon": (dataclasses.replace(F16, attention=(), codes=8192), 68_718_467),
    "LlamaGen VQ-16": (dataclasses.replace(F16, form="llamagen", z=8), 71_883_403),
}  # fmt: skip
"""The published networks by their own descriptions, and their numbers of parameters."""


def tree(**parts):
    found = nn.Module()
    for name, part in parts.items():
        found.add_module(name, part)
    return found


def conv(inside, outside, kernel=3):
    return nn.Conv2d(inside, outside, kernel, padding=kernel // 2)


def block(s, inside, outside):
    norms = {"norm1": nn.GroupNorm(32, inside, s.eps), "norm2": nn.GroupNorm(32, outside, s.eps)}
    beside = {s.shortcut: conv(inside, outside, 1 if s.shortcut == "nin_shortcut" else 3)} if inside != outside else {}
    return tree(**norms, conv1=conv(inside, outside), conv2=conv(outside, outside), **beside)


def attention(s, width):
    parts = {name: conv(width, width, 1) for name in ("q", "k", "v", "proj_out")}
    return tree(norm=nn.GroupNorm(32, width, s.eps), **parts)


def middle(s, width):
    parts = [block(s, width, width), attention(s, width), block(s, width, width)]
    if s.form == "llamagen":
        return nn.ModuleList(parts)
    named = dict(zip(("block_1", "attn_1", "block_2"), parts, strict=True))
    return tree(**{name: part for name, part in named.items() if s.middle_attention or name != "attn_1"})


def stack(s, i, inside, blocks, **more):
    """One resolution's blocks."""
    outside = s.width * s.multipliers[i]
    made = nn.ModuleList(block(s, inside if j == 0 else outside, outside) for j in range(blocks))
    looks = nn.ModuleList(attention(s, outside) for _ in range(blocks if i in s.attention else 0))
    return tree(**{"res" if s.form == "llamagen" else "block": made}, attn=looks, **more)


def encoder(s):
    widths, last = [s.width * m for m in s.multipliers], len(s.multipliers) - 1
    levels = nn.ModuleList()
    for i, inside in enumerate([s.width, *widths[:-1]]):
        more = {"downsample": tree(conv=nn.Conv2d(widths[i], widths[i], 3, stride=2))} if i < last else {}
        levels.append(stack(s, i, inside, s.blocks, **more))
    return tree(
        conv_in=conv(3, s.width),
        **{"conv_blocks" if s.form == "llamagen" else "down": levels},
        mid=middle(s, widths[-1]),
        norm_out=nn.GroupNorm(32, widths[-1], s.eps),
        conv_out=conv(widths[-1], s.latents),
    )


def decoder(s):
    widths = [s.width * m for m in s.multipliers]
    levels = []
    for i in reversed(range(len(widths))):
        more = {"upsample": tree(conv=conv(widths[i], widths[i]))} if i > 0 else {}
        levels.append(stack(s, i, widths[min(i + 1, len(widths) - 1)], s.blocks + 1, **more))
    # LlamaGen numbers them as they work, taming by their place in the multipliers
    named = {"conv_blocks": nn.ModuleList(levels)} if s.form == "llamagen" else {"up": nn.ModuleList(levels[::-1])}
    return tree(
        conv_in=conv(s.latents, widths[-1]),
        mid=middle(s, widths[-1]),
        **named,
        norm_out=nn.GroupNorm(32, widths[0], s.eps),
        conv_out=conv(widths[0], 3),
    )


def build(s):
    """Return a network; its state_dict has the published names and shapes."""
    if s.gumbel:
        table = {"proj": conv(s.z, s.codes, 1), "embed": nn.Embedding(s.codes, s.z)}
    else:
        table = {"embedding": nn.Embedding(s.codes, s.z)}
    parts = {"encoder": encoder(s), "quantize": tree(**table)}
    parts |= {"quant_conv": conv(s.latents, s.z, 1), "post_quant_conv": conv(s.z, s.latents, 1)}
    return tree(**parts, **({"decoder": decoder(s)} if s.decoder else {})).eval()


# ----------------------------------------------------------------------------------------------------------- computing


def norm_silu(norm, x):
    return F.silu(norm(x))


def through_block(part, x):
    y = part.conv1(norm_silu(part.norm1, x))
    y = part.conv2(norm_silu(part.norm2, y))
    beside = [layer for name, layer in part.named_children() if name.endswith("shortcut")]
    return (beside[0](x) if beside else x) + y


def through_attention(part, x):
    b, c, h, w = x.shape
    q, k, v = (layer(part.norm(x)).reshape(b, c, h * w) for layer in (part.q, part.k, part.v))
    weights = torch.softmax(torch.einsum("bct,bcs->bts", q, k) / c**0.5, -1)
    return x + part.proj_out(torch.einsum("bts,bcs->bct", weights, v).reshape(b, c, h, w))


def through(part, x):
    return through_attention(part, x) if hasattr(part, "q") else through_block(part, x)


def through_stack(part, x):
    blocks = part.res if hasattr(part, "res") else part.block
    for j, one in enumerate(blocks):
        x = through_block(one, x)
        if len(part.attn):
            x = through_attention(part.attn[j], x)
    return x


@torch.no_grad()
def latents(s, net, pictures):
    """Return what is quantised, [b, z, i, j], of pictures [b, 3, h, w]."""
    part = net.encoder
    x = part.conv_in(pictures)
    for level in part.conv_blocks if s.form == "llamagen" else part.down:
        x = through_stack(level, x)
        if hasattr(level, "downsample"):
            x = level.downsample.conv(F.pad(x, s.padding))
    for one in part.mid.children():
        x = through(one, x)
    return net.quant_conv(part.conv_out(norm_silu(part.norm_out, x)))


@torch.no_grad()
def badness(s, net, found):
    """Return [n, m], of each latent the distance of each code, or of Gumbel's the negative score; least is best."""
    if s.gumbel:
        return -net.quantize.proj(found).permute(0, 2, 3, 1).reshape(-1, s.codes)
    table, flat = net.quantize.embedding.weight, found.permute(0, 2, 3, 1).reshape(-1, s.z)
    if s.form == "llamagen":
        table, flat = F.normalize(table, dim=-1), F.normalize(flat, dim=-1)
    return torch.cdist(flat.double(), table.double()) ** 2


@torch.no_grad()
def paint(s, net, codes):
    """Return pictures [b, 3, h, w] of codes [b, i, j]."""
    table = (net.quantize.embed if s.gumbel else net.quantize.embedding).weight
    table = F.normalize(table, dim=-1) if s.form == "llamagen" else table
    part = net.decoder
    x = part.conv_in(net.post_quant_conv(table[codes].permute(0, 3, 1, 2)))
    for one in part.mid.children():
        x = through(one, x)
    for level in part.conv_blocks if s.form == "llamagen" else reversed(part.up):
        x = through_stack(level, x)
        if hasattr(level, "upsample"):
            x = level.upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
    return part.conv_out(norm_silu(part.norm_out, x))


# -------------------------------------------------------------------------------------------------------------- weights


@torch.no_grad()
def random(s, seed=0):
    """Return a network with random weights, whose latents and codes spread."""
    net, draw = build(s), torch.Generator().manual_seed(seed)
    shake(net, draw)
    settle(net.quantize, latents(s, net, torch.from_numpy(pictures(8, 16, seed + 1))), draw)
    return net


@torch.no_grad()
def shake(net, draw):
    """Set random weights; the first layers are so weak that the norms behind them divide by little, and eps counts."""
    for name, x in net.named_parameters():
        fan = x[0].numel() if x.ndim == 4 else 1
        scale = fan**-0.5 if x.ndim > 1 else 0.3
        x.copy_(scale * torch.randn(x.shape, generator=draw) + (name.endswith("weight") and x.ndim == 1))
        if "conv_in" in name:
            x.mul_(2e-3)


@torch.no_grad()
def settle(quantize, found, draw):
    """Put the codes among latents; LlamaGen's keep lengths of their own, Gumbel's scores lose what all have alike."""
    flat = found.permute(0, 2, 3, 1).reshape(-1, found.shape[1])
    table = (quantize.embed if hasattr(quantize, "embed") else quantize.embedding).weight
    if hasattr(quantize, "proj"):
        quantize.proj.bias.sub_(quantize.proj(found).mean((0, 2, 3)))
        table.normal_(generator=draw)
    else:
        at = torch.randperm(len(flat), generator=draw)[: len(table)]
        table.copy_(flat[at] * (0.5 + torch.rand(len(table), 1, generator=draw)))


def pictures(b, side, seed=0):
    """Return smooth random pictures, float32 [b, 3, h, w] in [-1, 1]."""
    x = np.random.default_rng(seed).normal(size=(b, 3, side, side)).astype(np.float32)
    return np.tanh(x + 3 * x.mean((2, 3), keepdims=True) + 2 * x[:, :, :1])


def state(net, dtype=np.float32, prefix=""):
    """Return the network's tensors by their published names, as numpy has them."""
    return {prefix + name: x.numpy().astype(dtype) for name, x in net.state_dict().items()}
