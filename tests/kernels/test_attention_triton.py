"""The Triton kernels against the reference, in Triton's interpreter: every mask, tile and layout.

The interpreter is slow, so rows are short; small tiles make up for it. It can't do bf16, nor what
the hardware adds: ``test_attention_triton_gpu.py`` has those.

Axes: B rows of the batch, T query positions, H query heads, G key/value heads, D head dim.
"""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from kernels.attention import api, sink_attention
from kernels.attention.fused import tiles
from kernels.attention.fused.tiles import Situation, Tile, Warpgroups, override_tiles, tile_for
from kernels.errors import UserError
from kernels.masks import IntervalMask

pytest.importorskip("triton")
from kernels.attention.fused import launch, portable
from kernels.attention.fused.op import backward_outputs
from kernels.attention.fused.tensors import BackwardCall, MaskTensors, as_loadable

pytestmark = [
    pytest.mark.skipif(not api._INTERPRETED, reason="needs Triton's interpreter"),
    pytest.mark.usefixtures("poisoned_memory"),
    # The kernels compute what `where` then drops; NumPy warns of it.
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]

FP32 = 1e-5
"""Allowed error of fp32, relative to a tensor's largest value."""


def tiled(queries: int, keys: int):
    """All kernels with tiles of this shape."""
    tile = Tile(queries=queries, keys=keys, warps=4, stages=1)
    return override_tiles(**dict.fromkeys(tiles.KERNELS, tile))


@pytest.fixture
def check(run_case, assert_agrees):
    """``check(case)``: the kernels in fp32 agree with the reference in fp64, on everything."""

    def run(case, tolerance=FP32, **settings):
        settings = {"statistics": "full", "tap": True} | settings
        ours = run_case(case, torch.float32, implementation="triton", **settings)
        exact = run_case(case, torch.float64, implementation="reference", **settings)
        assert_agrees(ours, exact, tolerance)
        statistics = ours[0].statistics
        assert all(x is None or x.dtype == torch.float32 for x in statistics or ())
        assert not any(x is not None and x.requires_grad for x in statistics or ())
        return ours

    return run


def rows(*lengths: int) -> list[list[int]]:
    """One row of documents of these lengths."""
    return [[n for n, length in enumerate(lengths, 1) for _ in range(length)]]


def documents(*lengths: int, **settings) -> IntervalMask:
    row = torch.tensor(rows(*lengths))
    if settings.get("pinned"):
        row[:, 0] = 0
    return IntervalMask.from_documents(row, **settings)


def any_intervals(num_tokens: int, pinned: int, seed: int) -> IntervalMask:
    """Non-monotone rows; some see the pinned key alone, some nothing, some everything."""
    generator = torch.Generator().manual_seed(seed)
    ends_2BT = torch.randint(
        0, num_tokens + 1, (2, 1, num_tokens), generator=generator, dtype=torch.int32
    )
    start_BT, stop_BT = ends_2BT.amin(0), ends_2BT.amax(0)
    start_BT[:, ::5] = stop_BT[:, ::5] = 0
    start_BT[:, ::7] = stop_BT[:, ::7] = num_tokens // 2
    # A whole tile of queries whatever its size, of each sort.
    start_BT[:, 16:32], stop_BT[:, 16:32] = 0, num_tokens
    start_BT[:, 32:48] = stop_BT[:, 32:48] = num_tokens - 1
    return IntervalMask(
        start_BT=start_BT,
        stop_BT=stop_BT,
        document_start_BT=torch.arange(num_tokens, dtype=torch.int32)[None] // 6 * 6,
        pinned=pinned,
    )


def test_agrees_with_the_reference(interval_case, check, run_case):
    if interval_case.E % 4:
        with pytest.raises(
            UserError, match=r"triton can't run head dim 5 \(only multiples of 4 up to 256\); use"
        ):
            run_case(interval_case, torch.float32, implementation="triton")
        return
    with tiled(128, 64):
        check(interval_case)


TILED_MASKS = {
    "causal": IntervalMask.causal(1, 61),
    "documents": documents(33, 1, 1, 26),
    "documents-padding": IntervalMask.from_documents(torch.tensor([[1] * 37 + [-1] * 24])),
    "pinned-window": documents(33, 1, 27, pinned=1).window(20),
    "prefix": IntervalMask.causal(1, 61).prefix(50),
    "any_intervals-pinned": any_intervals(61, pinned=1, seed=0),
}


