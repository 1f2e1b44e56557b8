"""The machine's matmul peak, the UNet's arithmetic, and how much of a step the engine spends outside the UNet."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from engine_parts.workload import Workload, spread
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def flops_per_row(workload: Workload) -> int:
    """Floating point operations of the base UNet on one row, a multiply-add counted as two; adapters not counted."""
    model = workload.engine.model
    latents = torch.zeros(2, *model.latents_shape(model.default_height, model.default_width))
    encoded = model.encode_prompts(["", ""])
    embeds = getattr(encoded, "embeds", encoded)
    # the counter knows plain matrix products on every device, and fused attention on some
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.unet(latents, torch.tensor([500, 500]), encoder_hidden_states=embeds)
    return counter.get_total_flops() // 2


def matmul_gflops(size: int = 512, repeats: int = 8) -> float:
    """The best of a few float32 products on the threads set, in GFLOP/s."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        a @ b
        seconds.append(time.perf_counter() - began)
    return 2 * size**3 / min(seconds) / 1e9


@contextmanager
def unet_clock(unet: torch.nn.Module) -> Iterator[list[float]]:
    """Collect the seconds of every UNet forward."""
    seconds: list[float] = []
    began = 0.0

    def before(*_: object) -> None:
        nonlocal began
        began = time.perf_counter()

    def after(*_: object) -> None:
        seconds.append(time.perf_counter() - began)

    hooks = [unet.register_forward_pre_hook(before), unet.register_forward_hook(after)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


def loop_overhead(workload: Workload, concurrent: int, steps: int = 20) -> dict[str, float]:
    """Share and milliseconds of a step outside the UNet, over full steps of `concurrent` samples."""
    engine = workload.fresh_engine(max_rows=concurrent * workload.rows)
    for index in range(concurrent):
        engine.submit(workload.sample(index, steps + 1))
    shares, outside_ms = [], []
    engine.step()
    for _ in range(steps):
        with unet_clock(workload.engine.model.unet) as forwards:
            began = time.perf_counter()
            engine.step()
            whole = time.perf_counter() - began
        shares.append(1 - sum(forwards) / whole)
        outside_ms.append(1e3 * (whole - sum(forwards)))
    return {"share": spread(shares)["median"], "ms_per_step": round(spread(outside_ms)["median"], 3)}
