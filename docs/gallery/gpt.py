"""A small GPT-2 of Hugging Face's: which layers are sharp, and the spectrum of Hessian and Gauss-Newton matrix.

python gpt.py        # writes gpt.png; needs transformers
"""

import os

import matplotlib.pyplot as plt
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import sharpkern as sk
from sharpkern.train.config import DataConfig
from sharpkern.train.data import load

STEPS = int(os.environ.get("GALLERY_STEPS", 200))
PRODUCTS = min(40, STEPS)  # of each probe of a density
LAYERS = ["wte", "wpe", "h.0", "h.1", "h.2", "ln_f"]  # embeddings (wte is the readout, too), blocks, last norm


def loss_fn(output, batch):
    """Predict the next character; from the logits, so that a Gauss-Newton matrix can be split there."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())


def sample(size):
    """Return a random batch, as a tokenizer and collator would."""
    tokens = data.train_inputs[torch.randint(0, len(data.train_inputs), (size,))]
    return {"input_ids": tokens, "labels": tokens}


torch.manual_seed(0)
data = load(DataConfig("text", context=32))  # Python's language reference, by characters
config = GPT2Config(vocab_size=data.classes, n_positions=32, n_embd=32, n_layer=3, n_head=4, use_cache=False)
model = GPT2LMHeadModel(config).eval()  # no dropout
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained")
fixed = sample(16)
for (left, right), steps in zip(axes, (0, STEPS), strict=True):
    for _ in range(steps):
        batch = sample(16)
        optimizer.zero_grad()
        loss_fn(model(**batch), batch).backward()
        optimizer.step()
    H, G = (Operator(model, loss_fn, fixed) for Operator in (sk.HessianOperator, sk.GGNOperator))
    groups = {name: [p for p in H.params if p.startswith(f"transformer.{name}.")] for name in LAYERS}
    layers = sk.layer_sharpness(H, groups, tol=0.02)
    whole = sk.lanczos(H, tol=0.02).eigenvalues[0].item()
    print(f"after {steps} steps: loss {H.loss:.2f}, sharpness {whole:.3g}; layers", end="")
    print("", ", ".join(f"{name} {r.value:.2g}" for name, r in layers.items()))
    left.barh(list(layers), [r.value for r in layers.values()])
    left.axvline(whole, color="k", linestyle="--", label="whole model")
    left.set(xlabel="sharpness", title=f"after {steps} steps, loss {H.loss:.2f}")
    left.invert_yaxis()
    left.legend()
    for name, operator in (("Hessian", H), ("Gauss-Newton", G)):
        density = sk.spectral_density(operator, probes=2, steps=PRODUCTS)
        low, high = density.nodes.min().item(), density.nodes.max().item()
        print(f"    {name}: from {low:.3g} to {high:.3g}, {density.matvecs} products")
        grid = torch.linspace(low - 0.1 * high, 1.1 * high, 1000)
        right.plot(grid, density.density(grid).value.clamp(min=1e-7), label=name)
    right.set(xlabel="eigenvalue", ylabel="density", yscale="log", ylim=(1e-6, None))
    right.legend()
figure.savefig("gpt.png", dpi=110)