@pytest.mark.parametrize(
    "shape", [(16, 16), (16, 64), (64, 16), (128, 128)], ids=lambda s: f"{s[0]}x{s[1]}"
)
@pytest.mark.parametrize("mask", TILED_MASKS)
def test_tile_shapes(mask, shape, case_of, check):
    """Tiles that need no mask, the diagonal, the pinned key's extra tile, tiles nobody sees."""
    with tiled(*shape):
        check(case_of(TILED_MASKS[mask], H=1, G=1, null="BHT"))


@pytest.mark.parametrize("mask", ["causal", "documents"])
def test_slopes(mask, case_of, check):
    # The scores reach 100, where fp32 has steps of 1e-5.
    check(case_of(TILED_MASKS[mask], H=2, G=1, slopes=True, null="H"), tolerance=1e-4)


@pytest.mark.parametrize(
    ("D", "E"), [(4, 4), (16, 24), (24, 16), (80, 96), (96, 80), (112, 8), (256, 16), (20, 256)]
)
def test_head_dims(D, E, case_of, check):
    check(case_of(documents(9, 12), H=1, G=1, D=D, E=E))


def test_three_heads_a_group(case_of, check):
    check(case_of(documents(9, 12), H=6, G=2, D=16, null="BHT", slopes=True), tolerance=3e-5)


@pytest.mark.parametrize("through", ["out", "lse"])
@pytest.mark.parametrize("tap", [False, True], ids=["no_tap", "tap"])
def test_gradients_through_one_output_alone(through, tap, case_of, check):
    check(case_of(documents(9, 12), H=1, G=1, null="BHT"), through=through, tap=tap)


@pytest.mark.parametrize("statistics", ["off", "basic", "full"])
def test_levels_without_a_tap(statistics, case_of, check):
    case = case_of(documents(9, 12, pinned=1), H=2, G=1, null="H")
    output, _ = check(case, statistics=statistics, tap=False)
    assert (output.statistics is None) == (statistics == "off")


@pytest.mark.parametrize("mask", TILED_MASKS)
def test_mass_adds_up_to_the_non_empty_queries(mask, case_of):
    case = case_of(TILED_MASKS[mask], H=2, G=1, null="H")
    q, k, v, null_logit = (x.detach() for x in case.tensors(torch.float32).values())
    statistics = sink_attention(
        q, k, v, case.mask, null_logit=null_logit, implementation="triton"
    ).statistics
    total_BH = statistics.key_mass_BHS.sum(-1) + statistics.null_mass_BHT.sum(-1)
    queries_B1 = (case.mask.keys_per_query_BT() > 0).sum(1, keepdim=True)
    torch.testing.assert_close(total_BH, queries_B1.expand_as(total_BH).float())


FP16_MASKS = ["causal", "pinned-window", "any_intervals-pinned"]


@pytest.mark.parametrize("mask", FP16_MASKS)
def test_fp16_errs_no_more_than_attention_written_out(
    mask, case_of, run_case, assert_no_worse_than_plain
):
    case = case_of(TILED_MASKS[mask], H=2, G=1, D=32, E=48, null="BHT")
    ours = run_case(case, torch.float16, "out", implementation="triton")
    exact = run_case(case, torch.float64, "out", implementation="reference")
    assert_no_worse_than_plain(case, torch.float16, ours, exact)


@pytest.mark.parametrize("mask", FP16_MASKS)
def test_statistics_of_fp16_are_those_of_fp32(mask, case_of, run_case, assert_agrees):
    """Scores and weights stay in fp32 whatever the inputs are; out and gradients don't."""
    case = case_of(TILED_MASKS[mask], H=2, G=1, D=32, null="BHT")
    runs = [
        run_case(case, dtype, statistics="full", implementation=implementation)[0]
        for dtype, implementation in ((torch.float16, "triton"), (torch.float64, "reference"))
    ]
    assert runs[0].out_BTHE.dtype == torch.float16
    assert runs[0].lse_BHT.dtype == torch.float32
    ours, exact = ((run._replace(out_BTHE=run.lse_BHT), {}) for run in runs)
    assert_agrees(ours, exact, FP32)


