"""GPT-2 as nanoGPT defines it, on the ops of `kernels`.

Parameters are fp32; activations and the residual stream have the compute dtype. Every sub-layer's output (its "branch") is
added to the residual stream inside the next LayerNorm's kernel, so a block takes and returns the pair (branch, residual).

B batch, T sequence, C channels (n_embd), nh heads, hs head size, V vocabulary.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kernels.attention import causal_attention, decode_attention
from kernels.cross_entropy import linear_cross_entropy
from kernels.embedding import embedding
from kernels.layernorm import layer_norm, layer_norm_residual
from kernels.linear import linear
from kernels.mlp import gelu_mlp
from nanogpt.config import GPTConfig


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias; given a residual stream, it first adds the branch x to it."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_embd))
        self.bias = nn.Parameter(torch.zeros(n_embd)) if bias else None

    def forward(self, x: Tensor, residual: Tensor | None, dropout_p: float) -> tuple[Tensor, Tensor]:
        if residual is None:  # x is the embedding: the stream starts here
            return layer_norm(x, self.weight, self.bias), x
        return layer_norm_residual(x, residual, self.weight, self.bias, dropout_p=dropout_p)


class KVCache:
    """Keys and values of the tokens seen so far, per layer (B, nh, T_max, hs)."""

    def __init__(self, config: GPTConfig, batch_size: int, max_len: int, dtype: torch.dtype, device: torch.device):
        shape = (batch_size, config.n_head, max_len, config.n_embd // config.n_head)
        self.keys = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.values = [torch.empty(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]
        self.length = 0  # advanced by GPT.forward, once per call

    @property
    def max_len(self) -> int:
        return self.keys[0].shape[2]

    def attend(self, layer: int, qkv: Tensor, n_head: int) -> Tensor:
        """Appends the keys and values of qkv (B, T, 3C), then attends: T > 1 only into an empty cache."""
        B, T, C3 = qkv.shape
        k, v = qkv.view(B, T, 3, n_head, -1)[:, :, 1:].permute(2, 0, 3, 1, 4)  # each (B, nh, T, hs)
        end = self.length + T
        self.keys[layer][:, :, self.length : end] = k
        self.values[layer][:, :, self.length : end] = v
        if T > 1:
            if self.length:
                raise ValueError(f"a prompt of {T} tokens needs an empty cache, this one holds {self.length}")
            return causal_attention(qkv, n_head)
        lengths = torch.full((B,), end, dtype=torch.int32, device=qkv.device)
        return decode_attention(qkv[:, 0, : C3 // 3], self.keys[layer], self.values[layer], lengths)[:, None]  # (B, 1, C)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head, self.layer, self.dropout = config.n_head, layer, config.dropout

    def forward(self, x: Tensor, cache: KVCache | None) -> Tensor:
        qkv = self.c_attn(x)  # (B, T, 3C)
        if cache is not None:
            return self.c_proj(cache.attend(self.layer, qkv, self.n_head))
        return self.c_proj(causal_attention(qkv, self.n_head, self.dropout if self.training else 0.0))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.approximate = "tanh" if config.gelu == "tanh" else "none"

    def forward(self, x: Tensor) -> Tensor:
        return gelu_mlp(x, self.c_fc.weight, self.c_fc.bias, self.c_proj.weight, self.c_proj.bias, self.approximate)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = LayerNorm(config.n_embd, config.bias)
        self.mlp = MLP(config)
        self.dropout = config.dropout

    def forward(self, branch: Tensor, residual: Tensor | None, cache: KVCache | None = None) -> tuple[Tensor, Tensor]:
        p = self.dropout if self.training else 0.0
        y, residual = self.ln_1(branch, residual, p)
        y, residual = self.ln_2(self.attn(y, cache), residual, p)
        return self.mlp(y), residual


class GPT(nn.Module):
    """A GPT-2 language model.

    Args:
        config: its shape.
        dtype: compute dtype of activations and GEMMs: bfloat16, float16 or float32. Parameters stay fp32.
    """

    def __init__(self, config: GPTConfig, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.config, self.dtype = config, dtype
        self.recompute = False  # blocks keep their input alone, and are computed again in backward
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList(Block(config, layer) for layer in range(config.n_layer)),
                "ln_f": LayerNorm(config.n_embd, config.bias),
            }
        )
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight  # tied
        for name, p in self.named_parameters():
            if p.dim() >= 2:
                std = 0.02 / math.sqrt(2 * config.n_layer) if name.endswith("c_proj.weight") else 0.02
                nn.init.normal_(p, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, cache: KVCache | None = None
    ) -> tuple[Tensor | None, Tensor | None]:
        """Loss with targets, logits without.

        Args:
            idx: (B, T) int64 token ids.
            targets: (B, T) int64, -1 where no token is to be predicted.
            cache: with it, idx continues the cache's tokens: (B, T) into an empty one, then (B, 1) at a time.

        Returns:
            (None, mean cross-entropy in fp32) with targets; (logits (B, 1, V) of the last position, None) without.

        Raises:
            ValueError: for more tokens than positions (block_size, or the cache's length).
        """
        y = self.hidden(idx, cache)
        if targets is None:
            return self.lm_head(y[:, -1:]), None
        wte = self.transformer.wte.weight
        return None, linear_cross_entropy(y.flatten(0, 1), wte, targets.flatten(), vocab_size=self.vocab_size)

    def hidden(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """(B, T) token ids -> (B, T, C), what the head reads. Arguments and errors as for :meth:`forward`."""
        T = idx.shape[1]
        offset = cache.length if cache is not None else 0
        limit = self.config.block_size if cache is None else min(self.config.block_size, cache.max_len)
        if offset + T > limit:
            raise ValueError(f"{offset + T} tokens do not fit into {limit} positions")
        p = self.config.dropout if self.training else 0.0
        wte, wpe = self.transformer.wte.weight, self.transformer.wpe.weight
        branch, residual = embedding(idx, wte, wpe, self.dtype, p, offset), None  # (B, T, C)
        for block in self.transformer.h:
            if self.recompute and torch.is_grad_enabled():  # dropout draws the same again
                kept = {"use_reentrant": False, "preserve_rng_state": p > 0}
                branch, residual = checkpoint(block, branch, residual, **kept)
            else:
                branch, residual = block(branch, residual, cache)
        y, _ = self.transformer.ln_f(branch, residual, p)
        if cache is not None:
            cache.length += T
        return y

    @torch.no_grad()
    def token_losses(self, idx: Tensor, targets: Tensor, chunk_rows: int = 1024) -> Tensor:
        """The loss of each token by itself, for evaluation; logits exist for chunk_rows tokens at a time.

        Args:
            idx, targets: (B, T) as for :meth:`forward`.

        Returns:
            (B, T) fp32, -log p of each target in nats, 0 where there is none.
        """
        keep = targets >= 0
        rows, wanted = self.hidden(idx)[keep].split(chunk_rows), targets[keep].split(chunk_rows)  # (K, C), (K,)
        losses = torch.zeros(targets.shape, device=targets.device)
        losses[keep] = torch.cat(
            [F.cross_entropy(self.lm_head(y)[:, : self.vocab_size].float(), t, reduction="none") for y, t in zip(rows, wanted)]
        )
        return losses

    @property
    def vocab_size(self) -> int:
        """Number of tokens that can be predicted: padding left out."""
        return self.config.real_vocab_size or self.config.vocab_size

    def new_cache(self, batch_size: int, max_len: int) -> KVCache:
        return KVCache(self.config, batch_size, max_len, self.dtype, self.transformer.wte.weight.device)

    def parameter_count(self, non_embedding: bool = True) -> int:
        """Number of parameters, by default without the position embeddings, as nanoGPT counts."""
        n = sum(p.numel() for p in self.parameters())
        return n - self.transformer.wpe.weight.numel() if non_embedding else n

    def flops_per_token(self, causal: bool) -> int:
        """Forward and backward FLOPs per token at full context: 6N + 12 L C T as PaLM and nanoGPT count (appendix B of
        PaLM, arXiv 2204.02311), or 6N + 6 L C T, which leaves out the half of attention that the causal mask skips.

        Frozen blocks cost their forward pass alone, the frozen head no weight gradient. Recomputing counts for nothing.
        """
        c, t, n = self.config, self.transformer, self.parameter_count()
        frozen = [block for block in t.h if not block.ln_1.weight.requires_grad]
        below = sum(p.numel() for block in frozen for p in block.parameters())
        head = 0 if t.wte.weight.requires_grad else t.wte.weight.numel()
        attention = (2 if causal else 4) * (3 * c.n_layer - 2 * len(frozen)) * c.n_embd * c.block_size
        return 6 * n - 4 * below - 2 * head + attention

    def freeze(self, blocks: int) -> None:
        """Ends the training of the embeddings, so of the head, and of the lowest blocks; 0: embeddings alone, -1: nothing."""
        if blocks > len(self.transformer.h):
            raise ValueError(f"freeze={blocks}: the network has {len(self.transformer.h)} blocks")
        if blocks >= 0:
            for module in (self.transformer.wte, self.transformer.wpe, *self.transformer.h[:blocks]):
                module.requires_grad_(False)

    def decay_groups(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """(matrices and embeddings, which weight decay shrinks; biases and LayerNorm weights, which it leaves alone)."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return [p for p in trained if p.dim() >= 2], [p for p in trained if p.dim() < 2]

    def layers_above(self) -> dict[nn.Parameter, int]:
        """0 for ln_f, 1 for the last block, ..., n_layer + 1 for the embeddings, of which one is the head as well."""
        t = self.transformer
        layers = [[t.ln_f], *([block] for block in reversed(t.h)), [t.wte, t.wpe]]
        return {p: depth for depth, modules in enumerate(layers) for module in modules for p in module.parameters()}

    def crop_block_size(self, block_size: int) -> None:
        """Drops the positions from block_size on, so that a model runs on a shorter context than it was trained for."""
        if not 0 < block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: expected 1..{self.config.block_size}")
        self.config.block_size = block_size
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight.detach()[:block_size].clone(), wpe.weight.requires_grad)
        wpe.num_embeddings = block_size
