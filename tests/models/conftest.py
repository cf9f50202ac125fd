"""Small decoders and batches written out by their documents.

Axes: B rows, T positions.
"""

import pytest
import torch
from torch import nn

from kernels.masks import IntervalMask
from models.attention import SoftmaxAttention
from models.batch import IGNORE_LABEL, PackedBatch
from models.decoder import Decoder, DecoderConfig

VOCAB_SIZE = 97


def make_batch(documents, *, causal_across=False, pinned=0, tokens_BT=None):
    """A batch of rows given by document ids (-1 padding, 0 a pinned BOS), tokens at random.

    Positions count from the start of each document; with a pinned BOS, it has 0 and they 1.
    """
    document_BT = torch.tensor(documents, dtype=torch.int32)
    if tokens_BT is None:
        generator = torch.Generator().manual_seed(7)
        tokens_BT = torch.randint(VOCAB_SIZE, document_BT.shape, generator=generator)
    mask = IntervalMask.from_documents(document_BT, pinned=pinned, causal_across=causal_across)
    positions_BT = torch.arange(document_BT.shape[1]) - mask.document_start_BT.long()
    positions_BT += pinned * (document_BT > 0)
    labels_BT = torch.full_like(tokens_BT, IGNORE_LABEL)
    follows_BT = (document_BT[:, 1:] == document_BT[:, :-1]) & (document_BT[:, 1:] > 0)
    labels_BT[:, :-1] = torch.where(follows_BT, tokens_BT[:, 1:], IGNORE_LABEL)
    return PackedBatch(
        tokens_BT=tokens_BT,
        labels_BT=labels_BT,
        positions_BT=torch.where(document_BT < 0, 0, positions_BT),
        document_BT=document_BT,
        begins_BT=document_BT >= 0,
        mask=mask,
        num_labels=(labels_BT != IGNORE_LABEL).sum(),
    )


def make_decoder(*, attention=None, dtype=torch.float64, vocab_size=VOCAB_SIZE, **changes):
    """A decoder with weights so large that attention is far from uniform and norms from 1."""
    settings = {
        "num_layers": 3,
        "d_model": 48,
        "num_heads": 4,
        "num_kv_heads": 2,
        "d_ff": 40,
        **changes,
    }
    torch.manual_seed(0)
    decoder = Decoder(DecoderConfig(**settings), attention or SoftmaxAttention.Config(), vocab_size)
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.25)
    return decoder.to(dtype)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Handing out tensors this small costs more than the work, 4 times on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def batch_of():
    return make_batch


@pytest.fixture
def decoder_of():
    return make_decoder
