"""The benchmarks themselves: their arithmetic, that wrong results are never timed, and that baselines are the layer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from benchmarks.plots import plot_sweep, plot_train_step
from robust_moe.benchmarks import expert_sweep, harness, layer_case, load, ranks, scaling, train_step
from robust_moe.benchmarks.baselines import AllExperts, DenseBlock, MaskedLoop, SortedLoop, in_bfloat16
from robust_moe.benchmarks.expert_sweep import baselines, sweep
from robust_moe.benchmarks.harness import BusyMachine, Options, Row, check_close, compare, peak_bytes, save
from robust_moe.benchmarks.layer_case import DENSE, MASKED, OURS, SORTED, Case
from robust_moe.benchmarks.load import MOST_OTHERS, MOST_SWITCHES, Load, Watch, why_busy
from robust_moe.models.resnet import BasicBlock
from robust_moe_kernels.modules import FusedBlockMoE

CPU = torch.device("cpu")
TINY = Case(experts=3, batch=6, top_k=2, channels=4, size=4)


def _timings(monkeypatch: pytest.MonkeyPatch, seconds: dict[str, list[float]]) -> list[str]:
    """Replaces the clock: each run takes what the list says. Returns the order of the runs, as it grows."""
    order: list[str] = []
    left = {name: iter(values) for name, values in seconds.items()}

    def fake(run, number: int, device: torch.device, queued: bool) -> float:
        name = run(number)
        order.append(name)
        return next(left[name])

    monkeypatch.setattr(harness, "_seconds", fake)
    return order


def test_medians_spread_and_ratios_leave_out_the_warm_up_and_pair_the_rounds(monkeypatch):
    ours = [9.0, 9.0, 1.0, 2.0, 4.0]
    other = [9.0, 9.0, 3.0, 4.0, 20.0]  # ratios of the rounds 3, 2, 5: median 3; ratio of the medians: 2
    order = _timings(monkeypatch, {"ours": ours, "other": other})
    rows = compare({"n": 1}, {"ours": lambda _: "ours", "other": lambda _: "other"}, Options(CPU, repeats=3))
    assert order == ["ours", "other"] * 5
    first, second = rows
    assert (first.median_ms, first.low_ms, first.high_ms, first.ratio, first.repeats) == (2e3, 1e3, 4e3, 1.0, 3)
    assert (second.median_ms, second.low_ms, second.high_ms, second.ratio) == (4e3, 3e3, 20e3, 3.0)


def test_spread_of_many_runs_is_the_tenth_to_the_ninetieth_percentile(monkeypatch):
    values = [float(i) for i in range(1, 21)]
    _timings(monkeypatch, {"a": values[::-1]})
    (row,) = compare({}, {"a": lambda _: "a"}, Options(CPU, repeats=20), warmup=0)
    assert (row.median_ms, row.low_ms, row.high_ms) == (10.5e3, 3e3, 18e3)


@pytest.mark.parametrize(
    ("each", "expected"),
    [
        (10.0, 2),  # over the limit at once: two rounds all the same
        (1.0, 3),  # warm-up, and three more: the fourth would start after the limit
        (0.1, 9),  # never reached
    ],
)
def test_a_slow_case_gets_fewer_rounds_and_says_so(monkeypatch, each: float, expected: int):
    _timings(monkeypatch, {"a": [each] * 10})
    options = Options(CPU, repeats=9, seconds=3.5)
    (row,) = compare({}, {"a": lambda _: "a"}, options, warmup=1)
    assert row.repeats == expected


def test_the_gate_measures_relative_errors_and_refuses_nan_and_other_shapes():
    wanted = torch.tensor([3.0, 4.0])
    check_close("right", torch.tensor([3.0, 4.005]), wanted, 1.1e-3)
    with pytest.raises(AssertionError, match=r"wrong: expected a relative error of at most 9\.0e-04, got 1\.0e-03"):
        check_close("wrong", torch.tensor([3.0, 4.005]), wanted, 9e-4)
    with pytest.raises(AssertionError, match="got nan; not timed"):
        check_close("nan", torch.tensor([3.0, float("nan")]), wanted, 1e9)
    with pytest.raises(AssertionError, match=r"expected shape \[2\], got \[1, 2\]"):
        check_close("shape", wanted[None], wanted, 1.0)


@pytest.mark.parametrize("damaged", [None, OURS, MASKED, layer_case.ALL, DENSE])
def test_a_wrong_result_stops_the_benchmark_before_any_timing(damaged: str | None):
    variants = TINY.variants(TINY.layer(CPU), (MASKED, SORTED, layer_case.ALL, DENSE))
    x = TINY.inputs(CPU)[0]
    if damaged is None:  # all right as they are
        layer_case.check(variants, x, ("forward+backward",))
        return
    variants[damaged].register_forward_hook(lambda module, inputs, y: 1.001 * y)
    with pytest.raises(AssertionError, match=f"{damaged}: output in evaluation: .*not timed"):
        layer_case.check(variants, x, ("forward+dx",))


@pytest.mark.parametrize("damaged", [OURS, MASKED])
def test_a_wrong_gradient_in_training_stops_it_too(damaged: str):
    """The output is right, and so is everything in evaluation."""
    variants = TINY.variants(TINY.layer(CPU), (MASKED, SORTED, DENSE))
    x = TINY.inputs(CPU)[0]
    variants[damaged].register_forward_hook(
        lambda module, inputs, y: 1.01 * y - 0.01 * y.detach() if module.training else y
    )
    layer_case.check(variants, x, ("forward+dx",))
    with pytest.raises(AssertionError, match=f"{damaged}: input gradient in training: .*not timed"):
        layer_case.check(variants, x, ("forward+backward",))


def test_the_gate_multiplies_float32_as_float32_and_puts_back_what_was_allowed():
    """On a GPU PyTorch's convolutions take TF32 by default, and no bound for float32 would hold."""
    convolution = torch.backends.cudnn.conv
    assert convolution.fp32_precision == "tf32"  # PyTorch's default
    seen = []
    variants = TINY.variants(TINY.layer(CPU), (SORTED,))
    variants[SORTED].register_forward_hook(lambda module, inputs, y: seen.append(convolution.fp32_precision))
    layer_case.check(variants, TINY.inputs(CPU)[0], ("forward+backward",))
    layer_case.check_same("the same", variants[SORTED], variants[SORTED], TINY.inputs(CPU)[0])
    assert seen and set(seen) == {"ieee"} and convolution.fp32_precision == "tf32"


