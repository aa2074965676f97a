"""The store of tuned choices: lookups, and what happens when processes collide, die or leave rubbish."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tetris.autotune.store import TuningStore, cache_folder
from tetris.errors import FileFormatError
from tetris.kernels.configs import Conv2dConfig, Conv2dProblem, DeviceInfo, LinearConfig, LinearProblem
from tetris.tuned_choices import Entry, distance, read_entries

H200 = DeviceInfo("NVIDIA H200", (9, 0), 132, "3.6.0")
CONV = Conv2dProblem(128, 512, 512, 28, 28, (3, 3), (1, 1), (1, 1), (1, 1), (64, 64), "float16", 17)
LINEAR = LinearProblem(8192, 4096, 4096, (64, 64), "float16", 1100)


def entry(problem: Conv2dProblem | LinearProblem = CONV, time_us: float = 10.0, **changes: object) -> Entry:
    config = Conv2dConfig(num_warps=8) if isinstance(problem, Conv2dProblem) else LinearConfig(num_warps=8)
    made = Entry(H200.name, H200.capability, H200.triton_version, problem, config, time_us, 12.0, 20)
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.fixture
def store(tmp_path: Path) -> TuningStore:
    (tmp_path / "tables").mkdir()
    return TuningStore(tmp_path / "cache", tables=tmp_path / "tables")


def test_nothing_tuned_finds_nothing_and_writes_nothing(store: TuningStore) -> None:
    assert store.lookup(CONV, H200) is None and store.entries() == []
    assert not store.path.parent.exists()


def test_exact_lookup_after_a_round_trip(store: TuningStore) -> None:
    store.put([entry(), entry(LINEAR)])
    again = TuningStore(store.folder, store.tables)
    found = again.lookup(CONV, H200)
    assert found is not None and found.distance == 0 and found.entry == entry()
    assert again.lookup(LINEAR, H200).config == LinearConfig(num_warps=8)


def test_nearest_lookup_prefers_the_nearer_and_refuses_the_far(store: TuningStore) -> None:
    near, far = replace(CONV, batch=64), replace(CONV, batch=1, height=7, width=7)
    store.put([entry(near, 1.0), entry(far, 2.0)])
    found = store.lookup(CONV, H200)
    assert found.entry.problem == near and found.distance == 1.0
    assert store.lookup(replace(CONV, batch=4096), H200) is None


@pytest.mark.parametrize(
    "problem",
    [
        replace(CONV, block=(32, 32)),
        replace(CONV, dtype="float32"),
        replace(CONV, kernel_size=(1, 1)),
        replace(CONV, stride=(2, 2)),
        LINEAR,
    ],
)
def test_choices_do_not_carry_over_to_other_kinds_of_problem(problem) -> None:
    assert distance(entry(), problem, H200) == float("inf")


def test_other_machines_and_versions_are_farther_or_out_of_reach() -> None:
    assert distance(entry(), CONV, H200) == 0
    assert distance(entry(), CONV, replace(H200, triton_version="3.7.1")) == 0.25
    assert distance(entry(), CONV, replace(H200, name="NVIDIA H100")) == 0.25
    assert distance(entry(), replace(CONV, dtype="bfloat16"), H200) == 0.25
    assert distance(entry(LINEAR), replace(LINEAR, weight_dtype="int8"), H200) == float("inf")
    assert distance(entry(), CONV, replace(H200, capability=(8, 0))) == float("inf")


def test_users_choice_hides_the_shipped_one(store: TuningStore, tmp_path: Path) -> None:
    TuningStore(tmp_path / "other", store.tables).put([entry(time_us=9.0)])
    os.rename(tmp_path / "other" / "tuning.json", tmp_path / "tables" / "h200.json")
    assert store.lookup(CONV, H200).entry.time_us == 9.0
    store.put([entry(time_us=8.0)])
    assert store.lookup(CONV, H200).entry.time_us == 8.0


def test_sees_what_another_store_wrote(store: TuningStore) -> None:
    store.put([entry()])
    assert store.lookup(LINEAR, H200) is None
    TuningStore(store.folder, store.tables).put([entry(LINEAR)])
    assert store.lookup(LINEAR, H200) is not None and len(store.mine) == 2


def test_export_and_import_keep_the_faster(store: TuningStore, tmp_path: Path) -> None:
    store.put([entry(time_us=5.0), entry(LINEAR, 5.0)])
    assert store.export(tmp_path / "saved.json") == 2
    other = TuningStore(tmp_path / "second", store.tables)
    other.put([entry(time_us=4.0), entry(LINEAR, 6.0)])
    assert other.import_from(tmp_path / "saved.json") == 1
    assert sorted(e.time_us for e in other.mine.values()) == [4.0, 5.0]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format":"tetris-tuning","version":7}', '{"format":"tetris-tuning","version":1,"entries":[3]}'],
)
def test_corrupt_files_are_named_and_left_alone(store: TuningStore, text: str) -> None:
    store.path.parent.mkdir(parents=True)
    store.path.write_text(text)
    for attempt in (lambda: store.lookup(CONV, H200), lambda: store.put([entry()])):
        with pytest.raises(FileFormatError, match=r"tuning\.json"):
            attempt()
    assert store.path.read_text() == text


def test_entries_of_other_versions_of_the_config_are_refused(store: TuningStore) -> None:
    store.put([entry()])
    data = json.loads(store.path.read_text())
    data["entries"][0]["config"]["warp_speed"] = 9
    store.path.write_text(json.dumps(data))
    with pytest.raises(FileFormatError, match="warp_speed"):
        store.entries()


def test_folder_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "here"))
    assert cache_folder() == tmp_path / "here" and TuningStore().path == tmp_path / "here" / "tuning.json"
    monkeypatch.delenv("TETRIS_CACHE_DIR")
    assert cache_folder().name == "tetris-sparse"


WRITER = textwrap.dedent(
    """
    import sys
    from pathlib import Path
    from tetris.autotune.store import TuningStore
    from tetris.tuned_choices import Entry
    from tetris.kernels.configs import LinearConfig, LinearProblem

    folder, first, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    store = TuningStore(folder, tables=folder)
    for tokens in range(first, first + count):
        problem = LinearProblem(tokens, 64, 64, (16, 16), "float16", 4)
        store.put([Entry("gpu", (9, 0), "3.6.0", problem, LinearConfig(), 1.0)])
        print(tokens, flush=True)
    """
)


def start_writer(folder: Path, first: int, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(folder), str(first), str(count)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def test_two_processes_writing_at_once_lose_nothing(tmp_path: Path) -> None:
    writers = [start_writer(tmp_path, first, 25) for first in (1000, 2000)]
    assert [writer.wait(120) for writer in writers] == [0, 0]
    tokens = sorted(e.problem.tokens for e in read_entries(tmp_path / "tuning.json"))
    assert tokens == [*range(1000, 1025), *range(2000, 2025)]


def test_a_killed_writer_leaves_a_whole_file_and_no_lock(tmp_path: Path) -> None:
    writer = start_writer(tmp_path, 1, 100_000)
    assert writer.stdout is not None
    done = [int(writer.stdout.readline()) for _ in range(10)]
    time.sleep(0.013)
    writer.send_signal(signal.SIGKILL)
    writer.wait(30)
    survived = {e.problem.tokens for e in read_entries(tmp_path / "tuning.json")}
    assert survived >= set(done)
    store = TuningStore(tmp_path, tables=tmp_path / "none")
    store.put([entry()])
    assert len(store.mine) == len(survived) + 1


def test_pooled_choices_are_apart(store: TuningStore) -> None:
    store.put([entry(time_us=5.0), entry(time_us=7.0, max_pool=True)])
    again = TuningStore(store.folder, store.tables)
    assert again.lookup(CONV, H200).entry.time_us == 5.0
    assert again.lookup(CONV, H200, max_pool=True).entry == entry(time_us=7.0, max_pool=True)