@st.composite
def random_masks(draw) -> IntervalMask:
    """Documents of 1 token and more, padding, then a window, a prefix, a pinned key or none."""
    lengths = draw(st.lists(st.just(1) | st.integers(1, 40), min_size=1, max_size=4))
    pinned = draw(st.integers(0, 1))
    row_1T = torch.tensor([rows(*lengths)[0] + [-1] * draw(st.integers(0, 20))])
    row_1T[:, 0] *= 1 - pinned
    mask = IntervalMask.from_documents(row_1T, pinned=pinned, causal_across=draw(st.booleans()))
    if draw(st.booleans()):
        mask = mask.window(draw(st.integers(1, 20)))
    if draw(st.booleans()):
        mask = mask.prefix(draw(st.integers(0, 20)))
    return mask


# The fixtures keep nothing from one example to the next.
STATELESS = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.function_scoped_fixture],
}
SMALL_SHAPES = st.sampled_from([(16, 16), (16, 32), (32, 16)])


@settings(max_examples=8, **STATELESS)
@given(random_masks(), SMALL_SHAPES, st.sampled_from(["", "H", "BHT"]))
def test_random_masks(case_of, check, mask, shape, null):
    with tiled(*shape):
        check(case_of(mask, H=1, G=1, null=null))


def plan_by_definition(mask: IntervalMask, shape: tuple[int, int]) -> list[list[int]]:
    """low, high, full_low, full_high of each key tile of row 0, from the intervals of its rows."""
    (queries, keys), num_tokens = shape, mask.num_tokens
    intervals = list(zip(mask.start_BT[0].tolist(), mask.stop_BT[0].tolist(), strict=True))
    query_tiles = [intervals[i : i + queries] for i in range(0, num_tokens, queries)]
    plan = []
    for first in range(0, num_tokens, keys):
        end = min(first + keys, num_tokens)
        visits, full = [], []
        for m, tile in enumerate(query_tiles):
            some = [(start, stop) for start, stop in tile if start < stop]
            meets = any(start < end for start, _ in some) and any(stop > first for _, stop in some)
            sees_pinned = mask.pinned and first == 0 and any(stop > 0 for _, stop in tile)
            if meets or sees_pinned:
                visits.append(m)
            if all(start <= first and end <= stop for start, stop in tile):
                full.append(m)
        runs = [
            (m, n)
            for m in full
            for n in range(m + 1, len(query_tiles) + 1)
            if set(range(m, n)) <= set(full)
        ]
        low, high = (min(visits), max(visits) + 1) if visits else (0, 0)
        # Of runs as long as each other, the first.
        full_low, full_high = max(runs, key=lambda r: (r[1] - r[0], -r[0]), default=(high, high))
        plan.append([low, high, full_low, full_high])
    return plan


def mask_tensors(mask: IntervalMask) -> MaskTensors:
    """The mask with a table for its intervals, even where they are causal."""
    return MaskTensors(
        mask.start_BT, mask.stop_BT, mask.document_start_BT, mask.pinned, False, mask.one_document
    )


def plan_of(mask: IntervalMask, shape: tuple[int, int]) -> list[list[int]]:
    return portable.plan(mask_tensors(mask), *shape)[0].tolist()


@settings(max_examples=20, **STATELESS)
@given(random_masks(), SMALL_SHAPES)
def test_the_plan_is_what_the_intervals_say(mask, shape):
    plan = plan_of(mask, shape)
    assert plan == plan_by_definition(mask, shape)
    queries, keys = shape
    visible_TS = mask.dense_BTS()[0]
    for n, (low, high, full_low, full_high) in enumerate(plan):
        assert 0 <= low <= full_low <= full_high <= high
        seen_T = visible_TS[:, n * keys : (n + 1) * keys]
        assert not seen_T[: low * queries].any() and not seen_T[high * queries :].any()
        assert seen_T[full_low * queries : full_high * queries].all()


@pytest.mark.parametrize("mask", TILED_MASKS)
def test_the_plan_of_long_rows(mask):
    """More key tiles than one program plans, and intervals that are not monotone."""
    mask = TILED_MASKS[mask]
    for shape in ((16, 4), (4, 16), (32, 2)):
        assert plan_of(mask, shape) == plan_by_definition(mask, shape)


@pytest.mark.parametrize("mask", TILED_MASKS)
def test_the_bounds_are_those_of_the_intervals(mask):
    mask, queries = TILED_MASKS[mask], 16
    bounds = portable.bounds(mask_tensors(mask), queries)[0, :, :5].tolist()
    intervals = list(zip(mask.start_BT[0].tolist(), mask.stop_BT[0].tolist(), strict=True))
    for m, ours in enumerate(bounds):
        tile = intervals[m * queries : (m + 1) * queries]
        some = [interval for interval in tile if interval[0] < interval[1]]
        assert ours == [
            min((start for start, _ in some), default=mask.num_tokens),
            max((stop for _, stop in some), default=0),
            max(start for start, _ in tile),
            min(stop for _, stop in tile),
            int(mask.pinned and any(stop > 0 for _, stop in tile)),
        ]


