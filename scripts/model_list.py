"""The models of ``scripts/models.py``: tiny Hugging Face configurations, and constructs of plain torch.

Each is built offline from random numbers; nothing is downloaded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

VOCABULARY, LENGTH, COUNT = 17, 6, 3
_WIDTHS = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
_TEXT = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
_IMAGE = {"image_size": 8, "patch_size": 4, "num_channels": 1}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True}


@dataclass(frozen=True)
class Case:
    """One model to compare.

    Attributes:
        name: in the table.
        make: builds the model; random numbers are torch's.
        batch: makes a batch in float32; random numbers are torch's.
        loss: ``(output, targets)``, or ``(output, batch)`` for a dict batch.
        group: heading in the table.
        symmetric: False where the gradient is not that of a function, so that there is no Hessian.
        moving: values without a gradient follow the parameters, so that differences of gradients see what no second
            backward pass does: the vectors of a spectral norm in train mode.
        frozen: names that begin so are not trained.
        modes: in which eager torch itself runs.
    """

    name: str
    make: Callable[[], nn.Module]
    batch: Callable[[], Any]
    loss: Callable[[Any, Any], Tensor]
    group: str
    symmetric: bool = True
    moving: bool = False
    frozen: str = ""
    modes: tuple[str, ...] = ("train", "eval")


def own_loss(output: Any, _batch: Any) -> Tensor:
    """Return the loss that a Hugging Face model computes from its labels."""
    return output.loss


# Batches.


def _ids() -> Tensor:
    return torch.randint(3, VOCABULARY, (COUNT, LENGTH))


def _mask(left: bool = False) -> Tensor:
    """Return a padding mask whose rows have different lengths, one of them whole."""
    real = torch.arange(LENGTH) < torch.tensor([LENGTH, LENGTH - 1, LENGTH - 3])[:, None]
    return real.flip(1).long() if left else real.long()


def text(left: bool = False) -> dict[str, Tensor]:
    """Token ids with padding, whose labels do not count."""
    ids, mask = _ids(), _mask(left)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def left_padded() -> dict[str, Tensor]:
    """Token ids with padding in front, as decoders are fed in batches."""
    return text(left=True)


def unmasked() -> dict[str, Tensor]:
    """Token ids of one length: for recurrent models, whose mask is not used."""
    ids = _ids()
    return {"input_ids": ids, "labels": ids}


def pair_of_texts() -> dict[str, Tensor]:
    """Source with padding, and labels of another length."""
    labels = torch.randint(3, VOCABULARY, (COUNT, LENGTH - 1))
    labels[1, -2:] = -100
    return {"input_ids": _ids(), "attention_mask": _mask(), "labels": labels}


def classes_of_texts() -> dict[str, Tensor]:
    """Token ids with padding, and a class for each text."""
    return {"input_ids": _ids(), "attention_mask": _mask(), "labels": torch.randint(3, (COUNT,))}


def sound() -> dict[str, Tensor]:
    """Log-mel features and labels."""
    return {"input_features": torch.randn(COUNT, 4, 12), "labels": torch.randint(3, VOCABULARY, (COUNT, LENGTH))}


def images(size: int = 8, channels: int = 1) -> dict[str, Tensor]:
    """Images with a class each."""
    return {"pixel_values": torch.randn(COUNT, channels, size, size), "labels": torch.randint(3, (COUNT,))}


def captions() -> dict[str, Any]:
    """Images and texts that belong together."""
    ids = _ids()
    ids[:, -1] = 1  # the end of the text, whose state is the text's
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images()["pixel_values"],
            "return_loss": True}  # fmt: skip


# Hugging Face. The name of a class without "Config" and the head's ending give both classes.


def _hf(family: str, head: str, config: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        return getattr(transformers, family + head)(getattr(transformers, family + "Config")(**config))

    return make


def _decoder(family: str, **changes: Any) -> Callable[[], nn.Module]:
    config = _WIDTHS | _TEXT | {"max_position_embeddings": 16, "attention_dropout": 0.1}
    return _hf(family, "ForCausalLM", config | changes)


def _encoder(family: str, head: str = "ForMaskedLM", **changes: Any) -> Callable[[], nn.Module]:
    return _hf(family, head, _WIDTHS | _TEXT | {"max_position_embeddings": 16} | changes)


def _clip() -> nn.Module:
    import transformers

    text_part = _WIDTHS | _TEXT | {"max_position_embeddings": 16, "projection_dim": 8}
    image_part = _WIDTHS | _IMAGE | {"projection_dim": 8}
    return transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text_part, vision_config=image_part, projection_dim=8)
    )


_NARROW = {"num_key_value_heads": 1}
_BART = {
    "d_model": 8, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "decoder_attention_heads": 2,
    "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "max_position_embeddings": 16, "decoder_start_token_id": 0,
}  # fmt: skip
_STAGES = {"num_channels": 1, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}

_HUGGING_FACE: list[tuple[str, Callable[[], nn.Module], Callable[[], Any]]] = [
    ("GPT-2", _hf("GPT2", "LMHeadModel", {**_TEXT, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}), text),
    ("GPT-NeoX", _decoder("GPTNeoX", hidden_dropout=0.1), left_padded),
    ("OPT", _hf("OPT", "ForCausalLM", _WIDTHS | _TEXT | {"ffn_dim": 12, "word_embed_proj_dim": 8,
                                                         "max_position_embeddings": 16}), text),
    ("BLOOM", _hf("Bloom", "ForCausalLM", {**_TEXT, "hidden_size": 8, "n_layer": 1, "n_head": 2,
                                           "hidden_dropout": 0.1, "attention_dropout": 0.1}), text),
    ("Llama", _decoder("Llama", num_hidden_layers=2), left_padded),
    ("Llama, grouped queries", _decoder("Llama", **_NARROW), text),
    ("Mistral, sliding window", _decoder("Mistral", sliding_window=3, **_NARROW), text),
    ("Qwen2, tied", _decoder("Qwen2", tie_word_embeddings=True, **_NARROW), left_padded),
    ("Qwen2-MoE", _decoder("Qwen2Moe", moe_intermediate_size=8, shared_expert_intermediate_size=8, num_experts=3,
                           decoder_sparse_step=1, **_NARROW, **_EXPERTS), text),
    ("Qwen3", _decoder("Qwen3", head_dim=4, **_NARROW), text),
    ("Mixtral", _decoder("Mixtral", num_local_experts=3, **_NARROW, **_EXPERTS), text),
    ("Mixtral, eager experts", _decoder("Mixtral", num_local_experts=3, experts_implementation="eager", **_NARROW,
                                        **_EXPERTS), text),
    ("Gemma", _decoder("Gemma", head_dim=4, **_NARROW), text),
    ("Gemma 2", _decoder("Gemma2", head_dim=4, num_hidden_layers=2, sliding_window=4, **_NARROW), text),
    ("Phi", _decoder("Phi", resid_pdrop=0.1, embd_pdrop=0.1), left_padded),
    ("Falcon", _decoder("Falcon", hidden_dropout=0.1, new_decoder_architecture=False), text),
    ("StableLM", _decoder("StableLm", hidden_dropout=0.1, num_key_value_heads=2), left_padded),
    ("BERT", _encoder("Bert"), text),
    ("BERT, classes", _encoder("Bert", "ForSequenceClassification", num_labels=3), classes_of_texts),
    ("RoBERTa", _encoder("Roberta", max_position_embeddings=20), text),
    ("DistilBERT", _hf("DistilBert", "ForMaskedLM", {**_TEXT, "dim": 8, "hidden_dim": 12, "n_layers": 1, "n_heads": 2,
                                                     "max_position_embeddings": 16}), text),
    ("ALBERT", _encoder("Albert", embedding_size=8, num_hidden_layers=2, hidden_dropout_prob=0.1), text),
    ("ELECTRA", _encoder("Electra", embedding_size=8), text),
    ("DeBERTa-v2", _encoder("DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"], position_buckets=4,
                            norm_rel_ebd="layer_norm", share_att_key=True), text),
    ("T5", _hf("T5", "ForConditionalGeneration", {**_TEXT, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 1,
                                                  "num_heads": 2, "decoder_start_token_id": 0}), pair_of_texts),
    ("BART", _hf("Bart", "ForConditionalGeneration", _TEXT | _BART), pair_of_texts),
    ("MBart", _hf("MBart", "ForConditionalGeneration", _TEXT | _BART | {"attention_dropout": 0.1}), pair_of_texts),
    ("Whisper", _hf("Whisper", "ForConditionalGeneration", _TEXT | _BART | {
        "num_mel_bins": 4, "max_source_positions": 6, "max_target_positions": 8, "dropout": 0.1}), sound),
    ("ViT", _hf("ViT", "ForImageClassification", _WIDTHS | _IMAGE | {"num_labels": 3, "hidden_dropout_prob": 0.1}),
     images),
    ("DeiT", _hf("DeiT", "ForImageClassification", _WIDTHS | _IMAGE | {"num_labels": 3}), images),
    ("BEiT", _hf("Beit", "ForImageClassification", _WIDTHS | _IMAGE | {
        "num_labels": 3, "drop_path_rate": 0.3, "use_relative_position_bias": True}), images),
    ("Swin", _hf("Swin", "ForImageClassification", {"image_size": 16, "patch_size": 2, "num_channels": 1,
        "embed_dim": 8, "depths": [2, 1], "num_heads": [2, 2], "window_size": 4, "num_labels": 3}),
     lambda: images(16)),
    ("ConvNeXt", _hf("ConvNext", "ForImageClassification", _STAGES | {"num_stages": 2, "patch_size": 2,
                                                                      "drop_path_rate": 0.3}), images),
    ("ResNet", _hf("ResNet", "ForImageClassification", _STAGES | {"embedding_size": 8, "layer_type": "basic"}),
     lambda: images(16)),
    ("CLIP", _clip, captions),
    ("Mamba", _hf("Mamba", "ForCausalLM", {**_TEXT, "hidden_size": 8, "state_size": 4, "num_hidden_layers": 1}),
     unmasked),
    ("RWKV", _hf("Rwkv", "ForCausalLM", {**_TEXT, "hidden_size": 8, "attention_hidden_size": 8,
                                         "num_hidden_layers": 2, "context_length": 16}), unmasked),
]  # fmt: skip


# Plain torch.


class Around(nn.Module):
    """Parts, and a function of them and the input."""

    def __init__(self, call: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.call = call
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        """Call the function with this module first."""
        return self.call(self, *inputs)


class Rounded(torch.autograd.Function):
    """Rounding whose backward passes straight through."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        """Round to halves."""
        return (2 * x).round() / 2

    @staticmethod
    def backward(_ctx: Any, g: Tensor) -> Tensor:
        """Pretend that it was the identity."""
        return g


class Reversed(torch.autograd.Function):
    """The identity, whose backward changes the sign."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        """Return the input."""
        return x.view_as(x)

    @staticmethod
    def backward(_ctx: Any, g: Tensor) -> Tensor:
        """Change the sign."""
        return -g


def _residual(s: Any, x: Tensor) -> Tensor:
    """Solve u' = u for a network u: the derivative is taken in the forward pass."""
    x = x.clone().requires_grad_()
    u = s.net(x)
    (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    return u - slope


def _mlp(width: int = 4, out: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, 6), nn.Tanh(), nn.Linear(6, out))


