"""What the network bench does on a GPU beyond the CPU run: compiling ahead, graphs, refusing wrong results."""

from __future__ import annotations

import argparse
import math
from types import SimpleNamespace

import pytest
import torch

from tests.support.fake_gpu import H200, clock
from tetris.autotune.ceilings import Ceilings
from tetris.bench import network_bench
from tetris.bench.network_bench import Dense, Session
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
    monkeypatch.setattr(network_bench, "graphed", lambda call: call)
    times = {"dense eager": 100.0, "dense graph": 80.0, "tetris eager": 50.0, "tetris graph": 20.0}
    monkeypatch.setattr(network_bench, "time_us", clock(times))
    return made


def whole_plan(session: Session) -> ModelPlan:
    """Half of every layer pruned in blocks of 32; dense 10 us, sparse 4 us."""
    layers = []
    for name, layer in network_bench.prunable_layers(session.model).items():
        rate = network_bench.resolve_sparsity(session.case.sparsity, {name: layer})[name]
        candidates = (Candidate(None, 0.0, 1.0, 1.0, 10.0), Candidate((32, 32), rate, 1 - rate, 0.6, 4.0))
        candidates += (Candidate((32, 32), rate / 2, 1 - rate / 2, 0.8, 6.0),)
        layers.append(
            LayerPlan(name, "linear", tuple(layer.weight.shape), (32, 32), rate, 1.0, (4, 8), candidates, "faster")
        )
    return ModelPlan(tuple(layers))


def test_graphs_are_timed_against_the_fastest_dense_variant(session: Session) -> None:
    plan = whole_plan(session)
    rows = {row.provider: row for row in session.network_rows(session.dense.folded, plan, error=1e-6)}
    assert set(rows) == {"dense eager", "dense graph", "tetris eager", "tetris graph"}
    assert rows["tetris graph"].speedup == 4 and rows["dense eager"].speedup == 0.8
    assert rows["tetris graph"].flop < rows["dense graph"].flop and rows["tetris graph"].error == 1e-6
    assert all(row.status == OK and row.extra["batch"] == 4 for row in rows.values())
    dense = session.roofline(None)
    assert dense[2] == pytest.approx(rows["dense graph"].roofline_fraction * 80)


def test_a_wrong_network_is_not_timed(session: Session) -> None:
    rows = session.network_rows(session.dense.folded, whole_plan(session), error=math.nan)
    status = {row.provider: row.status for row in rows}
    assert status == {"dense eager": OK, "dense graph": OK, "tetris eager": WRONG, "tetris graph": WRONG}


def test_a_variant_that_does_not_run_is_named(session: Session) -> None:
    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory\nmore")

    rows = session.network_rows(fails, whole_plan(session), error=0.0)  # type: ignore[arg-type]
    assert {row.provider: row.status for row in rows if row.status != OK} == dict.fromkeys(
        ("tetris eager", "tetris graph"), f"{FAILED}: out of memory"
    )


def test_compiled_variants_are_offered_where_asked(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    compiled = Dense(session.model, session.dense.folded, lambda x: calls.append(x.shape), session.dense.epilogues)
    session.dense = compiled
    session.args.compile_converted = True
    monkeypatch.setattr(torch, "compile", lambda model, **options: model)
    found = session.providers(session.dense.folded)
    assert {"dense compile+graph", "tetris compile+graph"} < set(found)
    session.compile_dense()
    found["dense compile+graph"]()
    assert calls == [session.x.shape] * 2


def test_layers_are_compared_with_the_library_at_the_asked_rate(session: Session) -> None:
    rows = session.layer_rows(whole_plan(session))
    assert {row.provider for row in rows} == {network_bench.LIBRARY["linear"], "32x32"}
    assert {row.speedup for row in rows} == {1.0, 2.5}  # the candidate at another rate is left out


def test_a_session_on_a_gpu_takes_stored_choices_or_tunes(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    plan = whole_plan(session)
    monkeypatch.setattr(session, "plan", lambda: plan)
    monkeypatch.setattr(network_bench, "apply_tuned", lambda *given: used.append("stored"))
    monkeypatch.setattr(network_bench, "tune_model", lambda *given, budget: used.append(budget))
    rows = session.rows()
    best = next(row for row in rows if row.provider == "tetris graph")
    assert best.status == OK and best.error < 1e-5 and best.speedup == 4
    session.args.tune = 5
    session.rows()
    assert used == ["stored", 5]


def test_a_saved_plan_is_used_again(session: Session, tmp_path) -> None:
    plan = whole_plan(session)
    plan.save(tmp_path / f"{CASE.name}_b4.json")
    session.args.plans = tmp_path
    assert session.plan() == plan


def test_kernels_are_compiled_while_torch_compiles(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[object] = []

    class FakeSession:
        def __init__(self, case, dense, batch, *rest) -> None:
            self.case, self.batch, self.name = case, batch, f"{case.name} b{batch}"

        def jobs(self) -> list[object]:
            return []

        def compile_dense(self) -> None:
            events.append(("dense", self.batch))

        def rows(self) -> list[Row]:
            if self.batch == 2:
                raise RuntimeError("too large\nmore")
            return [Row("network", self.name, "tetris graph", median_us=1.0)]

    monkeypatch.setattr(network_bench, "Session", FakeSession)
    monkeypatch.setattr(network_bench, "Dense", SimpleNamespace(of=lambda *given: given))
    monkeypatch.setattr(network_bench, "measure_ceilings", lambda device, dtype: CEILINGS)
    monkeypatch.setattr(network_bench, "device_info", lambda device: H200)
    workers = SimpleNamespace(wait=lambda seconds: events.append(("waited", seconds)) or [])
    monkeypatch.setattr(network_bench, "start_workers", lambda jobs, device: events.append("started") or workers)
    rows = network_bench.run(arguments(tmp_path, device="cuda", model=[CASE.name], batch=[1, 2]))
    assert events == ["started", ("dense", 1), ("dense", 2), ("waited", 60)]
    assert [row.status for row in rows] == [OK, f"{FAILED}: RuntimeError: too large"]
    assert len(read_csv(tmp_path / "network.csv")) == 2