def test_whole_tiles_are_skipped():
    """Guards the speed of sparse masks, which agreement with the reference can't show."""
    plan = plan_of(documents(*[16] * 8), (16, 16))
    assert plan == [[n, n + 1, n + 1, n + 1] for n in range(8)]
    plan = plan_of(IntervalMask.causal(1, 128).window(17), (16, 16))
    assert [high - low for low, high, _, _ in plan] == [2] * 7 + [1]
    plan = plan_of(IntervalMask.causal(1, 128).prefix(128), (16, 32))
    assert plan == [[0, 8, 0, 8]] * 4


def layouts() -> dict[str, tuple[torch.Tensor, ...]]:
    """q, k, v [1, 21, 2, 16] with the same numbers, stored in different ways."""
    generator = torch.Generator().manual_seed(0)
    qkv_3BTHD = torch.randn(3, 1, 21, 2, 16, generator=generator)
    fused_BTF = qkv_3BTHD.permute(1, 2, 0, 3, 4).reshape(1, 21, 96)
    heads_first_3BHTD = qkv_3BTHD.transpose(2, 3).contiguous()
    return {
        "contiguous": qkv_3BTHD.unbind(0),
        "one_projection": fused_BTF.unflatten(-1, (3, 2, 16)).unbind(2),
        "heads_first": heads_first_3BHTD.transpose(2, 3).unbind(0),
        "part_of_a_wider_head": torch.nn.functional.pad(qkv_3BTHD, (0, 4))[..., :16].unbind(0),
    }


@pytest.mark.parametrize("layout", ["one_projection", "heads_first", "part_of_a_wider_head"])
def test_strides_are_read_as_they_are(layout):
    """No copies on the way in, and the same bits out, whatever the layout."""

    def attend(name):
        tensors = [x.detach().requires_grad_() for x in layouts()[name]]
        assert all(as_loadable(x) is x for x in tensors)
        output = sink_attention(
            *tensors, documents(9, 12), statistics="full", implementation="triton"
        )
        # The gradient has the layout of a projection's, too.
        dout = output.out_BTHE.detach().transpose(1, 2).contiguous().transpose(1, 2)
        gradients = torch.autograd.grad(
            [output.out_BTHE, output.lse_BHT], tensors, [dout, dout[..., 0].mT]
        )
        measured = [x for x in output.statistics if x is not None]
        return [output.out_BTHE, output.lse_BHT, *measured, *gradients]

    for ours, wanted in zip(attend(layout), attend("contiguous"), strict=True):
        assert torch.equal(ours, wanted)


def test_what_the_hardware_cannot_read_is_copied():
    x = torch.randn(1, 21, 2, 16)
    misaligned = torch.randn(x.numel() + 1)[1:].view(x.shape)
    gaps_in_the_last_axis = torch.randn(1, 21, 2, 32)[..., ::2]
    odd_steps = torch.randn(1, 21, 2, 17)[..., :16]
    expanded = torch.randn(1, 1, 1, 16).expand(x.shape)
    for y in (misaligned, gaps_in_the_last_axis, odd_steps, expanded):
        loadable = as_loadable(y)
        assert loadable.is_contiguous() and torch.equal(loadable, y)
        assert loadable is not y and loadable.data_ptr() % 16 == 0
    # An axis of one element is never stepped along, whatever its stride.
    assert as_loadable(x.as_strided(x.shape, (1, *x.stride()[1:]))).data_ptr() == x.data_ptr()


def test_a_gradient_expanded_from_a_scalar(case_of):
    case = case_of(documents(9, 12), H=2, G=1)
    results = []
    for implementation in ("triton", "cpu"):
        tensors = list(case.tensors(torch.float32).values())
        output = sink_attention(*tensors, case.mask, implementation=implementation)
        results.append(torch.autograd.grad(output.out_BTHE.sum(), tensors))
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=2e-5)


