"""The transformer's MLP, y = gelu(x W_fc^T + b_fc) W_proj^T + b_proj, with GELU inside the GEMMs' epilogues.

    forward   pre = x W_fc^T + b_fc;  post = gelu(pre);  slope = gelu'(pre);  y = post W_proj^T + b_proj
    backward  dpost = dy W_proj;  dpre = dpost * slope;  dx = dpre W_fc
              dW_proj = dy^T post;  dW_fc = dpre^T x;  biases: column sums

Saved are x, post and slope, instead of x and pre: the exponentials are taken once, in forward, and the backward epilogue is one
product. At M = 65,536 and C = 768 on an H100 that costs 0.04 ms forward and saves 0.28 ms backward a layer, for MN more values.

M rows (B*T), C channels, N hidden units (4C). 4MNC FLOPs forward, 8MNC backward. Two ways per direction, chosen by the config
table per architecture:

- fused: one persistent GEMM whose epilogue writes (slope, post) forward and dpre backward. Against a GEMM followed by an
  elementwise kernel this saves a write and a read of (M, N) either way, and the elementwise launch.
  sm_90 loads and stores through host-made tensor descriptors (TMA), older architectures through masked pointers.
- unfused: cuBLAS, then an elementwise kernel. Also what fp32, and C or N that are not multiples of 16, take.

The ``cuda`` backend has cuBLASLt do the same (kernels/cublaslt.py); it saves pre instead of slope. The other GEMMs are cuBLAS.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import configs, cpu, cublaslt, dispatch, gelu
from kernels.gelu import gelu_and_slope_of, gelu_of
from kernels.library import custom_op, once_differentiable
from kernels.linear import linear_ref, mm_fp32, shadow
from kernels.triton_compat import TensorDescriptor, cdiv, tl, triton

APPROXIMATE = ("none", "tanh")


@triton.jit
def _load(src, row, col, n_rows, n_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    """A (ROWS, COLS) tile of a row-major matrix, zeros outside of it; `src` is a descriptor or a pointer."""
    if TMA:
        return src.load([row, col])
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        return tl.load(src + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=mask, other=0.0)


@triton.jit
def _store(dst, value, row, col, n_rows, n_cols, stride, ROWS: tl.constexpr, COLS: tl.constexpr, TMA: tl.constexpr):
    if TMA:
        dst.store([row, col], value.to(dst.dtype))
    else:
        rows = row + tl.arange(0, ROWS)
        cols = col + tl.arange(0, COLS)
        mask = (rows < n_rows)[:, None] & (cols < n_cols)[None, :]
        tl.store(dst + rows.to(tl.int64)[:, None] * stride + cols[None, :], value.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def _tile_origin(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a tile; GROUP_M rows of tiles are walked together, so that L2 keeps their operands."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    per_group = GROUP_M * tl.cdiv(N, BLOCK_N)
    first = tile // per_group * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    return (first + tile % per_group % height) * BLOCK_M, tile % per_group // height * BLOCK_N


@triton.jit
def _columns(acc, ROWS: tl.constexpr, COLS: tl.constexpr, PARTS: tl.constexpr):
    """A tile as 1, 2 or 4 tiles side by side, in registers: narrower epilogues hold fewer registers and less shared memory."""
    if PARTS == 1:
        return (acc,)
    else:
        left, right = acc.reshape(ROWS, 2, COLS // 2).permute(0, 2, 1).split()
        if PARTS == 2:
            return (left, right)
        else:
            a, b = left.reshape(ROWS, 2, COLS // 4).permute(0, 2, 1).split()
            c, d = right.reshape(ROWS, 2, COLS // 4).permute(0, 2, 1).split()
            return (a, b, c, d)


@triton.jit
def _fwd_kernel(
    x, w, bias_ptr, slope, post,  # (M, K), (N, K), (N,), (M, N), (M, N)
    M, N, K, stride_xm, stride_om,
    HAS_BIAS: tl.constexpr, WITH_SLOPE: tl.constexpr, TANH: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """post = gelu(x w^T + bias), and gelu's slope there if it is wanted."""
    PART_N: tl.constexpr = BLOCK_N // PARTS
    tl.assume(K > 0)  # drops a second copy of the epilogue, for an empty inner loop
    # flatten: the next tile's loads are in flight during this tile's epilogue.
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0), flatten=FLATTEN):
        row, col = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            a = _load(x, row, k, M, K, stride_xm, BLOCK_M, BLOCK_K, TMA)  # (BLOCK_M, BLOCK_K)
            b = _load(w, col, k, N, K, K, BLOCK_N, BLOCK_K, TMA)  # (BLOCK_N, BLOCK_K)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        parts = _columns(acc, BLOCK_M, BLOCK_N, PARTS)
        for i in tl.static_range(PARTS):
            h = parts[i]  # (BLOCK_M, PART_N)
            at = col + i * PART_N
            if HAS_BIAS:
                cols = at + tl.arange(0, PART_N)
                h += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
            if WITH_SLOPE:
                value, grad = gelu_and_slope_of(h, TANH)
                _store(slope, grad, row, at, M, N, stride_om, BLOCK_M, PART_N, TMA)
            else:
                value = gelu_of(h, TANH)
            _store(post, value, row, at, M, N, stride_om, BLOCK_M, PART_N, TMA)


