"""The endless stream of training rows, and the loader that reads it from any row on.

The order of rows is a function of (data_seed, epoch): a ``RowCursor`` says all there is to say
about where a run stands. A global batch is the next ``batch_rows`` rows, going on into the next
epoch; of its rows, rank r of W gets r, r + W, ..., so another number of ranks sees the same global
order.

Axes: B rows of a request.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Generator
from torch.cuda import is_available as cuda_is_available
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from data.documents import Documents, DocumentSource
from data.interventions import Interventions
from data.packing import BosKind, PackingConfig, plan_epoch
from data.parcel import Parcel, ParcelReceiver, ParcelSender
from data.plan import Plan
from data.rows import RowArrays, SpecialIds, concatenate, finish_rows, gather_rows
from kernels.errors import UserError
from models.batch import PackedBatch, RowCursor

PREFETCH = 2
"""Batches that each worker is asked for ahead of those handed on."""


@dataclass(frozen=True)
class EpochRows:
    """An epoch's documents, their plan and the labels of each row."""

    documents: Documents
    plan: Plan
    labels_R: np.ndarray


class Seen(NamedTuple):
    """What a run has seen of its training text up to a cursor.

    passes: epochs gone through, the last one in part, by rows. unique_tokens: text tokens (no BOS,
    no EOS) in the rows of the first epoch, as far as they were seen; of every epoch, where each has
    other documents. What a later epoch shows of text that the first cropped isn't counted.
    """

    epoch: int
    rows: int
    passes: float
    unique_tokens: int


class RowRequest(NamedTuple):
    """Rows of one micro-batch of one rank, with what their global batch says."""

    epoch_B: np.ndarray
    row_B: np.ndarray
    num_labels: int
    cursor: RowCursor


class TrainingStream:
    """Rows by (epoch, row); the plans of the last two epochs asked for are kept."""

    def __init__(
        self,
        source: DocumentSource,
        config: PackingConfig,
        specials: SpecialIds,
        data_seed: int,
        interventions: Interventions | None = None,
    ):
        self.config = config
        self._interventions = interventions or Interventions()
        self._source = source
        self._specials = specials
        self._data_seed = data_seed
        self._epochs: dict[int, EpochRows] = {}
        self._epoch_text_tokens: dict[int, int] = {}
        self._text_tokens_R1 = -1, np.zeros(1, np.int64)

    def epoch(self, epoch: int) -> EpochRows:
        """Documents and plan of an epoch."""
        if epoch not in self._epochs:
            rows = self._plan(epoch)
            # A batch spans two epochs at most, unless an epoch is shorter than a batch.
            self._epochs = dict([*self._epochs.items()][-1:])
            self._epochs[epoch] = rows
        return self._epochs[epoch]

    def _plan(self, epoch: int) -> EpochRows:
        documents = self._source.epoch(epoch)
        plan = plan_epoch(documents.lengths_N, self.config, self._data_seed, epoch)
        return EpochRows(documents, plan, plan.labels_R(self.config.labels))

    def advance(self, cursor: RowCursor, num_rows: int) -> RowRequest:
        """The next ``num_rows`` rows: their places, their labels, and the cursor after them."""
        epochs, rows, num_labels = [], [], 0
        epoch, row = cursor.epoch, cursor.row
        missing = num_rows
        while missing:
            labels_R = self.epoch(epoch).labels_R
            taken = min(missing, len(labels_R) - row)
            epochs.append(np.full(taken, epoch))
            rows.append(np.arange(row, row + taken))
            num_labels += int(labels_R[row : row + taken].sum())
            missing -= taken
            row += taken
            if row == len(labels_R):
                epoch, row = epoch + 1, 0
        after = RowCursor(epoch, row, cursor.rows + num_rows)
        # No label at all is a loss of 0 / 1, not 0 / 0.
        return RowRequest(np.concatenate(epochs), np.concatenate(rows), max(1, num_labels), after)

    def seen(self, cursor: RowCursor) -> Seen:
        """What lies before a cursor."""
        epoch, _, rows = cursor
        passes = float(epoch)
        if cursor.row:
            passes += cursor.row / len(self.epoch(epoch).labels_R)
        if self._source.repeats:
            cursor = min(cursor, RowCursor(1, 0, 0))
        unique_tokens = sum(self._text_tokens(epoch, None) for epoch in range(cursor.epoch))
        if cursor.row:
            unique_tokens += self._text_tokens(cursor.epoch, cursor.row)
        return Seen(epoch, rows, passes, unique_tokens)

    def _text_tokens(self, epoch: int, num_rows: int | None) -> int:
        """Text tokens in the first rows of an epoch; None: in all of them."""
        if num_rows is None and epoch in self._epoch_text_tokens:
            return self._epoch_text_tokens[epoch]
        if self._text_tokens_R1[0] != epoch:
            # Planned once more if training is elsewhere, whose plans are to stay.
            rows = self._epochs.get(epoch) or self._plan(epoch)
            text_R = rows.plan.text_tokens_R(
                rows.documents.lengths_N,
                bos=self.config.bos is BosKind.document,
                eos=self.config.eos,
            )
            self._text_tokens_R1 = epoch, np.append(0, text_R.cumsum())
            self._epoch_text_tokens[epoch] = int(text_R.sum())
        return int(self._text_tokens_R1[1][-1 if num_rows is None else num_rows])

    def batch(self, request: RowRequest) -> PackedBatch:
        """The rows of a request."""
        parts = [self._gather(epoch, request) for epoch in np.unique(request.epoch_B)]
        return finish_rows(
            concatenate(parts), self.config, num_labels=request.num_labels, cursor=request.cursor
        )

    def _gather(self, epoch: int, request: RowRequest) -> RowArrays:
        rows = self.epoch(int(epoch))
        row_B = request.row_B[request.epoch_B == epoch]
        plan = rows.plan.take(row_B)
        arrays = gather_rows(rows.documents, plan, self.config, self._specials)
        self._interventions.write(arrays, int(epoch), row_B)
        return arrays


