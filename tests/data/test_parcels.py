"""Batches handed over by workers: what arrives, and that no buffer is written too early."""

import pickle
import time
from itertools import islice

import pytest
import torch

from data.packing import PackingConfig
from data.parcel import ParcelReceiver, ParcelSender


def content(seed: int, num_rows: int = 3) -> dict:
    generator = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randint(0, 100, (num_rows, 7), generator=generator),
        "every_other": torch.arange(10, dtype=torch.int32)[::2],
        "flags": torch.rand(num_rows, 3, generator=generator) > 0.5,
        "count": torch.tensor(seed),
        "nothing": torch.empty(0, 4),
        "rest": ("text", seed, None),
    }


def assert_same(ours: dict, expected: dict) -> None:
    assert ours["rest"] == expected["rest"]
    for name, tensor in expected.items():
        if name != "rest":
            assert ours[name].dtype == tensor.dtype and ours[name].is_contiguous()
            assert torch.equal(ours[name], tensor)


def test_what_is_opened_is_what_was_sent_and_stays_so():
    sender, receiver = ParcelSender(2), ParcelReceiver(pin_memory=False)
    opened = [receiver.open(sender.send(content(seed), sender=0)) for seed in range(5)]
    for seed, ours in enumerate(opened):
        assert_same(ours, content(seed))


def test_as_many_parcels_as_buffers_may_wait():
    sender, receiver = ParcelSender(3), ParcelReceiver(pin_memory=False)
    waiting = [sender.send(content(seed), sender=0) for seed in range(3)]
    for seed in range(3, 8):
        assert_same(receiver.open(waiting.pop(0)), content(seed - 3))
        waiting.append(sender.send(content(seed), sender=0))


def test_a_buffer_travels_once_unless_it_has_to_grow():
    sender, receiver = ParcelSender(2), ParcelReceiver(pin_memory=False)
    parcels = []
    for num_rows in (3, 3, 3, 2, 50, 3, 50):
        parcels.append(sender.send(content(0, num_rows), sender=0))
        assert_same(receiver.open(parcels[-1]), content(0, num_rows))
    travels = [parcel.buffer is not None for parcel in parcels]
    assert travels == [True, True, False, False, True, False, False]
    assert all(parcel.buffer.is_shared() for parcel in parcels if parcel.buffer is not None)
    assert len(pickle.dumps(parcels[2])) < 2000


def test_senders_are_told_apart():
    senders, receiver = [ParcelSender(1), ParcelSender(1)], ParcelReceiver(pin_memory=False)
    parcels = [senders[i].send(content(i), sender=i) for i in range(2)]
    for i in (1, 0):
        assert_same(receiver.open(parcels[i]), content(i))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_are_in_pinned_memory_for_a_gpu(make_module, num_workers):
    packing = PackingConfig(context=24, batch_tokens=48)
    loader = make_module(packing, num_workers=num_workers).train_dataloader()
    for batch in islice(loader, 5):
        for tensor in (batch.tokens_BT, batch.begins_BT, batch.mask.stop_BT, batch.num_labels):
            assert tensor.is_pinned()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_far_ahead_overwrite_nothing(make_module, monkeypatch, num_workers):
    """A slow reader gives them the time to make everything they may make before it reads."""
    packing = PackingConfig(context=24, batch_tokens=48)
    made_here = list(islice(make_module(packing).train_dataloader(), 16))
    open_now = ParcelReceiver.open

    def open_late(self, parcel):
        time.sleep(0.02)
        return open_now(self, parcel)

    monkeypatch.setattr(ParcelReceiver, "open", open_late)
    loader = make_module(packing, num_workers=num_workers).train_dataloader()
    for _ in range(2):
        handed_over = list(islice(loader, 16))
        assert [b.tokens_BT.tolist() for b in handed_over] == [
            b.tokens_BT.tolist() for b in made_here
        ]
