"""A model that trains through the Triton attention: nothing is counted twice, whatever runs it.

Activation checkpointing runs a layer's forward twice, compiled code may save or recompute what it
likes, and micro-batches add up: statistics, counts and gradients must not depend on any of it.
"""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import checks
from kernels.masks import IntervalMask
from models.attention import SoftmaxAttention
from models.batch import PackedBatch
from models.decoder import Decoder, DecoderConfig

VOCAB_SIZE = 31
NUM_HEADS = 2

# Four rows: documents of one token, one document, padding at the end, a row of padding alone.
ROWS = [
    [1] * 5 + [2] + [3] + [4] * 7,
    [1] * 14,
    [1] * 4 + [2] * 7 + [-1] * 3,
    [-1] * 14,
]

pytestmark = [
    # Triton's interpreter computes what `where` then drops; NumPy warns of it.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
    # The compiler's own use of PyTorch.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
INTERPRETED = pytest.mark.skipif(
    not (checks.HAS_TRITON and checks.INTERPRETED), reason="needs Triton's interpreter"
)


class Checkpointed(nn.Module):
    """A block that keeps no activations: the backward pass runs its forward again."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block
        self.attention = block.attention

    def forward(self, *inputs):
        return checkpoint(self.block, *inputs, use_reentrant=False)


def make_decoder(implementation: str) -> Decoder:
    torch.manual_seed(0)
    decoder = Decoder(
        DecoderConfig(num_layers=2, d_model=16, num_heads=NUM_HEADS, num_kv_heads=1, d_ff=8),
        SoftmaxAttention.Config(implementation=implementation, window=7),
        VOCAB_SIZE,
    )
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.3)
    return decoder


def make_batch(rows: list[list[int]]) -> PackedBatch:
    document_BT = torch.tensor(rows, dtype=torch.int32)
    position_BT = torch.arange(document_BT.shape[1]).repeat(len(rows), 1)
    # Tokens depend on the row's content alone, so that micro-batches hold the same rows.
    tokens_BT = (document_BT.long() * 7 + position_BT * 3) % VOCAB_SIZE
    return PackedBatch(
        tokens_BT=tokens_BT,
        labels_BT=(tokens_BT * 5 + 1) % VOCAB_SIZE,
        positions_BT=position_BT,
        document_BT=document_BT,
        begins_BT=document_BT >= 0,
        mask=IntervalMask.from_documents(document_BT),
        num_labels=torch.tensor(document_BT.numel()),
    )


def train_step(
    micro_batches: int,
    *,
    checkpointed: bool,
    backend: str | None,
    device: str = "cpu",
    implementation: str = "triton",
) -> dict[str, torch.Tensor]:
    """Gradients and sums over rows of every statistic by layer, as a training loop takes them."""
    decoder = make_decoder(implementation).to(device)
    if checkpointed:
        decoder.blocks = nn.ModuleList(map(Checkpointed, decoder.blocks))
    model = decoder
    if backend is not None:
        torch._dynamo.reset()
        model = torch.compile(decoder, fullgraph=True, backend=backend, dynamic=False)
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, value: torch.Tensor) -> None:
        sums[name] = sums.get(name, 0) + value

    rows_each = len(ROWS) // micro_batches
    for first in range(0, len(ROWS), rows_each):
        batch = make_batch(ROWS[first : first + rows_each]).to(device)
        taps = decoder.key_mass_taps(batch)
        output = model(batch, statistics="full", key_mass_taps=taps)
        logits_BVT = output.logits_BTV.mT
        nn.functional.cross_entropy(logits_BVT, batch.labels_BT, reduction="sum").backward()
        for layer, (tap, record) in enumerate(zip(taps, output.layers, strict=True)):
            statistics = record.statistics
            assert statistics.key_mass_BHS is None
            add(f"{layer}.key_mass_HS", tap.grad.sum(0))
            add(f"{layer}.first_mass_HT", statistics.first_mass_BHT.sum(0))
            add(f"{layer}.document_mass_HT", statistics.document_mass_BHT.sum(0))
            add(f"{layer}.entropy_HT", statistics.entropy_BHT.sum(0))
            max_logit_BH = statistics.max_logit_BH
            add(f"{layer}.max_logit_H", max_logit_BH.masked_fill(max_logit_BH.isinf(), 0).sum(0))
    for index, parameter in enumerate(decoder.parameters()):
        sums[f"gradient_{index}"] = parameter.grad
    return {name: value.detach().cpu() for name, value in sums.items()}


@pytest.fixture(scope="module")
def on_cpu():
    """The reference, all rows in one batch."""
    return train_step(1, checkpointed=False, backend=None, implementation="reference")


def assert_equal_steps(
    step: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    queries = sum(document >= 0 for row in ROWS for document in row)
    assert step.keys() == expected.keys()
    for name, value in step.items():
        if "key_mass" in name:
            # Each query pays 1 in all, once.
            torch.testing.assert_close(value.sum(-1), torch.full((NUM_HEADS,), float(queries)))
        torch.testing.assert_close(
            value,
            expected[name],
            rtol=0,
            atol=tolerance * max(1.0, float(expected[name].abs().max())),
            msg=lambda message, name=name: f"{name}: {message}",
        )


WAYS = [
    (None, 1),
    (None, 4),
    # Compiled once, run twice.
    ("aot_eager", 2),
    # A row by itself may be one document, which is another kind of mask: compiled twice, for what
    # two micro-batches and the tests of masks leave little room for.
    pytest.param("aot_eager", 4, marks=pytest.mark.slow),
    pytest.param("inductor", 4, marks=pytest.mark.slow),
]
PLAIN_OR_CHECKPOINTED = pytest.mark.parametrize(
    "checkpointed", [False, True], ids=["plain", "checkpointed"]
)


@INTERPRETED
@PLAIN_OR_CHECKPOINTED
@pytest.mark.parametrize(("backend", "micro_batches"), WAYS)
def test_every_way_of_training_measures_the_same(on_cpu, backend, checkpointed, micro_batches):
    step = train_step(micro_batches, checkpointed=checkpointed, backend=backend)
    assert_equal_steps(step, on_cpu, tolerance=2e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@PLAIN_OR_CHECKPOINTED
@pytest.mark.parametrize("backend", [None, "inductor"])
def test_every_way_of_training_on_a_gpu_measures_the_same(backend, checkpointed):
    plain = train_step(1, checkpointed=False, backend=None, device="cuda")
    step = train_step(4, checkpointed=checkpointed, backend=backend, device="cuda")
    assert_equal_steps(step, plain, tolerance=1e-4)