@triton.jit
def _bwd_kernel(
    dy, w, slope, dpre, partial_ptr,  # (M, K), (K, N), (M, N), (M, N), (tiles of M, N) fp32
    M, N, K, stride_ym, stride_om,
    HAS_BIAS: tl.constexpr, TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """dpre = (dy w) * slope, and the column sums of each tile of dpre for the bias gradient."""
    PART_N: tl.constexpr = BLOCK_N // PARTS
    tl.assume(K > 0)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N), tl.num_programs(0), flatten=FLATTEN):
        row, col = _tile_origin(tile, M, N, BLOCK_M, BLOCK_N, GROUP_M)
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            a = _load(dy, row, k, M, K, stride_ym, BLOCK_M, BLOCK_K, TMA)  # (BLOCK_M, BLOCK_K)
            b = _load(w, k, col, K, N, N, BLOCK_K, BLOCK_N, TMA)  # (BLOCK_K, BLOCK_N)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        parts = _columns(acc, BLOCK_M, BLOCK_N, PARTS)
        for i in tl.static_range(PARTS):
            at = col + i * PART_N
            grad = parts[i] * _load(slope, row, at, M, N, stride_om, BLOCK_M, PART_N, TMA)  # 0 beyond M: dy is
            _store(dpre, grad, row, at, M, N, stride_om, BLOCK_M, PART_N, TMA)
            if HAS_BIAS:
                cols = at + tl.arange(0, PART_N)
                tl.store(partial_ptr + (row // BLOCK_M).to(tl.int64) * N + cols, tl.sum(grad, axis=0), mask=cols < N)


def _fusable(x: Tensor, w: Tensor) -> bool:
    """Whether a fused kernel takes these matrices: 16-bit (fp32 belongs to cuBLAS), rows of whole 16-byte units."""
    if x.dtype == torch.float32 and not dispatch.interpreting():
        return False
    return x.numel() > 0 and all(size % 16 == 0 for size in w.shape) and x.data_ptr() % 16 == w.data_ptr() % 16 == 0


# Rows and columns of the tile that a kernel loads or stores of each matrix.
FWD_TILES = {"x": ("BLOCK_M", "BLOCK_K"), "w": ("BLOCK_N", "BLOCK_K")} | dict.fromkeys(("slope", "post"), ("BLOCK_M", "PART_N"))
BWD_TILES = {"dy": FWD_TILES["x"], "w": ("BLOCK_K", "BLOCK_N")} | dict.fromkeys(("slope", "dpre"), FWD_TILES["post"])


def _operands(config: dict[str, int], tiles: dict[str, tuple[str, str]], *matrices: Tensor) -> dict:
    """The matrices as the kernels take them: descriptors of their tiles, or themselves."""
    if not config["TMA"]:
        return dict(zip(tiles, matrices))
    sizes = config | {"PART_N": config["BLOCK_N"] // config["PARTS"]}
    return {
        name: TensorDescriptor.from_tensor(matrix, [sizes[rows], sizes[cols]])
        for (name, (rows, cols)), matrix in zip(tiles.items(), matrices)
    }


def _grid(config: dict[str, int], M: int, N: int, device: torch.device) -> tuple[int]:
    """`per_sm` resident programs on each SM walk the tiles: one's epilogue runs beside another's matrix products."""
    per_sm = config.pop("per_sm")
    return (min(cdiv(M, config["BLOCK_M"]) * cdiv(N, config["BLOCK_N"]), per_sm * configs.multiprocessors(device)),)


def _gelu_fwd(x: Tensor, w: Tensor, bias: Tensor | None, tanh: bool, with_slope: bool) -> tuple[Tensor, Tensor]:
    """x (M, K), w (N, K) -> post and slope (M, N); slope is (0, N) if it is not wanted."""
    M, K = x.shape
    N = w.shape[0]
    fusable = _fusable(x, w)

    def launch(config):
        if not (config.pop("fused") and fusable):
            pre = F.linear(x, w, bias)
            post = gelu.gelu_(pre, tanh, with_slope)
            return post, pre if with_slope else pre.new_empty(0, N)
        post = x.new_empty(M, N)
        slope = x.new_empty(M if with_slope else 0, N)
        grid = _grid(config, M, N, x.device)
        _fwd_kernel[grid](
            **_operands(config, FWD_TILES, x, w, slope if with_slope else post, post),
            bias_ptr=w if bias is None else bias.contiguous(), M=M, N=N, K=K, stride_xm=x.stride(0), stride_om=N,
            HAS_BIAS=bias is not None, WITH_SLOPE=with_slope, TANH=tanh, **config,
        )  # fmt: skip
        return post, slope

    return launch(configs.select("gelu_mlp_fwd", "default", fwd_candidates, launch))


def _gelu_bwd(dy: Tensor, w: Tensor, slope: Tensor, has_bias: bool) -> tuple[Tensor, Tensor]:
    """dy (M, K), w (K, N), slope (M, N) -> dpre (M, N), and the bias gradient (N,) in fp32, (0,) without a bias."""
    M, K = dy.shape
    N = w.shape[1]
    fusable = _fusable(dy, w)

    def launch(config):
        if not (config.pop("fused") and fusable):
            dpre = dy @ w  # still of post
            partial = gelu.dgelu_(dpre, slope, has_bias)
        else:
            dpre = torch.empty_like(slope)
            partial = dy.new_empty(cdiv(M, config["BLOCK_M"]) if has_bias else 0, N, dtype=torch.float32)
            grid = _grid(config, M, N, dy.device)
            _bwd_kernel[grid](
                **_operands(config, BWD_TILES, dy, w, slope, dpre), partial_ptr=partial,
                M=M, N=N, K=K, stride_ym=dy.stride(0), stride_om=N, HAS_BIAS=has_bias, **config,
            )  # fmt: skip
        return dpre, partial.sum(0) if has_bias else partial.view(0)

    return launch(configs.select("gelu_mlp_bwd", "default", bwd_candidates, launch))


@custom_op("gelu_mlp_fwd")
def _mlp_fwd(
    x: Tensor,
    w_fc: Tensor,
    b_fc: Tensor | None,
    w_proj: Tensor,
    b_proj: Tensor | None,
    tanh: bool,
    with_slope: bool,
    lt: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (M, C_out), post and slope of x (M, C); with ``lt``, which is cuBLASLt's tanh GELU, the last is gelu's argument."""
    with torch.cuda.device_of(x):
        x, w = x.contiguous(), w_fc.contiguous()
        if lt:
            post, slope = cublaslt.linear_gelu(x, w, None if b_fc is None else b_fc.contiguous(), with_slope)
        else:
            post, slope = _gelu_fwd(x, w, b_fc, tanh, with_slope)
        return F.linear(post, w_proj, b_proj), post, slope


@torch.library.register_fake(_mlp_fwd)
def _(x, w_fc, b_fc, w_proj, b_proj, tanh, with_slope, lt):
    M, N = x.shape[0], w_fc.shape[0]
    return x.new_empty(M, w_proj.shape[0]), x.new_empty(M, N), x.new_empty(M if with_slope else 0, N)


@custom_op("gelu_mlp_bwd")
def _mlp_bwd(
    dy: Tensor,
    x: Tensor,
    post: Tensor,
    slope: Tensor,
    w_fc: Tensor,
    w_proj: Tensor,
    has_b_fc: bool,
    has_b_proj: bool,
    lt: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx in the compute dtype; dw_fc, db_fc, dw_proj, db_proj in fp32, (0,) for a bias that is not there."""
    with torch.cuda.device_of(dy):
        dy = dy.contiguous()
        dpre, db_fc = (cublaslt.linear_dgelu if lt else _gelu_bwd)(dy, w_proj.contiguous(), slope, has_b_fc)
        dw_proj = mm_fp32(dy.t(), post)
        db_proj = dy.sum(0, dtype=torch.float32) if has_b_proj else dy.new_empty(0, dtype=torch.float32)
        return dpre @ w_fc, mm_fp32(dpre.t(), x), db_fc, dw_proj, db_proj


@torch.library.register_fake(_mlp_bwd)
def _(dy, x, post, slope, w_fc, w_proj, has_b_fc, has_b_proj, lt):
    def empty(*shape):
        return dy.new_empty(shape, dtype=torch.float32)

    N, C = w_fc.shape
    biases = empty(N if has_b_fc else 0), empty(w_proj.shape[0] if has_b_proj else 0)
    return dy.new_empty(x.shape), empty(N, C), biases[0], empty(*w_proj.shape), biases[1]


class _GeluMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w_fc, b_fc, w_proj, b_proj, s_w_fc, s_b_fc, s_w_proj, s_b_proj, tanh, with_slope, lt):
        y, post, slope = _mlp_fwd(x, s_w_fc, s_b_fc, s_w_proj, s_b_proj, tanh, with_slope, lt)
        if with_slope:
            ctx.save_for_backward(x, post, slope, s_w_fc, s_w_proj)
        ctx.dtypes = [None if p is None else p.dtype for p in (w_fc, b_fc, w_proj, b_proj)]
        ctx.lt = lt
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        has_b_fc, has_b_proj = ctx.dtypes[1] is not None, ctx.dtypes[3] is not None
        dx, *grads = _mlp_bwd(dy, *ctx.saved_tensors, has_b_fc, has_b_proj, ctx.lt)
        grads = [None if dtype is None else g.to(dtype) for g, dtype in zip(grads, ctx.dtypes)]
        return dx, *grads, *(None,) * 7


def gelu_mlp_ref(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, approximate: str = "none"
) -> Tensor:
    return linear_ref(F.gelu(linear_ref(x, w_fc, b_fc), approximate=approximate), w_proj, b_proj)


def gelu_mlp(
    x: Tensor, w_fc: Tensor, b_fc: Tensor | None, w_proj: Tensor, b_proj: Tensor | None, approximate: str = "none"
) -> Tensor:
    """The transformer's MLP; backward keeps x, the hidden activation and GELU's slope.

    Args:
        x: (..., C), compute dtype.
        w_fc, b_fc: (N, C) and (N,) or None; parameters, fp32 or already the compute dtype.
        w_proj, b_proj: (C_out, N) and (C_out,) or None.
        approximate: ``"none"``, x * Phi(x) with erf (nanoGPT), or ``"tanh"`` (OpenAI's GPT-2 weights);
            Hendrycks and Gimpel 2016, arXiv:1606.08415.

    Returns:
        (..., C_out) in x's dtype.

    Raises:
        ValueError: for another ``approximate``, or shapes that do not fit together.
    """
    if approximate not in APPROXIMATE:
        raise ValueError(f"approximate={approximate!r}: expected one of {', '.join(APPROXIMATE)}")
    if x.shape[-1] != w_fc.shape[1] or w_fc.shape[0] != w_proj.shape[1]:
        raise ValueError(f"x {tuple(x.shape)}, w_fc {tuple(w_fc.shape)}, w_proj {tuple(w_proj.shape)} do not chain")
    for name, bias, weight in (("b_fc", b_fc, w_fc), ("b_proj", b_proj, w_proj)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ValueError(f"{name} of shape {tuple(bias.shape)} for weights of shape {tuple(weight.shape)}")
    backend = dispatch.choose("gelu_mlp", x.device.type)
    if backend == "cuda" and (reason := cublaslt.uncovered(x.dtype, approximate)):
        backend = dispatch.instead("gelu_mlp", x.device.type, "cuda", reason)
    if backend == "torch":
        return gelu_mlp_ref(x, w_fc, b_fc, w_proj, b_proj, approximate)
    if backend == "cpp":
        return cpu.gelu_mlp(x, w_fc, b_fc, w_proj, b_proj, approximate == "tanh")
    parameters = (w_fc, b_fc, w_proj, b_proj)
    shadows = [None if p is None else shadow(p, x.dtype) for p in parameters]
    with_slope = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, *parameters))
    flags = approximate == "tanh", with_slope, backend == "cuda"
    y = _GeluMlp.apply(x.reshape(-1, x.shape[-1]), *parameters, *shadows, *flags)
    return y.view(*x.shape[:-1], w_proj.shape[0])


# What a fused configuration says; FLATTEN: see `_fwd_kernel`; per_sm: programs resident on an SM.
KEYS = ("TMA", "BLOCK_M", "BLOCK_N", "BLOCK_K", "PARTS", "num_warps", "num_stages", "per_sm", "GROUP_M", "FLATTEN")
UNFUSED = {"fused": 0}
# sm_80 to sm_89: FLATTEN 0, since cp.async is pipelined in the inner loop only.
POINTER_CANDIDATES = (
    (0, 128, 128, 32, 2, 8, 4, 2, 8, 0),
    (0, 128, 128, 32, 2, 8, 4, 1, 8, 0),
    (0, 128, 128, 64, 2, 8, 3, 1, 8, 0),
    (0, 64, 256, 32, 2, 8, 4, 1, 8, 0),
    (0, 128, 256, 32, 4, 8, 3, 1, 8, 0),
)
# sm_90. Two programs an SM, under 114 KB of shared memory each: one's epilogue runs beside the other's products. One program:
# larger tiles read less, but the tensor cores wait for the epilogue.
FWD_TMA_CANDIDATES = (
    (1, 128, 128, 64, 2, 4, 3, 2, 8, 1),
    (1, 128, 128, 64, 2, 4, 3, 2, 16, 1),
    (1, 128, 128, 64, 2, 4, 3, 2, 8, 0),
    (1, 128, 128, 64, 4, 4, 3, 2, 8, 1),
    (1, 128, 128, 64, 4, 4, 3, 2, 8, 0),
    (1, 128, 128, 64, 2, 8, 2, 2, 8, 1),
    (1, 64, 128, 64, 2, 4, 4, 2, 8, 1),
    (1, 128, 256, 64, 2, 8, 3, 1, 8, 1),
    (1, 128, 256, 64, 4, 8, 4, 1, 8, 1),
    (1, 128, 256, 64, 4, 8, 4, 1, 8, 0),
    (1, 256, 128, 64, 2, 8, 3, 1, 8, 1),
    (1, 256, 128, 64, 4, 8, 4, 1, 8, 1),
)
# An epilogue holds a tile of the slope as well.
BWD_TMA_CANDIDATES = (
    (1, 128, 128, 64, 4, 4, 3, 2, 8, 1),
    (1, 128, 128, 64, 4, 4, 3, 2, 16, 1),
    (1, 128, 128, 64, 4, 4, 3, 2, 8, 0),
    (1, 128, 128, 64, 4, 4, 2, 2, 8, 1),
    (1, 128, 128, 32, 4, 4, 4, 2, 8, 1),
    (1, 128, 128, 64, 2, 8, 2, 2, 8, 1),
    (1, 64, 128, 64, 2, 4, 3, 2, 8, 1),
    (1, 128, 128, 64, 2, 8, 4, 1, 8, 1),
    (1, 128, 256, 64, 2, 8, 3, 1, 8, 1),
    (1, 128, 256, 64, 2, 8, 3, 1, 16, 1),
    (1, 128, 256, 64, 4, 8, 3, 1, 8, 1),
    (1, 128, 256, 64, 4, 8, 4, 1, 8, 1),
    (1, 256, 128, 64, 2, 8, 3, 1, 8, 1),
    (1, 256, 128, 64, 4, 8, 3, 1, 8, 1),
)


def fwd_candidates(arch: int) -> Iterator[dict[str, int]]:
    """Configurations of `gelu_mlp_fwd` worth timing."""
    yield UNFUSED
    for values in FWD_TMA_CANDIDATES if arch >= 90 else POINTER_CANDIDATES:
        yield {"fused": 1, **dict(zip(KEYS, values))}


def bwd_candidates(arch: int) -> Iterator[dict[str, int]]:
    """Configurations of `gelu_mlp_bwd` worth timing."""
    yield UNFUSED
    for values in BWD_TMA_CANDIDATES if arch >= 90 else POINTER_CANDIDATES:
        yield {"fused": 1, **dict(zip(KEYS, values))}
