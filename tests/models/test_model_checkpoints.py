"""A saved decoder comes back bit by bit, and nothing else passes for one."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from kernels.errors import UserError
from models.attention import SoftmaxAttention
from models.checkpoints import CONFIG_FILE, WEIGHTS_FILE, load_model, save_model


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_round_trip_is_bitwise(decoder_of, batch_of, tmp_path, tied, dtype):
    attention = SoftmaxAttention.Config(window=5)
    decoder = decoder_of(tie_embeddings=tied, dtype=dtype, attention=attention, rope_base=500.0)
    save_model(decoder, tmp_path / "step_00000128")
    state = torch.get_rng_state()
    loaded = load_model(tmp_path / "step_00000128")
    assert torch.equal(torch.get_rng_state(), state), "loading drew random numbers"
    assert same_weights(loaded, decoder)
    assert (loaded.config, loaded.attention_config) == (decoder.config, attention)
    assert all(p.requires_grad for p in loaded.parameters())
    batch = batch_of([[1] * 7 + [2] * 9])
    assert torch.equal(loaded(batch).logits_BTV, decoder(batch).logits_BTV)
    assert sorted(p.name for p in tmp_path.rglob("*")) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
        "step_00000128",
    ]


def test_the_forced_kernel_is_not_part_of_a_checkpoint(decoder_of, tmp_path):
    attention = SoftmaxAttention.Config(implementation="reference")
    save_model(decoder_of(attention=attention), tmp_path / "model")
    assert load_model(tmp_path / "model").attention_config.implementation == "auto"


@pytest.fixture
def saved(decoder_of, tmp_path):
    save_model(decoder_of(), tmp_path / "model")
    return tmp_path / "model"


def edit(folder, **changes):
    """Merge ``changes`` into model.json; a None removes its key."""
    description = json.loads((folder / CONFIG_FILE).read_text())
    for key, value in changes.items():
        if isinstance(value, dict):
            description[key] |= value
        else:
            description[key] = value
    kept = {key: value for key, value in description.items() if value is not None}
    (folder / CONFIG_FILE).write_text(json.dumps(kept))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": {"d_model": 96, "head_dim": 12}}, "doesn't fit model.json: blocks.0.attention"),
        ({"model": {"num_layers": 2}}, r"blocks\.2\.attention\.key\.weight must be absent, got"),
        ({"model": {"num_layers": 4}}, r"blocks\.3\.\S+ must be \(24, 48\), got nothing"),
        ({"model": {"num_layers": "many"}}, r"model\.json: .*'many'"),
        ({"model": {"num_layers": 0}}, r"model\.json: model\.num_layers must be >= 1, got 0"),
        ({"model": {"depth": 3}}, r"model\.json: Key 'depth' not in 'DecoderConfig'"),
        ({"model": {"norm": "batch_norm"}}, r"model\.norm must be one of .*, got 'batch_norm'"),
        ({"attention": {"kind": "unheard_of"}}, r"attention\.kind must be one of .*'unheard_of'"),
        ({"attention": {"gate": True}}, r"model\.json: Key 'gate' not in"),
        ({"vocab_size": 900}, r"embedding\.weight must be \(960, 48\), got \(128, 48\)"),
        ({"vocab_size": None}, r"isn't a model of this project: it has no valid 'vocab_size'"),
        ({"format": "other 3"}, r"format must be 'sinklab model 1', got 'other 3'"),
        ({"weights_sha256": "0"}, r"model\.safetensors is damaged"),
    ],
    ids=lambda value: "" if isinstance(value, str) else json.dumps(value),
)
def test_what_does_not_fit_ends_in_one_line(saved, changes, message):
    edit(saved, **changes)
    with pytest.raises(UserError, match=message) as error:
        load_model(saved)
    assert "\n" not in str(error.value)


def test_weights_of_other_sizes_are_refused(saved):
    weights = load_file(saved / WEIGHTS_FILE)
    weights["norm.weight"] = torch.ones(7)
    save_file(weights, saved / WEIGHTS_FILE)
    from models.checkpoints import _digest

    edit(saved, weights_sha256=_digest(saved / WEIGHTS_FILE))
    with pytest.raises(UserError, match=r"norm\.weight must be \(48,\), got \(7,\)$"):
        load_model(saved)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
@pytest.mark.parametrize("damage", ["cut", "empty", "flipped", "missing"])
def test_damaged_files_end_in_one_line(saved, name, damage):
    path = saved / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:middle] + b"\xff" + content[middle + 1 :])
    else:
        path.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    problem = "can't be read" if damage == "missing" else "damaged"
    with pytest.raises(UserError, match=rf"{name} .*{problem}") as error:
        load_model(saved)
    assert "\n" not in str(error.value)


def test_a_failed_save_leaves_nothing(decoder_of, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("models.checkpoints._digest", fail)
    with pytest.raises(OSError, match="disk full"):
        save_model(decoder_of(), tmp_path / "model")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_content_is_not_overwritten(decoder_of, saved):
    before = (saved / WEIGHTS_FILE).read_bytes()
    with pytest.raises(UserError, match="must be a new or empty folder"):
        save_model(decoder_of(num_layers=1), saved)
    assert (saved / WEIGHTS_FILE).read_bytes() == before
