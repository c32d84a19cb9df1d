"""The opponent: a GPT in plain PyTorch with nanoGPT's architecture, names and training step, to be beaten as fast as it gets.

Written after nanoGPT's description, with none of our kernels: ``nn.Linear``, ``F.layer_norm``, ``F.gelu``,
``F.scaled_dot_product_attention``, the whole (B*T, V) logits and ``F.cross_entropy``, under autocast. Two switches make it
stronger than nanoGPT itself: the attention backend, and a residual stream in 16 bits.

B batch, T sequence, C channels, nh heads, hs head size, V vocabulary.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

ATTENTION = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


class LayerNorm(nn.Module):
    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    def __init__(self, n_embd: int, n_head: int, bias: bool, attention: str):
        super().__init__()
        self.c_attn = nn.Linear(n_embd, 3 * n_embd, bias=bias)
        self.c_proj = nn.Linear(n_embd, n_embd, bias=bias)
        self.n_head, self.backend = n_head, ATTENTION.get(attention)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = (z.view(B, T, self.n_head, C // self.n_head).transpose(1, 2) for z in self.c_attn(x).split(C, dim=2))
        if self.backend is None:  # PyTorch's own choice
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            with sdpa_kernel(self.backend):
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, nh, T, hs)
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class MLP(nn.Module):
    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.c_fc = nn.Linear(n_embd, 4 * n_embd, bias=bias)
        self.c_proj = nn.Linear(4 * n_embd, n_embd, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    def __init__(self, n_embd: int, n_head: int, bias: bool, attention: str):
        super().__init__()
        self.ln_1 = LayerNorm(n_embd, bias)
        self.attn = CausalSelfAttention(n_embd, n_head, bias, attention)
        self.ln_2 = LayerNorm(n_embd, bias)
        self.mlp = MLP(n_embd, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class BaselineGPT(nn.Module):
    """GPT-2 in plain PyTorch, parameters fp32.

    Args:
        attention: flash, cudnn or math; anything else leaves the choice to PyTorch.
        dtype: the autocast dtype; float32 turns autocast off.
        low_residual: keep the residual stream in ``dtype`` instead of nanoGPT's fp32.
    """

    def __init__(self, n_layer, n_head, n_embd, block_size, vocab_size, bias=False, *, attention, dtype, low_residual=False):
        super().__init__()
        self.dtype, self.low_residual = dtype, low_residual
        self.recompute = False  # blocks keep their input alone, and are computed again in backward
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(vocab_size, n_embd),
                "wpe": nn.Embedding(block_size, n_embd),
                "h": nn.ModuleList(Block(n_embd, n_head, bias, attention) for _ in range(n_layer)),
                "ln_f": LayerNorm(n_embd, bias),
            }
        )
        self.lm_head = nn.Linear(n_embd, vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                nn.init.normal_(p, std=0.02 / math.sqrt(2 * n_layer) if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy, fp32 scalar, of idx and targets (B, T) int64; targets of -1 are left out."""
        low = self.dtype.itemsize == 2
        with torch.autocast(idx.device.type, self.dtype) if low else nullcontext():
            positions = torch.arange(idx.shape[1], device=idx.device)
            x = self.transformer.wte(idx) + self.transformer.wpe(positions)  # (B, T, C)
            if self.low_residual:
                x = x.to(self.dtype)
            for block in self.transformer.h:
                x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
            logits = self.lm_head(self.transformer.ln_f(x))  # (B, T, V)
            return F.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1), ignore_index=-1)


def adamw(model: nn.Module, lr: float = 6e-4, fused: bool | None = None) -> torch.optim.AdamW:
    """nanoGPT's optimizer: matrices and embeddings decay by 0.1, the rest does not; PyTorch's fused kernel on a GPU alone,
    unless ``fused`` says otherwise."""
    decay = [p for p in model.parameters() if p.dim() >= 2]
    rest = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    fused = model.lm_head.weight.is_cuda if fused is None else fused
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=fused)
