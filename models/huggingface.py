"""Export to Hugging Face's ``LlamaForCausalLM``, for tools that read its format.

The rotary convention is the same, so every weight is renamed and none is changed; the unused rows
of a padded vocabulary are left out. transformers itself isn't needed to write the files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from kernels.errors import require
from models.attention import attention_name
from models.checkpoints import contiguous_cpu, new_folder
from models.decoder import Decoder

_BLOCK_NAMES = {
    "attention_norm": "input_layernorm",
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
    "feed_forward_norm": "post_attention_layernorm",
    "feed_forward.gate": "mlp.gate_proj",
    "feed_forward.up": "mlp.up_proj",
    "feed_forward.output": "mlp.down_proj",
}


def to_huggingface(decoder: Decoder) -> tuple[dict, dict[str, Tensor]]:
    """config.json and the state dict of the same model as a ``LlamaForCausalLM``.

    The tensors lie on the CPU; those of a decoder on the CPU share its memory.
    The ids of special tokens are null: a decoder doesn't know them. ``max_position_embeddings`` is
    the format's default and limits nothing, rope having no longest context.
    Raises ``UserError`` naming the first setting that makes the model no LLaMA.
    """
    model = decoder.config
    for setting, value, needed in (
        ("attention", attention_name(decoder.attention_config), "softmax"),
        ("attention.window", decoder.attention_config.window, None),
        ("attention.row_sum", getattr(decoder.attention_config, "row_sum", 1.0), 1.0),
        ("model.norm", model.norm, "rms_norm"),
        ("model.norm_place", model.norm_place.value, "before"),
        ("model.position", model.position, "rope"),
        ("model.rope_share", model.rope_share, 1.0),
        ("model.feed_forward", model.feed_forward, "swiglu"),
    ):
        shown = "null" if needed is None else needed
        require(value == needed, setting, f"must be {shown} for an export to LLaMA", value)
    require(
        model.d_model % model.num_heads == 0,
        "model.d_model",
        f"must be a multiple of model.num_heads = {model.num_heads} for an export to LLaMA",
        model.d_model,
    )

    embedding_VC = decoder.embedding.weight[: decoder.vocab_size]
    state = {"model.embed_tokens.weight": embedding_VC, "model.norm.weight": decoder.norm.weight}
    for layer, block in enumerate(decoder.blocks):
        for ours, theirs in _BLOCK_NAMES.items():
            weight = block.get_submodule(ours).weight
            state[f"model.layers.{layer}.{theirs}.weight"] = weight
    if decoder.unembedding is not None:
        state["lm_head.weight"] = decoder.unembedding.weight[: decoder.vocab_size]

    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": str(embedding_VC.dtype).removeprefix("torch."),
        "vocab_size": decoder.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.resolved_num_kv_heads,
        "head_dim": model.resolved_head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_base},
        "tie_word_embeddings": model.tie_embeddings,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return config, contiguous_cpu(state)


def export_huggingface(
    decoder: Decoder,
    folder: Path | str,
    *,
    settings: Mapping[str, object] | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write ``folder`` for ``LlamaForCausalLM.from_pretrained(folder)``, complete or not at all.

    settings: entries of config.json that a decoder doesn't know, such as ids of special tokens.
    files: what else the folder is to hold, such as the tokenizer's files.
    Raises ``UserError`` for a model that is no LLaMA or a folder that holds anything already.
    """
    config, state = to_huggingface(decoder)
    with new_folder(folder) as path:
        (path / "config.json").write_text(
            json.dumps(config | dict(settings or {}), indent=2) + "\n"
        )
        for name, content in (files or {}).items():
            (path / name).write_bytes(content)
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
