"""What this GPU reaches at best: copies of several sizes, a large matmul, and cuBLAS at the shapes of GPT-2's matmuls.

    python benchmarks/ceilings.py [--quick]

Cases gemm-NAME are y = x W^T of (M, K) by (N, K): `fwd` y, `dx` = dy W, `dw` = dy^T x with fp32 output (ours) or in the compute
dtype (`cublas-low`). Percent is of the large matmul, so a low one names a GEMM that cuBLAS itself could do better; for copies
and square matmuls it is of the data sheet.
"""

import common
import torch
from common import Work

from kernels.linear import mm_fp32


def main(argv: list[str] | None = None) -> common.Bench:
    args = common.parser(__doc__).parse_args(argv)
    bench = common.Bench("ceilings", args)
    device, dtype = bench.device, bench.dtype

    sheet = common.data_sheet(bench.facts["device"], dtype)

    def report(case: str, pass_: str, calls: dict, work: Work, of: Work | None = None) -> None:
        for name, stats in bench.time(bench.wanted(calls)).items():
            bench.timed_row(case, name, pass_, stats, work, of)

    for mib in (1,) if args.tiny else (64, 256, 1024) if bench.gpu else (64, 256):
        x = torch.empty(mib << 20, dtype=torch.int8, device=device)
        y = torch.empty_like(x)
        report(f"copy-{mib}MiB", "copy", {"torch": lambda x=x, y=y: y.copy_(x)}, Work(bytes=2 * x.numel()), sheet)
    for n in (64,) if args.tiny else (4096, 8192) if bench.gpu else (1024,):
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        report(f"matmul-{n}", "fwd", {"cublas": lambda a=a, b=b: a @ b}, Work(flops=2 * n**3), sheet)

    models = [("124M", 65536, 768)] if args.quick else [("124M", 65536, 768), ("350M", 32768, 1024), ("1558M", 8192, 1600)]
    if args.tiny or not bench.gpu:
        models = [("tiny", 64, 32)] if args.tiny else [("char", 4096, 384)]
    for model, M, C in models:
        gemms = {
            "qkv": (3 * C, C),
            "proj": (C, C),
            "fc": (4 * C, C),
            "mlp-proj": (C, 4 * C),
            "head": (50304 if bench.gpu else 256, C),
        }
        for gemm, (N, K) in gemms.items():
            rows = min(M, 16384) if gemm == "head" else M  # the head runs in chunks
            x = torch.randn(rows, K, device=device, dtype=dtype)
            w = torch.randn(N, K, device=device, dtype=dtype)
            dy = torch.randn(rows, N, device=device, dtype=dtype)
            case, work = f"gemm-{model}-{gemm}-{rows}x{N}x{K}", Work(flops=2 * rows * N * K)
            report(case, "fwd", {"cublas": lambda x=x, w=w: x @ w.t()}, work)
            report(case, "dx", {"cublas": lambda dy=dy, w=w: dy @ w}, work)
            calls = {"cublas": lambda dy=dy, x=x: mm_fp32(dy.t(), x), "cublas-low": lambda dy=dy, x=x: dy.t() @ x}
            report(case, "dw", calls, work)
    bench.finish()
    return bench


if __name__ == "__main__":
    main()
