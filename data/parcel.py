"""Batches on their way from a worker process: one buffer instead of a dozen tensors.

Handing a tensor to another process costs a file of shared memory, a descriptor and a mapping, far
more than copying what it holds: 1.3 MB took 12 ms as eight tensors and 5 ms as one buffer.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import torch
from torch import Tensor


class Parcel:
    """An object with its CPU tensors laid end to end in one buffer.

    ``open`` gives the object back, its tensors views of the buffer. Like any unpickling it runs no
    constructor, so what was checked in the worker isn't checked again.
    """

    def __init__(self, content: Any):
        skeleton = io.BytesIO()
        tensors = _TensorsApart(skeleton)
        tensors.dump(content)
        self.skeleton = skeleton.getvalue()
        self.buffer = torch.cat(tensors.parts)

    def pin_memory(self) -> Parcel:
        """The same parcel, its buffer in page-locked memory."""
        self.buffer = self.buffer.pin_memory()
        return self

    def open(self) -> Any:
        """What was put in."""
        return _TensorsBack(io.BytesIO(self.skeleton), self.buffer).load()


_ALIGNMENT = 16


class _TensorsApart(pickle.Pickler):
    """Pickles everything but tensors, whose bytes it keeps in ``parts``."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.parts: list[Tensor] = []
        self._size = 0

    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, Tensor):
            return None
        content = obj.contiguous().view(-1).view(torch.uint8)
        place = (self._size, content.numel(), obj.dtype, tuple(obj.shape))
        padding = -content.numel() % _ALIGNMENT
        self.parts += [content, content.new_empty(padding)]
        self._size += content.numel() + padding
        return place


class _TensorsBack(pickle.Unpickler):
    """Unpickles it again, with views of the buffer for tensors."""

    def __init__(self, file: io.BytesIO, buffer: Tensor):
        super().__init__(file)
        self._buffer = buffer

    def persistent_load(self, place: tuple) -> Tensor:
        start, size, dtype, shape = place
        return self._buffer[start : start + size].view(dtype).view(shape)