def _tied() -> nn.Module:
    model = Around(lambda s, i: s.head(torch.tanh(s.table(i))), table=nn.Embedding(7, 4), head=nn.Linear(4, 7))
    model.head.weight = model.table.weight
    return model


def _tower(layer: Callable[[], nn.Module], channels: int = 4) -> Callable[[], nn.Module]:
    """Put a layer between a convolution and a classifier; channels: the layer's own at its end."""
    return lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), layer(), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * channels, 3),
    )  # fmt: skip


def _rows(*shape: int, classes: int = 3) -> Callable[[], Any]:
    return lambda: (torch.randn(5, *shape), torch.randint(classes, (5,)))


def _tokens() -> Any:
    return torch.randint(7, (5, 4)), torch.randint(7, (5, 4))


def _each_token(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, -2), targets.flatten())


def _recurrent(kind: type[nn.RNNBase], **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        cell = kind(4, 6, num_layers=2, batch_first=True, **options)
        return Around(lambda s, x: s.head(s.cell(x)[0][:, -1]), cell=cell, head=nn.Linear(6, 3))

    return make


def _masked_attention() -> nn.Module:
    def call(s: Any, x: Tensor) -> Tensor:
        hidden = torch.arange(x.shape[1]) >= torch.tensor([4, 3, 2, 4, 1])[:, None]
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return s.head(s.attention(x, x, x, key_padding_mask=hidden, attn_mask=causal, need_weights=False)[0].mean(1))

    return Around(call, attention=nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True), head=nn.Linear(4, 3))


