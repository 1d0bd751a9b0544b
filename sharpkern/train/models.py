"""The reference models: fully connected, convolutional, and a small GPT."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "gelu": F.gelu, "tanh": torch.tanh}
PARAMETERISATIONS = ("sp", "ntp", "mup")
# A normal distribution cut at two standard deviations keeps this share of its standard deviation.
_CUT = 0.87962566103423978


class ScaledLinear(nn.Module):
    """A linear layer with a parameterisation's initial variance and forward multiplier; bias zero at first.

    With fan_in a, fan_out b, and variance factor s (2 for hidden layers, 1 for the readout):

    ======  ======================  ============================================
    sp      W ~ s / a               y = W x + c
    ntp     W ~ 1                   y = sqrt(s / a) W x + c
    mup     W ~ s / b (hidden)      y = sqrt(b / a) (W x + c)
    mup     W ~ 1 / a (readout)     y = sqrt(1 / a) (W x + c)
    ======  ======================  ============================================

    Args:
        fan_in: inputs.
        fan_out: outputs.
        parameterisation: sp, ntp or mup.
        readout: the last layer.
        generator: of the weights, a normal cut at two standard deviations and rescaled to the variance.

    Raises:
        ValueError: an unknown parameterisation.

    Source: Kalra and Barkeshli, Why warmup the learning rate? (2024), appendix on parameterisations.
    """

    def __init__(
        self,
        fan_in: int,
        fan_out: int,
        parameterisation: str,
        *,
        readout: bool,
        generator: torch.Generator | None,
    ) -> None:
        super().__init__()
        if parameterisation not in PARAMETERISATIONS:
            raise ValueError(
                f"unknown parameterisation {parameterisation!r}; known are {', '.join(PARAMETERISATIONS)}."
            )
        s = 1.0 if readout else 2.0
        variance = {"sp": s / fan_in, "ntp": 1.0, "mup": 1 / fan_in if readout else s / fan_out}[parameterisation]
        # Two multipliers, because muP's also acts on the bias and the neural tangent's does not.
        self.before_bias = math.sqrt(s / fan_in) if parameterisation == "ntp" else 1.0
        mup = math.sqrt(1 / fan_in) if readout else math.sqrt(fan_out / fan_in)
        self.after_bias = mup if parameterisation == "mup" else 1.0
        self.weight = nn.Parameter(torch.empty(fan_out, fan_in))
        self.bias = nn.Parameter(torch.zeros(fan_out))
        # The cut takes away variance, hence the division below: the initial sharpness follows the variance.
        nn.init.trunc_normal_(self.weight, 0.0, 1.0, -2.0, 2.0, generator=generator)
        with torch.no_grad():
            self.weight.mul_(math.sqrt(variance) / _CUT)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., fan_in] -> [..., fan_out]``."""
        # The usual case is one call. A multiplication by 1 would be one more op in the exported program, at every
        # product.
        if self.before_bias != 1.0:
            return F.linear(x, self.weight) * self.before_bias + self.bias
        y = F.linear(x, self.weight, self.bias)
        return y if self.after_bias == 1.0 else y * self.after_bias


class FCN(nn.Module):
    """Fully connected network on flattened inputs; FCN-4-512 has three hidden layers of 512 and a readout.

    Args:
        inputs: numbers in an example.
        classes: outputs.
        depth: linear layers, readout included.
        width: of the hidden layers.
        activation: relu, gelu or tanh.
        parameterisation: sp, ntp or mup.
        zero_readout: start with a readout of zero.
        seed: of the weights.

    Raises:
        ValueError: an unknown activation or parameterisation, depth below 2, or width below 1.
    """

    def __init__(
        self,
        inputs: int,
        classes: int,
        *,
        depth: int = 4,
        width: int = 512,
        activation: str = "relu",
        parameterisation: str = "sp",
        zero_readout: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"unknown activation {activation!r}; known are {', '.join(ACTIVATIONS)}.")
        if depth < 2 or width < 1:
            raise ValueError(f"depth must be at least 2 and width at least 1, got {depth} and {width}.")
        # A generator of its own: the network of a seed is the same whatever was drawn before it was built.
        generator = torch.Generator().manual_seed(seed)
        sizes = [inputs, *[width] * (depth - 1), classes]
        self.layers = nn.ModuleList(
            ScaledLinear(a, b, parameterisation, readout=i == depth - 1, generator=generator)
            for i, (a, b) in enumerate(zip(sizes, sizes[1:], strict=False))
        )
        self.activation = ACTIVATIONS[activation]
        if zero_readout:
            nn.init.zeros_(self.layers[-1].weight)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        """``[N, ...] -> [N, classes]``."""
        x = x.flatten(1)
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


