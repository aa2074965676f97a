"""What the network bench does on a GPU beyond the CPU run: compiling ahead, graphs, refusing wrong results."""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tests.support.fake_gpu import H200, clock
from tetris.autotune.ceilings import Ceilings
from tetris.bench import compile_dense, network_bench, network_session
from tetris.bench.kernel_profile import KernelProfile
from tetris.bench.network_session import COMPILED, Dense, Session
from tetris.bench.networks import NETWORKS
from tetris.bench.rows import FAILED, OK, WRONG, Row, read_csv
from tetris.plans import Candidate, LayerPlan, ModelPlan

CASE = NETWORKS["small-mlp"]
CEILINGS = Ceilings(1e10, 1e12)


def arguments(tmp_path, **changes) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    network_bench.add_arguments(parser)
    values = vars(parser.parse_args([])) | {"device": "cpu", "quick": True, "out": tmp_path, "blocks": "32"}
    return argparse.Namespace(**values | changes)


@pytest.fixture
def session(tmp_path, monkeypatch: pytest.MonkeyPatch) -> Session:
    """A session that was made on the CPU and takes itself for one on a GPU; graphs are the calls themselves."""
    dense = Dense.of(CASE, "cpu", torch.float32, "none")
    made = Session(CASE, dense, 4, torch.float32, CEILINGS, arguments(tmp_path, compile="default"))
    made.device = "cuda"
    monkeypatch.setattr(network_session, "graphed", lambda call: call)
    times = {"dense eager": 100.0, "dense graph": 80.0, "tetris eager": 50.0, "tetris graph": 20.0}
    monkeypatch.setattr(network_session, "time_us", clock(times))
    return made


def whole_plan(session: Session) -> ModelPlan:
    """Half of every layer pruned in blocks of 32; dense 10 us, sparse 4 us."""
    layers = []
    for name, layer in network_session.prunable_layers(session.model).items():
        rate = network_session.resolve_sparsity(session.case.sparsity, {name: layer})[name]
        candidates = (Candidate(None, 0.0, 1.0, 1.0, 10.0), Candidate((32, 32), rate, 1 - rate, 0.6, 4.0))
        candidates += (Candidate((32, 32), rate / 2, 1 - rate / 2, 0.8, 6.0),)
        layers.append(
            LayerPlan(name, "linear", tuple(layer.weight.shape), (32, 32), rate, 1.0, (4, 8), candidates, "faster")
        )
    return ModelPlan(tuple(layers))


def test_graphs_are_timed_against_the_fastest_dense_variant(session: Session) -> None:
    plan = whole_plan(session)
    rows = {row.provider: row for row in session.network_rows(session.dense.folded, 1e-6, plan)}
    assert set(rows) == {"dense eager", "dense graph", "tetris eager", "tetris graph"}
    assert rows["tetris graph"].speedup == 4 and rows["dense eager"].speedup == 0.8
    assert rows["tetris graph"].flop < rows["dense graph"].flop and rows["tetris graph"].error == 1e-6
    assert all(row.status == OK and row.extra["batch"] == 4 for row in rows.values())
    dense = session.roofline(None)
    assert dense[2] == pytest.approx(rows["dense graph"].roofline_fraction * 80)


def test_a_wrong_network_is_not_timed(session: Session) -> None:
    rows = session.network_rows(session.dense.folded, math.nan, whole_plan(session))
    status = {row.provider: row.status for row in rows}
    assert status == {"dense eager": OK, "dense graph": OK, "tetris eager": WRONG, "tetris graph": WRONG}


def test_without_a_right_network_nothing_is_concluded(session: Session) -> None:
    with pytest.raises(RuntimeError, match="no right variant of tetris"):
        session.fastest(session.network_rows(session.dense.folded, math.nan, whole_plan(session)))


def test_a_variant_that_does_not_run_is_named(session: Session) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory\nmore")

    rows = session.network_rows(fails, 0.0, whole_plan(session))  # type: ignore[arg-type]
    assert {row.provider: row.status for row in rows if row.status != OK} == dict.fromkeys(
        ("tetris eager", "tetris graph"), f"{FAILED}: out of memory"
    )