def _transformer() -> nn.Module:
    body = nn.Transformer(8, 2, 1, 1, 12, dropout=0.1, batch_first=True)
    causal = nn.Transformer.generate_square_subsequent_mask(4)
    return Around(lambda s, x, y: s.body(x, y, tgt_mask=causal.to(x.dtype)), body=body)


def _checkpointed(reentrant: bool) -> Callable[[], nn.Module]:
    def call(s: Any, x: Tensor) -> Tensor:
        return s.head(checkpoint(s.body, s.first(x), use_reentrant=reentrant))

    def make() -> nn.Module:
        body = nn.Sequential(nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.2))
        return Around(call, first=nn.Linear(4, 6), body=body, head=nn.Linear(6, 3))

    return make


_PARAMETRIZED = nn.utils.parametrizations
_CE = F.cross_entropy
_ABOUT: list[tuple[str, Callable[[], nn.Module], Callable[[], Any], Callable[..., Tensor]]] = [
    ("LSTM with dropout", _recurrent(nn.LSTM, dropout=0.3), _rows(4, 4), _CE),
    ("GRU", _recurrent(nn.GRU), _rows(4, 4), _CE),
    ("nn.Transformer, causal", _transformer,
     lambda: ((torch.randn(3, 5, 8), torch.randn(3, 4, 8)), torch.randn(3, 4, 8)), F.mse_loss),
    ("MultiheadAttention, two masks", _masked_attention, _rows(4, 4), _CE),
    ("EmbeddingBag", lambda: nn.Sequential(nn.EmbeddingBag(7, 4), nn.Tanh(), nn.Linear(4, 3)),
     lambda: (torch.randint(7, (5, 4)), torch.randint(3, (5,))), _CE),
    ("weight norm", lambda: nn.Sequential(_PARAMETRIZED.weight_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)),
     _rows(4), _CE),
    ("checkpoint, not reentrant", _checkpointed(False), _rows(4), _CE),
    ("checkpoint, reentrant", _checkpointed(True), _rows(4), _CE),
    ("FFT layer", lambda: Around(lambda s, x: s.head(torch.fft.rfft(s.first(x)).abs()), first=nn.Linear(4, 6),
                                 head=nn.Linear(4, 3)), _rows(4), _CE),
    ("autograd.grad in the forward", lambda: Around(_residual, net=_mlp(1, 1)),
     lambda: (torch.rand(5, 1), torch.zeros(5, 1)), F.mse_loss),
    ("tied weights", _tied, _tokens, _each_token),
    ("BatchNorm, momentum=None", _tower(lambda: nn.BatchNorm2d(4, momentum=None)), _rows(2, 4, 4), _CE),
    ("GroupNorm", _tower(lambda: nn.GroupNorm(2, 4)), _rows(2, 4, 4), _CE),
    ("InstanceNorm, running", _tower(lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
     _rows(2, 4, 4), _CE),
    ("Upsample, bilinear", _tower(lambda: nn.Upsample(scale_factor=2, mode="bilinear")), _rows(2, 4, 4), _CE),
    ("PixelShuffle", _tower(lambda: nn.PixelShuffle(2), 1), _rows(2, 4, 4), _CE),
    ("ConvTranspose", _tower(lambda: nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1), 3), _rows(2, 4, 4), _CE),
]  # fmt: skip