class CNN(nn.Module):
    """Four 3x3 convolutions with layer norm over channels and pixels, mean pooling, and a readout.

    Args:
        channels: of the images.
        classes: outputs.
        width: channels of the first two convolutions; twice that in the others.
        seed: of the weights.
    """

    def __init__(self, channels: int, classes: int, *, width: int = 32, seed: int = 0) -> None:
        super().__init__()
        sizes = [(channels, width, 1), (width, width, 2), (width, 2 * width, 1), (2 * width, 2 * width, 2)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, stride=s, padding=1) for a, b, s in sizes)
        # One group is layer norm over channels and pixels. ``nn.LayerNorm`` would tie the model to one image size.
        self.norms = nn.ModuleList(nn.GroupNorm(1, b) for _, b, _ in sizes)
        self.readout = nn.Linear(2 * width, classes)
        _initialise(self, seed)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, classes]``."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        out: Tensor = self.readout(x.mean((2, 3)))
        return out


class _Block(nn.Module):
    """Pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        # One matrix product for all three; the permutation only makes views.
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        # As one op: the export keeps it whole, and the rule for attention then takes it. Written out, it would be two
        # products and a softmax whose scores are stored.
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(b, t, d))
        out: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return out


class GPT(nn.Module):
    """Decoder-only transformer with sinusoidal positions, after GPT-2.

    Args:
        vocabulary: number of tokens.
        context: longest sequence.
        width: of the residual stream; a multiple of heads.
        heads: attention heads.
        blocks: transformer blocks.
        last_norm: layer norm before the readout; without it the initial sharpness is 10 times higher.
        seed: of the weights.

    Raises:
        ValueError: width is no multiple of 2 * heads.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int,
        *,
        width: int = 128,
        heads: int = 4,
        blocks: int = 4,
        last_norm: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # Heads of even width: the heads share the width equally, and the positions are two halves, sines and cosines.
        if width % (2 * heads):
            raise ValueError(f"width must be a multiple of 2 * heads = {2 * heads}, got {width}.")
        self.embed = nn.Embedding(vocabulary, width)
        angle = torch.arange(context)[:, None] / 10_000 ** (torch.arange(0, width, 2) / width)
        # Not in the state_dict: it follows from context and width.
        self.register_buffer("positions", torch.cat([angle.sin(), angle.cos()], 1), persistent=False)
        self.blocks = nn.Sequential(*(_Block(width, heads) for _ in range(blocks)))
        self.norm = nn.LayerNorm(width) if last_norm else nn.Identity()
        self.readout = nn.Linear(width, vocabulary, bias=False)
        _initialise(self, seed)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[N, T] -> [N, T, vocabulary]``."""
        x = self.embed(tokens) + self.positions[: tokens.shape[1]]  # type: ignore[index]
        out: Tensor = self.readout(self.norm(self.blocks(x)))
        return out


def _initialise(model: nn.Module, seed: int) -> None:
    """Weights normal with variance 1 / fan_in, 2 / fan_in for convolutions before a ReLU; biases zero; norms one."""
    # ``modules()`` goes in the order of definition, so the seed fixes every number.
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Embedding):
            # What one output sums over. For an embedding this is the width, so that a token's vector has a length of
            # about 1.
            fan_in = module.weight[0].numel()
            gain = 2.0 if isinstance(module, nn.Conv2d) else 1.0
            nn.init.normal_(module.weight, 0.0, math.sqrt(gain / fan_in), generator=generator)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
