"""What the kinds of attention cost: one layer of each beside plain softmax, in one process.

    python -m scripts.bench_kinds [--shape B,T,H,D ...] [--only KIND ...] [--rounds N] [--json FILE]

A layer is an attention module of width H D with its projections, statistics ``basic`` and a tap,
forward and backward, compiled, in bf16 on a GPU and fp32 elsewhere. Kinds take turns in bursts, and
each median is printed with its ratio to softmax; on a GPU they are replayed from CUDA graphs. The
layer's core stands beside it, from q, k and v as projected to what the output projection takes.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch._dynamo
from torch import Tensor, nn

from kernels.bench.environment import environment
from kernels.bench.timing import Captured, Clock, CudaClock, HostClock, interleaved
from kernels.errors import require
from kernels.masks import IntervalMask
from models.attention import ATTENTIONS, Attention, LayerInputs
from models.attention.gated import GateKind, GatePlace
from models.decoder_config import DecoderConfig
from models.positions import POSITIONS
from train.mistakes import exit_code

DEFAULT_SHAPES = ["32,2048,12,64", "16,2048,8,96", "16,2048,6,128"]
BASELINE = "softmax"


def variants() -> dict[str, tuple[str, dict, str]]:
    """By what is printed: kind of attention, settings, position encoding."""
    found = {name: (name, {}, "rope") for name in ATTENTIONS}
    for gate in GateKind:
        for place in GatePlace:
            settings = {"gate": gate, "place": place}
            found[f"gated {gate.value} {place.value}"] = ("gated", settings, "rope")
    del found["gated"]
    for name, kind in ATTENTIONS.items():
        if hasattr(kind.Config, "normalize") and not kind.Config.normalize:
            found[f"{name} normalized"] = (name, {"normalize": True}, "rope")
    found["softmax alibi"] = ("softmax", {}, "alibi")
    return found


class Core(nn.Module):
    """A layer without its query, key, value and output projections."""

    def __init__(self, attention: Attention):
        super().__init__()
        self.attention = attention

    def forward(self, qkv: tuple[Tensor, Tensor, Tensor], x_BTC: Tensor, inputs: LayerInputs):
        """What the output projection takes, [B, T, H D]."""
        q_BTHD, k_BTGD, v_BTGE = qkv
        if inputs.rotation is not None:
            q_BTHD, k_BTGD = inputs.rotation(q_BTHD), inputs.rotation(k_BTGD)
        result = self.attention.attend(q_BTHD, k_BTGD, v_BTGE, inputs, "auto")
        return self.attention.finish(result.out_BTHE, x_BTC).flatten(2)


def calls_of(
    shape: tuple[int, int, int, int], variant: tuple[str, dict, str], device: torch.device
) -> dict[str, Callable[[], object]]:
    """Forward and backward of the layer and of its core."""
    batch_size, num_tokens, num_heads, head_dim = shape
    kind, settings, position = variant
    width = num_heads * head_dim
    model = DecoderConfig(num_layers=1, d_model=width, num_heads=num_heads, d_ff=1)
    torch.manual_seed(0)
    attention = ATTENTIONS[kind](ATTENTIONS[kind].Config(**settings), model).to(device)
    encoding = POSITIONS[position](model)
    positions_BT = torch.arange(num_tokens, device=device).expand(batch_size, -1)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x_BTC = torch.randn(batch_size, num_tokens, width, device=device, dtype=dtype)
    tap_BHS = torch.zeros(batch_size, num_heads, num_tokens, device=device, requires_grad=True)
    sink_11C = torch.randn(1, 1, width, device=device) if attention.has_sink_token else None
    inputs = LayerInputs(
        mask=IntervalMask.causal(batch_size, num_tokens).to(device),
        rotation=encoding.rotation(positions_BT, torch.float32),
        slopes_H=encoding.slopes(device),
        statistics="basic",
        key_mass_tap_BHS=tap_BHS,
        override=None,
        sink_11C=sink_11C,
    )
    x_BTC.requires_grad_()
    qkv = tuple(t.detach().to(dtype).requires_grad_() for t in attention.project(x_BTC.float()))
    # Shapes differ between calls, not within one: nothing is to be compiled for any shape.
    layer, core = (
        torch.compile(module, fullgraph=True, dynamic=False)
        for module in (attention, Core(attention))
    )
    grad_BTC = torch.randn_like(x_BTC)

    def run(made: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], object]:
        def call() -> object:
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                y_BTC = made()
            return torch.autograd.grad(y_BTC, leaves, grad_BTC.to(y_BTC.dtype), allow_unused=True)

        return call

    parameters = list(attention.parameters())
    return {
        "layer": run(lambda: layer(x_BTC, inputs).y_BTC, [x_BTC, tap_BHS, *parameters]),
        "core": run(lambda: core(qkv, x_BTC, inputs), [*qkv, tap_BHS, *parameters]),
    }


def measure(
    shape: tuple[int, int, int, int], names: list[str], device: torch.device, rounds: int
) -> list[dict]:
    """A record a kind; the baseline is always among them."""
    # All kinds share the code of one forward, and each counts as a recompilation of it.
    torch._dynamo.config.recompile_limit = 1000
    torch._dynamo.config.accumulated_recompile_limit = 10_000
    clock: Clock = CudaClock() if device.type == "cuda" else HostClock()
    chosen = {n: v for n, v in variants().items() if n == BASELINE or not names or n in names}
    timings = {}
    calls = {name: calls_of(shape, variant, device) for name, variant in chosen.items()}
    for what in ("layer", "core"):
        ready = []
        for name in chosen:
            call = calls[name][what]
            ready.append((name, Captured(call) if device.type == "cuda" else call))
        timings[what] = interleaved(ready, clock=clock, rounds=rounds)
    return [
        {
            "shape": list(shape),
            "kind": name,
            "layer_ms": round(timings["layer"][name].median, 4),
            "layer_ratio": round(
                timings["layer"][name].median / timings["layer"][BASELINE].median, 4
            ),
            "core_ms": round(timings["core"][name].median, 4),
            "core_ratio": round(timings["core"][name].median / timings["core"][BASELINE].median, 4),
        }
        for name in chosen
    ]


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """B, T, H, D of a text like ``32,2048,12,64``."""
    parts = text.split(",")
    valid = len(parts) == 4 and all(part.isdigit() and int(part) >= 1 for part in parts)
    require(valid, "--shape", "must be four positive numbers B,T,H,D", text)
    batch_size, num_tokens, num_heads, head_dim = (int(part) for part in parts)
    return batch_size, num_tokens, num_heads, head_dim


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m scripts.bench_kinds", description=__doc__)
    parser.add_argument("--shape", action="append", metavar="B,T,H,D")
    parser.add_argument("--only", action="append", default=[], metavar="KIND")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    options = parser.parse_args(arguments)
    known = variants()
    for name in options.only:
        require(name in known, "--only", f"must be one of {', '.join(known)}", name)
    require(options.rounds >= 2, "--rounds", "must be >= 2", options.rounds)
    shapes = [parse_shape(text) for text in options.shape or DEFAULT_SHAPES]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    records: list[dict] = []
    for shape in shapes:
        if device.type == "cuda":
            # Graphs can't be captured on the default stream, nor what autograd began there.
            with torch.cuda.stream(torch.cuda.Stream()):
                records += measure(shape, options.only, device, options.rounds)
        else:
            records += measure(shape, options.only, device, options.rounds)
        print(f"B, T, H, D = {shape}: ms forward and backward, ratio to {BASELINE}")
        for record in records:
            if record["shape"] == list(shape):
                print(
                    f"  {record['kind']:28} layer {record['layer_ms']:9.3f} "
                    f"{record['layer_ratio']:6.3f}   core {record['core_ms']:9.3f} "
                    f"{record['core_ratio']:6.3f}"
                )
        if options.json:
            lines = [{"environment": environment("scripts.bench_kinds")}, *records]
            options.json.write_text("[\n" + ",\n".join(map(json.dumps, lines)) + "\n]\n")


if __name__ == "__main__":
    sys.exit(exit_code(main, sys.argv[1:]))
