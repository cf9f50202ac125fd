"""The exported folder, opened by transformers, gives our logits and our alphas."""

import pytest
import torch

from kernels.errors import UserError
from models.attention import SoftmaxAttention
from models.decoder import NormPlace
from models.huggingface import export_huggingface, to_huggingface

SHAPES = {
    "untied": {},
    "tied": {"tie_embeddings": True},
    "mha": {"num_kv_heads": None},
    "head-96": {"head_dim": 96, "num_kv_heads": 1},
    "head-22-base-500": {"head_dim": 22, "rope_base": 500.0, "norm_eps": 1e-3},
}


@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES)
def test_logits_and_alphas_equal_those_of_transformers(decoder_of, batch_of, tmp_path, changes):
    from transformers import LlamaForCausalLM

    decoder = decoder_of(dtype=torch.float32, **changes)
    export_huggingface(decoder, tmp_path / "llama")
    llama, report = LlamaForCausalLM.from_pretrained(
        tmp_path / "llama", attn_implementation="eager", output_loading_info=True
    )
    assert not any(report.values())
    batch = batch_of([[1] * 33, [1] * 33])
    with torch.no_grad():
        ours = decoder(batch)
        theirs = llama(batch.tokens_BT, output_attentions=True)
    torch.testing.assert_close(theirs.logits, ours.logits_BTV, rtol=0, atol=1e-4)

    queries_BS = batch.mask.queries_per_key_BS()
    for probabilities_BHTS, record in zip(theirs.attentions, ours.layers, strict=True):
        # alpha_k = 1 / (T - k) * sum over queries i >= k of A[i, k], counting from 0.
        alpha_BHS = probabilities_BHTS.sum(2) / torch.arange(33, 0, -1)
        ours_BHS = record.statistics.key_mass_BHS / queries_BS[:, None]
        torch.testing.assert_close(alpha_BHS, ours_BHS, rtol=0, atol=1e-5)
        first_BHT = record.statistics.first_mass_BHT
        torch.testing.assert_close(probabilities_BHTS[..., 0], first_BHT, rtol=0, atol=1e-5)
    assert alpha_BHS.amax() > 3 * alpha_BHS.mean(), "the attention is too uniform to tell"


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"position": "none"}, "model.position must be rope for an export to LLaMA, got 'none'"),
        (
            {"attention": SoftmaxAttention.Config(window=4)},
            "attention.window must be null for an export to LLaMA, got 4",
        ),
        (
            {"attention": SoftmaxAttention.Config(row_sum=0.5)},
            "attention.row_sum must be 1.0 for an export to LLaMA, got 0.5",
        ),
        ({"rope_share": 0.5}, "model.rope_share must be 1.0 for an export to LLaMA, got 0.5"),
        (
            {"norm_place": NormPlace.after},
            "model.norm_place must be before for an export to LLaMA, got 'after'",
        ),
        (
            {"d_model": 50, "head_dim": 12},
            "model.d_model must be a multiple of model.num_heads = 4 for an export to LLaMA,"
            " got 50",
        ),
    ],
    ids=["position", "window", "row_sum", "rope_share", "norm_place", "width"],
)
def test_what_is_no_llama_is_refused_by_its_setting(decoder_of, tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        export_huggingface(decoder_of(**changes), tmp_path / "llama")
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []


def test_every_weight_is_exported_unchanged(decoder_of):
    decoder = decoder_of()
    _, state = to_huggingface(decoder)
    assert len(state) == len(decoder.state_dict())
    exported = sum(value.sum() for value in state.values())
    padded_rows = decoder.embedding.weight[97:].sum() + decoder.unembedding.weight[97:].sum()
    torch.testing.assert_close(exported + padded_rows, sum(p.sum() for p in decoder.parameters()))