def test_only_what_needs_a_gradient_has_one(case_of):
    case = case_of(documents(9, 12), H=2, G=1)
    q, k, v = (x.detach() for x in case.tensors(torch.float32).values())
    output = sink_attention(q, k, v.requires_grad_(), case.mask, implementation="triton")
    output.out_BTHE.sum().backward()
    assert v.grad.isfinite().all() and q.grad is None and k.grad is None
    with torch.no_grad():
        output = sink_attention(q, k, v, case.mask, implementation="triton")
    assert not output.out_BTHE.requires_grad and not output.lse_BHT.requires_grad


def test_large_scores_neither_overflow_nor_lose_the_null_slot():
    """exp(score) and exp(null) are far outside fp32 here, and their ratio underflows."""
    q, k = torch.zeros(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
    q[0, :, 0, 0], k[0, :, 0, 0] = torch.tensor([3.0, -40, 12]), torch.tensor([4.0, 9, 20])
    output = sink_attention(
        q,
        k,
        torch.ones(1, 3, 1, 4),
        IntervalMask.causal(1, 3),
        scale=1.0,
        null_logit=torch.tensor([[[400.0, -370.0, -500.0]]]),
        statistics="full",
        implementation="triton",
    )
    statistics = output.statistics
    torch.testing.assert_close(output.lse_BHT, torch.tensor([[[400.0, -160.0, 240.0]]]))
    torch.testing.assert_close(output.out_BTHE[0, :, 0, 0], torch.tensor([0.0, 1.0, 1.0]))
    torch.testing.assert_close(statistics.null_mass_BHT, torch.tensor([[[1.0, 0.0, 0.0]]]))
    torch.testing.assert_close(statistics.entropy_BHT, torch.zeros(1, 1, 3), rtol=0, atol=1e-4)
    torch.testing.assert_close(statistics.max_logit_BH, torch.tensor([[240.0]]))


def test_tiles_come_from_the_table(monkeypatch):
    """The nearest larger head dim and the nearest length of the card; else what any card takes."""

    def entry(queries=0, **changes) -> dict:
        tile = dict(queries=queries, keys=16, warps=4, stages=3)
        kind = dict(kernel="key", card="A card", mask="causal", level="basic")
        return {**kind, "head_dim": 64, "tokens": 1024, "ms": 1.0, "tile": tile, **changes}

    hopper = Warpgroups(groups=2, rows=64, stages=2)
    table = [
        entry(queries=1),
        entry(queries=2, ms=0.5),
        entry(queries=3, tokens=8192),
        entry(ms=0.1, tile=tiles.tile_as_json(hopper)),
        entry(queries=4, head_dim=96),
        entry(queries=5, mask="interval"),
        entry(queries=6, level="off"),
        entry(queries=7, card="Another card", head_dim=256),
    ]
    monkeypatch.setattr(tiles, "_table", lambda: table)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    tiles._look_up.cache_clear()

    def tile(for_hopper=False, **changes):
        usual = dict(device=torch.device("cuda"), dtype=torch.bfloat16, head_dim=64)
        situation = {**usual, "num_tokens": 1000, "is_causal": True, "level": "basic", **changes}
        return tile_for("key", Situation(**situation), for_hopper)

    assert tile().queries == tile(head_dim=24).queries == tile(num_tokens=1).queries == 2
    assert tile(for_hopper=True) == hopper
    assert tile(num_tokens=16384, for_hopper=True).queries == 3
    assert tile(head_dim=80).queries == 4
    assert tile(is_causal=False).queries == 5
    assert tile(level="off").queries == 6
    assert tile(head_dim=128) == tiles._ANY_CARD["key"]
    assert tile(dtype=torch.float32) == tiles._FP32
    assert tile(device=torch.device("cpu")) == tiles._INTERPRETED
    with pytest.raises(ZeroDivisionError), tiled(16, 16):
        assert tile().queries == 16
        raise ZeroDivisionError
    assert tile().queries == 2
    tiles._look_up.cache_clear()


def test_the_committed_table_serves_every_call():
    """Each card has a tile that any call can take; rows past the end are padded to 64, no more."""
    entries = tiles._table()
    levels = {"forward": {"off", "basic", "full"}, "query": {"off"}, "key": {"off", "basic"}}
    levels["key_mass"] = {"basic"}
    for card, head_dim in {(entry["card"], entry["head_dim"]) for entry in entries}:
        served = {
            (entry["kernel"], entry["mask"], entry["level"])
            for entry in entries
            if (entry["card"], entry["head_dim"]) == (card, head_dim)
            and isinstance(tiles.tile_from_json(entry["tile"]), Tile)
        }
        assert served == {
            (kernel, mask, level)
            for kernel in tiles.KERNELS
            for mask in ("causal", "interval")
            for level in levels[kernel]
        }
    for entry in entries:
        tile = tiles.tile_from_json(entry["tile"])
        if entry["kernel"] == "key" and isinstance(tile, Warpgroups):
            assert launch.PADDING % tile.rows == 0


@pytest.mark.parametrize("is_causal", [True, False], ids=["causal", "window"])
def test_rows_past_the_end_take_no_part(is_causal):
    """Bulk copies read past the end of a row: what stands there must make every P 0."""
    mask = IntervalMask.causal(1, 70)
    mask = mask if is_causal else mask.window(5)
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (torch.randn(1, 70, 1, 16, generator=generator) for _ in range(4))
    output = sink_attention(q, k, v, mask, implementation="triton")
    out, lse = output.out_BTHE, output.lse_BHT
    tensors = MaskTensors(mask.start_BT, mask.stop_BT, mask.start_BT, 0, is_causal, False)
    call = BackwardCall(dout, None, q, k, v, out, lse, tensors, None, 0.25, True)
    log_sum_BHt, shift_BHt = torch.empty(1, 1, 128), torch.empty(1, 1, 128)
    grads = backward_outputs(q, k, v, lse, "basic")
    launch.query_gradients(call, grads, log_sum_BHt, shift_BHt)
    torch.testing.assert_close(log_sum_BHt[..., :70], lse / math.log(2))
    torch.testing.assert_close(shift_BHt[..., :70], (out * dout).sum(-1).mT)
    assert log_sum_BHt[..., 70:].eq(math.inf).all() and shift_BHt[..., 70:].eq(0).all()


def operator_inputs(null: bool, tap: bool, is_causal: bool):
    """Arguments of ``sinklab::attention``: leaves, mask, numbers; no query sees nothing."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, 2, 8), (1, 6, 1, 8), (1, 6, 1, 4)]
    leaves = [torch.randn(shape, generator=generator, requires_grad=True) for shape in shapes]
    leaves.append(torch.randn(1, 2, 6, generator=generator, requires_grad=True) if null else None)
    leaves.append(torch.zeros(1, 2, 6, requires_grad=True) if tap else None)
    mask = IntervalMask.causal(1, 6) if is_causal else IntervalMask.causal(1, 6).window(3)
    return leaves, (mask.start_BT, mask.stop_BT), (mask.pinned, mask.is_causal)


OPERATORS = torch.ops.sinklab


@pytest.mark.parametrize(
    ("null", "tap", "is_causal", "level"),
    [(False, False, True, "off"), (True, True, False, "full")],
    ids=["off-causal", "full-null-tap-window"],
)
def test_the_operators_pass_pytorchs_own_checks(null, tap, is_causal, level):
    leaves, intervals, kind = operator_inputs(null, tap, is_causal)
    document_start = torch.zeros_like(intervals[0])
    where = (None, *intervals, document_start, *kind, True, 0.3, level)
    torch.library.opcheck(OPERATORS.attention.default, (*leaves, *where))
    q, k, v, *extras = (x if x is None else x.detach() for x in leaves)
    out, lse, *_ = OPERATORS.attention(q, k, v, *extras, *where)
    dlse = torch.ones_like(lse) if null else None
    torch.library.opcheck(
        OPERATORS.attention_backward.default,
        (out, dlse, q, k, v, out, lse, None, *intervals, *kind, 0.3, level),
    )
    torch.library.opcheck(OPERATORS.key_mass.default, (q, k, lse, None, *intervals, *kind, 0.3))


def test_products_are_counted():
    leaves, intervals, kind = operator_inputs(null=False, tap=False, is_causal=True)
    document_start = torch.zeros_like(intervals[0])
    with FlopCounterMode(display=False) as counter:
        out, lse, *_ = OPERATORS.attention(
            *leaves, None, *intervals, document_start, *kind, True, 0.3, "basic"
        )
        out.sum().backward()
        OPERATORS.key_mass(*leaves[:2], lse, None, *intervals, *kind, 0.3)
    pairs, D, E = 2 * 6 * 6, 8, 4
    assert counter.get_flop_counts()["Global"] == {
        OPERATORS.attention: 2 * pairs * (D + E),
        OPERATORS.attention_backward: 2 * pairs * (3 * D + 2 * E),
        OPERATORS.key_mass: 2 * pairs * D,
    }