class TrainingRows(Dataset):
    """The stream as a map from requests to batches, in a parcel if a worker makes them."""

    def __init__(self, stream: TrainingStream):
        self._stream = stream
        # A loader asks for a new batch just before it hands one on, which is opened only then: of
        # each worker's batches, that one may wait besides those made ahead.
        self._sender = ParcelSender(PREFETCH + 1)

    def __getitem__(self, request: RowRequest) -> PackedBatch | Parcel:
        batch = self._stream.batch(request)
        worker = get_worker_info()
        return batch if worker is None else self._sender.send(batch, worker.id)


class GlobalBatches(Sampler):
    """One rank's requests, from a cursor on, without end: micro-batches of batch after batch."""

    def __init__(self, stream: TrainingStream, cursor: RowCursor, rank: int, world_size: int):
        self._stream = stream
        self._cursor = cursor
        self._rank = rank
        self._world_size = world_size
        self._micro_batches = stream.config.micro_batches(world_size)

    def __iter__(self) -> Iterator[RowRequest]:
        cursor = self._cursor
        while True:
            request = self._stream.advance(cursor, self._stream.config.batch_rows)
            cursor = request.cursor
            own = slice(self._rank, None, self._world_size)
            epochs = np.split(request.epoch_B[own], self._micro_batches)
            rows = np.split(request.row_B[own], self._micro_batches)
            for epoch_B, row_B in zip(epochs, rows, strict=True):
                yield request._replace(epoch_B=epoch_B, row_B=row_B)


class TrainingLoader(DataLoader):
    """A plain loader over requests; worker processes change what it yields in nothing.

    Raises ``UserError`` when a worker dies or the store can't be read any more.
    """

    def __init__(
        self,
        stream: TrainingStream,
        cursor: RowCursor,
        *,
        rank: int,
        world_size: int,
        num_workers: int,
    ):
        # Planned here, the first epoch is there for every worker that is forked.
        stream.epoch(cursor.epoch)
        super().__init__(
            TrainingRows(stream),
            sampler=GlobalBatches(stream, cursor, rank, world_size),
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            prefetch_factor=PREFETCH if num_workers else None,
            worker_init_fn=_leave_signals_to_the_parent,
            # What workers make is pinned as it is opened.
            pin_memory=cuda_is_available() and not num_workers,
            # A loader draws a seed for its workers; from the global generator, that would make the
            # run depend on how often loaders start.
            generator=Generator(),
        )

    def __iter__(self) -> Iterator[PackedBatch]:
        receiver = ParcelReceiver(pin_memory=cuda_is_available())
        try:
            with warnings.catch_warnings():
                # Python 3.12 warns of any fork beside threads; the workers only index arrays.
                warnings.filterwarnings("ignore", "(?s).*use of fork", DeprecationWarning)
                batches = super().__iter__()
            for batch in batches:
                yield receiver.open(batch) if isinstance(batch, Parcel) else batch
        except OSError as error:
            raise UserError(f"training rows must be readable, got {_last_line(error)}") from error
        except RuntimeError as error:
            # A worker died; what a living one raises says "in DataLoader worker process".
            if "DataLoader worker (pid" not in str(error):
                raise
            raise UserError(
                "data workers must stay alive (too little memory, or the token store changed while "
                f"in use?), got {_last_line(error)}"
            ) from error


def _leave_signals_to_the_parent(worker_id: int) -> None:
    # A terminal and a scheduler signal every process of a run, which finishes its step, with these
    # workers' batches, and then ends them. They notice by themselves if it is killed.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


def _as_it_is(batch: PackedBatch | Parcel) -> PackedBatch | Parcel:
    return batch


def _last_line(error: Exception) -> str:
    # An error from a worker quotes the worker's traceback, the error itself last.
    return str(error).strip().rpartition("\n")[2]