def _small(stride: int, top_k: int, experts: int = 4) -> tuple[FusedBlockMoE, torch.Tensor]:
    torch.manual_seed(3)
    channels = 6 if stride == 2 else 4
    downsample = None
    if stride == 2:
        downsample = nn.Sequential(nn.Conv2d(4, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))
    block = BasicBlock(4, channels, stride, downsample)
    layer = FusedBlockMoE.from_block(block, experts, top_k, init="fresh").double()
    for name, value in layer.state_dict().items():  # every norm and every running statistic its own
        if "bn" in name or "downsample.1" in name:
            value.copy_(torch.rand(value.shape) + 0.5)
    return layer, torch.randn(9, 4, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("baseline", [MaskedLoop, SortedLoop, AllExperts])
@pytest.mark.parametrize(("stride", "top_k", "experts"), [(1, 1, 4), (1, 2, 4), (2, 3, 4), (2, 2, 2), (1, 2, 16)])
def test_baselines_are_the_layer_in_evaluation(baseline: type[nn.Module], stride: int, top_k: int, experts: int):
    """k = 1 to 3 and k = E, with and without a downsampling skip, and experts that no sample is sent to (16)."""
    layer, x = _small(stride, top_k, experts)
    layer.eval()
    other = baseline(layer).eval()
    results = []
    for module in (layer, other):
        leaf = x.clone().requires_grad_()
        y = module(leaf)
        (gradient,) = torch.autograd.grad((y * torch.sin(y.detach())).sum(), leaf)
        results.append((y, gradient))
    for got, wanted in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("baseline", [MaskedLoop, SortedLoop])
def test_loops_are_the_layer_in_training(baseline: type[nn.Module]):
    layer, x = _small(stride=1, top_k=2)
    other = baseline(layer.train()).train()
    torch.testing.assert_close(other(x), layer(x), rtol=1e-10, atol=1e-10)
    for number, block in enumerate(other.blocks):
        mean = layer.experts[number].bn2.running_mean
        torch.testing.assert_close(block.bn2.running_mean, mean, rtol=1e-10, atol=1e-12)


def test_the_dense_block_is_one_expert_on_k_times_the_rows():
    layer, x = _small(stride=1, top_k=3)
    layer.eval().fixed_expert = 0
    rows = DenseBlock(layer).eval()(x)
    assert rows.shape[0] == 3 * x.shape[0]
    torch.testing.assert_close(rows, layer(x).repeat(3, 1, 1, 1), rtol=1e-10, atol=1e-10)


def test_baselines_have_parameters_of_their_own_and_train_them():
    layer = TINY.layer(CPU)
    own = {parameter.data_ptr() for parameter in layer.experts.parameters()}
    for module in TINY.variants(layer, (MASKED, SORTED, layer_case.ALL, DENSE)).values():
        parameters = list(module.parameters())
        assert parameters and all(parameter.requires_grad for parameter in parameters)
        if module is not layer:
            assert not own & {parameter.data_ptr() for parameter in parameters}


def test_work_counts_the_products_that_touch_the_map():
    """Against a count of them, one by one."""
    case = Case(batch=3, top_k=2, channels=5, size=4)
    inside = sum(
        0 <= row + dy < 4 and 0 <= column + dx < 4
        for row in range(4)
        for column in range(4)
        for dy in (-1, 0, 1)
        for dx in (-1, 0, 1)
    )
    assert inside == 100
    convolution = 2 * 3 * 2 * 5 * 5 * inside / 1e9
    assert case.gflop("forward") == pytest.approx(2 * convolution)
    assert case.gflop("forward+dx") == pytest.approx(4 * convolution)
    assert case.gflop("forward+backward") == pytest.approx(6 * convolution)


def test_frozen_passes_return_the_input_gradient_alone():
    layer = TINY.layer(CPU)
    inputs = TINY.inputs(CPU)
    layer_case.set_mode({OURS: layer}, "forward+dx")
    (d_x,) = layer_case.one_pass(layer, inputs, "forward+dx")(0)
    assert d_x.shape == inputs[0].shape and not layer.training
    layer_case.set_mode({OURS: layer}, "forward+backward")
    gradients = layer_case.one_pass(layer, inputs, "forward+backward")(0)
    assert len(gradients) == 1 + len(list(layer.parameters())) and layer.training


def test_the_sweep_has_every_point_once_and_always_the_two_rivals():
    for full in (False, True):
        points = list(sweep(full))
        assert len(points) == len(set(points))
        assert {point.experts for point in points} == {2, 4, 8, 16, 32}
        assert {point.batch for point in points} == {32, 64, 128, 256, 512, 1024}
        assert {(point.channels, point.size) for point in points} == {(512, 4), (256, 8), (128, 16)}
        assert all({SORTED, DENSE} <= set(baselines(point, full)) for point in points)
        assert all(point.gflop("forward") < 4e3 for point in points)


def test_one_tiny_point_of_the_sweep_from_gate_to_share(monkeypatch):
    monkeypatch.setattr(expert_sweep.layer_case, "peak_bytes", lambda run, device: 2**21)  # the profiler takes seconds
    rows = expert_sweep._point(TINY, torch.float32, Options(CPU, repeats=1), (1,))
    assert [row.variant for row in rows] == [OURS, MASKED, SORTED, layer_case.ALL, DENSE] * 2
    assert {row.case["mode"] for row in rows} == {"forward+backward", "forward+dx"}
    for row in rows:
        work = TINY.gflop(row.case["mode"])
        assert row.extra["gflops"] == pytest.approx(work / (row.median_ms / 1e3)) and row.extra["peak_mib"] == 2.0
    product = {"op": "large matrix product", "threads": 1, "dtype": "float32"}
    ceilings = [Row(product, "mm", 1.0, 1.0, 1.0, 1.0, 1, {"gflops": rate}) for rate in (50.0, 200.0, 100.0)]
    shares = [row.extra["share"] for row in expert_sweep._with_share(rows + ceilings)]
    assert shares == pytest.approx([row.extra["gflops"] / 200 for row in rows] + [0.25, 1.0, 0.5])


def test_peak_memory_counts_what_lives_at_once():
    def run() -> None:
        for _ in range(3):
            torch.ones(2**18)  # 1 MiB each, one at a time
        kept = [torch.ones(2**18) for _ in range(2)]
        del kept

    assert 2 * 2**20 <= peak_bytes(run, CPU) < 2.5 * 2**20


def test_results_say_what_they_came_from(tmp_path: Path):
    rows = [Row({"E": 4, "mode": "forward"}, OURS, 2.0, 1.0, 3.0, 1.0, 5, {"peak_mib": 7.5})]
    record = json.loads(save("tiny", rows, CPU, tmp_path).read_text(encoding="utf-8"))
    assert record["benchmark"] == "tiny"
    assert {"versions", "git", "hardware", "matmul_precision", "rows"} <= record.keys()
    assert {"torch", "python", "robust-moe-kernels", "extension"} <= record["versions"].keys()
    assert record["rows"][0]["case"] == {"E": 4, "mode": "forward"}
    assert record["rows"][0]["repeats"] == 5 and record["rows"][0]["extra"] == {"peak_mib": 7.5}


def test_a_busy_machines_numbers_are_not_written(tmp_path: Path):
    quiet = Row({"E": 4}, OURS, 2.0, 1.0, 3.0, 1.0, 5, {}, Load(1.0, MOST_OTHERS, MOST_SWITCHES))
    assert why_busy(quiet.load) is None
    for load_, words in (
        (Load(1.0, MOST_OTHERS + 0.01, 0.0), "other processes took 9% of its processors' time"),
        (Load(1.0, 0.0, MOST_SWITCHES + 1), "151 involuntary context switches a second"),
    ):
        rows = [quiet, Row({"E": 16}, OURS, 2.0, 1.0, 3.0, 1.0, 5, {}, load_)]
        with pytest.raises(BusyMachine, match=f"tiny: expected a quiet machine, but in {{'E': 16}}: {words}"):
            save("tiny", rows, CPU, tmp_path)
    assert not list(tmp_path.iterdir())
    record = json.loads(save("tiny", [quiet], CPU, tmp_path).read_text(encoding="utf-8"))
    assert record["rows"][0]["load"] == {"seconds": 1.0, "others": MOST_OTHERS, "switches": MOST_SWITCHES}


def test_one_tick_of_a_short_case_is_no_busy_machine(tmp_path: Path):
    """Cases of 5 ms are judged in stretches of half a second; of less nothing is said."""

    def rows(*others: float, seconds: float = 0.005) -> list[Row]:
        loads = [Load(seconds, share, 0.0) for share in others]
        return [Row({"n": n}, OURS, 2.0, 1.0, 3.0, 1.0, 5, {}, each) for n, each in enumerate(loads)]

    save("one tick in few", rows(1.0, 0.0), CPU, tmp_path)
    save("one tick in many", rows(1.0, *[0.0] * 150), CPU, tmp_path)
    with pytest.raises(BusyMachine, match=r"but in {'n': 0} to {'n': 149}: other processes took 20%"):
        save("one in five", rows(*[1.0, 0.0, 0.0, 0.0, 0.0] * 30), CPU, tmp_path)


def test_what_others_took_is_the_processors_work_without_our_own(monkeypatch):
    """Seconds of the clock, of all work and of our own; switches."""
    counters = iter([(100.0, 50.0, 20.0, 7.0), (104.0, 57.0, 25.0, 27.0)])
    monkeypatch.setattr(load, "_counters", lambda _: next(counters))
    monkeypatch.setattr(load, "_processors", lambda: frozenset({3, 5}))
    assert Watch().load() == Load(seconds=4.0, others=0.25, switches=5.0)


def test_of_workers_that_share_the_processors_switches_say_nothing(monkeypatch):
    monkeypatch.setattr(load, "_processors", lambda: frozenset({0}))
    for workers, switches in ((False, 1e4), (True, None)):
        counters = iter([(0.0, 0.0, 0.0, 0.0), (0.0, 0.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1e4)])
        monkeypatch.setattr(load, "_counters", lambda _, counters=counters: next(counters))
        (row,) = compare({}, {"a": lambda _: None}, Options(CPU, repeats=1, quick=True), warmup=0, workers=workers)
        assert row.load == Load(1.0, 0.0, switches)
        assert (why_busy(row.load) is None) == workers
    one, none = ("1", Load(0.3, 0.2, 8.0)), ("2", Load(0.3, 0.1, None))
    assert load.stretches([one, none]) == [("1 to 2", Load(0.6, pytest.approx(0.15), None))]
    assert "other processes took 15%" in str(why_busy(load.stretches([one, none])[0][1]))


def test_the_load_is_that_of_the_timed_rounds(monkeypatch):
    counters = iter([(0.0, 0.0, 0.0, 0.0), (10.0, 10.0, 0.0, 900.0), (11.0, 10.0, 0.0, 902.0)])
    monkeypatch.setattr(load, "_counters", lambda _: next(counters))
    (row,) = compare({}, {"a": lambda _: None}, Options(CPU, repeats=2), warmup=1)
    assert row.load == Load(1.0, 0.0, 2.0)


@pytest.mark.parametrize(("busy", "kept"), [(0, 1), (1, 2), (2, 3), (9, 3)])
def test_a_case_beside_which_the_machine_was_busy_is_timed_again_twice_at_most(monkeypatch, capsys, busy, kept):
    """``busy`` tries are disturbed; the rounds of try number ``kept`` are the case's."""
    tries = []

    class Told(Watch):
        def load(self) -> Load:
            tries.append(len(calls))
            return Load(1.0, 0.5 if len(tries) <= busy else 0.0, 0.0)

    calls: list[int] = []
    monkeypatch.setattr(harness, "Watch", Told)
    (row,) = compare({"E": 4}, {"a": calls.append}, Options(CPU, repeats=2), warmup=1)
    assert calls == [-1, 0, 1] + [0, 1] * (kept - 1)
    assert tries == [3 + 2 * more for more in range(kept)]
    assert row.repeats == 2 and row.load == Load(1.0, 0.5 if busy >= kept else 0.0, 0.0)
    said = capsys.readouterr().out
    assert said.count("other processes took 50% of its processors' time, at most 8% is quiet; timed again") == kept - 1


def test_the_model_adds_up_amdahls_law_operation_by_operation():
    alone = {"convolution": 80.0, "sort": 3.0, "slower together": 5.0}
    together = {"convolution": 50.0, "sort": 3.0, "slower together": 9.0}  # w = 60 of the convolution's 80
    found = scaling.amdahl(alone, together, 2)
    assert found == pytest.approx({str(p): 20 + 60 / p + 3 + 5 for p in (1, 2, 4, 16, 64)})
    assert scaling.amdahl({"a": 4.0}, {"a": 1.0}, 2)["64"] == 4 / 64  # no more than wholly parallel


def test_scaling_compares_thread_counts_and_models_from_the_first_and_last(monkeypatch):
    threads = torch.get_num_threads()
    monkeypatch.setattr(scaling, "_operations", lambda step, others: {"convolution": 1e9, "small": 1e-9 * len(others)})
    try:
        rows = scaling._point(TINY, Options(CPU, repeats=1), 3)
    finally:
        torch.set_num_threads(threads)
    variants = (OURS, DENSE, f"{OURS}, bfloat16", f"{DENSE}, bfloat16")
    assert [(row.case["threads"], row.variant) for row in rows[:12]] == [(n, v) for n in (1, 2, 3) for v in variants]
    for first, row in zip(rows[:4], rows[8:12], strict=True):
        assert row.extra["scaling"] == pytest.approx(first.median_ms / row.median_ms)
        assert row.extra["operations_ms"] == pytest.approx({"convolution": row.median_ms, "rest": 0.0})
        assert row.extra["model_ms"]["1"] == pytest.approx(first.median_ms)
    assert "model_ms" not in rows[0].extra and "operations_ms" not in rows[4].extra


@pytest.mark.slow
def test_two_processes_of_the_benchmark_train_what_one_does():
    ranks.check(8)


def test_efficiency_is_the_share_of_twice_the_speed_of_the_same_rounds():
    rows = [
        harness.Row({}, name, 1e9, 0.0, 1e9, ratio, 1, {})
        for name, ratio in (("1", 1.0), ("strong", 0.8), ("weak", 1.25))
    ]
    assert [row.extra["efficiency"] for row in ranks.with_efficiency(rows)] == [1.0, 0.5 / 0.8, 0.8]


def test_in_bfloat16_products_are_and_the_result_is_float32():
    seen = []
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    network[0].register_forward_hook(lambda module, inputs, y: seen.append(y.dtype))
    x = torch.randn(2, 3, 8, 8)
    plain = network(x)
    half = in_bfloat16(network)(x)
    assert half.dtype == torch.float32 and 0 < (half - plain).abs().max() < 0.1
    assert seen == [torch.float32, torch.bfloat16]


def test_the_step_in_bfloat16_casts_the_weights_once_an_attack():
    """As the trainer, and not in each of its steps: counted casts of tensors as large as a filter bank."""
    config = train_step._config(4, 8)
    batches, method = train_step._images(4, CPU), config.method.build(config.model)
    counted = {}
    for mixed in (True, False):
        step = train_step.method_step(in_bfloat16(train_step._model(config, 4, CPU)), method, batches, mixed)
        with torch.profiler.profile(record_shapes=True) as seen:
            step(0)
        counted[mixed] = sum(
            event.name == "aten::_to_copy"
            and bool(event.input_shapes[0])
            and len(event.input_shapes[0]) == 4
            and event.input_shapes[0][-1] == 3
            for event in seen.events()
        )
    assert counted[True] < counted[False] - 7 * 10


def test_the_plain_attack_stays_in_its_ball_and_leaves_no_gradients():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(5, 3, 2, 2), torch.randint(3, (5,))
    x = train_step.plain_attack(model, images, labels, images)
    assert float((x - images).abs().max()) <= train_step.EPS + 1e-6 and float(x.min()) >= 0 and float(x.max()) <= 1
    loss = nn.functional.cross_entropy
    assert loss(model(x), labels) > loss(model(images), labels)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_figures_are_drawn_from_results(tmp_path: Path):
    rows = []
    for experts, batch in ((2, 128), (4, 128), (4, 32), (16, 128)):
        for mode in ("forward+backward", "forward+dx"):
            case = {**Case(experts, batch).describe(mode), "threads": 2, "dtype": "float32"}
            for variant, ratio in ((OURS, 1.0), (MASKED, 3.0), (SORTED, 2.0), (DENSE, 1.25)):
                extra = {"peak_mib": 10 * ratio, "gflops": 100 / ratio, "share": 0.8 / ratio}
                rows.append({"case": case, "variant": variant, "ratio": ratio, "extra": extra})
    about = {"hardware": "a CPU", "versions": {"torch": "2"}, "git": None}
    for what in ("time", "memory", "rate"):
        plot_sweep({**about, "rows": rows}, tmp_path / f"{what}.png", what)
    steps = [
        {"case": {"step": "PGD-7", "E": 4, "B": 32}, "variant": variant, "median_ms": 1e3, "low_ms": 9e2,
         "high_ms": 2e3, "ratio": 1.0, "extra": {"peak_mib": 5.0}}
        for variant in ("ours", "plain")
    ]  # fmt: skip
    plot_train_step({**about, "rows": steps}, tmp_path / "step.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("time", "memory", "rate", "step"))
    with pytest.raises(ValueError, match="expected rows of expert_sweep"):
        plot_sweep({**about, "rows": []}, tmp_path / "none.png", "time")
