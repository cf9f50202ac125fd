"""The loader under a trainer: ranks, micro-batches, workers, resume; held-out batches."""

import os
import signal
from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch

from data.evaluation import ProbeKind
from data.packing import BosKind, MaskKind, Packer, PackingConfig, PositionKind
from data.stream import TrainingStream
from kernels.errors import UserError
from models.batch import IGNORE_LABEL, PackedBatch, RowCursor

PACKING = {"context": 24, "batch_tokens": 24 * 8, "mask": MaskKind.document}


def take(module, count) -> list[PackedBatch]:
    return list(islice(module.train_dataloader(), count))


def rows(batches: list[PackedBatch]) -> list[list[int]]:
    return torch.cat([batch.tokens_BT for batch in batches]).tolist()


def test_batches_go_round_the_epochs_in_order(make_module):
    module = make_module(PackingConfig(**PACKING))
    module.setup()
    num_rows = module.report.rows
    steps = num_rows // 8 + 2
    batches = take(module, steps)
    assert rows(batches)[:num_rows] != rows(batches)[num_rows : 2 * num_rows]
    assert batches[-1].cursor == RowCursor(1, steps * 8 - num_rows, steps * 8)
    straddling = batches[num_rows // 8]
    assert num_rows % 8 and straddling.cursor.epoch == 1
    assert len({tuple(row) for row in rows(batches)[:num_rows]}) == num_rows
    for batch in batches:
        assert batch.num_labels == (batch.labels_BT != IGNORE_LABEL).sum()


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_rows_of_one_rank(make_module, world_size):
    whole = take(make_module(PackingConfig(**PACKING)), 20)
    ranks = [
        take(make_module(PackingConfig(**PACKING), rank=rank, world_size=world_size), 20)
        for rank in range(world_size)
    ]
    for step in range(20):
        shares = [rank[step] for rank in ranks]
        woven = torch.stack([share.tokens_BT for share in shares], 1).flatten(0, 1)
        assert woven.tolist() == whole[step].tokens_BT.tolist()
        assert {share.cursor for share in shares} == {whole[step].cursor}
        assert {int(share.num_labels) for share in shares} == {int(whole[step].num_labels)}


def test_micro_batches_are_the_same_rows_and_count_the_whole_batch(make_module):
    whole = make_module(PackingConfig(**PACKING))
    parts = make_module(PackingConfig(**PACKING, micro_batch_rows=2))
    assert (whole.accumulation(1), parts.accumulation(1), parts.accumulation(2)) == (1, 4, 2)
    batches, micro = take(whole, 5), take(parts, 20)
    assert rows(micro) == rows(batches)
    for step, batch in enumerate(batches):
        own = micro[4 * step : 4 * step + 4]
        assert {part.cursor for part in own} == {batch.cursor}
        assert all(part.num_labels == batch.num_labels for part in own)
        assert sum(int((part.labels_BT != IGNORE_LABEL).sum()) for part in own) == batch.num_labels


def test_a_resume_on_another_number_of_ranks_keeps_the_order(make_module):
    one = make_module(PackingConfig(**PACKING))
    straight = take(one, 10)
    one.cursor = straight[3].cursor
    state = one.state_dict()
    ranks = []
    for rank in range(2):
        module = make_module(PackingConfig(**PACKING), rank=rank, world_size=2)
        module.load_state_dict(state)
        ranks.append(take(module, 6))
    for step, batch in enumerate(straight[4:]):
        woven = torch.stack([rank[step].tokens_BT for rank in ranks], 1).flatten(0, 1)
        assert woven.tolist() == batch.tokens_BT.tolist()


class Recorder(L.LightningModule):
    """Trains one weight and notes the tokens of every step."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[list[int]]] = []

    def training_step(self, batch: PackedBatch, _):
        self.seen.append(batch.tokens_BT.tolist())
        return self.weight * batch.num_labels

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def fit(data, steps, folder, ckpt_path=None) -> Recorder:
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=steps,
        accumulate_grad_batches=data.accumulation(1),
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    recorder = Recorder()
    trainer.fit(recorder, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return recorder


@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
@pytest.mark.parametrize("num_workers", [0, 2])
def test_training_resumes_at_the_next_row(make_module, tmp_path, num_workers):
    """Lightning and the workers fetch batches ahead; those must not count as seen."""
    packing = PackingConfig(**PACKING, micro_batch_rows=4)
    straight = fit(make_module(packing), 7, tmp_path)
    first = fit(make_module(packing, num_workers=num_workers), 3, tmp_path)
    data = make_module(packing, num_workers=num_workers)
    second = fit(data, 7, tmp_path, ckpt_path=tmp_path / "3.ckpt")
    assert (len(straight.seen), len(first.seen), len(second.seen)) == (14, 6, 8)
    assert first.seen + second.seen == straight.seen
    assert data.cursor.rows == 7 * 8


def test_loaders_leave_the_random_state_alone(make_module):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    take(make_module(PackingConfig(**PACKING)), 2)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("change", [{"data_seed": 1}, {"packing": PackingConfig(context=32)}])
def test_a_cursor_of_other_rows_is_refused(make_module, change):
    state = make_module(PackingConfig(**PACKING)).state_dict()
    settings = {"packing": PackingConfig(**PACKING)} | change
    with pytest.raises(UserError, match=r"^resume must use .* of the checkpoint"):
        make_module(**settings).load_state_dict(state)
    # Another cut into batches is the same stream.
    make_module(PackingConfig(**PACKING | {"batch_tokens": 24 * 4})).load_state_dict(state)


def test_a_worker_that_dies_is_one_clear_error(make_module, monkeypatch):
    def die(self, request):
        os.kill(os.getpid(), signal.SIGKILL)

    module = make_module(PackingConfig(**PACKING), num_workers=1)
    module.setup()
    monkeypatch.setattr(TrainingStream, "batch", die)
    with pytest.raises(UserError, match=r"^data workers must stay alive .* got DataLoader worker"):
        take(module, 1)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_unreadable_store_is_one_clear_error(make_module, monkeypatch, num_workers):
    def fail(self, request):
        raise OSError("input/output error")

    module = make_module(PackingConfig(**PACKING), num_workers=num_workers)
    monkeypatch.setattr(TrainingStream, "batch", fail)
    with pytest.raises(UserError, match=r"^training rows must be readable, got .*output error$"):
        take(module, 1)


def labelled_text(batches: list[PackedBatch]) -> list[list[int]]:
    """The labels of each row, in order."""
    return [
        [label for label in row if label != IGNORE_LABEL]
        for batch in batches
        for row in batch.labels_BT.tolist()
    ]


def test_canonical_labels_are_the_same_in_every_arm(make_module):
    arms = {}
    packed = [(packer, MaskKind.causal, BosKind.none) for packer in Packer]
    shown = [(Packer.chunk, mask, bos) for mask in MaskKind for bos in BosKind]
    for packer, mask, bos in {*packed, *shown}:
        packing = PackingConfig(
            packer=packer,
            mask=mask,
            bos=bos,
            eos=bos is not BosKind.none,
            positions=PositionKind.document,
            context=24,
            batch_tokens=48,
        )
        module = make_module(packing, canonical_rows=40)
        module.setup()
        arms[packer, mask, bos] = module.canonical_batches()
    expected = labelled_text(arms[Packer.chunk, MaskKind.causal, BosKind.none])
    assert len(expected) == 40
    for (_, _, bos), batches in arms.items():
        assert labelled_text(batches) == expected
        assert {int(batch.num_labels) for batch in batches} == {sum(map(len, expected))}
        assert [len(batch.tokens_BT) for batch in batches] == [16, 16, 8]
        first = torch.cat([batch.tokens_BT[:, 0] for batch in batches])
        has_bos = bos is not BosKind.none
        assert bool((first == module.tokenizer.bos_id).all()) == has_bos
        if has_bos:
            assert (torch.cat([batch.labels_BT[:, 0] for batch in batches]) == IGNORE_LABEL).all()
        number = torch.cat([batch.document_BT[:, 0] for batch in batches])
        assert (number == (0 if bos is BosKind.pinned else 1)).all()


def test_canonical_rows_take_the_documents_in_turn(make_module):
    module = make_module(PackingConfig(context=20, batch_tokens=20), canonical_rows=1000)
    module.setup()
    documents = module.validation
    expected = []
    for offset in range(0, int(documents.lengths_N.max()), 19):
        for start, end in zip(
            documents.starts_N, documents.starts_N + documents.lengths_N, strict=True
        ):
            piece = documents.tokens[start + offset : end][:19] if start + offset < end else []
            if len(piece) >= 16:
                expected.append([int(token) for token in piece])
    batches = module.canonical_batches()
    assert 30 < len(expected) < 1000
    assert labelled_text(batches) == [piece[1:] for piece in expected]
    begins = torch.cat([batch.begins_BT[:, 0] for batch in batches])
    # Pieces of fewer than 16 tokens are skipped, and a document here has no longer one.
    assert int(begins.sum()) == int((documents.lengths_N >= 16).sum()) < len(documents)


@pytest.mark.parametrize("bos", BosKind)
def test_probe_prompts_have_the_same_labels_with_and_without_bos(make_module, bos):
    module = make_module(PackingConfig(bos=bos, **PACKING))
    module.setup()
    text = module.probe_batch(ProbeKind.text, num_tokens=32, num_rows=10)
    bos_text = module.probe_batch("bos_text", num_tokens=32, num_rows=10)
    assert text.tokens_BT.shape == bos_text.tokens_BT.shape == (10, 32)
    assert (bos_text.tokens_BT[:, 0] == module.tokenizer.bos_id).all()
    assert torch.equal(bos_text.tokens_BT[:, 1:], text.tokens_BT[:, :-1])
    assert labelled_text([text]) == text.tokens_BT[:, 1:31].tolist()
    assert labelled_text([bos_text]) == labelled_text([text])
    for batch in (text, bos_text):
        assert batch.mask.is_causal and batch.mask.pinned == 0
        assert batch.num_labels == 10 * 30
        assert batch.positions_BT.tolist() == [list(range(32))] * 10


def test_own_rows_are_the_held_out_documents_packed_as_in_training(make_module):
    packing = PackingConfig(packer=Packer.single, bos=BosKind.pinned, **PACKING)
    module = make_module(packing, own_rows=20)
    module.setup()
    batches = module.own_batches()
    assert [len(batch.tokens_BT) for batch in batches] == [16, 4]
    first = [int(module.validation.tokens[start]) for start in module.validation.starts_N[:20]]
    assert torch.cat([batch.tokens_BT[:, 1] for batch in batches]).tolist() == first
    assert batches[0].mask.pinned == 1
    labels = sum(map(len, labelled_text(batches)))
    assert {int(batch.num_labels) for batch in batches} == {labels}


def test_held_out_text_is_not_taken_in_the_order_of_its_sources(make_module):
    module = make_module(PackingConfig(**PACKING))
    module.setup()
    ours, stored = module.validation, module.corpus.validation.epoch(0)
    assert sorted(ours.starts_N) == list(stored.starts_N) != list(ours.starts_N)
    length_at = dict(zip(stored.starts_N, stored.lengths_N, strict=True))
    assert [length_at[start] for start in ours.starts_N] == list(ours.lengths_N)
    assert list(module.validation.starts_N) == list(ours.starts_N), "the same at every call"
    # So the first rows are of early and of late documents alike.
    early = ours.starts_N[: len(ours) // 2] < np.median(stored.starts_N)
    assert 0.2 < early.mean() < 0.8


def test_figures_of_the_held_out_text(make_module):
    module = make_module(PackingConfig(**PACKING))
    module.setup()
    tokens = torch.from_numpy(module.validation.tokens.astype(int))
    share_V = torch.bincount(tokens).double() / len(tokens)
    assert module.unigram_entropy == pytest.approx(float(torch.special.entr(share_V).sum()))
    ids = module.tokenizer.encode_batch(["naïve cats"])[0]
    labels_BT = torch.tensor([[IGNORE_LABEL, *ids, module.tokenizer.eos_id]])
    assert module.label_bytes(labels_BT) == len("naïve cats".encode())
    assert module.optimal_loss is None and module.trigger_ids is None
    assert any("a query sees" in line for line in module.describe())


@pytest.mark.parametrize("bos", [BosKind.none, BosKind.pinned])
def test_workers_hand_over_the_same_batches(make_module, bos):
    packing = PackingConfig(**PACKING, bos=bos)
    made_here = take(make_module(packing), 12)
    handed_over = take(make_module(packing, num_workers=2), 12)
    for here, there in zip(made_here, handed_over, strict=True):
        assert (there.cursor, there.mask.pinned, there.mask.is_causal) == (
            here.cursor,
            here.mask.pinned,
            here.mask.is_causal,
        )
        for name in ("tokens", "labels", "positions", "document", "begins"):
            one, other = getattr(here, f"{name}_BT"), getattr(there, f"{name}_BT")
            assert other.dtype == one.dtype and torch.equal(other, one)
        assert torch.equal(there.mask.dense_BTS(), here.mask.dense_BTS())
        assert torch.equal(there.mask.document_start_BT, here.mask.document_start_BT)
        assert torch.equal(there.num_labels, here.num_labels)