def test_compiled_variants_are_offered_where_the_dense_one_is(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    compiled = Dense(session.model, session.dense.folded, lambda x: calls.append(x.shape), session.dense.epilogues)
    session.dense = compiled
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    found = session.providers(session.dense.folded)
    assert {f"dense {COMPILED}", f"tetris {COMPILED}"} < set(found)
    session.compile_dense()
    found[f"dense {COMPILED}"]()
    assert calls == [session.x.shape] * 2


def test_layers_are_compared_with_the_library_at_the_asked_rate(session: Session) -> None:
    rows = session.layer_rows(whole_plan(session))
    assert {row.provider for row in rows} == {network_session.LIBRARY["linear"], "32x32"}
    assert {row.speedup for row in rows} == {1.0, 2.5}  # the candidate at another rate is left out


def test_a_session_on_a_gpu_takes_stored_choices_or_tunes(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    plan = whole_plan(session)
    monkeypatch.setattr(session, "plan", lambda: plan)
    monkeypatch.setattr(network_session, "apply_tuned", lambda *given: used.append("stored"))
    monkeypatch.setattr(network_session, "tune_model", lambda *given, budget: used.append(budget))
    session.measure()
    best = next(row for row in session.rows if row.provider == "tetris graph")
    assert best.status == OK and best.error < 1e-5 and best.speedup == 4
    session.args.tune = 5
    session.measure()
    assert used == ["stored", 5]


def test_a_network_that_is_slower_as_a_whole_is_measured_with_fewer_layers(
    session: Session, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, asked = whole_plan(session), []
    monkeypatch.setattr(session, "plan", lambda: plan)
    monkeypatch.setattr(
        session, "convert", lambda chosen: (asked.append(list(chosen.blocks)) or session.dense.folded, 0.0)
    )
    monkeypatch.setattr(network_session, "time_us", clock({"dense eager": 100.0}, otherwise=200.0))
    session.args.save_plan = True
    session.measure()
    assert asked == [["fc1", "fc2"], ["fc2"]]
    assert session.rows[-1].status == "skipped: every layer dense: the converted network as a whole was slower"
    saved = ModelPlan.load(tmp_path / "plans" / f"{CASE.name}_b4.json")
    assert saved.blocks == {} and saved.end_to_end is not None and saved.end_to_end.speedup == 1.0


def test_permutations_share_is_a_column(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = {"gather_rows_kernel": (1, 25.0), "conv2d_kernel": (2, 75.0)}
    monkeypatch.setattr(network_session, "profile_kernels", lambda run, device: KernelProfile(kernels))
    session.args.profile = True
    rows = session.network_rows(session.dense.folded, 1e-6, whole_plan(session))
    assert {row.provider: row.extra.get("permutation_share") for row in rows} == {
        "dense eager": None, "dense graph": 0.25, "tetris eager": None, "tetris graph": 0.25
    }  # fmt: skip


def test_a_saved_plan_is_used_again(session: Session, tmp_path) -> None:
    plan = whole_plan(session)
    plan.save(tmp_path / f"{CASE.name}_b4.json")
    session.args.plans = tmp_path
    assert session.plan() == plan


def test_everything_is_compiled_ahead_side_by_side(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class FakeSession:
        def __init__(self, case, dense, batch, *rest) -> None:
            self.case, self.batch, self.name, self.dtype = case, batch, f"{case.name} b{batch}", torch.float32
            self.rows: list[Row] = []

        def jobs(self) -> list[object]:
            return []

        def row(self, provider: str, **values) -> Row:
            return Row("network", self.name, provider, **values)

        def compile_dense(self) -> None:
            events.append(("met", self.batch))

        def measure(self) -> None:
            self.rows = [self.row("cublas", extra={"layer": "fc1"})]
            if self.batch == 2:
                raise RuntimeError("too large\nmore")
            self.rows.append(self.row("tetris graph", median_us=1.0))

    monkeypatch.setattr(network_bench, "Session", FakeSession)
    monkeypatch.setattr(network_bench, "Dense", SimpleNamespace(of=lambda *given: given))
    monkeypatch.setattr(network_bench, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(network_bench, "device_info", lambda device: H200)
    workers = SimpleNamespace(wait=lambda seconds: events.append(("kernels", seconds)) or [])
    monkeypatch.setattr(network_bench, "start_workers", lambda jobs, device: events.append("started") or workers)
    monkeypatch.setattr(compile_dense, "start", lambda *given: events.append(given[:2]) or given[1])
    monkeypatch.setattr(compile_dense, "wait", lambda batch, seconds: events.append(("waited", batch)) or "")
    rows = network_bench.run(arguments(tmp_path, device="cuda", model=[CASE.name], batch=[1, 2]))
    assert events == [
        (CASE.name, 1), (CASE.name, 2), "started", ("kernels", 90), ("waited", 1), ("waited", 2), ("met", 1), ("met", 2)
    ]  # fmt: skip
    assert [row.status for row in rows] == [OK, OK, OK, f"{FAILED}: RuntimeError: too large"]
    assert len(read_csv(tmp_path / "network.csv")) == 4
    events.clear()
    only = arguments(tmp_path / "only", device="cuda", model=[CASE.name], batch=[1, 2], compile_only=True)
    assert network_bench.run(only) == [] and ("kernels", 90) in events
    events.clear()
    network_bench.run(arguments(tmp_path, device="cuda", model=[CASE.name], batch=[1, 2], compile_seconds=0.0))
    assert events == [("met", 1), ("met", 2)]


def test_a_dense_network_is_compiled_in_a_process_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch, "compile", lambda model, **options: lambda x: calls.append((x.shape, x.dtype, options)))
    compile_dense.main("small-mlp", "4", "cpu", "float16", "default")
    assert calls == [((4, 256), torch.float16, {"mode": "default", "dynamic": False})]
    process = compile_dense.start("small-mlp", 2, "nowhere", torch.float32, "default")
    assert "nowhere" in compile_dense.wait(process, 120.0)


def test_a_compilation_that_takes_too_long_is_ended() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], stderr=subprocess.PIPE, text=True)
    assert "ended after 0 s" in compile_dense.wait(process, 0.0)
    assert process.returncode is not None