CASES = [
    # RWKV scales its weights in place in eval mode, and torch refuses the gradient.
    *(Case(name, make, batch, own_loss, "Hugging Face", modes=("train",) if name == "RWKV" else ("train", "eval"))
      for name, make, batch in _HUGGING_FACE),
    *(Case(name, make, batch, loss, "plain torch") for name, make, batch, loss in _ABOUT),
    Case("spectral norm",
         lambda: nn.Sequential(_PARAMETRIZED.spectral_norm(nn.Linear(4, 6)), nn.Tanh(), nn.Linear(6, 3)),
         _rows(4), _CE, "plain torch", moving=True),
    Case("frozen parts", lambda: nn.Sequential(_mlp(4, 6), nn.GELU(), nn.Linear(6, 3)), _rows(4), _CE, "plain torch",
         frozen="0."),
    Case("straight-through rounding", lambda: Around(lambda s, x: s.b(torch.tanh(Rounded.apply(s.a(x)))),
         a=nn.Linear(4, 6), b=nn.Linear(6, 3)), _rows(4), _CE, "plain torch", symmetric=False),
    Case("gradient reversal", lambda: Around(lambda s, x: s.b(torch.tanh(Reversed.apply(s.a(x)))),
         a=nn.Linear(4, 6), b=nn.Linear(6, 3)), _rows(4), _CE, "plain torch", symmetric=False),
]  # fmt: skip
