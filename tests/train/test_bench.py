"""The bench of whole training runs, on a model that takes no time."""

import json
import math

import pandas as pd
import pytest
import torch

from kernels.bench.timing import HostClock, interleaved
from kernels.errors import UserError
from models.decoder import Decoder
from scripts.bench.__main__ import main
from scripts.bench.materialised import MaterialisedPass
from scripts.bench.memory import Stage
from scripts.bench.plain import PlainRun
from scripts.bench.settings import bench_overrides, run_in
from scripts.bench.split import PARTS, Split
from scripts.bench.turns import Fit, GlobalSettings
from scripts.plain_decoder import PlainDecoder, check_plain
from train.config import compose
from train.data import data_of

# Lightning counts cores.
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

TINY = ["debug=cpu", "model.d_model=64", "model.d_ff=64", "packing.context=64"]


@pytest.fixture
def tiny(cache_dir) -> list[str]:
    return [*TINY, f"cache_dir={cache_dir}"]


@pytest.fixture(scope="module")
def entries(cache_dir, tmp_path_factory):
    """What the command writes, for models that know more ids than the tokenizer."""
    path = tmp_path_factory.mktemp("bench") / "train.json"
    options = ["--agree", "6", "--rounds", "2", "--every", "10", "--rows", "2"]
    where = ["--vocab-size", "600", "--json", str(path)]
    learning = ["schedule.warmup_steps=1", "optimizer.lr=1e-3", f"cache_dir={cache_dir}"]
    main(["--presets", "barbero120m", *TINY, *learning, *options, *where])
    return json.loads(path.read_text())


def test_every_contender_has_an_entry(entries):
    about, *entries = entries
    assert about["presets"] == ["barbero120m"]
    assert about["environment"]["torch"] == torch.__version__
    names = [entry["implementation"] for entry in entries]
    assert names == ["sinklab+stats", "sinklab", "plain", "materialised"]
    for entry in entries:
        # Two micro-batches of two rows of 64.
        assert entry["tokens_per_second"] == pytest.approx(256_000 / entry["ms"], rel=0.01)
        assert entry["mfu"] is None and entry["peak_gib"] is None
        assert (entry["rows"], entry["micro_batches"], entry["vocab_size"]) == (2, 2, 600)
        assert entry["ratio_to_plain"] == pytest.approx(entries[2]["ms"] / entry["ms"], rel=0.01)
        assert entry["seconds_to_first_step"] > 0


def test_plain_and_ours_learn_the_same(entries):
    ours, bare, plain = (entry["loss"] for entry in entries[1:4])
    assert ours["step"] == plain["step"] == bare["step"] == 6
    assert ours["nats"] == pytest.approx(plain["nats"], abs=1e-3)
    assert bare["nats"] == pytest.approx(ours["nats"], abs=1e-3)
    # Learning has begun, so the update is compared too.
    assert plain["nats"] < 0.99 * math.log(600), plain


def test_materialised_adds_its_share_of_a_pass(entries):
    bare, materialised = entries[2], entries[4]
    extra = materialised["ms"] - bare["ms"]
    assert extra == pytest.approx(materialised["pass_ms"] / 10, abs=0.01)
    assert materialised["every"] == 10


def test_split_has_every_part(entries):
    split = entries[1]["split_ms"]
    assert list(split) == list(PARTS) and all(ms > 0 for ms in split.values())
    assert all("split_ms" not in entry for entry in entries[2:])


def test_turns(tiny, tmp_path):
    torch.use_deterministic_algorithms(False)
    folder = tmp_path / "run"
    config, settings = run_in(folder, bench_overrides("default", tiny))
    before = GlobalSettings.now()
    fit = Fit(config, settings, None)
    fit.start()
    try:
        step = lambda: fit.turns.trainer.global_step  # noqa: E731
        assert step() == 0 and fit.is_waiting
        fit.steps(2)
        assert step() == 2
        # Lightning's setting is the process's until somebody else's turn.
        assert fit.global_settings.deterministic and not before.deterministic
        losses = fit.losses(2)
        assert step() == 4
        rows = pd.read_csv(folder / "metrics.csv").dropna(subset="train/loss")
        assert rows.step.tolist() == [1, 2, 3, 4]
        assert rows["train/loss"].tolist()[2:] == pytest.approx(losses)
        clock = HostClock()
        start = clock.mark()
        split = fit.split(5, Split(clock))
        whole = clock.milliseconds(start, clock.mark()) / 5
        assert sum(split.values()) == pytest.approx(whole, rel=0.05)
        assert split["backward"] > split["logging"]
        # Nothing is left on the callbacks.
        fit.steps(1)
        assert not any("on_train_batch_end" in vars(c) for c in fit.turns.trainer.callbacks)
    finally:
        fit.stop()
        before.apply()
    assert not fit.is_waiting
    assert (folder / "metrics.csv").read_text().count("\n") > 9


