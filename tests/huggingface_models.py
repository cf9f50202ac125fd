"""Small Hugging Face models of random weights, saved once, and what transformers makes of them."""

import json

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn

NUM_TOKENS = 64

VOCAB_SIZE = 260
SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": None,
}
GPT2 = transformers.GPT2Config(
    vocab_size=VOCAB_SIZE,
    n_embd=48,
    n_layer=3,
    n_head=4,
    n_positions=NUM_TOKENS,
    scale_attn_by_inverse_layer_idx=True,
    bos_token_id=256,
    eos_token_id=257,
)
GPT_OSS = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": 40}
CONFIGS = {
    "llama": transformers.LlamaConfig(**SIZES),
    "gpt2": GPT2,
    "mistral": transformers.MistralConfig(**SIZES, sliding_window=40),
    "gpt_oss": transformers.GptOssConfig(**SIZES, **GPT_OSS),
}
SINK_TOKENS = [sorted(pre_tokenizers.ByteLevel.alphabet()).index(digit) for digit in "0123456789"]


def save_model(folder, config, tokenizer=None):
    """Save a model whose weights are so large that attention is far from uniform."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.25)
    if config.model_type == "llama":
        plant_sinks(model)
    for layer in model.base_model.layers if config.model_type == "gpt_oss" else ():
        nn.init.normal_(layer.self_attn.sinks, mean=12.0)
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def plant_sinks(model):
    """Heads attend to the BOS and to digits, the more the later the head."""
    model.model.embed_tokens.weight[:, :2] = torch.tensor([3.0, 0.0])
    model.model.embed_tokens.weight[[*SINK_TOKENS, 256], :2] = torch.tensor([0.0, 8.0])
    for layer in model.model.layers:
        # The last of 6 pairs of dimensions hardly turns within 64 positions.
        strength_H = torch.tensor([0.0, 2.0, 3.0, 6.0])
        layer.self_attn.q_proj.weight[5::12, 0] += strength_H
        layer.self_attn.k_proj.weight[5::12, 1] += 1.0


def byte_tokenizer():
    """A token a byte, then BOS and EOS; special tokens are added unless that is switched off."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<bos>", "<eos>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", add_bos_token=True
    )


def write_texts(path):
    """A jsonl file of 40 texts, every third one too short."""
    lines = [
        f"{n} it is a truth universally acknowledged, " * (3 if n % 3 else 1) for n in range(40)
    ]
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


def random_tokens(rows=10):
    return torch.randint(250, (rows, NUM_TOKENS), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def eager_maps(folder, tokens_BT):
    """[L, B, H, T, S]: transformers' own attention maps."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    output = model(tokens_BT, output_attentions=True, output_hidden_states=True)
    return torch.stack(output.attentions), output