def test_what_a_run_raises_is_raised_here(tiny, tmp_path):
    config, settings = run_in(tmp_path, ["packing=causal", *tiny])
    fit = Fit(config, settings, 100)
    with pytest.raises(UserError, match="the model's vocabulary must be >= 512"):
        fit.start()
    fit.stop()


def test_a_plain_run_starts_anew(tiny):
    config, _ = compose(["experiment=gu60m", *tiny])
    torch.manual_seed(0)
    weights = Decoder(config.model, config.attention, 512).state_dict()
    plain = PlainRun(config, 512, weights, torch.device("cpu"), bf16=False, compiled=False)
    first = plain.losses(3)
    plain.restart()
    assert plain.losses(3) == first and first[0] != first[1]


@pytest.mark.parametrize("model", [[], ["model.tie_embeddings=true", "model.vocab_multiple=100"]])
def test_the_plain_decoder_is_the_decoder(tiny, model):
    config, _ = compose([*tiny, "experiment=gu60m", *model])
    data = data_of(config)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    decoder = Decoder(config.model, config.attention, 512)
    plain = PlainDecoder(config.model, 512, 64)
    plain.load_state_dict(decoder.state_dict())
    for backend in (None, torch.nn.attention.SDPBackend.MATH):
        plain.backend = backend
        loss = plain(batch.tokens_BT, batch.labels_BT)
        logits_BTV = decoder(batch, statistics="off").logits_BTV
        ours = torch.nn.functional.cross_entropy(
            logits_BTV.flatten(0, 1), batch.labels_BT.flatten(), reduction="sum"
        )
        torch.testing.assert_close(loss, ours)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("packing=document", "packing.mask must be causal for the plain peer, got 'document'"),
        ("attention=sigmoid", "attention must be softmax for the plain peer, got 'sigmoid'"),
        ("model.num_kv_heads=1", "model.num_kv_heads must be null or 2 for the plain peer, got 1"),
        ("model.position=none", "model.position must be rope for the plain peer, got 'none'"),
    ],
)
def test_what_plain_cannot_express(override, message):
    config, _ = compose(["debug=cpu", "packing=causal", override])
    with pytest.raises(UserError) as caught:
        check_plain(config)
    assert message in str(caught.value)


@pytest.mark.parametrize("packing", ["causal", "document_pinned_bos"])
def test_materialised_statistics_are_the_kernels(tiny, packing, monkeypatch):
    overrides = [f"packing={packing}", "attention.window=40", "attention.global_every=2"]
    config, _ = compose([*tiny, *overrides, "model.num_kv_heads=1"])
    data = data_of(config)
    data.setup()
    batch = next(iter(data.train_dataloader()))
    decoder = Decoder(config.model, config.attention, 512)
    # One row at a time.
    monkeypatch.setattr("scripts.bench.materialised.MATRIX_BYTES", 1)
    materialise = MaterialisedPass(decoder, bf16=False)
    for _ in range(2):
        with torch.no_grad():
            decoder.embedding.weight.mul_(3)
            output = decoder(batch, statistics="full")
        for ours, theirs in zip(output.layers, materialise(batch), strict=True):
            torch.testing.assert_close(theirs, ours.statistics, rtol=1e-4, atol=1e-5)


def test_settings(tmp_path):
    config, settings = run_in(tmp_path, bench_overrides("gu60m", ["debug=cpu"], rows=3))
    assert config.packing.batch_tokens == 2 * 3 * 128 == settings["packing"]["batch_tokens"]
    assert config.packing.mask == "causal" and config.trainer.max_steps > 10**5
    given = ["debug=cpu", "packing=causal_pinned_bos", "packing.batch_tokens=1024"]
    added = bench_overrides("default", given)
    assert "packing=causal" not in added
    assert not [o for o in added if "batch_tokens" in o and o not in given]


def test_bursts_of_a_given_length():
    made = []
    clock = HostClock()
    calls = [("a", lambda: made.append("a")), ("b", lambda: made.append("b"))]
    timings = interleaved(calls, clock=clock, rounds=3, burst_calls={"a": 4, "b": 1})
    # One call before the clock starts; such calls aren't warmed up.
    assert made.count("a") == 3 * 5 and made.count("b") == 3 * 2
    assert set(timings) == {"a", "b"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_parked_tensors_come_back():
    class Owner:
        def __init__(self):
            self.parameter = torch.nn.Parameter(torch.randn(3, device="cuda"))
            self.global_settings = GlobalSettings.now()

        def tensors(self):
            return [self.parameter]

    one, other = Owner(), Owner()
    value = one.parameter.detach().clone()
    stage = Stage()
    stage.parking = True
    stage.enter(one)
    stage.enter(other)
    assert not one.parameter.is_cuda and other.parameter.is_cuda
    stage.enter(one)
    assert one.parameter.is_cuda and torch.equal(one.parameter, value)
    with torch.no_grad():
        one.parameter += 1
    stage.enter(other)
    stage.enter(one)
    assert torch.equal(one.parameter, value + 1)
